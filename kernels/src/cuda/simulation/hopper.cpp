// What is Hopper's own: barriers in shared memory, the copy engine, products of warpgroups. Copies arrive as late as they
// may, when somebody waits for them, or under order 0 at once; stores are read, and products computed, when they are waited
// for: whoever does not wait reads what was there before.
#include "scheduler.hpp"

#include <array>
#include <deque>
#include <functional>
#include <vector>

#if __CUDA_ARCH__ >= 900

namespace simulation {

namespace {

// In shared memory lies a number of one of these, plus one in the upper half.
struct Phases {
    int announced, pending;
    long bytes; // that are expected and have not come, less those that came before
    unsigned phase;
    std::vector<std::function<void()>> copies; // under way
    races::Meeting *meeting, *before;          // of the running phase, and of the one before
    races::Actor engine;
};
std::deque<Phases> barriers;

// By thread: stores of the open group, and of those that are closed.
typedef std::vector<std::function<void()>> Stores;
struct OfThread {
    Stores open;
    std::deque<Stores> groups;
};
std::vector<OfThread> stores;

struct Product {
    WarpgroupProduct of[32]; // each thread's view
    std::array<unsigned, 4> registers[32];
    int warp; // of its group
};
struct OfWarp {
    std::vector<Product> open;
    std::deque<std::vector<Product>> groups;
};
std::vector<OfWarp> products;

constexpr uint64_t MARK = 0x6261727200000000;

Phases &phases(void *barrier, const void *code) {
    races::access(running_thread(), barrier, 8, races::READ, code);
    uint64_t word;
    memcpy(&word, barrier, sizeof word);
    if ((word & 0xffffffff00000000) != MARK || (uint32_t)word >= barriers.size())
        fail("a barrier in shared memory that was not initialised");
    return barriers[(uint32_t)word];
}

// Ends the phase if everything has happened.
void look_at(Phases &at) {
    if (at.pending > 0 || at.bytes != 0 || !at.copies.empty()) return;
    races::add_engine(at.meeting, at.engine, at.phase + 1);
    races::end(at.meeting);
    std::swap(at.meeting, at.before);
    at.phase++;
    at.pending = at.announced;
}

void deliver(Phases &at) {
    for (auto &copy : at.copies) copy();
    at.copies.clear();
    look_at(at);
}

} // namespace

void begin_hopper() {
    barriers.clear();
    stores.assign(block_threads(), OfThread());
    products.assign((block_threads() + 31) / 32, OfWarp());
}

void end_hopper() {
    for (Phases &at : barriers)
        if (!at.copies.empty()) fail_block("a block ends while the copy engine writes to its shared memory");
    for (OfThread &of : stores)
        if (!of.open.empty() || !of.groups.empty())
            fail_block("a block ends while the copy engine reads its shared memory");
    for (OfWarp &of : products)
        if (!of.open.empty() || !of.groups.empty()) fail_block("a block ends before its products have been waited for");
}

void barrier_init(void *barrier, int arrivals) {
    if ((uintptr_t)barrier % 8) fail("a barrier in shared memory that is not aligned");
    uint64_t word = MARK | barriers.size();
    races::access(running_thread(), barrier, 8, races::WRITE, __builtin_return_address(0));
    memcpy(barrier, &word, sizeof word);
    barriers.push_back({arrivals, arrivals, 0, 0, {}, races::new_meeting(), races::new_meeting(), races::new_engine()});
}

void barrier_arrive(void *barrier, int bytes) {
    Phases &at = phases(barrier, __builtin_return_address(0));
    if (at.pending == 0) fail("more threads arrive at a barrier in shared memory than were announced");
    races::come(at.meeting, running_thread());
    at.bytes += bytes;
    at.pending--;
    look_at(at);
}

void barrier_wait(void *barrier, unsigned parity) {
    struct Wait {
        Phases &at;
        unsigned parity;
    } wait = {phases(barrier, __builtin_return_address(0)), parity};
    wait_until(
        "a barrier in shared memory",
        [](void *context) {
            Wait &wait = *(Wait *)context;
            Phases &at = wait.at;
            if (at.phase % 2 == wait.parity && at.pending == 0) deliver(at);
            return at.phase % 2 != wait.parity;
        },
        &wait);
    races::learn(wait.at.before, running_thread());
}

// --- The copy engine.

namespace {

// As graft_simulation_tensor_map makes it.
struct Map {
    uint64_t address, dims[3], strides[2], box[3], element, mark;
};
constexpr uint64_t MAP = 0x67726166746d6170;

// Rows of 128 bytes, in which the chunks of 16 bytes have changed places with the row's number.
unsigned char *swizzled(unsigned char *shared, size_t row, size_t chunk) {
    uintptr_t at = (uintptr_t)shared + row * 128 + chunk * 16;
    return (unsigned char *)(at ^ (at >> 7 & 7) << 4);
}

// Calls `with` for the part of each chunk that lies in the tensor: where it is in shared memory, where in
// global memory, or null, and how many bytes.
template <class F> void each_chunk(const Map &map, unsigned char *shared, int x, int y, int z, F with) {
    long each = 16 / (long)map.element;
    for (long row = 0; row < (long)map.box[1]; row++)
        for (long chunk = 0; chunk < 8; chunk++) {
            long column = x + chunk * each, line = y + row;
            bool inside = column >= 0 && column < (long)map.dims[0] && line >= 0 && line < (long)map.dims[1] && z >= 0 &&
                          z < (long)map.dims[2];
            long count = inside ? min(each, (long)map.dims[0] - column) : 0;
            unsigned char *global = (unsigned char *)map.address + column * (long)map.element +
                                    line * (long)map.strides[0] + z * (long)map.strides[1];
            with(swizzled(shared, row, chunk), count ? global : nullptr, count * (long)map.element);
        }
}

} // namespace

void tensor(Tensor what, void *shared_at, const void *given, void *barrier, int x, int y, int z) {
    const void *code = __builtin_return_address(0);
    Map map;
    memcpy(&map, given, sizeof map);
    if (map.mark != MAP) fail("the copy engine is given no description of a tensor");
    unsigned char *shared = (unsigned char *)shared_at;
    if (shared_address(shared) % 1024) fail("the copy engine's box is not aligned in shared memory");
    int thread = running_thread();
    if (what == LOAD) {
        Phases &at = phases(barrier, code);
        races::access_of_engine(thread, at.engine, at.phase + 1, barrier, 8, races::READ, code);
        if (races::WATCHING)
            each_chunk(map, shared, x, y, z, [&](unsigned char *to, unsigned char *from, long bytes) {
                races::access_of_engine(thread, at.engine, at.phase + 1, to, 16, races::WRITE, code);
                if (from) races::access_of_engine(thread, at.engine, at.phase + 1, from, bytes, races::READ, code);
            });
        at.copies.push_back([=, &at] {
            each_chunk(map, shared, x, y, z, [&](unsigned char *to, unsigned char *from, long bytes) {
                memset(to, 0, 16);
                if (from) memcpy(to, from, bytes);
            });
            at.bytes -= 128 * (long)map.box[1];
        });
        if (launch_order() == 0) deliver(at);
        return;
    }
    if (races::WATCHING)
        each_chunk(map, shared, x, y, z, [&](unsigned char *from, unsigned char *to, long bytes) {
            races::access_beside(thread, races::STORES, from, 16, races::READ, code);
            if (to) races::access_never_done(thread, to, bytes, code);
        });
    stores[thread].open.push_back([=] {
        each_chunk(map, shared, x, y, z, [&](unsigned char *from, unsigned char *to, long bytes) {
            if (what == STORE || !to) {
                if (to) memcpy(to, from, bytes);
                return;
            }
            if (map.element != 4) fail("the copy engine adds floats alone");
            for (long i = 0; i < bytes; i += 4) {
                float sum, term;
                memcpy(&sum, to + i, 4);
                memcpy(&term, from + i, 4);
                sum += term;
                memcpy(to + i, &sum, 4);
            }
        });
    });
}

void bulk_load(void *to, const void *from, int bytes, void *barrier) {
    const void *code = __builtin_return_address(0);
    if (((uintptr_t)to | (uintptr_t)from | bytes) % 16) fail("a bulk copy that is not aligned");
    Phases &at = phases(barrier, code);
    races::access_of_engine(running_thread(), at.engine, at.phase + 1, barrier, 8, races::READ, code);
    races::access_of_engine(running_thread(), at.engine, at.phase + 1, to, bytes, races::WRITE, code);
    races::access_of_engine(running_thread(), at.engine, at.phase + 1, from, bytes, races::READ, code);
    at.copies.push_back([=, &at] {
        memcpy(to, from, bytes);
        at.bytes -= bytes;
    });
    if (launch_order() == 0) deliver(at);
}

void stores_commit() {
    OfThread &of = stores[running_thread()];
    of.groups.push_back(std::move(of.open));
    of.open.clear();
    races::close_group(running_thread(), races::STORES);
}

void stores_wait(int pending) {
    OfThread &of = stores[running_thread()];
    while ((int)of.groups.size() > pending) {
        for (auto &store : of.groups.front()) store();
        of.groups.pop_front();
    }
    races::groups_done(running_thread(), races::STORES, pending);
}

void fence_shared_async() { races::fence(running_thread()); }

// Lane l gives the address of row l % 8 of matrix l / 8, and has elements 2 * (l % 4) and the next of row l / 4.
void store_matrices(const void *operation, void *row, const unsigned (&r)[4]) {
    struct In {
        uint16_t *row;
        unsigned r[4];
    } in = {(uint16_t *)row, {r[0], r[1], r[2], r[3]}};
    races::access(running_thread(), row, 16, races::WRITE, __builtin_return_address(0));
    exchange(
        operation, 0xffffffffu, &in, sizeof in, nullptr, 0,
        [](Exchange &e, unsigned, const void *) {
            In all[32];
            for (int lane = 0; lane < 32; lane++) {
                memcpy(&all[lane], e.in[lane], sizeof(In));
                if ((uintptr_t)all[lane].row % 16) fail("stmatrix: a row is not 16-byte aligned");
            }
            for (int lane = 0; lane < 32; lane++)
                for (int matrix = 0; matrix < 4; matrix++)
                    memcpy(all[8 * matrix + lane / 4].row + 2 * (lane % 4), &all[lane].r[matrix], 4);
        },
        nullptr);
}

// --- Products of warpgroups. Each warp computes its 16 rows.

namespace {

// Where chunk number `chunk` of a row lies that `operand` describes: rows of 128 bytes, in which
// operands begin at multiples of 32.
unsigned char *chunk_of(uint64_t operand, size_t row, size_t chunk) {
    size_t start = (operand & 0x3fff) << 4, leading = (operand >> 16 & 0x3fff) << 4,
           stride = (operand >> 32 & 0x3fff) << 4;
    size_t at = start + chunk / 8 * leading + row / 8 * stride + row % 8 * 128 + chunk % 8 * 16;
    unsigned char *from = dynamic_shared() + at;
    return (unsigned char *)((uintptr_t)from ^ (at >> 7 & 7) << 4);
}

// Calls `with` for each chunk of an operand of 16 k: of `sides` sides from `first` on. Rows are sides, or k.
template <class F> void each_chunk(uint64_t operand, bool across, int first, int sides, F with) {
    if (across) {
        for (int k = 0; k < 16; k++)
            for (int side = first; side < first + sides; side += 8) with(chunk_of(operand, k, side / 8), side, k);
    } else {
        for (int side = first; side < first + sides; side++)
            for (int k = 0; k < 16; k += 8) with(chunk_of(operand, side, k / 8), side, k);
    }
}

float widen(uint16_t x) { return __uint_as_float((unsigned)x << 16); }

void read_operand(uint64_t operand, bool across, int first, int sides, float *to) {
    each_chunk(operand, across, first, sides, [&](unsigned char *from, int side, int k) {
        uint16_t eight[8];
        memcpy(eight, from, 16);
        for (int i = 0; i < 8; i++) {
            int at = across ? k * sides + side - first + i : (k + i) * sides + side - first;
            to[at] = widen(eight[i]);
        }
    });
}

void compute(const Product &product) {
    const WarpgroupProduct &of = product.of[0];
    float a[16 * 16], b[16 * 256], d[16 * 256]; // [k, rows], [k, columns], [rows, columns]
    int columns = of.columns;
    read_operand(of.b, of.b_across, 0, columns, b);
    if (!of.registers) {
        read_operand(of.a, of.a_across, 16 * product.warp, 16, a);
    } else {
        for (int lane = 0; lane < 32; lane++)
            for (int i = 0; i < 8; i++) {
                int row = lane / 4 + i / 2 % 2 * 8, k = 2 * (lane % 4) + i / 4 * 8 + i % 2;
                a[k * 16 + row] = widen(product.registers[lane][i / 2] >> i % 2 * 16);
            }
    }
    auto place = [&](int lane, int i) {
        return (lane / 4 + i / 2 % 2 * 8) * columns + i / 4 * 8 + 2 * (lane % 4) + i % 2;
    };
    for (int lane = 0; lane < 32; lane++)
        for (int i = 0; i < columns / 2; i++) d[place(lane, i)] = of.add ? product.of[lane].d[i] : 0;
    for (int row = 0; row < 16; row++)
        for (int k = 0; k < 16; k++) {
            float x = a[k * 16 + row];
            for (int column = 0; column < columns; column++) d[row * columns + column] += x * b[k * columns + column];
        }
    for (int lane = 0; lane < 32; lane++)
        for (int i = 0; i < columns / 2; i++) product.of[lane].d[i] = d[place(lane, i)];
}

struct Asked {
    int thread;
    const void *code;
};

} // namespace

void product(const void *operation, const WarpgroupProduct &given) {
    static_assert(sizeof given <= Exchange::MOST, "what threads exchange");
    Asked asked = {running_thread(), __builtin_return_address(0)};
    struct In {
        WarpgroupProduct of;
        std::array<unsigned, 4> registers;
    } in = {given, {}};
    if (given.registers) memcpy(&in.registers, given.registers, sizeof in.registers);
    exchange(
        operation, 0xffffffffu, &in, sizeof in, nullptr, 0,
        [](Exchange &e, unsigned, const void *context) {
            const Asked &asked = *(const Asked *)context;
            int first = asked.thread / 32 * 32;
            Product product;
            product.warp = asked.thread / 32 % 4;
            for (int lane = 0; lane < 32; lane++) {
                In in;
                memcpy(&in, e.in[lane], sizeof in);
                product.of[lane] = in.of;
                product.registers[lane] = in.registers;
                const WarpgroupProduct &a = in.of, &b = product.of[0];
                if (a.a != b.a || a.b != b.b || a.add != b.add) fail("the threads of a warp multiply different operands");
            }
            const WarpgroupProduct &of = product.of[0];
            if ((of.b >> 62) != 1 || (!of.registers && (of.a >> 62) != 1)) fail("wgmma: no swizzle of 128 bytes");
            if (races::WATCHING) {
                auto read = [&](unsigned char *at, int, int) {
                    races::access_of_warp(first, races::PRODUCTS, at, 16, races::READ, asked.code);
                };
                if (!of.registers) each_chunk(of.a, of.a_across, 16 * product.warp, 16, read);
                each_chunk(of.b, of.b_across, 0, of.columns, read);
            }
            products[first / 32].open.push_back(product);
        },
        &asked);
}

void products_commit(const void *operation) {
    int thread = running_thread();
    exchange(
        operation, 0xffffffffu, nullptr, 0, nullptr, 0,
        [](Exchange &, unsigned, const void *thread) {
            OfWarp &of = products[*(const int *)thread / 32];
            of.groups.push_back(std::move(of.open));
            of.open.clear();
        },
        &thread);
    races::close_group(thread, races::PRODUCTS);
}

void products_wait(const void *operation, int pending) {
    struct {
        int thread, pending;
    } wait = {running_thread(), pending};
    exchange(
        operation, 0xffffffffu, nullptr, 0, nullptr, 0,
        [](Exchange &, unsigned, const void *context) {
            const int *wait = (const int *)context;
            OfWarp &of = products[wait[0] / 32];
            while ((int)of.groups.size() > wait[1]) {
                for (const Product &product : of.groups.front()) compute(product);
                of.groups.pop_front();
            }
        },
        &wait);
    races::groups_done(running_thread(), races::PRODUCTS, pending);
}

} // namespace simulation

// A description of a tensor for `tensor`, of sixteen words: `dims` elements of `element` bytes, the innermost
// dimension first, in boxes. Strides in bytes. 0, or 1 for what the driver refuses.
extern "C" int graft_simulation_tensor_map(uint64_t *to, uint64_t address, uint64_t element, const uint64_t *dims,
                                           const uint64_t *strides, const uint64_t *box) {
    simulation::Map map = {address,
                           {dims[0], dims[1], dims[2]},
                           {strides[0], strides[1]},
                           {box[0], box[1], box[2]},
                           element,
                           simulation::MAP};
    bool fits = address % 16 == 0 && strides[0] % 16 == 0 && strides[1] % 16 == 0 && box[0] * element == 128 &&
                box[1] >= 1 && box[1] <= 256 && box[2] == 1;
    for (int i = 0; i < 3; i++) fits = fits && dims[i] >= 1 && dims[i] >> 32 == 0;
    for (int i = 0; i < 2; i++) fits = fits && strides[i] >> 40 == 0;
    memset(to, 0, 128);
    memcpy(to, &map, sizeof map);
    return fits ? 0 : 1;
}

#else

namespace simulation {
void begin_hopper() {}
void end_hopper() {}
} // namespace simulation

#endif
