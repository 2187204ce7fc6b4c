// What every kernel source builds on: number types, warp and block sums, random numbers. Includes
// no header of the system or the toolkit.
//
// Storage types are float and bf16; arithmetic is float. Sums are formed in a fixed order, so that
// the same input gives the same bits in every run.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#ifndef GRAFT_SIMULATION
#define EXPORT extern "C" __global__ void
// Dynamic shared memory, aligned for every vector and for the tensor copy engine's swizzle.
#define DYNAMIC_SHARED(name) extern __shared__ __align__(1024) u8 name[]
#endif

#define INFINITE __int_as_float(0x7f800000)

struct bf16 {
    u16 bits;
};

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(bf16 x) { return __uint_as_float((u32)x.bits << 16); }

// To nearest, ties to even; NaN stays NaN (quiet).
__device__ __forceinline__ bf16 to_bf16(float x) {
    bf16 y;
#if !defined(GRAFT_SIMULATION) && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
#else
    u32 word = __float_as_uint(x);
    y.bits = x != x ? (u16)((word >> 16) | 0x40) : (u16)((word + 0x7fff + ((word >> 16) & 1)) >> 16);
#endif
    return y;
}

template <class T> __device__ __forceinline__ T narrow(float x);
template <> __device__ __forceinline__ float narrow<float>(float x) { return x; }
template <> __device__ __forceinline__ bf16 narrow<bf16>(float x) { return to_bf16(x); }

// N elements that are loaded and stored by one instruction.
template <class T, int N> struct __align__(sizeof(T) * N) Pack {
    T at[N];
};

// Elements of 16 bytes.
template <class T> struct Wide {
    static constexpr int N = 16 / sizeof(T);
    typedef Pack<T, 16 / sizeof(T)> Type;
};

// Whether elements from `p` on can be read 16 bytes at a time.
__device__ __forceinline__ bool aligned16(const void *p) { return ((u64)p & 15) == 0; }

// --- Sums and maxima. Every thread of the warp or block takes part, and every one has the result.

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int lane = 16; lane > 0; lane /= 2) x += __shfl_xor_sync(0xffffffffu, x, lane);
    return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int lane = 16; lane > 0; lane /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, lane));
    return x;
}

// THREADS: blockDim.x, a multiple of 32. May be called again at once.
template <int THREADS> __device__ __forceinline__ float block_sum(float x) {
    __shared__ float parts[THREADS / 32];
    x = warp_sum(x);
    __syncthreads(); // the parts of the call before have been read
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
    __syncthreads();
    float sum = 0;
#pragma unroll
    for (int warp = 0; warp < THREADS / 32; warp++) sum += parts[warp];
    return sum;
}

template <int THREADS> __device__ __forceinline__ float block_max(float x) {
    __shared__ float parts[THREADS / 32];
    x = warp_max(x);
    __syncthreads();
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
    __syncthreads();
    float most = parts[0];
#pragma unroll
    for (int warp = 1; warp < THREADS / 32; warp++) most = fmaxf(most, parts[warp]);
    return most;
}

// --- Random numbers: Philox4x32-10 (Salmon et al., SC 2011), word for word those of philox.rs.

struct Words {
    u32 at[4];
};

__device__ __forceinline__ Words philox(u32 key0, u32 key1, u32 c0, u32 c1, u32 c2, u32 c3) {
#pragma unroll
    for (int round = 0; round < 10; round++) {
        u32 high0 = __umulhi(c0, 0xD2511F53u), low0 = c0 * 0xD2511F53u;
        u32 high1 = __umulhi(c2, 0xCD9E8D57u), low1 = c2 * 0xCD9E8D57u;
        c0 = high1 ^ c1 ^ key0;
        c1 = low1;
        c2 = high0 ^ c3 ^ key1;
        c3 = low0;
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    Words words;
    words.at[0] = c0;
    words.at[1] = c1;
    words.at[2] = c2;
    words.at[3] = c3;
    return words;
}

// The words of elements 4 * number .. 4 * number + 4 of a stream.
__device__ __forceinline__ Words stream_words(u32 key0, u32 key1, u64 number) {
    return philox(key0, key1, (u32)number, (u32)(number >> 32), 0, 0);
}

// --- Shapes: as many dimensions as a tensor may have.

#define MAX_RANK 6
struct Strided {
    i64 dims[MAX_RANK]; // 1 beyond the rank
    i64 strides[MAX_RANK];
};

// Where element `i` in row-major order lies.
__device__ __forceinline__ i64 strided_offset(const Strided &s, i64 i) {
    i64 offset = 0;
#pragma unroll
    for (int axis = MAX_RANK - 1; axis >= 0; axis--) {
        i64 length = s.dims[axis];
        if (length != 1) {
            offset += i % length * s.strides[axis];
            i /= length;
        }
    }
    return offset;
}
