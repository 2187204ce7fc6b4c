// The forward pass of attention on tensor cores: bf16 in and out, products and sums in f32. Online
// softmax after Milakov and Gimelshein (2018), blocks after Dao (2023): a block of threads has some
// queries of one head, whose scores, weights and sums stay in registers; keys and values pass through
// two stages of shared memory.
#include "attention_tensor.cuh"

#ifdef TENSOR_CORES

template <class E, int KEYS>
__device__ __forceinline__ void forward(const bf16 *q, const bf16 *k, const bf16 *v, i64 q_stride,
                                        i64 k_stride, i64 v_stride, const i64 *offsets,
                                        const i64 *starts, const i64 *lengths, bf16 *out,
                                        float *lse, i64 tokens, const Attention &p) {
    constexpr int D = E::D, M = E::M, QUERIES = E::ROWS, UNIT = E::UNIT;
    DYNAMIC_SHARED(shared);
    bf16 *queries = (bf16 *)shared;         // [QUERIES, D]
    bf16 *keys = queries + QUERIES * D;     // [2, KEYS, D]
    bf16 *values = keys + 2 * KEYS * D;     // [2, KEYS, D]

    Place here = place(p, offsets, p.heads);
    int len = here.len;
    // Under a causal mask the last queries see most keys: they come first.
    int first = (p.low == 0 ? p.blocks - 1 - here.block : here.block) * QUERIES;
    if (first >= len) return;
    q += here.start * q_stride + (i64)here.head * p.dims;
    Kept kept = kept_keys(here, starts, lengths);
    k += kept.start * k_stride + (i64)(here.head / p.group) * p.dims;
    v += kept.start * v_stride + (i64)(here.head / p.group) * p.dims;
    Span seen = keys_of(p, first + kept.shift, min(first + QUERIES, len) + kept.shift, kept.len);

    auto load = [&](int block, int stage) {
        load_tile<E, KEYS>(keys + stage * KEYS * D, k, k_stride, block, kept.len, p.dims);
        load_tile<E, KEYS>(values + stage * KEYS * D, v, v_stride, block, kept.len, p.dims);
        cp_async_commit();
    };
    int block = seen.from / KEYS * KEYS;
    load_tile<E, QUERIES>(queries, q, q_stride, first, len, p.dims);
    load(block, 0);

    int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    int query = first + E::row(), position = query + kept.shift;
    int unit = first + E::unit() + kept.shift;
    float c = exponent(p);
    float sums[M][D / 8][4], most[M][2], total[M][2];
    clear(sums);
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int r = 0; r < 2; r++) most[m][r] = -INFINITE, total[m][r] = 0;

    for (int stage = 0; block < seen.to; block += KEYS, stage ^= 1) {
        cp_async_wait<0>();
        E::see_copies();
        __syncthreads(); // this block is there, and nobody reads the one before any more
        if (block + KEYS < seen.to) load(block + KEYS, stage ^ 1);
        if (none_visible(p, unit, UNIT, block, KEYS, kept.len)) continue;
        float s[M][KEYS / 8][4];
        E::scores(s, queries, keys + stage * KEYS * D);
        E::commit();
        E::template wait<0>(s);
        if (p.cap > 0) squeeze(p, s);
        if (!all_visible(p, unit, UNIT, block, KEYS, kept.len))
            hide(p, s, position, block, kept.len);
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                float best = most[m][r];
#pragma unroll
                for (int n = 0; n < KEYS / 8; n++)
                    best = fmaxf(best, fmaxf(s[m][n][2 * r], s[m][n][2 * r + 1]));
                best = fmaxf(best, __shfl_xor_sync(0xffffffffu, best, 1));
                best = fmaxf(best, __shfl_xor_sync(0xffffffffu, best, 2));
                // No visible key so far: any finite shift gives weights of 0 and not NaN.
                float shift = best == -INFINITE ? 0 : best * c;
                float shrink = exp2_near(most[m][r] * c - shift);
                most[m][r] = best;
                float sum = 0;
#pragma unroll
                for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                    for (int e = 2 * r; e < 2 * r + 2; e++) {
                        s[m][n][e] = exp2_near(fmaf(s[m][n][e], c, -shift));
                        sum += s[m][n][e];
                    }
                total[m][r] = fmaf(total[m][r], shrink, sum);
#pragma unroll
                for (int n = 0; n < D / 8; n++) {
                    sums[m][n][2 * r] *= shrink;
                    sums[m][n][2 * r + 1] *= shrink;
                }
            }
        if (p.keep > 0) {
#pragma unroll
            for (int m = 0; m < M; m++) {
                u32 token = (u32)here.start + query + 16 * m;
                u64 bits = kept_of_queries<KEYS / 8>(p, token, block, here.head);
#pragma unroll
                for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                    for (int e = 0; e < 4; e++)
                        if (!(bits >> (4 * n + e) & 1)) s[m][n][e] = 0;
            }
        }
        E::accumulate(sums, s, values + stage * KEYS * D);
        E::commit();
        E::template wait<0>(sums);
    }

    // Each row's sum is spread over four lanes.
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float sum = total[m][r];
            sum += __shfl_xor_sync(0xffffffffu, sum, 1);
            sum += __shfl_xor_sync(0xffffffffu, sum, 2);
            float by = p.kept / sum;
#pragma unroll
            for (int n = 0; n < D / 8; n++) {
                sums[m][n][2 * r] *= by;
                sums[m][n][2 * r + 1] *= by;
            }
            int i = query + 16 * m + 8 * r + g;
            if (lse && t == 0 && i < len)
                lse[here.head * tokens + here.start + i] = most[m][r] * c * LN_2 + logf(sum);
        }
    i64 width = (i64)p.heads * p.dims;
    store(sums, 1, out + here.start * width + (i64)here.head * p.dims, width, query, len, p.dims);
}

#define FORWARD(D, E, KEYS, BLOCKS)                                                                 \
    EXPORT __launch_bounds__(E::THREADS, BLOCKS)                                                    \
        attention_##D(const bf16 *q, const bf16 *k, const bf16 *v, i64 q_stride, i64 k_stride,      \
                      i64 v_stride, const i64 *offsets, const i64 *starts, const i64 *lengths,      \
                      bf16 *out, float *lse, i64 tokens, Attention p) {                             \
        forward<E, KEYS>(q, k, v, q_stride, k_stride, v_stride, offsets, starts, lengths, out, lse, \
                         tokens, p);                                                                \
    }
#ifdef WARPGROUPS
typedef Groups<64, 2> Forward64;
typedef Groups<128, 2> Forward128;
FORWARD(64, Forward64, 64, 2)
FORWARD(128, Forward128, 128, 1)
#else
typedef Warps<64, 2, 4> Forward64;
typedef Warps<128, 2, 4> Forward128;
FORWARD(64, Forward64, 64, 2)
FORWARD(128, Forward128, 64, 2)
#endif
typedef Warps<256, 1, 4> Forward256;
FORWARD(256, Forward256, 32, 1)

#endif
