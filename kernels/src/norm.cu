// Normalisation of rows: LayerNorm, RMSNorm, and division by the Euclidean norm.
//
// Rows are [rows, columns]; statistics, parameters and their gradients are f32.
#include "rows.cuh"

// s = x + residual; y = (s - mean) rstd weight + bias with CENTRED (layer norm), else s rstd (weight +
// offset). residual, weight, bias and sum (which receives s) may be null; mean is written if CENTRED.
// The variance is put together of those of each thread's elements, so that rows far from zero keep it.
template <class T, bool CENTRED>
__device__ void norm(const T *x, const T *residual, const float *weight, const float *bias,
                     float offset, float eps, T *y, T *sum, float *mean, float *rstd, i64 rows,
                     int columns, bool wide, bool wide_parameters, bool keep) {
    constexpr int N = ROW_GROUP;
    i64 r = own_row();
    if (r >= rows) return; // a whole warp
    Row<T, ADDED> row(x, residual, r, columns, wide, keep);
    typedef typename Row<T, ADDED>::Item Item;
    float inverse = 1.f / columns;
    T *to = sum ? sum + r * columns : nullptr;

    // Distances from a first mean of each thread: their sum and that of their squares.
    float count = 0, near = 0, distances = 0, squares = 0;
    row.first([&](int i, Item &item) {
        if (to) row.write(to, i, item.a);
        if (!CENTRED) {
#pragma unroll
            for (int e = 0; e < N; e++) squares = fmaf(item.a[e], item.a[e], squares);
            return;
        }
        int there = min(row.left(i), N);
        if (i == (int)threadIdx.x) {
            float all = 0;
#pragma unroll
            for (int e = 0; e < N; e++) all += item.a[e];
            near = all / there;
        }
        count += there;
#pragma unroll
        for (int e = 0; e < N; e++) {
            float d = item.a[e] - near;
            if (e >= there) d = 0;
            distances += d;
            squares = fmaf(d, d, squares);
        }
    });

    float centre = 0, scale;
    if (CENTRED) {
        Moments moments;
        float rest = count > 0 ? distances / count : 0.f;
        moments.count = count;
        moments.mean = near + rest;
        moments.squares = fmaf(-rest, distances, squares);
        moments = row_moments(moments);
        centre = moments.mean;
        scale = 1.f / sqrtf(fmaxf(moments.squares * inverse, 0.f) + eps);
    } else {
        scale = 1.f / sqrtf(row_sum(squares) * inverse + eps);
    }
    if (threadIdx.x == 0) {
        if (CENTRED) mean[r] = centre;
        rstd[r] = scale;
    }

    T *out = y + r * columns;
    row.again([&](int i, Item &item) {
        Elements<float, N> w, b;
        if (weight) w = load_floats(weight, i * N, columns, wide_parameters);
        if (bias) b = load_floats(bias, i * N, columns, wide_parameters);
        float result[N];
#pragma unroll
        for (int e = 0; e < N; e++) {
            float v = (item.a[e] - centre) * scale;
            if (weight) v *= CENTRED ? w[e] : w[e] + offset;
            if (bias) v += b[e];
            result[e] = v;
        }
        item.a.put(result);
        row.write(out, i, item.a);
    });
}

// The gradient of s. With g = dy (weight + offset) and n = (s - mean) rstd: dx = rstd (g - mean(g) - n
// mean(g n)), the second term only if CENTRED. weight and mean may be null.
template <class T, bool CENTRED>
__device__ void norm_backward(const T *s, const float *weight, float offset, const float *mean,
                              const float *rstd, const T *dy, T *dx, i64 rows, int columns,
                              bool wide, bool wide_parameters, bool keep) {
    constexpr int N = ROW_GROUP;
    i64 r = own_row();
    if (r >= rows) return;
    Row<T, BOTH> row(s, dy, r, columns, wide, keep);
    typedef typename Row<T, BOTH>::Item Item;
    float inverse = 1.f / columns, scale = rstd[r], centre = CENTRED ? mean[r] : 0.f;

    float sum = 0, dot = 0;
    row.first([&](int i, Item &item) {
        Elements<float, N> w;
        if (weight) w = load_floats(weight, i * N, columns, wide_parameters);
#pragma unroll
        for (int e = 0; e < N; e++) {
            float g = item.b[e];
            if (weight) g *= w[e] + offset;
            if (CENTRED) sum += g;
            dot = fmaf(g, item.a[e] - centre, dot);
        }
    });
    if (CENTRED) row_sums(sum, dot);
    else dot = row_sum(dot);
    float shift = sum * inverse, slope = dot * inverse * scale * scale;

    T *out = dx + r * columns;
    row.again([&](int i, Item &item) {
        Elements<float, N> w;
        if (weight) w = load_floats(weight, i * N, columns, wide_parameters);
        float result[N];
#pragma unroll
        for (int e = 0; e < N; e++) {
            float g = item.b[e];
            if (weight) g *= w[e] + offset;
            if (CENTRED) g -= shift;
            result[e] = fmaf(centre - item.a[e], slope, g) * scale;
        }
        item.a.put(result);
        row.write(out, i, item.a);
    });
}

