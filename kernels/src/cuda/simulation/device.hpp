// What a CUDA source needs to be compiled as C++ for the CPU: the language's extensions and the
// built-in functions that the kernels use. One fiber runs each thread of a block; a fiber goes on
// until it reaches a barrier or an exchange within its warp, and then lets others run.
//
// Included before every source by `xtask simulation`; the scheduler is in scheduler.cpp.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>

#define GRAFT_SIMULATION 1
#ifndef __CUDA_ARCH__
#define __CUDA_ARCH__ 800
#endif
#define __device__
#define __host__
#define __global__
#define __constant__ static const
#define __forceinline__ inline
#define __noinline__
#define __restrict__
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static
#define EXPORT extern "C" void
// Of functions whose accesses to memory are not those of a kernel.
#define UNWATCHED __attribute__((no_sanitize_thread, noinline))
#define DYNAMIC_SHARED(name) unsigned char *name = simulation::dynamic_shared()

struct Index3 {
    unsigned x, y, z;
};
namespace simulation {
// Of the running thread.
struct Places {
    Index3 thread, block, block_size, grid_size;
};
extern Places places;
} // namespace simulation
#define threadIdx simulation::places.thread
#define blockIdx simulation::places.block
#define blockDim simulation::places.block_size
#define gridDim simulation::places.grid_size
constexpr int warpSize = 32;

namespace simulation {

// --- The scheduler (scheduler.cpp).

// The dynamic shared memory of the running block.
unsigned char *dynamic_shared();
// Number of the running thread within its warp.
int lane();
// Waits until every thread of the block that has not ended is here; all threads under the mask; so many
// threads at a barrier of this number.
void block_barrier();
void warp_barrier(unsigned mask);
void named_barrier(int number, int threads, bool waits);
// Stops the program with a message that names the kernel and the thread.
[[noreturn]] void fail(const char *what);

// What the threads of a warp exchange: each gives `bytes` bytes, and when all of `mask` have come
// to the same `operation`, `combine` is called once with everybody's.
struct Exchange {
    static constexpr int MOST = 128;
    alignas(16) unsigned char in[32][MOST];
    alignas(16) unsigned char out[32][MOST];
};
typedef void (*Combine)(Exchange &, unsigned mask, const void *context);
void exchange(const void *operation, unsigned mask, const void *in, int in_bytes, void *out,
              int out_bytes, Combine combine, const void *context);

// Copies that are done when the thread waits for their group: reading before that reads what was
// there.
void copy_later(void *to, const void *from, int bytes, int valid);
void end_group();
void wait_groups(int pending);

// What an atomic operation reads and writes.
void atomic_access(void *at, int bytes);

// --- Instructions of whole warps (instructions.cpp), after the layouts of the PTX manual. `operation`: an
// address that stands for the place in the code.

void load_matrices(const void *operation, unsigned (&r)[4], const void *row, bool transposed);
void multiply_16816(const void *operation, float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1);
void multiply_tf32(const void *operation, float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1);

// A kernel's entry in the table that `launch` looks up, with the bytes of each of its parameters.
typedef void (*Call)(void **parameters);
void add(const char *name, Call call, const size_t *sizes, int count);

template <class F> struct Unpack;
template <class... P> struct Unpack<void (*)(P...)> {
    template <void (*F)(P...), size_t... I>
    static void call(void **parameters, std::integer_sequence<size_t, I...>) {
        F(copy<std::remove_const_t<P>>(parameters[I])...);
    }
    // Aligned as the type is, wherever it comes from.
    template <class T> static T copy(const void *from) {
        T to;
        memcpy((void *)&to, from, sizeof to);
        return to;
    }
    template <void (*F)(P...)> static void run(void **parameters) {
        call<F>(parameters, std::make_integer_sequence<size_t, sizeof...(P)>());
    }
    static void add(const char *name, Call call) {
        static const size_t sizes[] = {sizeof(std::remove_reference_t<P>)...};
        simulation::add(name, call, sizes, sizeof...(P));
    }
};
struct Add {
    Add(void (*add)(const char *, Call), const char *name, Call call) { add(name, call); }
};
#define REGISTER(name)                                                                             \
    static simulation::Add add_##name(&simulation::Unpack<decltype(&name)>::add, #name,            \
                                      &simulation::Unpack<decltype(&name)>::template run<&name>);

