#include "clocks.hpp"

#include "device.hpp"

#include <algorithm>
#include <deque>

namespace races {

std::vector<Thread> threads;

namespace {

struct Actors {
    int count, most;
    std::vector<int> thread; // on behalf of which thread, or -1
    std::vector<const char *> name;
};

Actors acting; // by number

// Joins that were made already: threads that know the same learn the same.
struct Join {
    Base a, b, both;
};
Join joins[64];

Base join(const Base &a, const Base &b) {
    if (a == b) return a;
    Join &kept = joins[((uintptr_t)a.get() / 16 * 31 + (uintptr_t)b.get() / 16) % 64];
    if (kept.a == a && kept.b == b) return kept.both;
    auto both = std::make_shared<Known>(*a);
    bool is_a = true, is_b = true;
    auto most = [&](std::vector<Clock> &to, const std::vector<Clock> &from) {
        for (size_t i = 0; i < to.size(); i++) {
            is_a &= to[i] >= from[i];
            is_b &= from[i] >= to[i];
            to[i] = std::max(to[i], from[i]);
        }
    };
    most(both->seen, b->seen);
    most(both->fenced, b->fenced);
    kept = {a, b, is_a ? a : is_b ? b : Base(both)};
    return kept.both;
}

Actor new_actor(int thread, const char *name) {
    if (acting.count == acting.most) simulation::fail("more work goes on beside threads than the simulation counts");
    acting.thread[acting.count] = thread;
    acting.name[acting.count] = name;
    return acting.count++;
}

} // namespace

struct Meeting {
    std::vector<Base> bases;
    std::vector<Own> own;
    Base outcome;
};

namespace {
std::deque<Meeting> meetings;
}

int actors() { return acting.count; }
int most_actors() { return acting.most; }

std::string who(Actor actor) {
    if (actor == NOBODY) return "the copy engine";
    int thread = acting.thread[actor];
    std::string text = acting.name[actor];
    if (thread >= 0) text += " " + std::to_string(thread);
    return text;
}

void begin_clocks(int count) {
    meetings.clear();
    for (Join &join : joins) join = Join();
    acting.most = 2 * count + 160;
    acting.count = 0;
    acting.thread.assign(acting.most, -1);
    acting.name.assign(acting.most, "");
    auto nothing = std::make_shared<Known>();
    nothing->seen.assign(acting.most, 0);
    nothing->fenced.assign(acting.most, 0);
    threads.resize(count);
    for (int i = 0; i < count; i++) {
        Thread &thread = threads[i];
        thread.base = nothing;
        thread.own[0] = {new_actor(i, "thread"), 1, 0};
        for (int k = 1; k < 4; k++) thread.own[k] = {NOBODY, 0, 0}, thread.open[k] = 1;
    }
}

Meeting *new_meeting() {
    meetings.emplace_back();
    return &meetings.back();
}

void come(Meeting *meeting, int thread) {
    if (!WATCHING) return;
    Thread &t = threads[thread];
    auto &bases = meeting->bases;
    if (std::find(bases.rbegin(), bases.rend(), t.base) == bases.rend()) bases.push_back(t.base);
    for (const Own &own : t.own)
        if (own.actor != NOBODY) meeting->own.push_back(own);
    t.own[0].clock++;
}

void end(Meeting *meeting) {
    if (!WATCHING) return;
    auto all = std::make_shared<Known>();
    all->seen.assign(acting.most, 0);
    all->fenced.assign(acting.most, 0);
    for (const Base &base : meeting->bases)
        for (int i = 0; i < acting.most; i++) {
            all->seen[i] = std::max(all->seen[i], base->seen[i]);
            all->fenced[i] = std::max(all->fenced[i], base->fenced[i]);
        }
    for (const Own &own : meeting->own) {
        all->seen[own.actor] = std::max(all->seen[own.actor], own.clock);
        all->fenced[own.actor] = std::max(all->fenced[own.actor], own.fenced);
    }
    meeting->bases.clear();
    meeting->own.clear();
    meeting->outcome = all;
}

void learn(Meeting *meeting, int thread) {
    if (!WATCHING || !meeting->outcome) return;
    threads[thread].base = join(threads[thread].base, meeting->outcome);
}

Own &beside(int thread, Beside which) {
    static const char *names[] = {"an asynchronous copy of thread", "a store by the copy engine for thread",
                                  "products of the warp of thread"};
    Own &own = threads[thread].own[1 + which];
    // The products of a warp are one for all its threads.
    if (own.actor == NOBODY) {
        int first = which == PRODUCTS ? thread / 32 * 32 : thread;
        if (first != thread) return own = {beside(first, which).actor, 0, 0};
        own.actor = new_actor(thread, names[which]);
    }
    return own;
}

void close_group(int thread, Beside which) {
    if (WATCHING) threads[thread].open[1 + which]++;
}

void groups_done(int thread, Beside which, int pending) {
    if (!WATCHING) return;
    Own &own = beside(thread, which);
    Clock open = threads[thread].open[1 + which];
    if (open > (Clock)pending + 1) own.clock = std::max(own.clock, open - 1 - pending);
}

Actor new_engine() { return WATCHING ? new_actor(-1, "the copy engine") : NOBODY; }

void add_engine(Meeting *meeting, Actor engine, Clock phase) {
    if (WATCHING) meeting->own.push_back({engine, phase, phase});
}

void fence(int thread) {
    if (!WATCHING) return;
    Thread &t = threads[thread];
    for (Own &own : t.own) own.fenced = own.clock;
    t.own[0].clock++; // what comes later is behind no fence
    if (t.base->fenced == t.base->seen) return;
    // The same for threads that know the same.
    static Base before, behind;
    if (before != t.base) {
        auto all = std::make_shared<Known>(*t.base);
        all->fenced = all->seen;
        before = t.base;
        behind = all;
    }
    t.base = behind;
}

} // namespace races
