// Kernels that read a row of one or two tensors, reduce it, and pass over it again: the row is read
// from memory once and kept in shared memory, where every thread finds again what it put there
// itself, so that no barrier is needed but those of the sums.
//
// A block is [lanes, rows]: a row belongs to one warp and a block to several rows, or all threads of
// a block have one row. Which element a thread has, and so the order of every sum, follows from the
// number of columns alone: never from the alignment, or from what else the row is added to.
#pragma once

#include "pack.cuh"

// Elements of a group: of bf16 8 bytes, so that what goes with them in f32 is 16, and neighbouring
// threads read neighbouring bytes of both.
#define ROW_GROUP 4
// Most warps of a row.
#define ROW_WARPS 16

// Sums over the threads of a row. Every thread has the result.
__device__ __forceinline__ void row_sums(float &a, float &b) {
    __shared__ float parts[2][ROW_WARPS];
    a = warp_sum(a);
    b = warp_sum(b);
    int warps = blockDim.x / 32;
    if (warps == 1) return;
    __syncthreads(); // the parts of the call before have been read
    if (threadIdx.x % 32 == 0) {
        parts[0][threadIdx.x / 32] = a;
        parts[1][threadIdx.x / 32] = b;
    }
    __syncthreads();
    a = b = 0;
    for (int warp = 0; warp < warps; warp++) {
        a += parts[0][warp];
        b += parts[1][warp];
    }
}

// How many numbers there are, their mean, and the sum of the squares of their distances from it.
struct Moments {
    float count, mean, squares;
};

// Those of two sets together: T. Chan, G. Golub, R. LeVeque, "Updating formulae and a pairwise
// algorithm for computing sample variances", COMPSTAT 1982.
__device__ __forceinline__ Moments both(const Moments &a, const Moments &b) {
    Moments ab;
    ab.count = a.count + b.count;
    float share = ab.count > 0 ? b.count / ab.count : 0.f, apart = b.mean - a.mean;
    ab.mean = fmaf(apart, share, a.mean);
    ab.squares = a.squares + fmaf(apart * apart, a.count * share, b.squares);
    return ab;
}

// Those of all threads of a row together. Every thread has the result.
__device__ __forceinline__ Moments row_moments(Moments mine) {
    __shared__ Moments parts[ROW_WARPS];
#pragma unroll
    for (int lane = 16; lane > 0; lane /= 2) {
        Moments other;
        other.count = __shfl_xor_sync(0xffffffffu, mine.count, lane);
        other.mean = __shfl_xor_sync(0xffffffffu, mine.mean, lane);
        other.squares = __shfl_xor_sync(0xffffffffu, mine.squares, lane);
        // In the same order in both lanes, so that they have the same bits.
        mine = threadIdx.x & lane ? both(other, mine) : both(mine, other);
    }
    int warps = blockDim.x / 32;
    if (warps == 1) return mine;
    __syncthreads();
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = mine;
    __syncthreads();
    mine = parts[0];
    for (int warp = 1; warp < warps; warp++) mine = both(mine, parts[warp]);
    return mine;
}

__device__ __forceinline__ float row_sum(float a) {
    __shared__ float parts[ROW_WARPS];
    a = warp_sum(a);
    int warps = blockDim.x / 32;
    if (warps == 1) return a;
    __syncthreads();
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = a;
    __syncthreads();
    a = 0;
    for (int warp = 0; warp < warps; warp++) a += parts[warp];
    return a;
}

__device__ __forceinline__ float row_max(float a) {
    __shared__ float parts[ROW_WARPS];
    a = warp_max(a);
    int warps = blockDim.x / 32;
    if (warps == 1) return a;
    __syncthreads();
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = a;
    __syncthreads();
    a = parts[0];
    for (int warp = 1; warp < warps; warp++) a = fmaxf(a, parts[warp]);
    return a;
}

// What is read of a row.
enum Reads {
    ONE,   // a
    ADDED, // a + b, as stored; a alone where b is null
    BOTH,  // a and b, each for itself
};

