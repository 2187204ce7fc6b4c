// Attention on tensor cores: tiles of bf16 in shared memory, products of them, and what happens to
// scores between products.
//
// The manual's fragments, for lane = 4 g + t:
//   A (16 x 16): register 0 holds row g, columns 2t and 2t + 1; register 1 row g + 8; registers 2
//     and 3 the same 8 columns on.
//   B (16 x 8): register 0 holds rows 2t and 2t + 1 of column g, register 1 the same 8 rows on.
//   C (16 x 8): elements 0 and 1 are columns 2t and 2t + 1 of row g, elements 2 and 3 those of row
//     g + 8: element e is row g + 8 (e / 2), column 2t + e % 2. Two C side by side, rounded and
//     packed, are one A.
#pragma once

#include "attention.cuh"

#if defined(GRAFT_SIMULATION) || __CUDA_ARCH__ >= 800
#define TENSOR_CORES 1
#if defined(GRAFT_WARPGROUPS) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define WARPGROUPS 1
#endif

#include "attention_hopper.cuh"

// Starts copying rows `first` .. of `from`, `stride` apart, to a tile of ROWS, with zeros for rows
// from `end` on and for dimensions from `dims` on.
template <class E, int ROWS>
__device__ __forceinline__ void load_tile(bf16 *tile, const bf16 *from, i64 stride, int first,
                                          int end, int dims) {
    constexpr int CHUNKS = E::D / 8, STEP = E::THREADS / CHUNKS;
    static_assert(E::THREADS % CHUNKS == 0 && ROWS % STEP == 0, "whole turns");
    int chunk = threadIdx.x % CHUNKS, row = threadIdx.x / CHUNKS;
    const bf16 *source = from + 8 * chunk + (first + row) * stride;
    int rows = 8 * chunk < dims ? end - first : 0;
#pragma unroll
    for (int r = 0; r < ROWS; r += STEP) {
        bool valid = row + r < rows;
        cp_async_16(tile + E::template at<ROWS>(row + r, chunk), valid ? source + r * stride : from,
                    valid);
    }
}

// Weights rounded, as A: of columns 16 k .. + 16.
template <int N>
__device__ __forceinline__ void round_to_a(u32 (&a)[4], const float (&weights)[N][4], int k) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float(&w)[4] = weights[2 * k + i / 2];
        a[i] = pack_bf16(w[i % 2 * 2], w[i % 2 * 2 + 1]);
    }
}

// --- The ways to multiply tiles. A tile is [rows, D] of bf16 in shared memory; eight elements are a
// chunk. Each warp has 16 M rows of its block's side, and scores and sums of these rows alone.
// Products may be under way until `wait`: `commit` ends a group of them.

