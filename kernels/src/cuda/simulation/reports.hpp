// What is said of a race.
#pragma once

#include "shadow.hpp"

namespace races {

// Where the library begins; how far from there an address in its code is, 0 for none; and function, file and line of that,
// if there is somebody to ask.
const char *library();
inline uint32_t code_of(const void *code) {
    static const char *begin = library();
    return code ? (uint32_t)((const char *)code - begin) : 0;
}
std::string place(uint32_t at);

// Fails with both accesses to `memory`: the one that is made now, and what came `before`, by whom and where.
void report(const Access &now, const std::string &memory, const char *before, const std::string &by, uint32_t where,
            const char *lacks);

} // namespace races
