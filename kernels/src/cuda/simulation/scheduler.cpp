// Runs a kernel's blocks one after the other, each of its threads as a fiber. The order in which
// threads run between two barriers is part of the launch: a kernel that lacks a barrier gives
// different results, or reads what was never written, under one order or another.
#include "device.hpp"

#include <map>
#include <mutex>
#include <random>
#include <string>
#include <ucontext.h>
#include <vector>

thread_local Index3 threadIdx, blockIdx, blockDim, gridDim;

namespace simulation {

namespace {

constexpr size_t STACK = 256 << 10;

struct Copy {
    unsigned char *to;
    unsigned char data[16];
    int bytes;
};

struct Fiber {
    ucontext_t context;
    std::vector<unsigned char> stack;
    Index3 index;
    int number;
    bool ended;
    // What it waits for: the barrier or its warp's exchange of this generation
    enum { NOTHING, BARRIER, EXCHANGE } waits;
    unsigned long generation;
    unsigned mask;
    // Asynchronous copies: of the open group, and of those that are closed
    std::vector<Copy> open;
    std::vector<std::vector<Copy>> groups;
};

struct Warp {
    const void *operation = nullptr;
    unsigned arrived = 0, mask = 0, ended = 0;
    unsigned long generation = 0;
    Exchange exchange;
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
std::vector<Fiber> fibers;
std::vector<Warp> warps;
std::vector<unsigned char> shared_memory;
ucontext_t scheduler;
Fiber *running;
int threads, at_barrier, ended;
unsigned long barrier_generation;
char failure[512];

void yield() { swapcontext(&running->context, &scheduler); }

bool barrier_is_full() { return at_barrier + ended == threads; }

bool exchange_is_full(const Fiber &fiber) {
    const Warp &warp = warps[fiber.number / 32];
    int size = threads - fiber.number / 32 * 32;
    unsigned there = size >= 32 ? 0xffffffffu : (1u << size) - 1;
    unsigned expected = fiber.mask & there & ~warp.ended;
    return (warp.arrived & expected) == expected;
}

bool can_go_on(const Fiber &fiber) {
    switch (fiber.waits) {
    case Fiber::NOTHING: return true;
    case Fiber::BARRIER: return barrier_generation != fiber.generation || barrier_is_full();
    case Fiber::EXCHANGE:
        return warps[fiber.number / 32].generation != fiber.generation || exchange_is_full(fiber);
    }
    return true;
}

void finish() {
    Warp &warp = warps[running->number / 32];
    warp.ended |= 1u << running->number % 32;
    running->ended = true;
    ended++;
}

void trampoline() {
    entry(arguments);
    finish();
    yield();
}

// True if the block ran to its end; false if something failed or nothing can go on.
bool run_block(const std::vector<int> &order) {
    ended = at_barrier = 0;
    while (ended < threads) {
        bool moved = false;
        for (int number : order) {
            Fiber &fiber = fibers[number];
            if (fiber.ended || !can_go_on(fiber)) continue;
            moved = true;
            running = &fiber;
            threadIdx = fiber.index;
            swapcontext(&scheduler, &fiber.context);
            if (failure[0]) return false;
        }
        if (!moved) {
            snprintf(failure, sizeof failure,
                     "%s: block %u,%u,%u is stuck: %d of %d threads wait at __syncthreads, %d have "
                     "ended",
                     kernel, blockIdx.x, blockIdx.y, blockIdx.z, at_barrier, threads, ended);
            return false;
        }
    }
    return true;
}

void prepare(Fiber &fiber, int number) {
    fiber.stack.resize(STACK);
    fiber.number = number;
    fiber.ended = false;
    fiber.waits = Fiber::NOTHING;
    fiber.open.clear();
    fiber.groups.clear();
    fiber.index = {number % blockDim.x, number / blockDim.x % blockDim.y,
                   number / (blockDim.x * blockDim.y)};
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = STACK;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, trampoline, 0);
}

} // namespace

unsigned char *dynamic_shared() {
    uintptr_t start = (uintptr_t)shared_memory.data();
    return (unsigned char *)((start + 1023) / 1024 * 1024);
}

int lane() { return running->number % 32; }

void fail(const char *what) {
    snprintf(failure, sizeof failure, "%s: block %u,%u,%u thread %u,%u,%u: %s", kernel, blockIdx.x,
             blockIdx.y, blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z, what);
    yield();
    abort(); // nobody resumes a failed launch
}

void block_barrier() {
    unsigned long generation = barrier_generation;
    at_barrier++;
    running->waits = Fiber::BARRIER;
    running->generation = generation;
    // Threads that have ended count as arrived, as they do on the device.
    while (barrier_generation == generation && !barrier_is_full()) yield();
    if (barrier_generation == generation) {
        at_barrier = 0;
        barrier_generation++;
    }
    running->waits = Fiber::NOTHING;
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
    self.waits = Fiber::EXCHANGE;
    self.generation = warp.generation;
    self.mask = mask;
    while (warp.generation == self.generation && !exchange_is_full(self)) yield();
    if (warp.generation == self.generation) {
        combine(warp.exchange, warp.arrived, context);
        warp.arrived = 0;
        warp.generation++;
    }
    self.waits = Fiber::NOTHING;
    if (out_bytes) memcpy(out, warp.exchange.out[lane], out_bytes);
}

void copy_later(void *to, const void *from, int bytes, int valid) {
    if ((uintptr_t)to % bytes || (valid && (uintptr_t)from % bytes)) fail("cp.async: not aligned");
    Copy copy;
    copy.to = (unsigned char *)to;
    copy.bytes = bytes;
    memset(copy.data, 0, sizeof copy.data);
    if (valid) memcpy(copy.data, from, valid);
    running->open.push_back(copy);
}

void end_group() {
    running->groups.push_back(running->open);
    running->open.clear();
}

void wait_groups(int pending) {
    auto &groups = running->groups;
    while ((int)groups.size() > pending) {
        for (Copy &copy : groups.front()) memcpy(copy.to, copy.data, copy.bytes);
        groups.erase(groups.begin());
    }
}

void add(const char *name, Call call, const size_t *sizes, int count) {
    table()[name] = Kernel{call, std::vector<size_t>(sizes, sizes + count)};
}

static void launch(const char *name, const unsigned *grid, const unsigned *block, unsigned shared,
            void **parameters, unsigned order) {
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
    if (threads < 1 || threads > 1024) {
        snprintf(failure, sizeof failure, "%s: a block of %d threads", name, threads);
        return;
    }
    if ((int)fibers.size() < threads) fibers.resize(threads);
    std::vector<int> sequence(threads);
    for (int i = 0; i < threads; i++) sequence[i] = order == 1 ? threads - 1 - i : i;
    std::mt19937 random(order);
    size_t blocks = (size_t)grid[0] * grid[1] * grid[2];
    for (size_t i = 0; i < blocks; i++) {
        size_t number = order == 1 ? blocks - 1 - i : i;
        blockIdx = {(unsigned)(number % grid[0]), (unsigned)(number / grid[0] % grid[1]),
                    (unsigned)(number / grid[0] / grid[1])};
        if (order > 1)
            for (int k = threads - 1; k > 0; k--)
                std::swap(sequence[k], sequence[random() % (k + 1)]);
        // Not a number in every type: what is read before it is written shows.
        shared_memory.assign(shared + 2048, 0xff);
        warps.assign((threads + 31) / 32, Warp());
        barrier_generation = 0;
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
                                       unsigned shared, void **parameters, unsigned order,
                                       char *text, size_t size) {
    std::lock_guard<std::mutex> guard(busy);
    failure[0] = 0;
    launch(name, grid, block, shared, parameters, order);
    snprintf(text, size, "%s", failure);
    return failure[0] != 0;
}

// What the kernels were compiled for: 800 for compute capability 8.0.
extern "C" int graft_simulation_architecture() { return __CUDA_ARCH__; }

// How many parameters a kernel has, or -1 if there is no such kernel; the bytes of the first `most` in `sizes`.
extern "C" int graft_simulation_parameters(const char *name, size_t *sizes, int most) {
    auto found = table().find(name);
    if (found == table().end()) return -1;
    const std::vector<size_t> &parameters = found->second.parameters;
    for (int i = 0; i < most && i < (int)parameters.size(); i++) sizes[i] = parameters[i];
    return (int)parameters.size();
}
