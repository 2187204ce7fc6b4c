#include "races.hpp"

#include "device.hpp"
#include "scheduler.hpp"

#include <algorithm>
#include <array>
#include <deque>
#include <dlfcn.h>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

namespace races {

namespace {

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

struct Actors {
    int count;
    std::vector<int> thread; // on behalf of which thread, or -1
    std::vector<const char *> name;
};

constexpr unsigned WAS_ATOMIC = 1, BY_ENGINE = 2, MANY = 4, SPLIT = 8, ELSEWHERE = 16;

// The last accesses to four bytes, or to one of them if they are not accessed together.
struct Cell {
    uint32_t stamp;  // of the block, or of the launch, in which the rest holds
    uint32_t block;  // of the last write, for global memory
    uint32_t reading_block;
    Actor writer, reader;
    Clock wrote, read;
    uint32_t wrote_at, read_at; // where in the library's code
    uint32_t flags;
    uint32_t more; // of several readers, their number; of bytes, where they are
};

struct Reads {
    int count;
    struct {
        Actor actor;
        Clock clock;
    } by[14];
    std::vector<Clock> all; // by actor, where 14 are not enough
};

constexpr size_t PAGE = 4096;
typedef std::array<Cell, PAGE / 4> Page;

std::vector<Thread> threads;
Actors actors;
int most_actors;
uint32_t block_stamp, launch_stamp;
unsigned char *dynamic;
size_t dynamic_bytes;
std::vector<Cell> shared_cells; // of static, then of dynamic shared memory
std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
uintptr_t last_page;
Page *last_cells;
std::vector<std::array<Cell, 4>> shared_bytes, global_bytes;
std::deque<Reads> reads;
size_t reads_used;

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
    if (actors.count == most_actors) simulation::fail("more work goes on beside threads than the simulation counts");
    actors.thread[actors.count] = thread;
    actors.name[actors.count] = name;
    return actors.count++;
}

bool knows(const Thread &t, Actor actor, Clock clock) {
    for (const Own &own : t.own)
        if (own.actor == actor) return own.clock >= clock || t.base->seen[actor] >= clock;
    return t.base->seen[actor] >= clock;
}
bool fenced(const Thread &t, Actor actor, Clock clock) {
    for (const Own &own : t.own)
        if (own.actor == actor) return own.fenced >= clock || t.base->fenced[actor] >= clock;
    return t.base->fenced[actor] >= clock;
}

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

const void *library() {
    static Dl_info info;
    static bool found = dladdr((void *)&library, &info);
    return found ? info.dli_fbase : nullptr;
}
const char *file() {
    static Dl_info info;
    static bool found = dladdr((void *)&library, &info);
    return found ? info.dli_fname : "";
}

// Function, file and line, if there is somebody to ask.
std::string place(uint32_t at) {
    if (!at) return "";
    char command[1200];
    snprintf(command, sizeof command, "addr2line -s -i -e '%s' 0x%x 2>/dev/null", file(), at - 1);
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

std::string who(Actor actor) {
    if (actor == NOBODY) return "the copy engine";
    int thread = actors.thread[actor];
    std::string text = actors.name[actor];
    if (thread >= 0) text += " " + std::to_string(thread);
    return text;
}

bool is_static(const void *at) {
    return (unsigned char *)at >= simulation::static_shared() &&
           (unsigned char *)at < simulation::static_shared() + simulation::static_shared_bytes();
}

void report(const Access &now, const void *at, const char *before, const std::string &by, uint32_t where,
            const char *lacks) {
    std::string memory = "global memory";
    if ((unsigned char *)at >= dynamic && (unsigned char *)at < dynamic + dynamic_bytes) {
        memory = "byte " + std::to_string((unsigned char *)at - dynamic) + " of dynamic shared memory";
    } else if (is_static(at)) {
        memory = "shared memory";
    }
    const char *is = now.kind == READ ? "a read" : now.kind == WRITE ? "a write" : "an atomic operation";
    std::string text = "race: " + memory + ": " + is + " by " + who(now.actor) + place(now.at) + " and " + before +
                       " by " + by + place(where) + " " + lacks;
    simulation::fail(text.c_str());
}

void clear(Cell &cell, uint32_t stamp) {
    cell = Cell();
    cell.stamp = stamp;
    cell.writer = cell.reader = NOBODY;
}

// A number in place of an actor: written by the copy engine at a time that nobody knows.
constexpr Clock NEVER = 0xffffffff;

void look_at(Cell &cell, const Access &now, const void *at, bool shared) {
    constexpr const char *APART = "are not ordered";
    uint32_t block = block_stamp;
    // The same thread once more, since when nobody else has written (or read, if this one writes).
    bool same = now.kind == READ ? cell.reader == now.actor && cell.read == now.clock
                                 : cell.writer == now.actor && cell.wrote == now.clock && cell.reader == NOBODY;
    bool here = shared || cell.reading_block == block; // the reads that are kept are of this block
    if (same && now.itself && here && (shared || cell.block == block || !cell.wrote) && !(cell.flags & ELSEWHERE)) return;
    if (cell.wrote) {
        bool both_atomic = now.kind == ATOMIC && cell.flags & WAS_ATOMIC;
        if (!shared && cell.block != block) {
            if (!both_atomic)
                report(now, at, "a write", "another block, by " + who(cell.writer), cell.wrote_at, APART);
        } else if (!both_atomic) {
            if (cell.wrote == NEVER || !now.after(cell.writer, cell.wrote))
                report(now, at, "a write", who(cell.writer), cell.wrote_at, APART);
            if (shared && now.engine && !(cell.flags & BY_ENGINE) && !now.behind_fence(cell.writer, cell.wrote))
                report(now, at, "a write", who(cell.writer), cell.wrote_at, "have no fence of proxies between them");
        }
    } else if (shared && now.kind == READ) {
        std::string text = "what nobody wrote is read by " + who(now.actor) + place(now.at);
        if (now.engine || (unsigned char *)at < dynamic || (unsigned char *)at >= dynamic + dynamic_bytes)
            simulation::fail(text.c_str());
        text += ": byte " + std::to_string((unsigned char *)at - dynamic) + " of dynamic shared memory";
        simulation::fail(text.c_str());
    }
    if (now.kind == READ) {
        if (!shared && cell.reader != NOBODY && !here) {
            cell.flags |= ELSEWHERE;
            cell.flags &= ~MANY;
            cell.reader = NOBODY;
        }
        bool alone = cell.reader == NOBODY || cell.reader == now.actor || now.after(cell.reader, cell.read);
        if (!(cell.flags & MANY) && !alone) {
            cell.flags |= MANY;
            if (shared) {
                if (reads_used == reads.size()) reads.emplace_back();
                Reads &all = reads[reads_used];
                all.all.clear();
                all.count = 1;
                all.by[0] = {cell.reader, cell.read};
                cell.more = reads_used++;
            }
        }
        if (cell.flags & MANY && shared) {
            Reads &all = reads[cell.more];
            int i = 0;
            if (!all.all.empty()) {
                all.all[now.actor] = now.clock;
            } else {
                while (i < all.count && all.by[i].actor != now.actor) i++;
                if (i < 14) {
                    all.by[i] = {now.actor, now.clock};
                    all.count = std::max(all.count, i + 1);
                } else {
                    all.all.assign(most_actors, 0);
                    for (auto &one : all.by) all.all[one.actor] = one.clock;
                    all.all[now.actor] = now.clock;
                }
            }
        }
        cell.reader = now.actor;
        cell.read = now.clock;
        cell.read_at = now.at;
        cell.reading_block = block;
        return;
    }
    auto check_read = [&](Actor actor, Clock clock) {
        if (!now.after(actor, clock)) report(now, at, "a read", who(actor), cell.read_at, APART);
    };
    if (!shared && (cell.flags & ELSEWHERE || (cell.reader != NOBODY && !here)))
        report(now, at, "a read", "another block", cell.read_at, APART);
    if (cell.flags & MANY) {
        // Of global memory that many threads have read it is not kept which.
        if (shared) {
            Reads &all = reads[cell.more];
            if (all.all.empty()) {
                for (int i = 0; i < all.count; i++) check_read(all.by[i].actor, all.by[i].clock);
            } else {
                for (int i = 0; i < actors.count; i++)
                    if (all.all[i]) check_read(i, all.all[i]);
            }
        }
    } else if (cell.reader != NOBODY) {
        check_read(cell.reader, cell.read);
    }
    cell.reader = NOBODY;
    cell.read = 0;
    cell.writer = now.actor;
    cell.wrote = now.clock;
    cell.wrote_at = now.at;
    cell.block = block;
    cell.flags = (now.kind == ATOMIC ? WAS_ATOMIC : 0) | (now.engine ? BY_ENGINE : 0);
}

void look(const Access &now, const void *from, size_t bytes) {
    uintptr_t at = (uintptr_t)from, end = at + bytes;
    Cell *cells;
    uintptr_t base;
    bool shared = true;
    if (at - (uintptr_t)dynamic < dynamic_bytes) {
        base = (uintptr_t)dynamic;
        cells = shared_cells.data() + (simulation::static_shared_bytes() + 3) / 4;
        if (end > base + dynamic_bytes) simulation::fail("an access beyond the end of dynamic shared memory");
    } else if (is_static(from)) {
        base = (uintptr_t)simulation::static_shared();
        cells = shared_cells.data();
    } else {
        shared = false;
    }
    uint32_t stamp = shared ? block_stamp : launch_stamp;
    while (at < end) {
        uintptr_t word = at & ~(uintptr_t)3, stop = std::min(end, word + 4);
        Cell *cell;
        if (shared) {
            cell = cells + (word - base) / 4;
        } else {
            uintptr_t page = word / PAGE;
            if (page != last_page) {
                std::unique_ptr<Page> &found = pages[page];
                if (!found) found = std::make_unique<Page>();
                last_page = page;
                last_cells = found.get();
            }
            cell = &(*last_cells)[word % PAGE / 4];
        }
        if (cell->stamp != stamp) clear(*cell, stamp);
        if (stop - at == 4 && !(cell->flags & SPLIT)) {
            look_at(*cell, now, (void *)at, shared);
        } else {
            auto &all = shared ? shared_bytes : global_bytes;
            if (!(cell->flags & SPLIT)) {
                // Each byte goes on with what was known of all of them; several readers, as their last one.
                Cell byte = *cell;
                bool many = byte.flags & MANY;
                all.emplace_back();
                all.back().fill(byte);
                if (many && shared)
                    for (Cell &one : all.back()) {
                        if (reads_used == reads.size()) reads.emplace_back();
                        reads[reads_used] = reads[byte.more];
                        one.more = reads_used++;
                    }
                cell->flags |= SPLIT;
                cell->more = all.size() - 1;
            }
            auto &split = all[cell->more];
            for (uintptr_t byte = at; byte < stop; byte++) look_at(split[byte % 4], now, (void *)byte, shared);
        }
        at = stop;
    }
}

uint32_t code_of(const void *code) { return code ? (uint32_t)((uintptr_t)code - (uintptr_t)library()) : 0; }

} // namespace

struct Meeting {
    std::vector<Base> bases;
    std::vector<Own> own;
    Base outcome;
};

namespace {
std::deque<Meeting> meetings;
}

void begin_launch() {
    if (!WATCHING) return;
    launch_stamp++;
    global_bytes.clear();
    if (pages.size() > 1 << 14) {
        pages.clear();
        last_page = 0;
    }
}

void begin_block(int count, unsigned char *from, size_t bytes) {
    if (!WATCHING) return;
    block_stamp++;
    dynamic = from;
    dynamic_bytes = bytes;
    size_t cells = (simulation::static_shared_bytes() + 3) / 4 + (bytes + 3) / 4;
    if (shared_cells.size() < cells) shared_cells.resize(cells);
    shared_bytes.clear();
    reads_used = 0;
    meetings.clear();
    for (Join &join : joins) join = Join();
    most_actors = 2 * count + 160;
    actors.count = 0;
    actors.thread.assign(most_actors, -1);
    actors.name.assign(most_actors, "");
    auto nothing = std::make_shared<Known>();
    nothing->seen.assign(most_actors, 0);
    nothing->fenced.assign(most_actors, 0);
    threads.resize(count);
    for (int i = 0; i < count; i++) {
        Thread &thread = threads[i];
        thread.base = nothing;
        thread.own[0] = {new_actor(i, "thread"), 1, 0};
        for (int k = 1; k < 4; k++) thread.own[k] = {NOBODY, 0, 0}, thread.open[k] = 1;
    }
}

void access(int thread, const void *at, size_t bytes, Kind kind, const void *code) {
    if (!WATCHING) return;
    const Thread &t = threads[thread];
    look({kind, true, false, t.own[0].actor, t.own[0].clock, code_of(code), &t, 1}, at, bytes);
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
    all->seen.assign(most_actors, 0);
    all->fenced.assign(most_actors, 0);
    for (const Base &base : meeting->bases)
        for (int i = 0; i < most_actors; i++) {
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

static Own &beside(int thread, Beside which) {
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

void access_beside(int thread, Beside which, const void *at, size_t bytes, Kind kind, const void *code) {
    if (!WATCHING) return;
    Own &own = beside(thread, which);
    const Thread &t = threads[thread];
    look({kind, false, which != COPIES, own.actor, t.open[1 + which], code_of(code), &t, 1}, at, bytes);
}

void access_of_warp(int thread, Beside which, const void *at, size_t bytes, Kind kind, const void *code) {
    if (!WATCHING) return;
    Own &own = beside(thread, which);
    const Thread &t = threads[thread];
    look({kind, false, true, own.actor, t.open[1 + which], code_of(code), &t, 32}, at, bytes);
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

void access_of_engine(int thread, Actor engine, Clock phase, const void *at, size_t bytes, Kind kind, const void *code) {
    if (!WATCHING) return;
    look({kind, false, true, engine, phase, code_of(code), &threads[thread], 1}, at, bytes);
}

void add_engine(Meeting *meeting, Actor engine, Clock phase) {
    if (WATCHING) meeting->own.push_back({engine, phase, phase});
}

void access_never_done(int thread, const void *at, size_t bytes, const void *code) {
    if (!WATCHING) return;
    Own &own = beside(thread, STORES);
    look({WRITE, false, true, own.actor, NEVER, code_of(code), &threads[thread], 1}, at, bytes);
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

// --- What the compiler calls for each access of code that is built with -fsanitize=thread.

namespace {

inline void seen(const void *at, size_t bytes, races::Kind kind, const void *code) {
    if (simulation::is_private(at)) return;
    races::access(simulation::running_thread(), at, bytes, kind, code);
}

} // namespace

#define HOOK(name, bytes, kind)                                                                    \
    extern "C" void __tsan_##name(void *at) { seen(at, bytes, races::kind, __builtin_return_address(0)); }
#define HOOKS(bytes) HOOK(read##bytes, bytes, READ) HOOK(write##bytes, bytes, WRITE)
HOOKS(1) HOOKS(2) HOOKS(4) HOOKS(8) HOOKS(16)
#define UNALIGNED(bytes)                                                                           \
    HOOK(unaligned_read##bytes, bytes, READ) HOOK(unaligned_write##bytes, bytes, WRITE)
UNALIGNED(2) UNALIGNED(4) UNALIGNED(8) UNALIGNED(16)
extern "C" void __tsan_read_range(void *at, size_t bytes) {
    seen(at, bytes, races::READ, __builtin_return_address(0));
}
extern "C" void __tsan_write_range(void *at, size_t bytes) {
    seen(at, bytes, races::WRITE, __builtin_return_address(0));
}
extern "C" void __tsan_func_entry(void *) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_init() {}
