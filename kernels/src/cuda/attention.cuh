// What the attention kernels share: what is computed, which keys a query sees, dropout, and tiles
// of bf16 in shared memory with the fragments of `mma.m16n8k16` that are made of them.
//
// The manual's fragments, for lane = 4 g + t:
//   A (16 x 16): register 0 holds row g, columns 2t and 2t + 1; register 1 row g + 8; registers 2
//     and 3 the same 8 columns on.
//   B (16 x 8): register 0 holds rows 2t and 2t + 1 of column g, register 1 the same 8 rows on.
//   C (16 x 8): elements 0 and 1 are columns 2t and 2t + 1 of row g, elements 2 and 3 those of row
//     g + 8: element e is row g + 8 (e / 2), column 2t + e % 2. Two C side by side, rounded and
//     packed, are one A.
#pragma once

#include "common.cuh"
#include "ptx.cuh"

#if defined(GRAFT_SIMULATION) || __CUDA_ARCH__ >= 800
#define TENSOR_CORES 1
#endif

#define LOG2_E 1.44269504088896341f
#define LN_2 0.693147180559945309f

// Words of four bytes, in the order in which the launcher writes them.
struct Attention {
    int heads;
    int group;   // query heads to a key head
    int dims;    // of a head
    int low;     // query i sees key j if low <= i - j < window
    int window;
    float scale;
    float cap;   // 0 for none
    u32 keep;    // a weight is kept if its word >> 8 is at least this; 0 for all
    float kept;  // what kept weights grow by
    u32 key0, key1;
    int blocks;  // of the longest sequence
};

// What the scores are multiplied with before the softmax takes powers of two of them, and, under a
// cap, before that by its hyperbolic tangent.
__device__ __forceinline__ float exponent(const Attention &p) {
    return (p.cap > 0 ? p.cap : p.scale) * LOG2_E;
}
__device__ __forceinline__ float inside_cap(const Attention &p) { return p.scale / p.cap; }

__device__ __forceinline__ bool visible(const Attention &p, int query, int key, int len) {
    int behind = query - key;
    return key < len && behind >= p.low && behind < p.window;
}

// Whether every, or no query of i .. i + queries sees every, or any key of j .. j + keys.
__device__ __forceinline__ bool all_visible(const Attention &p, int i, int queries, int j, int keys,
                                            int len) {
    return j + keys <= len && i - (j + keys - 1) >= p.low && i + queries - 1 - j < p.window;
}
__device__ __forceinline__ bool none_visible(const Attention &p, int i, int queries, int j,
                                             int keys, int len) {
    return j >= len || i + queries - 1 - j < p.low || i - (j + keys - 1) >= p.window;
}

// From the first key that one of the queries i .. end sees to one past the last, and the same for
// the queries that see one of the keys j .. end.
struct Span {
    int from, to;
};
__device__ __forceinline__ Span keys_of(const Attention &p, int i, int end, int len) {
    return {max(0, i - p.window + 1), min(len, end - p.low)};
}
__device__ __forceinline__ Span queries_of(const Attention &p, int j, int end, int len) {
    return {max(0, j + p.low), min(len, end - 1 + p.window)};
}

// Which part of which sequence and head this block has.
struct Place {
    int block, head, sequence, len;
    i64 start;
};
__device__ __forceinline__ Place place(const Attention &p, const i64 *offsets, int heads) {
    u32 x = blockIdx.x;
    Place at;
    at.block = (int)(x % (u32)p.blocks);
    x /= (u32)p.blocks;
    at.head = (int)(x % (u32)heads);
    at.sequence = (int)(x / (u32)heads);
    at.start = offsets[at.sequence];
    at.len = (int)(offsets[at.sequence + 1] - at.start);
    return at;
}

// Where a sequence's keys are: where its queries are, or, if they were kept, in rows of their own,
// of which the last belong to the queries.
struct Kept {
    i64 start;
    int len, shift; // query i stands at key i + shift
};
__device__ __forceinline__ Kept kept_keys(const Place &here, const i64 *starts, const i64 *lengths) {
    if (!starts) return {here.start, here.len, 0};
    int len = (int)lengths[here.sequence];
    return {starts[here.sequence], len, len - here.len};
}

// --- Dropout: the word of head h, query token t of all and key j of the sequence is word j % 4 of
// the Philox block with counter [j / 4, t, h, 1].

__device__ __forceinline__ u32 keep_bits(const Attention &p, u32 key, u32 token, u32 head) {
    Words words = philox(p.key0, p.key1, key / 4, token, head, 1);
    u32 bits = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) bits |= (u32)(words.at[i] >> 8 >= p.keep) << i;
    return bits;
}

