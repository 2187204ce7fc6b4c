// What kernels that treat each element alone share: 16 bytes at a time, the next ones under way while
// those before are computed.
#pragma once

#include "common.cuh"

// Two floats as bf16 side by side, `low` in the low half.
__device__ __forceinline__ u32 two_bf16(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800 && !defined(GRAFT_SIMULATION)
    u32 word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
#else
    return (u32)to_bf16(low).bits | (u32)to_bf16(high).bits << 16;
#endif
}

// N neighbouring elements in registers, in words as they are stored: what is loaded long before it is
// used must not be taken apart before. x[e] is element e as float; `put` sets all of them. `push` and
// `pop` move every element by one place, for loops over the elements.
template <class T, int N> struct Elements;

template <int N> struct __align__(4 * N) Elements<float, N> {
    float at[N];
    __device__ __forceinline__ float operator[](int e) const { return at[e]; }
    __device__ __forceinline__ void put(const float (&x)[N]) {
#pragma unroll
        for (int e = 0; e < N; e++) at[e] = x[e];
    }
    __device__ __forceinline__ void push(float x) {
#pragma unroll
        for (int e = N - 1; e > 0; e--) at[e] = at[e - 1];
        at[0] = x;
    }
    __device__ __forceinline__ float pop() {
        float x = at[0];
#pragma unroll
        for (int e = 0; e < N - 1; e++) at[e] = at[e + 1];
        return x;
    }
};

template <int N> struct __align__(2 * N) Elements<bf16, N> {
    u32 words[N / 2];
    __device__ __forceinline__ float operator[](int e) const {
        return __uint_as_float(e % 2 ? words[e / 2] & 0xffff0000u : words[e / 2] << 16);
    }
    __device__ __forceinline__ void put(const float (&x)[N]) {
#pragma unroll
        for (int e = 0; e < N; e += 2) words[e / 2] = two_bf16(x[e], x[e + 1]);
    }
    __device__ __forceinline__ void push(bf16 x) {
#pragma unroll
        for (int w = N / 2 - 1; w > 0; w--) words[w] = words[w] << 16 | words[w - 1] >> 16;
        words[0] = words[0] << 16 | x.bits;
    }
    __device__ __forceinline__ bf16 pop() {
        bf16 x;
        x.bits = (u16)words[0];
#pragma unroll
        for (int w = 0; w < N / 2 - 1; w++) words[w] = words[w] >> 16 | words[w + 1] << 16;
        words[N / 2 - 1] >>= 16;
        return x;
    }
};

template <> struct Elements<bf16, 1> {
    bf16 at;
    __device__ __forceinline__ float operator[](int) const { return widen(at); }
    __device__ __forceinline__ void put(const float (&x)[1]) { at = to_bf16(x[0]); }
};

// As many elements as 16 bytes hold.
template <class T> using Group = Elements<T, Wide<T>::N>;

// N elements from `p` on, by one instruction; stored likewise.
template <int N, class T> __device__ __forceinline__ Elements<T, N> load(const T *p) {
    return *(const Elements<T, N> *)p;
}
template <int N, class T> __device__ __forceinline__ void store(T *p, const Elements<T, N> &x) {
    *(Elements<T, N> *)p = x;
}

// The first `there` of N elements one by one, zeros beyond; stored likewise.
template <int N, class T> __device__ __forceinline__ Elements<T, N> load_some(const T *p, int there) {
    Elements<T, N> x;
#pragma unroll 1
    for (int e = N - 1; e >= 0; e--) x.push(e < there ? p[e] : narrow<T>(0.f));
    return x;
}
template <int N, class T>
__device__ __forceinline__ void store_some(T *p, int there, Elements<T, N> x) {
#pragma unroll 1
    for (int e = 0; e < N; e++) {
        T element = x.pop();
        if (e < there) p[e] = element;
    }
}

// How many elements a call treats, as an argument that is known while compiling.
template <int N> struct Count {
    static constexpr int value = N;
};
#define COUNT(n) decltype(n)::value

// `read(n, first)` and then `work(n, first, what was read)` for all of `count` elements, cut among the
// threads of a grid of any size: n is N where `wide` says that tensors begin at multiples of 16
// bytes, and 1 for what is left. `read` must not see what `work` writes for other elements.
template <int N, class Read, class Work>
__device__ __forceinline__ void stream(i64 count, bool wide, Read read, Work work) {
    i64 threads = (i64)gridDim.x * blockDim.x;
    i64 thread = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    i64 whole = wide ? count - count % N : 0;
    i64 first = thread * N;
    if (first < whole) {
        auto next = read(Count<N>(), first);
        for (;;) {
            auto now = next;
            i64 after = first + threads * N;
            bool more = after < whole;
            if (more) next = read(Count<N>(), after);
            work(Count<N>(), first, now);
            if (!more) break;
            first = after;
        }
    }
#pragma unroll 1
    for (i64 i = whole + thread; i < count; i += threads) {
        auto one = read(Count<1>(), i);
        work(Count<1>(), i, one);
    }
}

// N elements of two or three tensors, that are read together.
template <class T, int N> struct Two {
    Elements<T, N> a, b;
};
template <class T, int N> struct Three {
    Elements<T, N> a, b, c;
};
template <int N, class T>
__device__ __forceinline__ Two<T, N> load(const T *a, const T *b, i64 first) {
    Two<T, N> of;
    of.a = load<N>(a + first);
    of.b = load<N>(b + first);
    return of;
}
template <int N, class T>
__device__ __forceinline__ Three<T, N> load(const T *a, const T *b, const T *c, i64 first) {
    Three<T, N> of;
    of.a = load<N>(a + first);
    of.b = load<N>(b + first);
    of.c = load<N>(c + first);
    return of;
}

// `i / d` and `i % d`, in 32 bits where that is enough: a division in 64 takes several times as long.
__device__ __forceinline__ void divide(i64 i, u32 d, i64 &quotient, u32 &remainder) {
    if ((u64)i >> 32 == 0) {
        u32 q = (u32)i / d;
        quotient = q;
        remainder = (u32)i - q * d;
    } else {
        quotient = i / d;
        remainder = (u32)(i - quotient * d);
    }
}
