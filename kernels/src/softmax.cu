// Softmax and its logarithm along the rows of [rows, columns].
//
// The largest element is subtracted first, so that no exponential overflows. A row of nothing but
// negative infinity gives NaN.
#include "activation.cuh"
#include "rows.cuh"

// e^x as far as T shows it.
template <class T> __device__ __forceinline__ float exponential(float x) {
    return sizeof(T) == 2 ? exp2_fast(x * LOG2_E) : expf(x);
}

// y = e^x / sum e^x, or with `log` x - ln sum e^x
template <class T>
__device__ void softmax(const T *x, T *y, i64 rows, int columns, bool log, bool wide, bool keep) {
    constexpr int N = ROW_GROUP;
    i64 r = own_row();
    if (r >= rows) return; // a whole warp
    Row<T, ONE> row(x, nullptr, r, columns, wide, keep);
    typedef typename Row<T, ONE>::Item Item;
    float most = -INFINITE;
    row.first([&](int i, Item &item) {
        int left = row.left(i);
#pragma unroll
        for (int e = 0; e < N; e++)
            if (e < left) most = fmaxf(most, item.a[e]);
    });
    most = row_max(most);
    float sum = 0;
    row.again([&](int i, Item &item) {
        int left = row.left(i);
#pragma unroll
        for (int e = 0; e < N; e++)
            if (e < left) sum += exponential<T>(item.a[e] - most);
    });
    sum = row_sum(sum);
    float scale = 1.f / sum, shift = logf(sum);
    T *out = y + r * columns;
    row.again([&](int i, Item &item) {
        float result[N];
#pragma unroll
        for (int e = 0; e < N; e++) {
            float v = item.a[e] - most;
            result[e] = log ? v - shift : exponential<T>(v) * scale;
        }
        item.a.put(result);
        row.write(out, i, item.a);
    });
}

// dx = y (dy - sum y dy), or with `log` dy - e^y sum dy
template <class T>
__device__ void softmax_backward(const T *y, const T *dy, T *dx, i64 rows, int columns, bool log,
                                 bool wide, bool keep) {
    constexpr int N = ROW_GROUP;
    i64 r = own_row();
    if (r >= rows) return;
    Row<T, BOTH> row(y, dy, r, columns, wide, keep);
    typedef typename Row<T, BOTH>::Item Item;
    float sum = 0;
    row.first([&](int, Item &item) {
#pragma unroll
        for (int e = 0; e < N; e++) {
            float d = item.b[e];
            sum = log ? sum + d : fmaf(item.a[e], d, sum);
        }
    });
    sum = row_sum(sum);
    T *out = dx + r * columns;
    row.again([&](int i, Item &item) {
        float result[N];
#pragma unroll
        for (int e = 0; e < N; e++) {
            float v = item.a[e], d = item.b[e];
            result[e] = log ? fmaf(-exponential<T>(v), sum, d) : v * (d - sum);
        }
        item.a.put(result);
        row.write(out, i, item.a);
    });
}

#define KERNELS(T, name)                                                                           \
    EXPORT softmax_##name(const T *x, T *y, i64 rows, int columns, int log, int wide, int keep) {  \
        softmax(x, y, rows, columns, log, wide, keep);                                             \
    }                                                                                              \
    EXPORT softmax_backward_##name(const T *y, const T *dy, T *dx, i64 rows, int columns, int log, \
                                   int wide, int keep) {                                           \
        softmax_backward(y, dy, dx, rows, columns, log, wide, keep);                               \
    }
KERNELS(float, f32)
KERNELS(bf16, bf16)