__device__ __forceinline__ bool is_kept(const Attention &p, u32 key, u32 token, u32 head) {
    return keep_bits(p, key, token, head) >> key % 4 & 1;
}

#ifdef TENSOR_CORES

// Bits 4 i + e: whether element e of C number i is kept, of COUNT side by side whose rows are queries
// from `token` on and whose columns are keys from `key` on (divisible by 8). Of the four blocks that
// a pair of lanes reads, each lane draws one.
template <int COUNT>
__device__ __forceinline__ u32 kept_of_queries(const Attention &p, u32 token, u32 key, u32 head) {
    static_assert(COUNT <= 8, "bits of a word");
    u32 g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, odd = t & 1, all = 0;
#pragma unroll 1
    for (int i = 0; i < COUNT; i++) {
        u32 bits = keep_bits(p, key + 8 * i + 4 * (t / 2), token + g + 8 * odd, head) << 4 * odd;
        bits |= __shfl_xor_sync(0xffffffffu, bits, 1);
        bits >>= 2 * odd;
        all |= ((bits & 3) | (bits >> 4 & 3) << 2) << 4 * i;
    }
    return all;
}

// The same for C whose rows are keys and whose columns are queries: four lanes, of which each draws
// one of the four blocks that they read.
template <int COUNT>
__device__ __forceinline__ u32 kept_of_keys(const Attention &p, u32 token, u32 key, u32 head) {
    static_assert(COUNT <= 8, "bits of a word");
    u32 g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, turn = g % 4, all = 0;
    key += g / 4 * 4 + turn / 2 * 8;
    token += 2 * t + turn % 2;
#pragma unroll 1
    for (int i = 0; i < COUNT; i++) {
        u32 bits = keep_bits(p, key, token + 8 * i, head) << 4 * turn;
        bits |= __shfl_xor_sync(0xffffffffu, bits, 4);
        bits |= __shfl_xor_sync(0xffffffffu, bits, 8);
        bits >>= turn;
        bits = (bits & 1) | (bits >> 4 & 1) << 1 | (bits >> 8 & 1) << 2 | (bits >> 12 & 1) << 3;
        all |= bits << 4 * i;
    }
    return all;
}

// A tile is [rows, D] of bf16. Eight elements are a chunk; chunks of a row change places with the
// row's number, so that eight rows of one column of chunks lie in different banks.
template <int D> __device__ __forceinline__ int at(int row, int chunk) {
    int turn = D % 64 == 0 ? row & 7 : (row >> 1) & 3;
    return (row * (D / 8) + (chunk ^ turn)) * 8;
}

// Starts copying rows `first` .. `first + ROWS` of `from`, `stride` apart, with zeros for rows from
// `end` on and for dimensions from `dims` on.
template <int D, int ROWS, int THREADS>
__device__ __forceinline__ void load_tile(bf16 *tile, const bf16 *from, i64 stride, int first,
                                          int end, int dims) {
    constexpr int CHUNKS = D / 8;
    static_assert(THREADS % CHUNKS == 0 && ROWS * CHUNKS % THREADS == 0, "whole turns");
    int chunk = threadIdx.x % CHUNKS, row = threadIdx.x / CHUNKS;
    const bf16 *source = from + 8 * chunk + (first + row) * stride;
    int rows = 8 * chunk < dims ? end - first : 0;
#pragma unroll
    for (int r = 0; r < ROWS; r += THREADS / CHUNKS) {
        bool valid = row + r < rows;
        cp_async_16(tile + at<D>(row + r, chunk), valid ? source + r * stride : from, valid);
    }
}

// A: rows `row` .. + 16 and dimensions 16 k .. + 16 of a tile.
template <int D> __device__ __forceinline__ void load_a(u32 (&a)[4], const bf16 *tile, int row, int k) {
    int lane = threadIdx.x % 32;
    ldmatrix_x4(a, tile + at<D>(row + (lane & 15), 2 * k + (lane >> 4)));
}

// Two B side by side: columns are the rows `row` .. + 16 of a tile, rows its dimensions 16 k .. + 16.
template <int D> __device__ __forceinline__ void load_b(u32 (&b)[4], const bf16 *tile, int row, int k) {
    int lane = threadIdx.x % 32;
    ldmatrix_x4(b, tile + at<D>(row + (lane & 7) + (lane >> 4) * 8, 2 * k + (lane >> 3 & 1)));
}