// By `mma.sync`, warp by warp.
template <int DIMS, int TILES, int COUNT> struct Warps {
    static constexpr int D = DIMS, M = TILES, WARPS = COUNT, THREADS = 32 * WARPS;
    static constexpr int ROWS = 16 * M * WARPS;
    static constexpr int UNIT = 16 * M; // rows that go through the same products together

    // Chunks of a row change places with the row's number, so that eight rows of one column of
    // chunks lie in different banks.
    template <int TILE> static __device__ __forceinline__ int at(int row, int chunk) {
        int turn = D % 64 == 0 ? row & 7 : (row >> 1) & 3;
        return (row * (D / 8) + (chunk ^ turn)) * 8;
    }
    // This thread's first row, and its unit's.
    static __device__ __forceinline__ int row() { return 16 * M * (threadIdx.x / 32); }
    static __device__ __forceinline__ int unit() { return row(); }

    static __device__ __forceinline__ void see_copies() {}
    static __device__ __forceinline__ void commit() {}
    template <int PENDING, int A, int B>
    static __device__ __forceinline__ void wait(float (&)[A][B][4]) {}

    // s = own * other^T, of the N * 8 rows of `other`.
    template <int N>
    static __device__ __forceinline__ void scores(float (&s)[M][N][4], const bf16 *own,
                                                  const bf16 *other) {
        int lane = threadIdx.x % 32;
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
            for (int m = 0; m < M; m++)
                ldmatrix_x4(a[m], own + at<0>(row() + 16 * m + (lane & 15), 2 * k + (lane >> 4)));
#pragma unroll
            for (int n = 0; n < N / 2; n++) {
                // Two B side by side: columns are rows of the tile.
                u32 b[4];
                ldmatrix_x4(b, other + at<0>(16 * n + (lane & 7) + (lane >> 4) * 8,
                                             2 * k + (lane >> 3 & 1)));
#pragma unroll
                for (int m = 0; m < M; m++) {
                    mma_bf16_16816(s[m][2 * n], a[m], b[0], b[1]);
                    mma_bf16_16816(s[m][2 * n + 1], a[m], b[2], b[3]);
                }
            }
        }
    }

    // sums += weights * other: weights [16 M, 8 N] rounded to bf16, other [8 N, D].
    template <int N>
    static __device__ __forceinline__ void accumulate(float (&sums)[M][D / 8][4],
                                                      const float (&weights)[M][N][4],
                                                      const bf16 *other) {
        int lane = threadIdx.x % 32;
#pragma unroll
        for (int k = 0; k < N / 2; k++) {
            u32 a[M][4];
#pragma unroll
            for (int m = 0; m < M; m++) round_to_a(a[m], weights[m], k);
#pragma unroll
            for (int n = 0; n < D / 16; n++) {
                // Two B side by side: rows are rows of the tile.
                u32 b[4];
                ldmatrix_x4_trans(b, other + at<0>(16 * k + (lane & 15), 2 * n + (lane >> 4)));
#pragma unroll
                for (int m = 0; m < M; m++) {
                    mma_bf16_16816(sums[m][2 * n], a[m], b[0], b[1]);
                    mma_bf16_16816(sums[m][2 * n + 1], a[m], b[2], b[3]);
                }
            }
        }
    }
};

#ifdef WARPGROUPS

// By `wgmma`, four warps with 64 rows together.
template <int DIMS, int COUNT> struct Groups {
    static constexpr int D = DIMS, M = 1, WARPS = 4 * COUNT, THREADS = 32 * WARPS;
    static constexpr int ROWS = 64 * COUNT, UNIT = 64;

    // 64 dimensions of all rows come before the next 64.
    template <int TILE> static __device__ __forceinline__ int at(int row, int chunk) {
        return (chunk / 8 * TILE + row) * 64 + ((chunk ^ row) & 7) * 8;
    }
    static __device__ __forceinline__ int row() { return 16 * (threadIdx.x / 32); }
    static __device__ __forceinline__ int unit() { return 64 * (threadIdx.x / 128); }

    static __device__ __forceinline__ void see_copies() { fence_shared_async(); }
    static __device__ __forceinline__ void commit() { wgmma_commit(); }
    template <int PENDING, int B>
    static __device__ __forceinline__ void wait(float (&sums)[1][B][4]) {
        wgmma_wait<PENDING>();
#pragma unroll
        for (int n = 0; n < B; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) wgmma_touch(sums[0][n][e]);
    }

    // From shared memory on both sides: rows that were kept in registers over the steps would be
    // taken for others' room by ptxas 12.9.
    template <int N>
    static __device__ __forceinline__ void scores(float (&s)[1][N][4], const bf16 *own,
                                                  const bf16 *other) {
        u64 a = wgmma_operand(own + unit() * 64, 0, 1024), b = wgmma_operand(other, 0, 1024);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < D / 16; k++)
            wgmma_product(s[0], a + k / 4 * (ROWS * 8) + k % 4 * 2,
                          b + k / 4 * (8 * N * 8) + k % 4 * 2, k > 0);
    }

    template <int N>
    static __device__ __forceinline__ void accumulate(float (&sums)[1][D / 8][4],
                                                      const float (&weights)[1][N][4],
                                                      const bf16 *other) {
        u32 a[N / 2][4];
#pragma unroll
        for (int k = 0; k < N / 2; k++) round_to_a(a[k], weights[0], k);
        u64 b = wgmma_operand(other, 8 * N * 128, 1024);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < N / 2; k++)
            wgmma_product<true>(sums[0], a[k], b + k * (16 * 8), true);
    }
};

