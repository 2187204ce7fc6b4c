// Soft caps of logits: y = cap tanh(x / cap).
#include "pack.cuh"

// In place.
template <class T> __device__ void softcap(T *x, float cap, float inverse, i64 count) {
    bool wide = aligned16(x);
    stream<Wide<T>::N>(
        count, wide, [&](auto n, i64 first) { return load<COUNT(n)>(x + first); },
        [&](auto n, i64 first, auto &at) {
            float result[COUNT(n)];
#pragma unroll
            for (int e = 0; e < COUNT(n); e++) result[e] = cap * tanhf(at[e] * inverse);
            at.put(result);
            store(x + first, at);
        });
}

// dy *= 1 - (y / cap)^2, in place.
template <class T> __device__ void softcap_backward(const T *y, T *dy, float inverse, i64 count) {
    bool wide = aligned16(y) && aligned16(dy);
    stream<Wide<T>::N>(
        count, wide, [&](auto n, i64 first) { return load<COUNT(n)>(y, dy, first); },
        [&](auto n, i64 first, auto &of) {
            float result[COUNT(n)];
#pragma unroll
            for (int e = 0; e < COUNT(n); e++) {
                float t = of.a[e] * inverse;
                result[e] = of.b[e] * fmaf(-t, t, 1.f);
            }
            of.b.put(result);
            store(dy + first, of.b);
        });
}

#define KERNELS(T, name)                                                                           \
    EXPORT softcap_##name(T *x, float cap, float inverse, i64 count) {                             \
        softcap(x, cap, inverse, count);                                                           \
    }                                                                                              \
    EXPORT softcap_backward_##name(const T *y, T *dy, float inverse, i64 count) {                  \
        softcap_backward(y, dy, inverse, count);                                                   \
    }
KERNELS(float, f32)
KERNELS(bf16, bf16)
