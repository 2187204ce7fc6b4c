// Runs a kernel's blocks one after the other, each of its threads as a fiber. The order in which
// threads run between two barriers is part of the launch: a kernel that lacks a barrier gives
// different results, or reads what was never written, under one order or another.
#undef _FORTIFY_SOURCE // fibers leave their stacks by longjmp
#include "scheduler.hpp"

#include <map>
#include <mutex>
#include <random>
#include <setjmp.h>
#include <string>
#include <sys/mman.h>
#include <ucontext.h>
#include <vector>

// The library's variables, of which kernels see no others than those in shared memory (and the numbers below).
extern "C" __attribute__((visibility("hidden"))) unsigned char __bss_start[], _end[];

namespace simulation {

Places places;

namespace {

constexpr size_t STACK = 256 << 10;
constexpr int MOST = 1024; // threads of a block

struct Copy {
    unsigned char *to;
    unsigned char data[16];
    int bytes;
};

struct Fiber {
    jmp_buf at;
    Index3 index;
    int number;
    bool started, ended;
    // What it waits for, if anything: until `ready`
    const char *waits;
    bool (*ready)(void *);
    void *context;
    // Asynchronous copies: of the open group, and of those that are closed
    std::vector<Copy> open;
    std::vector<std::vector<Copy>> groups;
};

struct Warp {
    const void *operation;
    unsigned arrived, mask, ended;
    unsigned long generation;
    races::Meeting *meeting;
    Exchange exchange;
};

// A number that fibers wait for to change, when all that are expected have come.
struct Barrier {
    int arrived;
    unsigned long generation;
    races::Meeting *meeting;
};

struct Kernel {
    Call call;
    std::vector<size_t> parameters;
};

std::map<std::string, Kernel> &table() {
    static std::map<std::string, Kernel> kernels;
    return kernels;
}

// The running launch: one at a time.
std::mutex busy;
const char *kernel;
Call entry;
void **arguments;
unsigned order;
std::vector<Fiber> fibers;
unsigned char *stacks;
std::vector<unsigned char> dynamic_memory;
jmp_buf scheduler;
Fiber *running;
int threads, ended;
Barrier whole, named[16];
char failure[2048];

// What the warps of the block exchange: accesses to it are nobody's.
Warp warps[MOST / 32];

void yield() {
    if (!_setjmp(running->at)) _longjmp(scheduler, 1);
}

void trampoline() {
    // A fiber is the same thread of one block after the other.
    for (;;) {
        entry(arguments);
        warps[running->number / 32].ended |= 1u << running->number % 32;
        if (races::WATCHING) races::come(whole.meeting, running->number);
        running->ended = true;
        ended++;
        yield();
    }
}

void resume(Fiber &fiber) {
    running = &fiber;
    threadIdx = fiber.index;
    if (_setjmp(scheduler)) return;
    if (fiber.started) _longjmp(fiber.at, 1);
    fiber.started = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = stacks + STACK * fiber.number;
    context.uc_stack.ss_size = STACK;
    context.uc_link = nullptr;
    makecontext(&context, trampoline, 0);
    setcontext(&context);
}

void say_stuck() {
    std::map<std::string, int> waits;
    for (int i = 0; i < threads; i++)
        if (!fibers[i].ended) waits[fibers[i].waits]++;
    std::string text;
    for (auto &[what, count] : waits) text += std::to_string(count) + " threads wait at " + what + ", ";
    snprintf(failure, sizeof failure, "%s: block %u,%u,%u is stuck: %s%d have ended", kernel, blockIdx.x,
             blockIdx.y, blockIdx.z, text.c_str(), ended);
}

// True if the block ran to its end; false if something failed or nothing can go on.
bool run_block(const std::vector<int> &sequence) {
    ended = 0;
    while (ended < threads) {
        bool moved = false;
        for (int number : sequence) {
            Fiber &fiber = fibers[number];
            if (fiber.ended || (fiber.ready && !fiber.ready(fiber.context))) continue;
            if (failure[0]) return false;
            moved = true;
            resume(fiber);
            if (failure[0]) return false;
        }
        if (!moved) {
            say_stuck();
            return false;
        }
    }
    end_hopper();
    return !failure[0];
}

void prepare(Fiber &fiber, int number) {
    fiber.number = number;
    fiber.ended = false;
    fiber.ready = nullptr;
    fiber.open.clear();
    fiber.groups.clear();
    fiber.index = {number % blockDim.x, number / blockDim.x % blockDim.y,
                   number / (blockDim.x * blockDim.y)};
}

unsigned lanes_of(int warp) {
    int size = threads - warp * 32;
    return size >= 32 ? 0xffffffffu : (1u << size) - 1;
}

} // namespace

unsigned char *dynamic_shared() {
    uintptr_t start = (uintptr_t)dynamic_memory.data();
    return (unsigned char *)((start + 1023) / 1024 * 1024);
}
unsigned char *static_shared() { return __bss_start; }
size_t static_shared_bytes() { return _end - __bss_start; }

int lane() { return running->number % 32; }
int running_thread() { return running->number; }
int block_threads() { return threads; }
unsigned launch_order() { return order; }

bool is_private(const void *at) {
    return (uintptr_t)at - (uintptr_t)stacks < STACK * MOST ||
           (uintptr_t)at - (uintptr_t)warps < sizeof warps ||
           (uintptr_t)at - (uintptr_t)&places < sizeof places;
}

void fail(const char *what) {
    snprintf(failure, sizeof failure, "%s: block %u,%u,%u thread %u,%u,%u: %s", kernel, blockIdx.x,
             blockIdx.y, blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z, what);
    yield();
    abort(); // nobody resumes a failed launch
}

void fail_block(const char *what) {
    snprintf(failure, sizeof failure, "%s: block %u,%u,%u: %s", kernel, blockIdx.x, blockIdx.y, blockIdx.z, what);
}

void wait_until(const char *what, bool (*ready)(void *), void *context) {
    running->waits = what;
    running->ready = ready;
    running->context = context;
    while (!ready(context)) yield();
    running->ready = nullptr;
}

namespace {

// Arrives, and if it is to wait, waits for the others. Threads that have ended count as arrived at the
// barrier of the whole block, as they do on the device.
void meet(Barrier &barrier, int expected, bool waits, const char *what) {
    struct Wait {
        Barrier &barrier;
        int expected;
        unsigned long generation;
    } wait = {barrier, expected, barrier.generation};
    races::come(barrier.meeting, running->number);
    barrier.arrived++;
    auto full = [](void *context) {
        Wait &wait = *(Wait *)context;
        Barrier &barrier = wait.barrier;
        return barrier.generation != wait.generation ||
               barrier.arrived + (&barrier == &whole ? ended : 0) == wait.expected;
    };
    if (waits) {
        wait_until(what, full, &wait);
    } else if (!full(&wait)) {
        return;
    }
    if (barrier.generation == wait.generation) {
        barrier.arrived = 0;
        barrier.generation++;
        races::end(barrier.meeting);
    }
    if (waits) races::learn(barrier.meeting, running->number);
}

} // namespace

void block_barrier() { meet(whole, threads, true, "__syncthreads"); }

void named_barrier(int number, int expected, bool waits) {
    if (number < 1 || number > 15 || expected % 32) fail("a named barrier that there is not");
    meet(named[number], expected, waits, "a named barrier");
}

void exchange(const void *operation, unsigned mask, const void *in, int in_bytes, void *out,
              int out_bytes, Combine combine, const void *context) {
    if (in_bytes > Exchange::MOST || out_bytes > Exchange::MOST) fail("an exchange is too large");
    Fiber &self = *running;
    Warp &warp = warps[self.number / 32];
    int lane = self.number % 32;
    if (!(mask >> lane & 1)) fail("a thread exchanges under a mask without itself");
    if (warp.arrived == 0) {
        warp.operation = operation;
        warp.mask = mask;
    } else if (warp.operation != operation || warp.mask != mask) {
        fail("the threads of a warp exchange at different places");
    }
    if (in_bytes) memcpy(warp.exchange.in[lane], in, in_bytes);
    warp.arrived |= 1u << lane;
    struct Wait {
        Warp &warp;
        unsigned long generation;
        unsigned expected;
    } wait = {warp, warp.generation, mask & lanes_of(self.number / 32)};
    auto full = [](void *context) {
        Wait &wait = *(Wait *)context;
        unsigned expected = wait.expected & ~wait.warp.ended;
        return wait.warp.generation != wait.generation || (wait.warp.arrived & expected) == expected;
    };
    wait_until("an exchange of a warp", full, &wait);
    if (warp.generation == wait.generation) {
        combine(warp.exchange, warp.arrived, context);
        warp.arrived = 0;
        warp.generation++;
    }
    if (out_bytes) memcpy(out, warp.exchange.out[lane], out_bytes);
}

void warp_barrier(unsigned mask) {
    static const char id = 0;
    races::Meeting *meeting = warps[running->number / 32].meeting;
    races::come(meeting, running->number);
    exchange(&id, mask, nullptr, 0, nullptr, 0,
             [](Exchange &, unsigned, const void *meeting) { races::end((races::Meeting *)meeting); }, meeting);
    races::learn(meeting, running->number);
}

void copy_later(void *to, const void *from, int bytes, int valid) {
    if ((uintptr_t)to % bytes || (valid && (uintptr_t)from % bytes)) fail("cp.async: not aligned");
    Copy copy;
    copy.to = (unsigned char *)to;
    copy.bytes = bytes;
    memset(copy.data, 0, sizeof copy.data);
    if (valid) memcpy(copy.data, from, valid);
    running->open.push_back(copy);
    if (races::WATCHING) {
        const void *code = __builtin_return_address(0);
        races::access_beside(running->number, races::COPIES, to, bytes, races::WRITE, code);
        if (valid) races::access_beside(running->number, races::COPIES, from, valid, races::READ, code);
    }
}

void end_group() {
    running->groups.push_back(running->open);
    running->open.clear();
    races::close_group(running->number, races::COPIES);
}

void wait_groups(int pending) {
    auto &groups = running->groups;
    while ((int)groups.size() > pending) {
        for (Copy &copy : groups.front()) memcpy(copy.to, copy.data, copy.bytes);
        groups.erase(groups.begin());
    }
    races::groups_done(running->number, races::COPIES, pending);
}

void atomic_access(void *at, int bytes) {
    races::access(running->number, at, bytes, races::ATOMIC, __builtin_return_address(0));
}

void add(const char *name, Call call, const size_t *sizes, int count) {
    table()[name] = Kernel{call, std::vector<size_t>(sizes, sizes + count)};
}

static void launch(const char *name, const unsigned *grid, const unsigned *block, unsigned shared,
                   void **parameters) {
    auto found = table().find(name);
    if (found == table().end()) {
        snprintf(failure, sizeof failure, "there is no kernel %s", name);
        return;
    }
    kernel = name;
    entry = found->second.call;
    arguments = parameters;
    gridDim = {grid[0], grid[1], grid[2]};
    blockDim = {block[0], block[1], block[2]};
    threads = block[0] * block[1] * block[2];
    if (threads < 1 || threads > MOST) {
        snprintf(failure, sizeof failure, "%s: a block of %d threads", name, threads);
        return;
    }
    if (!stacks) {
        int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
        void *found = mmap(nullptr, STACK * MOST, PROT_READ | PROT_WRITE, flags, -1, 0);
        if (found == MAP_FAILED) {
            snprintf(failure, sizeof failure, "no memory for the stacks of threads");
            return;
        }
        stacks = (unsigned char *)found;
    }
    if ((int)fibers.size() < threads) fibers.resize(threads);
    std::vector<int> sequence(threads);
    for (int i = 0; i < threads; i++) sequence[i] = order == 1 ? threads - 1 - i : i;
    std::mt19937 random(order);
    races::begin_launch();
    size_t blocks = (size_t)grid[0] * grid[1] * grid[2];
    for (size_t i = 0; i < blocks; i++) {
        size_t number = order == 1 ? blocks - 1 - i : i;
        blockIdx = {(unsigned)(number % grid[0]), (unsigned)(number / grid[0] % grid[1]),
                    (unsigned)(number / grid[0] / grid[1])};
        if (order > 1)
            for (int k = threads - 1; k > 0; k--)
                std::swap(sequence[k], sequence[random() % (k + 1)]);
        // Not a number in every type: what is read before it is written shows.
        dynamic_memory.assign(shared + 2048, 0xff);
        races::begin_block(threads, dynamic_shared(), shared);
        whole = {0, 0, races::new_meeting()};
        for (Barrier &barrier : named) barrier = {0, 0, races::new_meeting()};
        for (int w = 0; 32 * w < threads; w++) {
            Warp &warp = warps[w];
            warp.arrived = warp.ended = 0;
            warp.generation = 0;
            warp.meeting = races::new_meeting();
        }
        begin_hopper();
        for (int k = 0; k < threads; k++) prepare(fibers[k], k);
        if (!run_block(sequence)) {
            // Fibers that were left in the middle are not gone back to.
            fibers.clear();
            return;
        }
    }
}

} // namespace simulation

