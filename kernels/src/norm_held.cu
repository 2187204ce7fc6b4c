// LayerNorm of rows that the registers of a warp hold: at most 1024 columns, a multiple of
// 8. Each number is read once, by forward and by backward, whose sums for the parameters' gradients
// stay in registers from row to row. norm.cu has the others.
#include "pack.cuh"

#define N 8     // elements of a pack
#define WARPS 4 // of a block

// The packs of a row that a lane has: pack i of lane l begins at column (32 i + l) N. Those that are
// not there are 0.
template <class T, int PACKS> struct Held {
    Elements<T, N> at[PACKS];

    __device__ __forceinline__ void read(const T *row, int columns, bool wide) {
#pragma unroll
        for (int i = 0; i < PACKS; i++) {
            int first = (32 * i + (int)threadIdx.x) * N;
            float x[N] = {};
            if (first < columns && wide) {
                at[i] = load<N>(row + first);
                continue;
            }
            if (first < columns) {
#pragma unroll
                for (int e = 0; e < N; e++) x[e] = widen(row[first + e]);
            }
            at[i].put(x);
        }
    }
    __device__ __forceinline__ void write(T *row, int columns, bool wide) const {
#pragma unroll
        for (int i = 0; i < PACKS; i++) {
            int first = (32 * i + (int)threadIdx.x) * N;
            if (first >= columns) continue;
            if (wide) {
                store(row + first, at[i]);
                continue;
            }
#pragma unroll
            for (int e = 0; e < N; e++) row[first + e] = narrow<T>(at[i][e]);
        }
    }
};

// A parameter in shared memory, by halves of packs; `other` where there is none, and 0 behind the
// columns.
template <int PACKS>
__device__ __forceinline__ void share(float *to, const float *p, float other, int columns) {
    for (int c = threadIdx.y * 32 + threadIdx.x; c < 32 * N * PACKS; c += 32 * WARPS) {
        int pack = c / N, at = (pack / 32 * 2 + c % N / 4) * 128 + pack % 32 * 4 + c % 4;
        to[at] = c >= columns ? 0 : p ? p[c] : other;
    }
}
// Half `half` of pack i of this lane, side by side with those of other lanes.
__device__ __forceinline__ float4 shared_four(const float *from, int i, int half) {
    return *(const float4 *)(from + (2 * i + half) * 128 + 4 * threadIdx.x);
}

// s = x + residual; y = (s - mean) rstd weight + bias. residual, weight, bias and sum (which receives
// s) may be null.
template <class T>
__device__ __forceinline__ void forward(const T *x, const T *residual, const float *weight,
                                        const float *bias, float eps, T *y, T *sum, float *means,
                                        float *rstds, i64 rows, int columns, bool wide) {
    constexpr int PACKS = 4;
    __shared__ __align__(16) float w[32 * N * PACKS], b[32 * N * PACKS];
    share<PACKS>(w, weight, 1, columns);
    share<PACKS>(b, bias, 0, columns);
    __syncthreads();
    float inverse = 1.f / columns;
    i64 step = (i64)gridDim.x * WARPS;
    for (i64 r = (i64)blockIdx.x * WARPS + threadIdx.y; r < rows; r += step) {
        Held<T, PACKS> s;
        s.read(x + r * columns, columns, wide);
        if (residual) {
            Held<T, PACKS> other;
            other.read(residual + r * columns, columns, wide);
#pragma unroll
            for (int i = 0; i < PACKS; i++) {
                float both[N];
#pragma unroll
                for (int e = 0; e < N; e++) both[e] = s.at[i][e] + other.at[i][e];
                s.at[i].put(both);
            }
            if (sum) s.write(sum + r * columns, columns, wide);
        }
        float centre = 0, squares = 0;
#pragma unroll
        for (int i = 0; i < PACKS; i++) {
#pragma unroll
            for (int e = 0; e < N; e++) centre += s.at[i][e];
        }
        centre = warp_sum(centre) * inverse;
#pragma unroll
        for (int i = 0; i < PACKS; i++) {
            if ((32 * i + (int)threadIdx.x) * N >= columns) continue;
#pragma unroll
            for (int e = 0; e < N; e++) {
                float d = s.at[i][e] - centre;
                squares = fmaf(d, d, squares);
            }
        }
        float scale = 1.f / sqrtf(warp_sum(squares) * inverse + eps);
        if (threadIdx.x == 0) {
            means[r] = centre;
            rstds[r] = scale;
        }
#pragma unroll
        for (int i = 0; i < PACKS; i++) {
            float result[N];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float4 f = shared_four(w, i, half), t = shared_four(b, i, half);
                float factors[4] = {f.x, f.y, f.z, f.w}, terms[4] = {t.x, t.y, t.z, t.w};
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    float n = (s.at[i][4 * half + e] - centre) * scale;
                    result[4 * half + e] = fmaf(n, factors[e], terms[e]);
                }
            }
            s.at[i].put(result);
        }
        s.write(y + r * columns, columns, wide);
    }
}

// Sums of `mine` over the warps of a block to the columns at `to`.
template <int PACKS>
__device__ __forceinline__ void join_warps(const float (&mine)[PACKS][N], float *sums, float *to,
                                           int columns) {
    // A warp adds to what those before it left: the order is that of the warps.
    for (int warp = 0; warp < WARPS; warp++) {
        __syncthreads();
        if ((int)threadIdx.y != warp) continue;
#pragma unroll
        for (int i = 0; i < PACKS; i++) {
#pragma unroll
            for (int e = 0; e < N; e++) {
                int at = (N * i + e) * 32 + threadIdx.x;
                sums[at] = warp == 0 ? mine[i][e] : sums[at] + mine[i][e];
            }
        }
    }
    __syncthreads();
    for (int c = threadIdx.y * 32 + threadIdx.x; c < columns; c += 32 * WARPS) {
        int pack = c / N, i = pack / 32, lane = pack % 32;
        to[c] = sums[(N * i + c % N) * 32 + lane];
    }
}

