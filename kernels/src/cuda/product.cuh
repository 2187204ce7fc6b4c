// What the matrix products of gemm.cu and gemm_hopper.cu share: their parameters, the order of
// tiles, and what happens to a sum on its way into C.
#pragma once

#include "activation.cuh"
#include "half.cuh"

// Products C_i (+)= A_i * B_i of one size, i below the number of batches. As launchers write it.
//
// Of the two dimensions of an operand, one is its side (rows of A, columns of B) and one is its
// depth (what is summed over). Elements are contiguous along one of them, and `step` apart along
// the other.
struct Product {
    const void *a, *b;
    void *c;           // [m, n] without gaps: float if `wide`, else bf16
    void *pre;         // what the activation is applied to, or null
    const float *bias; // [n] or null
    const void *slope_of;  // [m, n] as C, or null: C gets the activation's slope there as a factor
    const float *relative; // [m] or null: C, of one matrix and 16 bits, is f16, less this of its row
    i64 m, n, k;
    i64 a_step, b_step;
    i64 a_batch, b_batch, c_batch; // elements from one matrix to the next
    i64 splits, depth; // k is cut into `splits` ranges of `depth`, a multiple of every tile's
    i64 activation;    // 1 + its number, or 0 for none
    i64 accumulate;    // whether the old C is added
    i64 wide;
    i64 direct; // whether rows of C are no multiples of 16 bytes apart
};

// What becomes of `x`, as it is stored as T: its activation, or its product with the slope at `of`.
template <class T>
__device__ __forceinline__ float activated(int kind, bool slope, float x, float of) {
    x = widen(narrow<T>(x));
    if (!slope) return activate<T>(kind, x);
    switch (kind) {
    case GELU: return x * Gelu::slope(of, Gelu::parts<T>(of));
    case GELU_TANH: return x * GeluTanh::slope(of, GeluTanh::parts<T>(of));
    case RELU: return x * Relu::slope(of, Parts());
    case TANH: return x * Tanh::slope(of, Tanh::parts<T>(of));
    default: return x * Silu::slope(of, Silu::parts<T>(of));
    }
}

// Four elements of C, or of what the activation was applied to, from element `at` on. `whole`: all
// four exist, and are aligned; otherwise `count` of them do.
__device__ __forceinline__ void read_four(const void *from, bool wide, i64 at, int count,
                                          bool whole, float (&x)[4]) {
    if (wide) {
        const float *c = (const float *)from + at;
        if (whole) {
            float4 four = *(const float4 *)c;
            x[0] = four.x, x[1] = four.y, x[2] = four.z, x[3] = four.w;
        } else {
#pragma unroll
            for (int i = 0; i < 4; i++) x[i] = i < count ? c[i] : 0;
        }
    } else {
        const bf16 *c = (const bf16 *)from + at;
        if (whole) {
            Pack<bf16, 4> four = *(const Pack<bf16, 4> *)c;
#pragma unroll
            for (int i = 0; i < 4; i++) x[i] = widen(four.at[i]);
        } else {
#pragma unroll
            for (int i = 0; i < 4; i++) x[i] = i < count ? widen(c[i]) : 0;
        }
    }
}
__device__ __forceinline__ void write_four(void *to, bool wide, i64 at, int count, bool whole,
                                           const float (&x)[4]) {
    if (wide) {
        float *c = (float *)to + at;
        if (whole) {
            *(float4 *)c = make_float4(x[0], x[1], x[2], x[3]);
        } else {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                if (i < count) c[i] = x[i];
            }
        }
    } else {
        bf16 *c = (bf16 *)to + at;
        Pack<bf16, 4> four;
#pragma unroll
        for (int i = 0; i < 4; i++) four.at[i] = to_bf16(x[i]);
        if (whole) {
            *(Pack<bf16, 4> *)c = four;
        } else {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                if (i < count) c[i] = four.at[i];
            }
        }
    }
}