// The first step of the parameters' gradients: sums over rows blockIdx.y * each to + each of dy (s -
// mean) rstd and of dy, for 32 packs of N columns, written to row blockIdx.y of dweight and dbias
// [gridDim.y, columns]. Either may be null; then so may what only it reads. blockDim: [32, 8].
#define PARTIAL_ROWS 8
template <int N, bool CENTRED, class T>
__device__ void norm_partial(const T *s, const float *mean, const float *rstd, const T *dy,
                             float *dweight, float *dbias, i64 rows, i64 each, int columns) {
    __shared__ float sums[2][PARTIAL_ROWS][32 * N];
    int column = (blockIdx.x * 32 + threadIdx.x) * N;
    float weights[N], biases[N];
#pragma unroll
    for (int e = 0; e < N; e++) weights[e] = biases[e] = 0;
    i64 end = (i64)(blockIdx.y + 1) * each;
    if (end > rows) end = rows;
    if (column < columns) {
#pragma unroll 4
        for (i64 r = (i64)blockIdx.y * each + threadIdx.y; r < end; r += PARTIAL_ROWS) {
            Elements<T, N> d = load<N>(dy + r * columns + column);
            if (dweight) {
                Elements<T, N> v = load<N>(s + r * columns + column);
                float scale = rstd[r], centre = CENTRED ? mean[r] : 0.f;
#pragma unroll
                for (int e = 0; e < N; e++)
                    weights[e] = fmaf(d[e], (v[e] - centre) * scale, weights[e]);
            }
            if (dbias) {
#pragma unroll
                for (int e = 0; e < N; e++) biases[e] += d[e];
            }
        }
    }
    // Element e of all lanes side by side, so that no two lanes meet in a bank.
#pragma unroll
    for (int e = 0; e < N; e++) {
        sums[0][threadIdx.y][e * 32 + threadIdx.x] = weights[e];
        sums[1][threadIdx.y][e * 32 + threadIdx.x] = biases[e];
    }
    __syncthreads();
    for (int at = threadIdx.y * 32 + threadIdx.x; at < 32 * N; at += 32 * PARTIAL_ROWS) {
        int c = blockIdx.x * 32 * N + at;
        if (c >= columns) break;
        int place = at % N * 32 + at / N;
        float weight = 0, bias = 0;
#pragma unroll
        for (int row = 0; row < PARTIAL_ROWS; row++) {
            weight += sums[0][row][place];
            bias += sums[1][row][place];
        }
        if (dweight) dweight[(i64)blockIdx.y * columns + c] = weight;
        if (dbias) dbias[(i64)blockIdx.y * columns + c] = bias;
    }
}

// y = x / max(|x|, eps). scale[row] is what x was multiplied with; negative where eps was the larger,
// because y then depends on x linearly.
template <class T>
__device__ void l2(const T *x, float eps, T *y, float *scales, i64 rows, int columns, bool wide,
                   bool keep) {
    constexpr int N = ROW_GROUP;
    i64 r = own_row();
    if (r >= rows) return;
    Row<T, ONE> row(x, nullptr, r, columns, wide, keep);
    typedef typename Row<T, ONE>::Item Item;
    float square = 0;
    row.first([&](int, Item &item) {
#pragma unroll
        for (int e = 0; e < N; e++) {
            float v = item.a[e];
            square = fmaf(v, v, square);
        }
    });
    float length = sqrtf(row_sum(square));
    bool limited = length < eps;
    float scale = 1.f / (limited ? eps : length);
    if (threadIdx.x == 0) scales[r] = limited ? -scale : scale;
    T *out = y + r * columns;
    row.again([&](int i, Item &item) {
        float result[N];
#pragma unroll
        for (int e = 0; e < N; e++) result[e] = item.a[e] * scale;
        item.a.put(result);
        row.write(out, i, item.a);
    });
}

