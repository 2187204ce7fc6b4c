#include "reports.hpp"

#include "device.hpp"

#include <dlfcn.h>

namespace races {

static Dl_info info() {
    Dl_info info = {};
    dladdr((void *)&library, &info);
    return info;
}

const char *library() { return (const char *)info().dli_fbase; }

std::string place(uint32_t at) {
    if (!at) return "";
    const char *name = info().dli_fname;
    char command[1200];
    snprintf(command, sizeof command, "addr2line -s -i -e '%s' 0x%x 2>/dev/null", name ? name : "", at - 1);
    std::string lines;
    if (FILE *pipe = popen(command, "r")) {
        char line[256];
        // The innermost lines are of the simulation itself.
        while (fgets(line, sizeof line, pipe)) {
            std::string text(line);
            text = text.substr(0, text.find_first_of(" \n"));
            bool own = text.find(".hpp:") != std::string::npos || text.find("??") != std::string::npos;
            if (own || lines.size() > 90) continue;
            lines += lines.empty() ? text : " < " + text;
        }
        pclose(pipe);
    }
    return lines.empty() ? "" : " (" + lines + ")";
}

void report(const Access &now, const std::string &memory, const char *before, const std::string &by, uint32_t where,
            const char *lacks) {
    const char *is = now.kind == READ ? "a read" : now.kind == WRITE ? "a write" : "an atomic operation";
    std::string text = "race: " + memory + ": " + is + " by " + who(now.actor) + place(now.at) + " and " + before +
                       " by " + by + place(where) + " " + lacks;
    simulation::fail(text.c_str());
}

} // namespace races