#endif

template <int A, int B> __device__ __forceinline__ void clear(float (&sums)[A][B][4]) {
#pragma unroll
    for (int m = 0; m < A; m++)
#pragma unroll
        for (int n = 0; n < B; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) sums[m][n][e] = 0;
}

// Runs `...` for each element e of each C m, n.
#define EACH(M, N, ...)                                                                             \
    {                                                                                               \
        _Pragma("unroll") for (int m = 0; m < M; m++)                                               \
            _Pragma("unroll") for (int n = 0; n < N; n++)                                           \
                _Pragma("unroll") for (int e = 0; e < 4; e++) __VA_ARGS__                           \
    }

// tanh with an absolute error of a few units of 1: enough beside scores of bf16 products.
__device__ __forceinline__ float tanh_near(float x) {
    return 1.0f - __fdividef(2.0f, 1.0f + exp2_near(2 * LOG2_E * x));
}

// Products of queries and keys become the tanh that the cap takes of them.
template <int M, int N>
__device__ __forceinline__ void squeeze(const Attention &p, float (&s)[M][N][4]) {
    float inside = inside_cap(p);
    EACH(M, N, { s[m][n][e] = tanh_near(s[m][n][e] * inside); })
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

// Bits 4 i + e: whether element e of C number i is kept, of COUNT side by side whose rows are queries
// from `token` on and whose columns are keys from `key` on (divisible by 8). Of the four blocks that
// a pair of lanes reads, each lane draws one. AT_ONCE: how many are drawn at a time.
template <int COUNT, int AT_ONCE = 1>
__device__ __forceinline__ u64 kept_of_queries(const Attention &p, u32 token, u32 key, u32 head) {
    static_assert(COUNT <= 16, "bits of a word");
    u32 g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, odd = t & 1;
    u64 all = 0;
#pragma unroll AT_ONCE
    for (int i = 0; i < COUNT; i++) {
        u32 bits = keep_bits(p, key + 8 * i + 4 * (t / 2), token + g + 8 * odd, head) << 4 * odd;
        bits |= __shfl_xor_sync(0xffffffffu, bits, 1);
        bits >>= 2 * odd;
        all |= (u64)((bits & 3) | (bits >> 4 & 3) << 2) << 4 * i;
    }
    return all;
}

// The same for C whose rows are keys and whose columns are queries: four lanes, of which each draws
// one of the four blocks that they read.
template <int COUNT, int AT_ONCE = 1>
__device__ __forceinline__ u64 kept_of_keys(const Attention &p, u32 token, u32 key, u32 head) {
    static_assert(COUNT <= 16, "bits of a word");
    u32 g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, turn = g % 4;
    u64 all = 0;
    key += g / 4 * 4 + turn / 2 * 8;
    token += 2 * t + turn % 2;
#pragma unroll AT_ONCE
    for (int i = 0; i < COUNT; i++) {
        u32 bits = keep_bits(p, key, token + 8 * i, head) << 4 * turn;
        bits |= __shfl_xor_sync(0xffffffffu, bits, 4);
        bits |= __shfl_xor_sync(0xffffffffu, bits, 8);
        bits >>= turn;
        bits = (bits & 1) | (bits >> 4 & 1) << 1 | (bits >> 8 & 1) << 2 | (bits >> 12 & 1) << 3;
        all |= (u64)bits << 4 * i;
    }
    return all;
}

// Rows `first` .. of a warp's sums, times `by`, to rows `stride` apart.
template <int M, int N>
__device__ __forceinline__ void store(const float (&sums)[M][N][4], float by, bf16 *to,
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
            for (int n = 0; n < N; n++)
                if (8 * n < dims)
                    *(u32 *)(y + 8 * n) =
                        pack_bf16(sums[m][n][2 * r] * by, sums[m][n][2 * r + 1] * by);
        }
}

#endif
