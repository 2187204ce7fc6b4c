// See fixed.hpp. PTX has variables of functions that are inlined before its kernels, which name those that they use, and
// others within the kernel.
#include "fixed.hpp"

#include <cctype>
#include <cstdio>
#include <cstring>
#include <vector>

namespace simulation {

namespace {

struct Variable {
    std::string name;
    size_t align, bytes; // 0 bytes: dynamic
};

// The lines of a text, one at a time.
bool next_line(const char *&text, std::string &line) {
    if (!*text) return false;
    const char *end = strchr(text, '\n');
    line.assign(text, end ? end - text : strlen(text));
    text = end ? end + 1 : text + strlen(text);
    return true;
}

bool part_of_name(char c) { return isalnum((unsigned char)c) || c == '_' || c == '$'; }

// Whether a line has a name in it, as a whole.
bool names(const std::string &line, const std::string &name) {
    for (size_t at = line.find(name); at != std::string::npos; at = line.find(name, at + 1)) {
        size_t end = at + name.size();
        bool begins = at == 0 || !part_of_name(line[at - 1]);
        if (begins && (end == line.size() || !part_of_name(line[end]))) return true;
    }
    return false;
}

// ".shared .align 4 .b8 NAME[BYTES];", ".shared .align 4 .u32 NAME;" or ".extern .shared .align 1024 .b8 NAME[];"
bool declared(const std::string &line, Variable &variable) {
    const char *at = line.c_str() + (line[0] == '\t');
    bool dynamic = strncmp(at, ".extern ", 8) == 0;
    if (dynamic) at += 8;
    char kind, name[512];
    unsigned long align, bits, count = 1;
    if (sscanf(at, ".shared .align %lu .%c%lu %511[^[;][%lu]", &align, &kind, &bits, name, &count) < 4) return false;
    variable = {name, align, dynamic ? 0 : bits / 8 * count};
    return true;
}

size_t up_to(size_t bytes, size_t align) { return (bytes + align - 1) / align * align; }

} // namespace

std::map<std::string, size_t> fixed_shared(const char *ptx) {
    std::vector<Variable> variables;
    std::vector<bool> used; // by the kernel whose lines pass
    std::map<std::string, size_t> fixed;
    std::string line, kernel;
    while (next_line(ptx, line)) {
        Variable variable;
        if (declared(line, variable)) {
            variables.push_back(variable);
            used.push_back(!kernel.empty()); // its own
            continue;
        }
        const char *entry = strstr(line.c_str(), ".entry ");
        if (entry) {
            kernel.assign(entry + 7);
            kernel.erase(kernel.find_first_of("( \t"));
            used.assign(variables.size(), false);
        }
        if (kernel.empty()) continue; // a function that kernels call: none has variables of its own
        for (size_t i = 0; i < variables.size(); i++) used[i] = used[i] || names(line, variables[i].name);
        if (line != "}") continue;
        size_t bytes = 0, align = 1;
        for (size_t i = 0; i < variables.size(); i++) {
            if (variables[i].bytes == 0) align = variables[i].align; // also if this kernel has none
            else if (used[i]) bytes = up_to(bytes, variables[i].align) + variables[i].bytes;
        }
        fixed[kernel] = up_to(bytes, align);
        kernel.clear();
    }
    return fixed;
}

} // namespace simulation
