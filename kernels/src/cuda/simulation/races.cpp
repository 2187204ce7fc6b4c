// Where accesses come from: the threads' own code, by the compiler's hooks, and what the simulation does for them.
#include "reports.hpp"
#include "scheduler.hpp"

namespace races {

void begin_launch() {
    if (WATCHING) begin_global();
}

void begin_block(int count, unsigned char *dynamic, size_t dynamic_bytes) {
    if (!WATCHING) return;
    begin_shared(dynamic, dynamic_bytes);
    begin_clocks(count);
}

void access(int thread, const void *at, size_t bytes, Kind kind, const void *code) {
    if (!WATCHING) return;
    const Thread &t = threads[thread];
    look({kind, true, false, t.own[0].actor, t.own[0].clock, code_of(code), &t, 1}, at, bytes);
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

void access_of_engine(int thread, Actor engine, Clock phase, const void *at, size_t bytes, Kind kind, const void *code) {
    if (!WATCHING) return;
    look({kind, false, true, engine, phase, code_of(code), &threads[thread], 1}, at, bytes);
}

void access_never_done(int thread, const void *at, size_t bytes, const void *code) {
    if (!WATCHING) return;
    Own &own = beside(thread, STORES);
    look({WRITE, false, true, own.actor, NEVER, code_of(code), &threads[thread], 1}, at, bytes);
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
