// Copies: filling, converting, gathering from and scattering to strided layouts.
#include "common.cuh"

// y[i] = value; the driver fills with shorter elements.
EXPORT fill_u64(u64 *y, i64 count, u64 value) {
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) y[i] = value;
}

// y[i] = x[i] in another type, rounded to nearest; four elements a thread.
template <class S, class D> __device__ void convert(const S *x, D *y, i64 count) {
    i64 first = 4 * ((i64)blockIdx.x * blockDim.x + threadIdx.x);
    if (first + 4 <= count && aligned16(x) && aligned16(y)) {
        Pack<S, 4> from = *(const Pack<S, 4> *)(x + first);
        Pack<D, 4> to;
#pragma unroll
        for (int i = 0; i < 4; i++) to.at[i] = narrow<D>(widen(from.at[i]));
        *(Pack<D, 4> *)(y + first) = to;
    } else {
        for (i64 i = first; i < first + 4 && i < count; i++) y[i] = narrow<D>(widen(x[i]));
    }
}
EXPORT convert_f32_bf16(const float *x, bf16 *y, i64 count) { convert(x, y, count); }
EXPORT convert_bf16_f32(const bf16 *x, float *y, i64 count) { convert(x, y, count); }

// y[i] = the i-th element of x in row-major order of `s`
template <class T> __device__ void gather_strided(const T *x, T *y, i64 count, const Strided &s) {
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) y[i] = x[strided_offset(s, i)];
}
// The other way round: the i-th element of y in row-major order of `s` = x[i]
template <class T> __device__ void scatter_strided(const T *x, T *y, i64 count, const Strided &s) {
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) y[strided_offset(s, i)] = x[i];
}
#define STRIDED(bits)                                                                              \
    EXPORT gather_strided_u##bits(const u##bits *x, u##bits *y, i64 count, Strided s) {            \
        gather_strided(x, y, count, s);                                                            \
    }                                                                                              \
    EXPORT scatter_strided_u##bits(const u##bits *x, u##bits *y, i64 count, Strided s) {           \
        scatter_strided(x, y, count, s);                                                           \
    }
STRIDED(8)
STRIDED(16)
STRIDED(32)
STRIDED(64)
