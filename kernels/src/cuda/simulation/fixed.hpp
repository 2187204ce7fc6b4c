// What the kernels of a PTX text take of shared memory whatever a launch asks for.
#pragma once

#include <cstddef>
#include <map>
#include <string>

namespace simulation {

// Bytes for each kernel, as ptxas counts them: its variables one after the other, up to where dynamic shared memory may
// begin.
std::map<std::string, size_t> fixed_shared(const char *ptx);

} // namespace simulation