// --- Exchanges within a warp.

// Every thread gets what the thread `source(lane)` gave.
template <class T, class Source> T shuffle(const void *operation, unsigned mask, T x, Source source) {
    struct Pair {
        T value;
        int from;
    } pair = {x, source(lane())};
    static_assert(sizeof(Pair) <= Exchange::MOST, "a value of a few bytes");
    T result;
    exchange(
        operation, mask, &pair, sizeof pair, &result, sizeof result,
        [](Exchange &e, unsigned mask, const void *) {
            for (int to = 0; to < 32; to++) {
                Pair own, other;
                if (!(mask >> to & 1)) continue;
                memcpy(&own, e.in[to], sizeof own);
                // A thread that takes no part gives nothing: the reader keeps its own.
                bool there = own.from >= 0 && own.from < 32 && (mask >> own.from & 1);
                memcpy(&other, e.in[there ? own.from : to], sizeof other);
                memcpy(e.out[to], &other.value, sizeof other.value);
            }
        },
        nullptr);
    return result;
}

} // namespace simulation

inline void __syncthreads() { simulation::block_barrier(); }
// Whether one of the block's threads says so.
UNWATCHED inline int __syncthreads_or(int predicate) {
    static int any;
    simulation::block_barrier();
    any = 0;
    simulation::block_barrier();
    if (predicate) any = 1;
    simulation::block_barrier();
    return any;
}
inline void __syncwarp(unsigned mask = 0xffffffffu) { simulation::warp_barrier(mask); }
inline void __threadfence() {}
inline void __threadfence_block() {}

template <class T> T __shfl_xor_sync(unsigned mask, T x, int with, int width = 32) {
    static const char id = 0;
    return simulation::shuffle(&id, mask, x, [=](int lane) { return lane ^ with; });
}
template <class T> T __shfl_down_sync(unsigned mask, T x, int by, int width = 32) {
    static const char id = 0;
    return simulation::shuffle(&id, mask, x, [=](int lane) {
        return lane % width + by < width ? lane + by : lane;
    });
}
template <class T> T __shfl_up_sync(unsigned mask, T x, int by, int width = 32) {
    static const char id = 0;
    return simulation::shuffle(&id, mask, x,
                               [=](int lane) { return lane % width >= by ? lane - by : lane; });
}
template <class T> T __shfl_sync(unsigned mask, T x, int from, int width = 32) {
    static const char id = 0;
    return simulation::shuffle(&id, mask, x, [=](int lane) {
        return lane / width * width + (from % width + width) % width;
    });
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
    static const char id = 0;
    unsigned result;
    int in = predicate != 0;
    simulation::exchange(
        &id, mask, &in, sizeof in, &result, sizeof result,
        [](simulation::Exchange &e, unsigned mask, const void *) {
            unsigned votes = 0;
            for (int lane = 0; lane < 32; lane++) {
                int vote;
                memcpy(&vote, e.in[lane], sizeof vote);
                if ((mask >> lane & 1) && vote) votes |= 1u << lane;
            }
            for (int lane = 0; lane < 32; lane++) memcpy(e.out[lane], &votes, sizeof votes);
        },
        nullptr);
    return result;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }

// --- Numbers.

struct alignas(8) float2 {
    float x, y;
};
inline float2 make_float2(float x, float y) { return float2{x, y}; }
struct alignas(16) float4 {
    float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return float4{x, y, z, w}; }

inline float __uint_as_float(unsigned x) { float y; memcpy(&y, &x, 4); return y; }
inline float __int_as_float(int x) { float y; memcpy(&y, &x, 4); return y; }
inline unsigned __float_as_uint(float x) { unsigned y; memcpy(&y, &x, 4); return y; }
inline int __float_as_int(float x) { int y; memcpy(&y, &x, 4); return y; }
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((uint64_t)a * b >> 32); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }

// Those of activation.cuh, for which numbers below the smallest normal one are 0.
inline float normal_or_zero(float x) { return fabsf(x) < 1.17549435e-38f ? copysignf(0, x) : x; }
inline float exp2_fast(float x) { return normal_or_zero(exp2f(normal_or_zero(x))); }
inline float exp2_near(float x) { return exp2_fast(x); }
inline void keep_order() {}
inline float reciprocal_fast(float x) { return normal_or_zero(1.0f / normal_or_zero(x)); }

inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __saturatef(float x) { return fminf(fmaxf(x, 0.0f), 1.0f); }
inline bool isfinite(float x) { return std::isfinite(x); }
template <class T> inline T __ldg(const T *p) { return *p; }
template <class A, class B> inline std::common_type_t<A, B> min(A a, B b) {
    typedef std::common_type_t<A, B> T;
    return (T)b < (T)a ? (T)b : (T)a;
}
template <class A, class B> inline std::common_type_t<A, B> max(A a, B b) {
    typedef std::common_type_t<A, B> T;
    return (T)a < (T)b ? (T)b : (T)a;
}
// One thread runs at a time, so that these are what they say.
template <class T, class F> UNWATCHED T atomic(T *p, F change) {
    simulation::atomic_access(p, sizeof(T));
    T old = *p;
    *p = change(old);
    return old;
}
template <class T> inline T atomicAdd(T *p, T x) { return atomic(p, [=](T old) { return old + x; }); }
template <class T> inline T atomicMin(T *p, T x) { return atomic(p, [=](T old) { return old < x ? old : x; }); }
template <class T> inline T atomicMax(T *p, T x) { return atomic(p, [=](T old) { return old < x ? x : old; }); }
template <class T> inline T atomicOr(T *p, T x) { return atomic(p, [=](T old) { return old | x; }); }
template <class T> inline T atomicExch(T *p, T x) { return atomic(p, [=](T) { return x; }); }

// Those of half.cuh.
inline uint16_t to_half(float x) {
    if (x != x) return 0x7fff;
    unsigned sign = __float_as_uint(x) >> 16 & 0x8000;
    x = fminf(fabsf(x), 65504.0f);
    // Below the smallest normal number, multiples of 2^-24; else ten bits behind the first.
    if (x < 6.103515625e-05f) return (uint16_t)(sign | (unsigned)nearbyintf(x * 16777216.0f));
    unsigned word = __float_as_uint(x) - (112u << 23);
    return (uint16_t)(sign | ((word + 0xfff + (word >> 13 & 1)) >> 13));
}
inline unsigned pack_half(float low, float high) {
    return (unsigned)to_half(low) | (unsigned)to_half(high) << 16;
}
inline float from_half(uint16_t x) {
    float size = (x & 0x7c00) == 0 ? (float)(x & 0x3ff) / 16777216.0f
                                   : __uint_as_float(((unsigned)(x & 0x7fff) << 13) + (112u << 23));
    if ((x & 0x7c00) == 0x7c00) size = x & 0x3ff ? NAN : INFINITY;
    return x & 0x8000 ? -size : size;
}

// --- The instructions of ptx.cuh.

inline void cp_async_16(void *shared, const void *global, bool valid) {
    simulation::copy_later(shared, global, 16, valid ? 16 : 0);
}
inline void cp_async_part(void *shared, const void *global, int bytes) {
    simulation::copy_later(shared, global, 16, bytes);
}
inline void cp_async_4(void *shared, const void *global, bool valid) {
    simulation::copy_later(shared, global, 4, valid ? 4 : 0);
}
inline void cp_async_commit() { simulation::end_group(); }
template <int PENDING> inline void cp_async_wait() { simulation::wait_groups(PENDING); }

inline void ldmatrix_x4(unsigned (&r)[4], const void *row) {
    static const char id = 0;
    simulation::load_matrices(&id, r, row, false);
}
inline void ldmatrix_x4_trans(unsigned (&r)[4], const void *row) {
    static const char id = 0;
    simulation::load_matrices(&id, r, row, true);
}

inline void mma_bf16_16816(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    static const char id = 0;
    simulation::multiply_16816(&id, d, a, b0, b1);
}

inline void mma_tf32_1688(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    static const char id = 0;
    simulation::multiply_tf32(&id, d, a, b0, b1);
}

inline unsigned pack_bf16(float low, float high) {
    auto round = [](float x) -> unsigned {
        unsigned word = __float_as_uint(x);
        if (x != x) return (word >> 16) | 0x40;
        return (word + 0x7fff + (word >> 16 & 1)) >> 16;
    };
    return round(low) | round(high) << 16;
}

#if __CUDA_ARCH__ >= 900
#define __CUDA_ARCH_FEAT_SM90_ALL 1
#include "hopper.hpp"
#endif
