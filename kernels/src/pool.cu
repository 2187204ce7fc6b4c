// One row per sequence of packed rows, and back: mean, first, last or maximum.
//
// x, dx [tokens, columns]; offsets [sequences + 1]; y, dy [sequences, columns]. Block (s, t) has
// sequence s and the t-th 32 packs of N columns; its threads [32, 8] share the rows. An empty sequence
// gives zeros.
#include "pack.cuh"

// Numbered as in pool.rs.
enum Pool { MEAN, FIRST, LAST, MAX };
#define POOL_ROWS 8

// The larger of two; NaN if one is.
__device__ __forceinline__ float larger(float a, float b) { return a > b || a != a ? a : b; }

template <int N, class T>
__device__ void pool(int kind, const T *x, const i64 *offsets, T *y, int columns) {
    __shared__ float parts[POOL_ROWS][32 * N];
    i64 begin = offsets[blockIdx.x], end = offsets[blockIdx.x + 1];
    int column = (blockIdx.y * 32 + threadIdx.x) * N;
    bool mine = column < columns;
    float best[N];
#pragma unroll
    for (int e = 0; e < N; e++) best[e] = kind == MAX ? -INFINITE : 0.f;
    if (mine && kind != LAST && kind != FIRST) {
#pragma unroll 4
        for (i64 r = begin + threadIdx.y; r < end; r += POOL_ROWS) {
            Elements<T, N> group = load<N>(x + r * columns + column);
#pragma unroll
            for (int e = 0; e < N; e++) {
                float v = group[e];
                best[e] = kind == MAX ? larger(v, best[e]) : best[e] + v;
            }
        }
    } else if (mine && threadIdx.y == 0 && begin < end) {
        i64 r = kind == FIRST ? begin : end - 1;
        Elements<T, N> group = load<N>(x + r * columns + column);
#pragma unroll
        for (int e = 0; e < N; e++) best[e] = group[e];
    }
#pragma unroll
    for (int e = 0; e < N; e++) parts[threadIdx.y][e * 32 + threadIdx.x] = best[e];
    __syncthreads();
    if (threadIdx.y != 0 || !mine) return;
    float result[N];
    float by = 1.f / (end - begin);
#pragma unroll
    for (int e = 0; e < N; e++) {
        float v = parts[0][e * 32 + threadIdx.x];
        for (int row = 1; row < POOL_ROWS; row++) {
            float other = parts[row][e * 32 + threadIdx.x];
            v = kind == MAX ? larger(other, v) : v + other;
        }
        if (kind == MEAN) v *= by;
        result[e] = begin < end ? v : 0.f;
    }
    Elements<T, N> group;
    group.put(result);
    store(y + (i64)blockIdx.x * columns + column, group);
}

// For MAX the gradient goes to the first row that holds the largest; the others do not read x.
template <int N, class T>
__device__ void pool_backward(int kind, const T *x, const i64 *offsets, const T *dy, T *dx,
                              int columns) {
    __shared__ float parts[POOL_ROWS][32 * N];
    __shared__ i64 places[POOL_ROWS][32 * N];
    i64 begin = offsets[blockIdx.x], end = offsets[blockIdx.x + 1];
    if (begin >= end) return;
    int column = (blockIdx.y * 32 + threadIdx.x) * N;
    bool mine = column < columns;
    i64 chosen[N];
#pragma unroll
    for (int e = 0; e < N; e++) chosen[e] = kind == LAST ? end - 1 : begin;
    if (kind == MAX) {
        // Each thread begins with the first row, so that one of NaN there stays the choice.
        float best[N];
        if (mine) {
            Elements<T, N> group = load<N>(x + begin * columns + column);
#pragma unroll
            for (int e = 0; e < N; e++) best[e] = group[e];
            for (i64 r = begin + threadIdx.y; r < end; r += POOL_ROWS) {
                group = load<N>(x + r * columns + column);
#pragma unroll
                for (int e = 0; e < N; e++) {
                    float v = group[e];
                    if (v > best[e]) {
                        best[e] = v;
                        chosen[e] = r;
                    }
                }
            }
#pragma unroll
            for (int e = 0; e < N; e++) {
                parts[threadIdx.y][e * 32 + threadIdx.x] = best[e];
                places[threadIdx.y][e * 32 + threadIdx.x] = chosen[e];
            }
        }
        __syncthreads();
        if (mine) {
#pragma unroll
            for (int e = 0; e < N; e++) {
                best[e] = parts[0][e * 32 + threadIdx.x];
                chosen[e] = places[0][e * 32 + threadIdx.x];
                for (int row = 1; row < POOL_ROWS; row++) {
                    float v = parts[row][e * 32 + threadIdx.x];
                    i64 place = places[row][e * 32 + threadIdx.x];
                    if (v > best[e] || (v == best[e] && place < chosen[e])) {
                        best[e] = v;
                        chosen[e] = place;
                    }
                }
            }
        }
    }
    if (!mine) return;
    Elements<T, N> group = load<N>(dy + (i64)blockIdx.x * columns + column);
    float given[N];
    float by = kind == MEAN ? 1.f / (end - begin) : 1.f;
#pragma unroll
    for (int e = 0; e < N; e++) given[e] = group[e] * by;
    for (i64 r = begin + threadIdx.y; r < end; r += POOL_ROWS) {
        float row[N];
#pragma unroll
        for (int e = 0; e < N; e++) row[e] = kind == MEAN || r == chosen[e] ? given[e] : 0.f;
        group.put(row);
        store(dx + r * columns + column, group);
    }
}

#define KERNELS(T, name)                                                                           \
    EXPORT pool_##name(int kind, const T *x, const i64 *offsets, T *y, int columns) {              \
        pool<Wide<T>::N>(kind, x, offsets, y, columns);                                            \
    }                                                                                              \
    EXPORT pool_single_##name(int kind, const T *x, const i64 *offsets, T *y, int columns) {       \
        pool<1>(kind, x, offsets, y, columns);                                                     \
    }                                                                                              \
    EXPORT pool_backward_##name(int kind, const T *x, const i64 *offsets, const T *dy, T *dx,      \
                                int columns) {                                                     \
        pool_backward<Wide<T>::N>(kind, x, offsets, dy, dx, columns);                              \
    }                                                                                              \
    EXPORT pool_backward_single_##name(int kind, const T *x, const i64 *offsets, const T *dy,      \
                                       T *dx, int columns) {                                       \
        pool_backward<1>(kind, x, offsets, dy, dx, columns);                                       \
    }
KERNELS(float, f32)
KERNELS(bf16, bf16)