// Two B side by side: rows are the rows `row` .. + 16 of a tile, columns its dimensions 16 n .. + 16.
template <int D>
__device__ __forceinline__ void load_b_rows(u32 (&b)[4], const bf16 *tile, int row, int n) {
    int lane = threadIdx.x % 32;
    ldmatrix_x4_trans(b, tile + at<D>(row + (lane & 15), 2 * n + (lane >> 4)));
}

// s = own * other^T: of this warp's 16 M rows from `row` on of `own`, and the N * 8 rows of `other`.
template <int D, int M, int N>
__device__ __forceinline__ void scores(float (&s)[M][N][4], const bf16 *own, int row,
                                       const bf16 *other) {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) s[m][n][e] = 0;
#pragma unroll 1
    for (int k = 0; k < D / 16; k++) {
        u32 a[M][4];
#pragma unroll
        for (int m = 0; m < M; m++) load_a<D>(a[m], own, row + 16 * m, k);
#pragma unroll
        for (int n = 0; n < N / 2; n++) {
            u32 b[4];
            load_b<D>(b, other, 16 * n, k);
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma_bf16_16816(s[m][2 * n], a[m], b[0], b[1]);
                mma_bf16_16816(s[m][2 * n + 1], a[m], b[2], b[3]);
            }
        }
    }
}

// Scores of what is not seen become -infinity: rows are queries from `query` on, columns keys.
template <int M, int N>
__device__ __forceinline__ void hide(const Attention &p, float (&s)[M][N][4], int query, int key,
                                     int len) {
    int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    // As one comparison: what is below `low` wraps around.
    int behind = query + g - key - 2 * t - p.low;
    u32 width = p.window - p.low;
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            bool inside = key + 8 * n + 2 * t + e % 2 < len;
#pragma unroll
            for (int m = 0; m < M; m++) {
                u32 distance = behind + 16 * m + e / 2 * 8 - 8 * n - e % 2;
                if (!(inside && distance < width)) s[m][n][e] = -INFINITE;
            }
        }
}

// The same where rows are keys and columns queries.
template <int M, int N>
__device__ __forceinline__ void hide_by_key(const Attention &p, float (&s)[M][N][4], int query,
                                            int key, int len) {
    int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    int behind = query + 2 * t - key - g - p.low;
    u32 width = p.window - p.low;
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            bool inside = key + 16 * m + e / 2 * 8 + g < len;
#pragma unroll
            for (int n = 0; n < N; n++) {
                u32 distance = behind + 8 * n + e % 2 - 16 * m - e / 2 * 8;
                if (!(inside && distance < width)) s[m][n][e] = -INFINITE;
            }
        }
}

// sums += weights * other: weights `[16 M, 8 N]` rounded to bf16, other `[8 N, D]`.
template <int D, int M, int N>
__device__ __forceinline__ void accumulate(float (&sums)[M][D / 8][4],
                                           const float (&weights)[M][N][4], const bf16 *other) {
#pragma unroll
    for (int k = 0; k < N / 2; k++) {
        u32 a[M][4];
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float(&w)[4] = weights[m][2 * k + i / 2];
                a[m][i] = pack_bf16(w[i % 2 * 2], w[i % 2 * 2 + 1]);
            }
#pragma unroll
        for (int n = 0; n < D / 16; n++) {
            u32 b[4];
            load_b_rows<D>(b, other, 16 * k, n);
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma_bf16_16816(sums[m][2 * n], a[m], b[0], b[1]);
                mma_bf16_16816(sums[m][2 * n + 1], a[m], b[2], b[3]);
            }
        }
    }
}

// Rows `first` .. of a warp's sums, times `by`, to rows `stride` apart.
template <int D, int M>
__device__ __forceinline__ void store(const float (&sums)[M][D / 8][4], float by, bf16 *to,
                                      i64 stride, int first, int len, int dims) {
    int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            int row = first + 16 * m + 8 * r + g;
            if (row >= len) continue;
            bf16 *y = to + row * stride + 2 * t;
#pragma unroll
            for (int n = 0; n < D / 8; n++)
                if (8 * n < dims)
                    *(u32 *)(y + 8 * n) =
                        pack_bf16(sums[m][n][2 * r] * by, sums[m][n][2 * r + 1] * by);
        }
}

// tanh with an absolute error of a few units of 1: enough beside scores of bf16 products.
__device__ __forceinline__ float tanh_near(float x) {
    return 1.0f - __fdividef(2.0f, 1.0f + exp2_near(2 * LOG2_E * x));
}

#endif
