// What is kept of the last accesses to all memory, and what every access is held against.
#pragma once

#include "clocks.hpp"

namespace races {

// In place of a clock: written by the copy engine at a time that nobody knows.
constexpr Clock NEVER = 0xffffffff;

// An access: what it is, and whose knowledge says what lies before it.
struct Access {
    Kind kind;
    bool itself; // by a thread itself, whose accesses follow each other
    bool engine; // by the copy engine or by products
    Actor actor;
    Clock clock;
    uint32_t at;
    const Thread *first;
    int threads; // that must all know what lies before

    bool after(Actor actor, Clock clock) const {
        for (int i = 0; i < threads; i++)
            if ((i == 0 || first[i].base != first[i - 1].base) && !knows(first[i], actor, clock)) return false;
        return true;
    }
    bool behind_fence(Actor actor, Clock clock) const {
        for (int i = 0; i < threads; i++)
            if ((i == 0 || first[i].base != first[i - 1].base) && !fenced(first[i], actor, clock)) return false;
        return true;
    }
};

// Holds an access against those before it, and keeps it.
void look(const Access &now, const void *from, size_t bytes);

// A launch begins, whose accesses come after all before; a block of it, with the dynamic shared memory that it has.
void begin_global();
void begin_shared(unsigned char *dynamic, size_t dynamic_bytes);

} // namespace races