// One row: `first` over its groups, then `again` as often as need be. Elements beyond the last column
// are 0.
template <class T, Reads R> struct Row {
    static constexpr int N = ROW_GROUP;
    // Groups that are loaded before the first of them is used
    static constexpr int BATCH = R == ONE || sizeof(T) == 2 ? 4 : 2;
    typedef Elements<T, N> Some;
    const T *a, *b;
    Some *kept; // of a, then those of b if BOTH; null: rows are read again
    int columns, groups;
    bool wide; // whether groups can be read by one instruction

    struct Item {
        Some a, b;
    };

    // Row `row` of [rows, columns]. `keep`: there is shared memory for it.
    __device__ __forceinline__ Row(const T *all_a, const T *all_b, i64 row, int columns, bool wide,
                                   bool keep)
        : columns(columns), groups((columns + N - 1) / N), wide(wide) {
        DYNAMIC_SHARED(shared);
        a = all_a + row * columns;
        b = all_b ? all_b + row * columns : nullptr;
        int slots = R == BOTH ? 2 * groups : groups;
        kept = keep ? (Some *)shared + (i64)threadIdx.y * slots : nullptr;
    }

    // Elements of group i that there are.
    __device__ __forceinline__ int left(int i) const { return columns - i * N; }

    __device__ __forceinline__ Some read(const T *p, int i) const {
        p += (i64)i * N;
        return wide ? load<N>(p) : load_some<N>(p, left(i));
    }

    // Stores group i of the row that begins at p.
    __device__ __forceinline__ void write(T *p, int i, const Some &group) const {
        p += (i64)i * N;
        if (wide) store(p, group);
        else store_some(p, left(i), group);
    }

    __device__ __forceinline__ Item fetch(int i) const {
        Item item;
        item.a = read(a, i);
        if (R == BOTH || (R == ADDED && b)) item.b = read(b, i);
        return item;
    }

    // The other half of a fetch, so that several can be under way before the first is needed.
    __device__ __forceinline__ void settle(Item &item) const {
        if (R == ADDED && b) {
            float sum[N];
#pragma unroll
            for (int e = 0; e < N; e++) sum[e] = item.a[e] + item.b[e];
            item.a.put(sum);
        }
    }

    template <class Work> __device__ __forceinline__ void first(Work work) const {
#pragma unroll 1
        for (int start = threadIdx.x; start < groups; start += BATCH * blockDim.x) {
            Item items[BATCH];
#pragma unroll
            for (int n = 0; n < BATCH; n++) {
                int i = start + n * blockDim.x;
                if (i < groups) items[n] = fetch(i);
            }
#pragma unroll
            for (int n = 0; n < BATCH; n++) {
                int i = start + n * blockDim.x;
                if (i < groups) {
                    settle(items[n]);
                    if (kept) {
                        kept[i] = items[n].a;
                        if (R == BOTH) kept[groups + i] = items[n].b;
                    }
                    work(i, items[n]);
                }
            }
        }
    }

    template <class Work> __device__ __forceinline__ void again(Work work) const {
#pragma unroll 2
        for (int i = threadIdx.x; i < groups; i += blockDim.x) {
            Item item;
            if (kept) {
                item.a = kept[i];
                if (R == BOTH) item.b = kept[groups + i];
            } else {
                item = fetch(i);
                settle(item);
            }
            work(i, item);
        }
    }
};

// The row that this thread belongs to.
__device__ __forceinline__ i64 own_row() { return (i64)blockIdx.x * blockDim.y + threadIdx.y; }

// ROW_GROUP floats of a parameter, from column `first` on; zeros beyond the last.
__device__ __forceinline__ Elements<float, ROW_GROUP> load_floats(const float *p, int first,
                                                                  int columns, bool wide) {
    return wide ? load<ROW_GROUP>(p + first) : load_some<ROW_GROUP>(p + first, columns - first);
}