// The epilogue of four elements of one row, `count` of them real, which belong from element `at` of
// C on. AT_ONCE: activations that are computed side by side; fewer are less code.
template <int AT_ONCE>
__device__ __forceinline__ void finish(const Product &p, i64 at, int count, bool whole,
                                       float (&x)[4], const float (&bias)[4]) {
    bool wide = p.wide;
    if (p.accumulate) {
        float old[4];
        read_four(p.c, wide, at, count, whole, old);
#pragma unroll
        for (int i = 0; i < 4; i++) x[i] += old[i];
    }
#pragma unroll
    for (int i = 0; i < 4; i++) x[i] += bias[i];
    if (p.relative) {
        float less = p.relative[at / p.n];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (i < count) ((u16 *)p.c)[at + i] = to_half(x[i] - less);
        }
        return;
    }
    if (p.pre) write_four(p.pre, wide, at, count, whole, x);
    if (p.activation) {
        int kind = (int)p.activation - 1;
        bool slope = p.slope_of;
        float of[4] = {};
        if (slope) read_four(p.slope_of, wide, at, count, whole, of);
#pragma unroll AT_ONCE
        for (int i = 0; i < 4; i++) {
            float y = wide ? activated<float>(kind, slope, x[0], of[0])
                           : activated<bf16>(kind, slope, x[0], of[0]);
            x[0] = x[1], x[1] = x[2], x[2] = x[3], x[3] = y;
            of[0] = of[1], of[1] = of[2], of[2] = of[3];
        }
    }
    write_four(p.c, wide, at, count, whole, x);
}

// Whether four elements from a column that is a multiple of 4 can be written at once.
__device__ __forceinline__ bool writes_fours(const Product &p) {
    return p.n % 4 == 0 && p.c_batch % 4 == 0 && aligned16(p.c) && aligned16(p.pre) &&
           aligned16(p.slope_of);
}

// Sums wait for the epilogue in shared memory, 128 to a row. Columns are exchanged in groups of 8
// by the row, so that neither the writes of a warp that holds 4 rows nor the reads of a row meet in
// a bank.
__device__ __forceinline__ int staged_at(int row, int column) {
    return row * 128 + (column ^ ((row & 3) << 3));
}

// The epilogue of `rows` staged rows of 128 columns, the first of which is element (row, column) of
// the C that begins at element `at`. A warp takes a row at a time. Not inlined: one copy of it, and
// of the activations, is enough for the kernels of a source.
__device__ __noinline__ void finish_staged(const Product &p, const float *staged, int rows, i64 at,
                                           i64 row, i64 column) {
    int lane = threadIdx.x % 32;
    i64 first = column + 4 * lane;
    int count = (int)min((i64)4, p.n - first);
    if (count <= 0) return;
    bool whole = count == 4 && writes_fours(p);
    float bias[4];
#pragma unroll
    for (int i = 0; i < 4; i++) bias[i] = p.bias && i < count ? p.bias[first + i] : 0;
    rows = (int)min((i64)rows, p.m - row);
#pragma unroll 1
    for (int r = threadIdx.x / 32; r < rows; r += blockDim.x / 32) {
        float4 four = *(const float4 *)(staged + staged_at(r, 4 * lane));
        float x[4] = {four.x, four.y, four.z, four.w};
        finish<4>(p, at + (row + r) * p.n + first, count, whole, x, bias);
    }
}

struct Tile {
    int row, column; // in tiles
};

// Tile `index` of rows x columns tiles, in bands of 8 rows: blocks that run side by side then read
// few rows of A and few columns of B.
__device__ __forceinline__ Tile tile_at(int index, int rows, int columns) {
    const int BAND = 8;
    int band = BAND * columns, first = index / band * BAND, within = index % band;
    int height = min(BAND, rows - first);
    Tile tile;
    tile.row = first + within % height;
    tile.column = within / height;
    return tile;
}

// What one block sums: a tile of one matrix over one range of k.
struct Task {
    int row, column; // first of the tile
    int batch, split;
    int begin, depth; // of k; at least 0

    // Where the matrix begins in C, which has one for each split.
    __device__ __forceinline__ i64 at(const Product &p) const {
        return batch * p.c_batch + split * p.m * p.n;
    }
};

// There are fewer than 2^31 tasks, and rows, columns and k.
template <int ROWS, int COLUMNS>
__device__ __forceinline__ Task task_at(const Product &p, int index) {
    int rows = ((int)p.m + ROWS - 1) / ROWS, columns = ((int)p.n + COLUMNS - 1) / COLUMNS;
    int splits = (int)p.splits, part = index / (rows * columns);
    Tile tile = tile_at(index - part * (rows * columns), rows, columns);
    Task task;
    task.row = tile.row * ROWS;
    task.column = tile.column * COLUMNS;
    task.batch = part / splits;
    task.split = part % splits;
    task.begin = task.split * (int)p.depth;
    task.depth = max(0, min((int)p.k - task.begin, (int)p.depth));
    return task;
}
