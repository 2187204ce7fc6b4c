// Reductions of x seen as [outer, axis, inner] along its axis, sums of everything, and the place of
// a row's maximum. A maximum is NaN if an element is.
#include "common.cuh"

#define THREADS 256
#define WARPS (THREADS / 32)
// Row lanes of a block that reduces columns; each has 32 threads.
#define ROW_LANES 8

struct Sum {
    static __device__ __forceinline__ float start() { return 0; }
    static __device__ __forceinline__ float join(float a, float b) { return a + b; }
};
struct Max {
    static __device__ __forceinline__ float start() { return -INFINITE; }
    static __device__ __forceinline__ float join(float a, float b) {
        return a > b || a != a ? a : b;
    }
};

// --- The axis is the last.

// y[r] = scale * (what becomes of x[r, :]); x [rows, axis]. A block has one row if `wide`, else
// each of its warps has one.
template <class Op, class T>
__device__ void reduce_rows(const T *x, T *y, i64 rows, i64 axis, float scale, int wide) {
    __shared__ float parts[WARPS];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    i64 row = wide ? (i64)blockIdx.x : (i64)blockIdx.x * WARPS + warp;
    i64 start = wide ? threadIdx.x : lane, step = wide ? THREADS : 32;
    float sum = Op::start();
    if (row < rows) {
        x += row * axis;
        // Runs that are summed by themselves: errors grow with the root of a long row's length.
#pragma unroll 1
        for (i64 first = start; first < axis; first += 64 * step) {
            i64 end = first + 64 * step < axis ? first + 64 * step : axis;
            float part = Op::start();
#pragma unroll 4
            for (i64 i = first; i < end; i += step) part = Op::join(part, widen(x[i]));
            sum = Op::join(sum, part);
        }
    }
#pragma unroll
    for (int other = 16; other > 0; other /= 2)
        sum = Op::join(sum, __shfl_xor_sync(0xffffffffu, sum, other));
    if (wide) {
        if (lane == 0) parts[warp] = sum;
        __syncthreads();
        sum = parts[0];
        for (int w = 1; w < WARPS; w++) sum = Op::join(sum, parts[w]);
    }
    if (row < rows && start == 0) y[row] = narrow<T>(sum * scale);
}
#define ROWS(name, Op, T)                                                                          \
    EXPORT name(const T *x, T *y, i64 rows, i64 axis, float scale, int wide) {                     \
        reduce_rows<Op>(x, y, rows, axis, scale, wide);                                            \
    }
ROWS(sum_of_rows_f32, Sum, float)
ROWS(sum_of_rows_bf16, Sum, bf16)
ROWS(max_of_rows_f32, Max, float)
ROWS(max_of_rows_bf16, Max, bf16)

// --- Other axes.