// dx = (dy - y (y dy)) scale, without the second term where scale is negative.
template <class T>
__device__ void l2_backward(const T *y, const float *scales, const T *dy, T *dx, i64 rows,
                            int columns, bool wide, bool keep) {
    constexpr int N = ROW_GROUP;
    i64 r = own_row();
    if (r >= rows) return;
    Row<T, BOTH> row(y, dy, r, columns, wide, keep);
    typedef typename Row<T, BOTH>::Item Item;
    float dot = 0;
    row.first([&](int, Item &item) {
#pragma unroll
        for (int e = 0; e < N; e++) dot = fmaf(item.a[e], item.b[e], dot);
    });
    dot = row_sum(dot);
    float scale = scales[r];
    if (scale < 0) dot = 0;
    scale = fabsf(scale);
    T *out = dx + r * columns;
    row.again([&](int i, Item &item) {
        float result[N];
#pragma unroll
        for (int e = 0; e < N; e++) result[e] = fmaf(-dot, item.a[e], item.b[e]) * scale;
        item.a.put(result);
        row.write(out, i, item.a);
    });
}

#define KERNELS(T, name)                                                                           \
    EXPORT layer_norm_##name(const T *x, const T *residual, const float *weight,                   \
                             const float *bias, float eps, T *y, T *sum, float *mean, float *rstd, \
                             i64 rows, int columns, int wide, int wide_parameters, int keep) {     \
        norm<T, true>(x, residual, weight, bias, 0, eps, y, sum, mean, rstd, rows, columns, wide,  \
                      wide_parameters, keep);                                                      \
    }                                                                                              \
    EXPORT rms_norm_##name(const T *x, const T *residual, const float *weight, float offset,       \
                           float eps, T *y, T *sum, float *rstd, i64 rows, int columns, int wide,  \
                           int wide_parameters, int keep) {                                        \
        norm<T, false>(x, residual, weight, nullptr, offset, eps, y, sum, nullptr, rstd, rows,     \
                       columns, wide, wide_parameters, keep);                                      \
    }                                                                                              \
    EXPORT layer_norm_backward_##name(const T *s, const float *weight, const float *mean,          \
                                      const float *rstd, const T *dy, T *dx, i64 rows,             \
                                      int columns, int wide, int wide_parameters, int keep) {      \
        norm_backward<T, true>(s, weight, 0, mean, rstd, dy, dx, rows, columns, wide,              \
                               wide_parameters, keep);                                             \
    }                                                                                              \
    EXPORT rms_norm_backward_##name(const T *s, const float *weight, float offset,                 \
                                    const float *rstd, const T *dy, T *dx, i64 rows, int columns,  \
                                    int wide, int wide_parameters, int keep) {                     \
        norm_backward<T, false>(s, weight, offset, nullptr, rstd, dy, dx, rows, columns, wide,     \
                                wide_parameters, keep);                                            \
    }                                                                                              \
    EXPORT layer_norm_partial_##name(const T *s, const float *mean, const float *rstd,             \
                                     const T *dy, float *dweight, float *dbias,                    \
                                     i64 rows, i64 each, int columns) {                            \
        norm_partial<Wide<T>::N, true>(s, mean, rstd, dy, dweight, dbias, rows, each, columns);    \
    }                                                                                              \
    EXPORT rms_norm_partial_##name(const T *s, const float *rstd, const T *dy,                     \
                                   float *dweight, i64 rows, i64 each, int columns) {              \
        norm_partial<Wide<T>::N, false>(s, nullptr, rstd, dy, dweight, nullptr, rows, each,        \
                                        columns);                                                  \
    }                                                                                              \
    EXPORT layer_norm_partial_single_##name(const T *s, const float *mean, const float *rstd,      \
                                            const T *dy, float *dweight, float *dbias,             \
                                            i64 rows, i64 each, int columns) {                     \
        norm_partial<1, true>(s, mean, rstd, dy, dweight, dbias, rows, each, columns);             \
    }                                                                                              \
    EXPORT rms_norm_partial_single_##name(const T *s, const float *rstd, const T *dy,              \
                                          float *dweight, i64 rows, i64 each, int columns) {       \
        norm_partial<1, false>(s, nullptr, rstd, dy, dweight, nullptr, rows, each,                 \
                               columns);                                                           \
    }                                                                                              \
    EXPORT l2_##name(const T *x, float eps, T *y, float *scales, i64 rows, int columns, int wide,  \
                     int keep) {                                                                   \
        l2(x, eps, y, scales, rows, columns, wide, keep);                                          \
    }                                                                                              \
    EXPORT l2_backward_##name(const T *y, const float *scales, const T *dy, T *dx, i64 rows,       \
                              int columns, int wide, int keep) {                                   \
        l2_backward(y, scales, dy, dx, rows, columns, wide, keep);                                 \
    }
KERNELS(float, f32)
KERNELS(bf16, bf16)
