// Functions of two elements, with broadcasting.
#include "pack.cuh"

// Numbered as in binary.rs, and what says which of two was chosen.
enum Binary { ADD, SUB, MUL, DIV, MAX, MIN, EQUAL };

// a[e] = kind(a[e], b[e])
template <int N, class T>
__device__ __forceinline__ void both(int kind, Elements<T, N> &a, const Elements<T, N> &b) {
    float y[N];
#define VALUE(KIND, expression)                                                                    \
    case KIND:                                                                                     \
        _Pragma("unroll") for (int e = 0; e < N; e++) {                                            \
            float p = a[e], q = b[e];                                                              \
            y[e] = expression;                                                                     \
        }                                                                                          \
        break;
    switch (kind) {
        VALUE(ADD, p + q)
        VALUE(SUB, p - q)
        VALUE(MUL, p * q)
        VALUE(DIV, p / q)
        VALUE(MAX, p > q || p != p ? p : q)
        VALUE(MIN, p < q || p != p ? p : q)
        VALUE(EQUAL, p == q ? 1.f : 0.f)
    }
#undef VALUE
    a.put(y);
}

// y may be a.
template <class T> __device__ void binary(int kind, const T *a, const T *b, T *y, i64 count) {
    bool wide = aligned16(a) && aligned16(b) && aligned16(y);
    stream<Wide<T>::N>(
        count, wide, [&](auto n, i64 first) { return load<COUNT(n)>(a, b, first); },
        [&](auto n, i64 first, auto &of) {
            both(kind, of.a, of.b);
            store(y + first, of.a);
        });
}

// The shape of a result and the strides of its operands, the innermost dimension last; `first` is
// the first dimension that is there.
struct Walk {
    i64 dims[MAX_RANK];
    i64 strides[2][MAX_RANK];
    i64 first;
};

// Where the operands of element i of the result lie.
__device__ __forceinline__ void offsets(const Walk &walk, i64 i, i64 &a, i64 &b) {
    a = b = 0;
#pragma unroll
    for (int axis = MAX_RANK - 1; axis > 0; axis--) {
        if (axis > walk.first) {
            u32 here;
            divide(i, (u32)walk.dims[axis], i, here);
            a += here * walk.strides[0][axis];
            b += here * walk.strides[1][axis];
        } else if (axis == walk.first) {
            a += i * walk.strides[0][axis];
            b += i * walk.strides[1][axis];
        }
    }
    if (walk.first == 0) {
        a += i * walk.strides[0][0];
        b += i * walk.strides[1][0];
    }
}

// N elements of an operand that lie `stride` apart, which may be 0.
template <int N, class T>
__device__ __forceinline__ Elements<T, N> load_run(const T *p, i64 stride, bool wide) {
    if (wide) return load<N>(p);
    float run[N];
#pragma unroll
    for (int e = 0; e < N; e++) run[e] = widen(p[e * stride]);
    Elements<T, N> x;
    x.put(run);
    return x;
}

// N elements of a row of the result at a time: rows are multiples of N, and y begins at a multiple of
// their bytes. `wide_a`: a's elements of such a run can be read by one instruction.
template <int N, class T>
__device__ void binary_strided(int kind, const T *a, const T *b, T *y, i64 count, const Walk &walk,
                               bool wide_a, bool wide_b) {
    i64 stride_a = walk.strides[0][MAX_RANK - 1], stride_b = walk.strides[1][MAX_RANK - 1];
    i64 step = (i64)gridDim.x * blockDim.x * N;
    for (i64 i = ((i64)blockIdx.x * blockDim.x + threadIdx.x) * N; i < count; i += step) {
        i64 at_a, at_b;
        offsets(walk, i, at_a, at_b);
        Elements<T, N> p = load_run<N>(a + at_a, stride_a, wide_a);
        Elements<T, N> q = load_run<N>(b + at_b, stride_b, wide_b);
        both(kind, p, q);
        store(y + i, p);
    }
}

// y[i] += x[i] scale
template <class T> __device__ void add_scaled(T *y, const T *x, float scale, i64 count) {
    bool wide = aligned16(x) && aligned16(y);
    stream<Wide<T>::N>(
        count, wide, [&](auto n, i64 first) { return load<COUNT(n)>(y, x, first); },
        [&](auto n, i64 first, auto &of) {
            float result[COUNT(n)];
#pragma unroll
            for (int e = 0; e < COUNT(n); e++) result[e] = fmaf(of.b[e], scale, of.a[e]);
            of.a.put(result);
            store(y + first, of.a);
        });
}

#define KERNELS(T, name)                                                                           \
    EXPORT binary_##name(int kind, const T *a, const T *b, T *y, i64 count) {                      \
        binary(kind, a, b, y, count);                                                              \
    }                                                                                              \
    EXPORT binary_rows_##name(int kind, const T *a, const T *b, T *y, i64 count, Walk walk,        \
                              int wide_a, int wide_b) {                                            \
        binary_strided<Wide<T>::N>(kind, a, b, y, count, walk, wide_a, wide_b);                    \
    }                                                                                              \
    EXPORT binary_elements_##name(int kind, const T *a, const T *b, T *y, i64 count, Walk walk) {  \
        binary_strided<1>(kind, a, b, y, count, walk, false, false);                               \
    }                                                                                              \
    EXPORT add_scaled_##name(T *y, const T *x, float scale, i64 count) {                           \
        add_scaled(y, x, scale, count);                                                            \
    }
KERNELS(float, f32)
KERNELS(bf16, bf16)