// y[o, p, i] = scale * (what becomes of x[o, a, i] over the a of part p), or += that;
// x [outer, axis, inner], y [outer, parts, inner]. A part has `length` places of the axis. A block
// has 32 * V neighbours in y; V divides `inner`, and V elements can be read at once.
template <class Op, class S, class D, int V>
__device__ void reduce_columns(const S *x, D *y, i64 axis, i64 inner, i64 parts, i64 length,
                               float scale, int accumulate) {
    __shared__ float lanes[ROW_LANES][32 * V];
    i64 strips = (inner + 32 * V - 1) / (32 * V);
    i64 strip = blockIdx.x % strips, outer_part = blockIdx.x / strips;
    i64 part = outer_part % parts, outer = outer_part / parts;
    int lane = threadIdx.x % 32, row_lane = threadIdx.x / 32;
    i64 first_column = strip * 32 * V, column = first_column + lane * V;
    i64 first = part * length, end = first + length < axis ? first + length : axis;
    float sum[V];
#pragma unroll
    for (int v = 0; v < V; v++) sum[v] = Op::start();
    if (column < inner) {
        const S *at = x + outer * axis * inner + column;
#pragma unroll 4
        for (i64 a = first + row_lane; a < end; a += ROW_LANES) {
            Pack<S, V> pack = *(const Pack<S, V> *)(at + a * inner);
#pragma unroll
            for (int v = 0; v < V; v++) sum[v] = Op::join(sum[v], widen(pack.at[v]));
        }
    }
#pragma unroll
    for (int v = 0; v < V; v++) lanes[row_lane][lane * V + v] = sum[v];
    __syncthreads();
    int mine = threadIdx.x;
    if (mine < 32 * V && first_column + mine < inner) {
        float total = lanes[0][mine];
#pragma unroll
        for (int r = 1; r < ROW_LANES; r++) total = Op::join(total, lanes[r][mine]);
        D *to = y + outer_part * inner + first_column + mine;
        float before = accumulate ? widen(*to) : 0;
        *to = narrow<D>(total * scale + before);
    }
}
#define COLUMNS(name, Op, S, D, V)                                                                 \
    EXPORT name(const S *x, D *y, i64 axis, i64 inner, i64 parts, i64 length, float scale,         \
                int accumulate) {                                                                  \
        reduce_columns<Op, S, D, V>(x, y, axis, inner, parts, length, scale, accumulate);          \
    }
COLUMNS(sum_of_columns_f32_f32, Sum, float, float, 1)
COLUMNS(sum_of_columns_f32_bf16, Sum, float, bf16, 1)
COLUMNS(sum_of_columns_bf16_f32, Sum, bf16, float, 1)
COLUMNS(sum_of_columns_bf16_bf16, Sum, bf16, bf16, 1)
COLUMNS(sum_of_columns_f32_f32_by4, Sum, float, float, 4)
COLUMNS(sum_of_columns_f32_bf16_by4, Sum, float, bf16, 4)
COLUMNS(sum_of_columns_bf16_f32_by4, Sum, bf16, float, 4)
COLUMNS(sum_of_columns_bf16_bf16_by4, Sum, bf16, bf16, 4)
COLUMNS(max_of_columns_f32, Max, float, float, 1)
COLUMNS(max_of_columns_bf16, Max, bf16, bf16, 1)

// --- The gradient of a maximum goes to the first element that is it.

__device__ __forceinline__ bool is_max(float x, float y) {
    return x == y || (x != x && y != y);
}

// dx[r, a] = dy[r] for the first a with x[r, a] = y[r], else 0; a warp for each row.
template <class T>
__device__ void max_rows_backward(const T *x, const T *y, const T *dy, T *dx, i64 rows, i64 axis) {
    int lane = threadIdx.x % 32;
    i64 row = (i64)blockIdx.x * WARPS + threadIdx.x / 32;
    if (row >= rows) return;
    float most = widen(y[row]);
    T gradient = dy[row];
    bool found = false;
#pragma unroll 1
    for (i64 first = 0; first < axis; first += 32) {
        i64 i = first + lane;
        bool here = !found && i < axis && is_max(widen(x[row * axis + i]), most);
        u32 votes = __ballot_sync(0xffffffffu, here);
        bool mine = here && (votes & ((1u << lane) - 1)) == 0;
        found = found || votes != 0;
        if (i < axis) dx[row * axis + i] = mine ? gradient : narrow<T>(0);
    }
}

// The same for x [outer, axis, inner] and y [outer, inner]; a thread for each element of y.
template <class T>
__device__ void max_columns_backward(const T *x, const T *y, const T *dy, T *dx, i64 count,
                                     i64 axis, i64 inner) {
    i64 at = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= count) return;
    float most = widen(y[at]);
    i64 first = at / inner * axis * inner + at % inner;
    bool found = false;