using namespace simulation;

// Runs a kernel. `order` is 0 for threads and blocks in ascending order, 1 for descending, any other
// number for a random one. Returns 0, or 1 with what went wrong in `text`.
extern "C" int graft_simulation_launch(const char *name, const unsigned *grid, const unsigned *block,
                                       unsigned shared, void **parameters, unsigned order_of_threads,
                                       char *text, size_t size) {
    std::lock_guard<std::mutex> guard(busy);
    failure[0] = 0;
    order = order_of_threads;
    launch(name, grid, block, shared, parameters);
    snprintf(text, size, "%s", failure);
    return failure[0] != 0;
}

// What the kernels were compiled for: 800 for compute capability 8.0.
extern "C" int graft_simulation_architecture() { return __CUDA_ARCH__; }

// Whether accesses to memory are looked at (races.hpp).
extern "C" int graft_simulation_watches() { return races::WATCHING; }

// How many parameters a kernel has, or -1 if there is no such kernel; the bytes of the first `most` in `sizes`.
extern "C" int graft_simulation_parameters(const char *name, size_t *sizes, int most) {
    auto found = table().find(name);
    if (found == table().end()) return -1;
    const std::vector<size_t> &parameters = found->second.parameters;
    for (int i = 0; i < most && i < (int)parameters.size(); i++) sizes[i] = parameters[i];
    return (int)parameters.size();
}
