// How far everybody has gone, and how far everybody knows the others to have gone: the clocks of races.hpp.
#pragma once

#include "races.hpp"

#include <memory>
#include <string>
#include <vector>

namespace races {

// How far clocks are known to have gone, and how far behind a fence.
struct Known {
    std::vector<Clock> seen, fenced;
};
typedef std::shared_ptr<const Known> Base;

// What a thread knows by itself, which `base` need not say: its own clock, and its work beside it that is done.
struct Own {
    Actor actor;
    Clock clock, fenced;
};
struct Thread {
    Base base;
    Own own[4]; // itself, then by Beside
    Clock open[4]; // number of the open group
};

// The threads of the block that runs.
extern std::vector<Thread> threads;

// Whoever has made accesses in this block has a number below `actors()`, which stays below `most_actors()`.
int actors();
int most_actors();
std::string who(Actor actor);

// A block of so many threads begins: nobody knows of anybody.
void begin_clocks(int count);

// The work that goes on beside a thread.
Own &beside(int thread, Beside which);

inline bool knows(const Thread &t, Actor actor, Clock clock) {
    for (const Own &own : t.own)
        if (own.actor == actor) return own.clock >= clock || t.base->seen[actor] >= clock;
    return t.base->seen[actor] >= clock;
}
inline bool fenced(const Thread &t, Actor actor, Clock clock) {
    for (const Own &own : t.own)
        if (own.actor == actor) return own.fenced >= clock || t.base->fenced[actor] >= clock;
    return t.base->fenced[actor] >= clock;
}

} // namespace races