#pragma unroll 1
    for (i64 a = 0; a < axis; a++) {
        bool here = !found && is_max(widen(x[first + a * inner]), most);
        dx[first + a * inner] = here ? dy[at] : narrow<T>(0);
        found = found || here;
    }
}
#define MAX_BACKWARD(T, name)                                                                      \
    EXPORT max_rows_backward_##name(const T *x, const T *y, const T *dy, T *dx, i64 rows,          \
                                    i64 axis) {                                                    \
        max_rows_backward(x, y, dy, dx, rows, axis);                                               \
    }                                                                                              \
    EXPORT max_columns_backward_##name(const T *x, const T *y, const T *dy, T *dx, i64 count,      \
                                       i64 axis, i64 inner) {                                      \
        max_columns_backward(x, y, dy, dx, count, axis, inner);                                    \
    }
MAX_BACKWARD(float, f32)
MAX_BACKWARD(bf16, bf16)

// --- The place of the maximum.

// Whether x at `i` comes before y at `j`: NaN first, then the larger, then the earlier.
__device__ __forceinline__ bool precedes(float x, int i, float y, int j) {
    bool odd_x = x != x, odd_y = y != y;
    if (odd_x != odd_y) return odd_x;
    if (!odd_x && x != y) return x > y;
    return i < j;
}

// y[r] = the index of the first maximum of x[r, :], of its first NaN if there is one. A block for
// each row of x [rows, columns].
template <class T> __device__ void argmax(const T *x, i64 *y, int columns) {
    __shared__ float values[WARPS];
    __shared__ int places[WARPS];
    x += (i64)blockIdx.x * columns;
    float best = -INFINITE;
    int place = 0x7fffffff;
#pragma unroll 1
    for (int i = threadIdx.x; i < columns; i += THREADS) {
        float value = widen(x[i]);
        if (precedes(value, i, best, place)) best = value, place = i;
    }
#pragma unroll
    for (int other = 16; other > 0; other /= 2) {
        float value = __shfl_xor_sync(0xffffffffu, best, other);
        int i = __shfl_xor_sync(0xffffffffu, place, other);
        if (precedes(value, i, best, place)) best = value, place = i;
    }
    int warp = threadIdx.x / 32;
    if (threadIdx.x % 32 == 0) values[warp] = best, places[warp] = place;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int w = 1; w < WARPS; w++)
            if (precedes(values[w], places[w], best, place)) best = values[w], place = places[w];
        y[blockIdx.x] = place;
    }
}
EXPORT argmax_f32(const float *x, i64 *y, int columns) { argmax(x, y, columns); }
EXPORT argmax_bf16(const bf16 *x, i64 *y, int columns) { argmax(x, y, columns); }

// --- Everything, in double precision.

// The sum of the block's numbers, for its first thread.
__device__ __forceinline__ double block_sum_double(double x) {
    __shared__ double numbers[THREADS];
    numbers[threadIdx.x] = x;
    for (int width = THREADS / 2; width > 0; width /= 2) {
        __syncthreads();
        if (threadIdx.x < width) numbers[threadIdx.x] += numbers[threadIdx.x + width];
    }
    return numbers[0];
}

// parts[b] = the sum of those elements that block b meets.
template <class T> __device__ void sum_parts(const T *x, i64 count, double *parts) {
    i64 step = (i64)gridDim.x * THREADS;
    double sum = 0;
#pragma unroll 4
    for (i64 i = (i64)blockIdx.x * THREADS + threadIdx.x; i < count; i += step)
        sum += (double)widen(x[i]);
    sum = block_sum_double(sum);
    if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}
EXPORT sum_parts_f32(const float *x, i64 count, double *parts) { sum_parts(x, count, parts); }
EXPORT sum_parts_bf16(const bf16 *x, i64 count, double *parts) { sum_parts(x, count, parts); }

// y[0] = the sum of the parts; one block.
EXPORT sum_join(const double *parts, int count, float *y) {
    double sum = 0;
#pragma unroll 1
    for (int i = threadIdx.x; i < count; i += THREADS) sum += parts[i];
    sum = block_sum_double(sum);
    if (threadIdx.x == 0) *y = (float)sum;
}