// The gradient of s: with g = dy weight and n = (s - mean) rstd, ds = rstd (g - mean(g) - n mean(g n)),
// plus `also`, what is known of it already. And the gradients of the parameters, of the rows of each
// block: dweight[block] = sum of dy n, dbias[block] = sum of dy; both [gridDim.x, columns]. weight,
// also, ds, dweight and dbias may be null, and so may s where dbias alone is wanted. `also` may be ds.
template <int PACKS, class T>
__device__ __forceinline__ void backward(const T *s, const float *weight, const float *means,
                                         const float *rstds, const T *dy, const T *also, T *ds,
                                         float *dweight, float *dbias, i64 rows, int columns,
                                         bool wide) {
    __shared__ __align__(16) float w[32 * N * PACKS];
    share<PACKS>(w, weight, 1, columns);
    __syncthreads();
    float inverse = 1.f / columns;
    i64 step = (i64)gridDim.x * WARPS;
    float weights[PACKS][N], biases[PACKS][N];
#pragma unroll
    for (int i = 0; i < PACKS; i++) {
#pragma unroll
        for (int e = 0; e < N; e++) weights[i][e] = biases[i][e] = 0;
    }
#pragma unroll 1
    for (i64 r = (i64)blockIdx.x * WARPS + threadIdx.y; r < rows; r += step) {
        Held<T, PACKS> d, v, more;
        d.read(dy + r * columns, columns, wide);
        if (s) v.read(s + r * columns, columns, wide);
        if (also) more.read(also + r * columns, columns, wide);
        if (dbias) {
#pragma unroll
            for (int i = 0; i < PACKS; i++) {
#pragma unroll
                for (int e = 0; e < N; e++) biases[i][e] += d.at[i][e];
            }
        }
        if (!s) continue;
        float scale = rstds[r], centre = means[r];
        float total = 0, dot = 0;
#pragma unroll
        for (int i = 0; i < PACKS; i++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float4 of = shared_four(w, i, half);
                float factors[4] = {of.x, of.y, of.z, of.w};
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    int at = 4 * half + e;
                    float dy_here = d.at[i][at], n = (v.at[i][at] - centre) * scale;
                    weights[i][at] = fmaf(dy_here, n, weights[i][at]);
                    float g = dy_here * factors[e];
                    total += g;
                    dot = fmaf(g, n, dot);
                }
            }
        }
        if (!ds) continue;
        float shift = warp_sum(total) * inverse, slope = warp_sum(dot) * inverse;
#pragma unroll
        for (int i = 0; i < PACKS; i++) {
            float result[N];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float4 of = shared_four(w, i, half);
                float factors[4] = {of.x, of.y, of.z, of.w};
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    int at = 4 * half + e;
                    float n = (v.at[i][at] - centre) * scale;
                    float g = fmaf(d.at[i][at], factors[e], -shift);
                    result[at] = fmaf(-n, slope, g) * scale;
                }
            }
            if (also) {
#pragma unroll
                for (int e = 0; e < N; e++) result[e] += more.at[i][e];
            }
            d.at[i].put(result);
        }
        d.write(ds + r * columns, columns, wide);
    }
    if (dweight) join_warps(weights, w, dweight + (i64)blockIdx.x * columns, columns);
    if (dbias) join_warps(biases, w, dbias + (i64)blockIdx.x * columns, columns);
}

// The second step, of norm.cu's norms too: y[which][c] = the sum over the parts of x[which, part, c],
// for 32 columns; which is blockIdx.y. A y may be null. blockDim: [32, 32].
EXPORT norm_join(const float *x, float *y0, float *y1, int parts, int columns) {
    __shared__ float sums[32][33];
    float *y = blockIdx.y == 0 ? y0 : y1;
    if (!y) return;
    x += (i64)blockIdx.y * parts * columns;
    int column = blockIdx.x * 32 + threadIdx.x;
    float sum = 0;
    if (column < columns) {
#pragma unroll 4
        for (int part = threadIdx.y; part < parts; part += 32) sum += x[(i64)part * columns + column];
    }
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    // Warp w has column w now; its lanes the parts.
    sum = warp_sum(sums[threadIdx.x][threadIdx.y]);
    column = blockIdx.x * 32 + threadIdx.y;
    if (threadIdx.x == 0 && column < columns) y[column] = sum;
}

#define FORWARD(T, name)                                                                           \
    EXPORT __launch_bounds__(32 * WARPS, sizeof(T) == 2 ? 6 : 4) layer_norm_held_##name(           \
        const T *x, const T *residual, const float *weight, const float *bias, float eps, T *y,    \
        T *sum, float *mean, float *rstd, i64 rows, int columns, int wide) {                       \
        forward(x, residual, weight, bias, eps, y, sum, mean, rstd, rows, columns, wide);          \
    }
FORWARD(float, f32)
FORWARD(bf16, bf16)

// For up to 256 PACKS columns.
#define BACKWARD(T, name, PACKS)                                                                   \
    EXPORT __launch_bounds__(32 * WARPS) layer_norm_held_backward_##name(                          \
        const T *s, const float *weight, const float *mean, const float *rstd, const T *dy,        \
        const T *also, T *ds, float *dweight, float *dbias, i64 rows, int columns, int wide) {     \
        backward<PACKS>(s, weight, mean, rstd, dy, also, ds, dweight, dbias, rows, columns, wide); \
    }
BACKWARD(float, f32, 4)
BACKWARD(bf16, bf16, 4)
BACKWARD(bf16, bf16_768, 3)
