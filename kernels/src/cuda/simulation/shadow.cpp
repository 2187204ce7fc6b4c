#include "shadow.hpp"

#include "reports.hpp"
#include "scheduler.hpp"

#include <algorithm>
#include <array>
#include <deque>
#include <unordered_map>

namespace races {

namespace {

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

bool is_static(const void *at) {
    return (unsigned char *)at >= simulation::static_shared() &&
           (unsigned char *)at < simulation::static_shared() + simulation::static_shared_bytes();
}

std::string memory_at(const void *at) {
    if ((unsigned char *)at >= dynamic && (unsigned char *)at < dynamic + dynamic_bytes)
        return "byte " + std::to_string((unsigned char *)at - dynamic) + " of dynamic shared memory";
    return is_static(at) ? "shared memory" : "global memory";
}

void clear(Cell &cell, uint32_t stamp) {
    cell = Cell();
    cell.stamp = stamp;
    cell.writer = cell.reader = NOBODY;
}

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
                report(now, memory_at(at), "a write", "another block, by " + who(cell.writer), cell.wrote_at, APART);
        } else if (!both_atomic) {
            if (cell.wrote == NEVER || !now.after(cell.writer, cell.wrote))
                report(now, memory_at(at), "a write", who(cell.writer), cell.wrote_at, APART);
            if (shared && now.engine && !(cell.flags & BY_ENGINE) && !now.behind_fence(cell.writer, cell.wrote))
                report(now, memory_at(at), "a write", who(cell.writer), cell.wrote_at, "have no fence of proxies between them");
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
                    all.all.assign(most_actors(), 0);
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
        if (!now.after(actor, clock)) report(now, memory_at(at), "a read", who(actor), cell.read_at, APART);
    };
    if (!shared && (cell.flags & ELSEWHERE || (cell.reader != NOBODY && !here)))
        report(now, memory_at(at), "a read", "another block", cell.read_at, APART);
    if (cell.flags & MANY) {
        // Of global memory that many threads have read it is not kept which.
        if (shared) {
            Reads &all = reads[cell.more];
            if (all.all.empty()) {
                for (int i = 0; i < all.count; i++) check_read(all.by[i].actor, all.by[i].clock);
            } else {
                for (int i = 0; i < actors(); i++)
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

} // namespace

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

void begin_global() {
    launch_stamp++;
    global_bytes.clear();
    if (pages.size() > 1 << 14) {
        pages.clear();
        last_page = 0;
    }
}

void begin_shared(unsigned char *from, size_t bytes) {
    block_stamp++;
    dynamic = from;
    dynamic_bytes = bytes;
    size_t cells = (simulation::static_shared_bytes() + 3) / 4 + (bytes + 3) / 4;
    if (shared_cells.size() < cells) shared_cells.resize(cells);
    shared_bytes.clear();
    reads_used = 0;
}

} // namespace races
