// The instructions of hopper.cuh and its like, for device.hpp: barriers in shared memory, the copy engine, products of
// warpgroups. What they do is in hopper.cpp.
#pragma once

struct TensorMap;

namespace simulation {

void barrier_init(void *barrier, int arrivals);
void barrier_arrive(void *barrier, int bytes);
void barrier_wait(void *barrier, unsigned parity);

// What the copy engine does.
enum Tensor { LOAD, STORE, ADD };
void tensor(Tensor what, void *shared, const void *map, void *barrier, int x, int y, int z);
void bulk_load(void *to, const void *from, int bytes, void *barrier);
void stores_commit();
void stores_wait(int pending);
void fence_shared_async();

void store_matrices(const void *operation, void *row, const unsigned (&r)[4]);

// d (+)= a * b of a warpgroup: a in shared memory, or in registers if they are given.
struct WarpgroupProduct {
    float *d;
    int columns;
    const unsigned *registers;
    uint64_t a, b;
    bool a_across, b_across, add;
};
void product(const void *operation, const WarpgroupProduct &product);
void products_commit(const void *operation);
void products_wait(const void *operation, int pending);

} // namespace simulation

// As the device has it: bytes from the beginning of dynamic shared memory.
inline unsigned shared_address(const void *p) { return (unsigned)((const unsigned char *)p - simulation::dynamic_shared()); }

inline void barrier_init(unsigned long long *barrier, int arrivals) { simulation::barrier_init(barrier, arrivals); }
inline void barrier_init_done() { simulation::fence_shared_async(); }
inline void barrier_expect(unsigned long long *barrier, int bytes) { simulation::barrier_arrive(barrier, bytes); }
inline void barrier_arrive(unsigned long long *barrier) { simulation::barrier_arrive(barrier, 0); }
inline void barrier_wait(unsigned long long *barrier, unsigned parity) { simulation::barrier_wait(barrier, parity); }
inline void named_barrier(int number, int threads) { simulation::named_barrier(number, threads, true); }
inline void named_arrive(int number, int threads) { simulation::named_barrier(number, threads, false); }

template <class Map> inline void tensor_prefetch(const Map *) {}
template <class Map> inline void tensor_load(void *to, const Map *map, unsigned long long *barrier, int x, int y, int z) {
    simulation::tensor(simulation::LOAD, to, map, barrier, x, y, z);
}
template <class Map> inline void tensor_store(const Map *map, const void *from, int x, int y, int z) {
    simulation::tensor(simulation::STORE, (void *)from, map, nullptr, x, y, z);
}
template <class Map> inline void tensor_add(const Map *map, const void *from, int x, int y, int z) {
    simulation::tensor(simulation::ADD, (void *)from, map, nullptr, x, y, z);
}
inline void bulk_load(void *to, const void *from, int bytes, unsigned long long *barrier) {
    simulation::bulk_load(to, from, bytes, barrier);
}
inline void tensor_store_commit() { simulation::stores_commit(); }
template <int PENDING> inline void tensor_store_wait_read() { simulation::stores_wait(PENDING); }
inline void fence_shared_async() { simulation::fence_shared_async(); }
inline void stmatrix_x4(void *row, unsigned r0, unsigned r1, unsigned r2, unsigned r3) {
    static const char id = 0;
    unsigned r[4] = {r0, r1, r2, r3};
    simulation::store_matrices(&id, row, r);
}

template <int REGISTERS> inline void more_registers() {}
template <int REGISTERS> inline void fewer_registers() {}

inline void wgmma_fence() {}
inline void wgmma_commit() {
    static const char id = 0;
    simulation::products_commit(&id);
}
template <int PENDING> inline void wgmma_wait() {
    static const char id = 0;
    simulation::products_wait(&id, PENDING);
}
template <int N> inline void wgmma_sums(float (&d)[N]) {}
inline void wgmma_touch(float &) {}
inline void keep_until_here(unsigned) {}
inline void forget(int &) {}

template <bool A_ACROSS, bool B_ACROSS>
inline void wgmma_64x192(float (&d)[96], unsigned long long a, unsigned long long b, bool accumulate) {
    static const char id = 0;
    simulation::product(&id, {d, 192, nullptr, a, b, A_ACROSS, B_ACROSS, accumulate});
}
template <int N> inline void wgmma_product(float (&d)[N][4], unsigned long long a, unsigned long long b, bool add) {
    static const char id = 0;
    simulation::product(&id, {d[0], 8 * N, nullptr, a, b, false, false, add});
}
template <bool ACROSS, int N>
inline void wgmma_product(float (&d)[N][4], const unsigned (&a)[4], unsigned long long b, bool add) {
    static const char id = 0;
    simulation::product(&id, {d[0], 8 * N, a, 0, b, false, ACROSS, add});
}
