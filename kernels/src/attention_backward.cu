// The backward pass of attention on tensor cores, without atomic sums: `attention_keys` takes the keys
// of a block and runs over the queries that see them, of each head of the group in turn, for the
// gradients of keys and values; `attention_queries` takes the queries of a block and runs over the
// keys that they see. Both compute the scores again, from the log-sum-exp that the forward pass kept.
#include "attention_tensor.cuh"

#ifdef TENSOR_CORES

// The gradients of a block of keys and values.
// DK, DV: which sums are kept: both need more registers than there are where D is 256.
template <class E, int QUERIES, bool DK, bool DV>
__device__ __forceinline__ void gradient_of_keys(const bf16 *q, const bf16 *k, const bf16 *v,
                                                 i64 q_stride, i64 k_stride, i64 v_stride,
                                                 const i64 *offsets, const bf16 *dout,
                                                 const float *lse, const float *dots, bf16 *dk,
                                                 bf16 *dv, i64 tokens, const Attention &p) {
    constexpr int D = E::D, M = E::M, KEYS = E::ROWS, UNIT = E::UNIT, N = QUERIES / 8;
    DYNAMIC_SHARED(shared);
    bf16 *keys = (bf16 *)shared;               // [KEYS, D]
    bf16 *values = keys + KEYS * D;            // [KEYS, D]
    bf16 *queries = values + KEYS * D;         // [2, QUERIES, D]
    bf16 *douts = queries + 2 * QUERIES * D;   // [2, QUERIES, D]
    float *rows = (float *)(douts + 2 * QUERIES * D); // [2, 2, QUERIES]: lse and dots

    Place here = place(p, offsets, p.heads / p.group);
    int len = here.len, first = here.block * KEYS;
    if (first >= len) return;
    i64 width = (i64)p.heads * p.dims, kv_width = width / p.group;
    i64 start = here.start;
    k += start * k_stride + (i64)here.head * p.dims;
    v += start * v_stride + (i64)here.head * p.dims;
    q += start * q_stride + (i64)here.head * p.group * p.dims;
    dout += start * width + (i64)here.head * p.group * p.dims;
    lse += (i64)here.head * p.group * tokens + start;
    dots += (i64)here.head * p.group * tokens + start;
    Span seen = queries_of(p, first, min(first + KEYS, len), len);
    int from = seen.from / QUERIES * QUERIES;
    int steps = (seen.to - from + QUERIES - 1) / QUERIES, total = steps * p.group;

    auto load = [&](int step, int stage) {
        int head = step / steps, query = from + step % steps * QUERIES;
        load_tile<E, QUERIES>(queries + stage * QUERIES * D, q + (i64)head * p.dims,
                                       q_stride, query, len, p.dims);
        load_tile<E, QUERIES>(douts + stage * QUERIES * D, dout + (i64)head * p.dims,
                                       width, query, len, p.dims);
        // Rows beyond the end are zeros: they add nothing, whatever their weights are.
        for (int i = threadIdx.x; i < 2 * QUERIES; i += E::THREADS) {
            int n = i % QUERIES;
            const float *x = (i < QUERIES ? lse : dots) + head * tokens;
            bool valid = query + n < len;
            cp_async_4(rows + stage * 2 * QUERIES + i, valid ? x + query + n : x, valid);
        }
        cp_async_commit();
    };
    load_tile<E, KEYS>(keys, k, k_stride, first, len, p.dims);
    load_tile<E, KEYS>(values, v, v_stride, first, len, p.dims);
    load(0, 0);

    int t = threadIdx.x % 4;
    int key = first + E::row(), unit = first + E::unit();
    float c = exponent(p);
    bool plain = p.cap == 0 && p.keep == 0;
    float dks[DK ? M : 1][D / 8][4], dvs[DV ? M : 1][D / 8][4];
    clear(dks);
    clear(dvs);

    for (int step = 0; step < total; step++) {
        int stage = step & 1, head = here.head * p.group + step / steps;
        int query = from + step % steps * QUERIES;
        cp_async_wait<0>();
        E::see_copies();
        __syncthreads(); // this step's rows are there, and nobody reads the ones before any more
        if (step + 1 < total) load(step + 1, stage ^ 1);
        if (none_visible(p, query, QUERIES, unit, UNIT, len)) continue;
        const bf16 *these = queries + stage * QUERIES * D, *grads = douts + stage * QUERIES * D;
        const float *row_lse = rows + stage * 2 * QUERIES, *row_dots = row_lse + QUERIES;
        // While few registers are taken.
        u64 bits[M];
#pragma unroll
        for (int m = 0; m < M; m++)
            bits[m] = p.keep > 0 ? kept_of_keys<N>(p, (u32)start + query, key + 16 * m, head) : ~0ull;
        float s[M][N][4], dp[M][N][4];
        E::scores(s, keys, these);
        if constexpr (DK) E::scores(dp, values, grads);
        E::commit();
        E::template wait<0>(s);
        if constexpr (DK) E::template wait<0>(dp);
        if (!plain) {
            if constexpr (DK) {
                EACH(M, N, {
                    float grow = bits[m] >> (4 * n + e) & 1 ? p.kept : 0;
                    dp[m][n][e] = fmaf(dp[m][n][e], grow, -row_dots[8 * n + 2 * t + e % 2]);
                })
            }
            if (p.cap > 0) {
                squeeze(p, s);
                if constexpr (DK) EACH(M, N, { dp[m][n][e] *= 1 - s[m][n][e] * s[m][n][e]; })
            }
        }
        if (!all_visible(p, query, QUERIES, unit, UNIT, len)) hide_by_key(p, s, query, key, len);
        EACH(M, N, {
            float lse2 = row_lse[8 * n + 2 * t + e % 2] * LOG2_E;
            s[m][n][e] = exp2_near(fmaf(s[m][n][e], c, -lse2));
        })
        if (plain) {
            if constexpr (DK) {
                EACH(M, N, {
                    float dot = row_dots[8 * n + 2 * t + e % 2];
                    dp[m][n][e] = s[m][n][e] * (dp[m][n][e] - dot);
                })
            }
        } else {
            if constexpr (DK) EACH(M, N, { dp[m][n][e] *= s[m][n][e]; })
            EACH(M, N, { s[m][n][e] *= bits[m] >> (4 * n + e) & 1 ? p.kept : 0; })
        }
        if constexpr (DV) E::accumulate(dvs, s, grads);
        if constexpr (DK) E::accumulate(dks, dp, these);
        E::commit();
        if constexpr (DV) E::template wait<0>(dvs);
        if constexpr (DK) E::template wait<0>(dks);
    }
    i64 to = start * kv_width + (i64)here.head * p.dims;
    if constexpr (DK)
        if (dk) store(dks, p.scale, dk + to, kv_width, key, len, p.dims);
    if constexpr (DV)
        if (dv) store(dvs, 1, dv + to, kv_width, key, len, p.dims);
}

#define KEYS(name, E, QUERIES, DK, DV, BLOCKS)                                                      \
    EXPORT __launch_bounds__(E::THREADS, BLOCKS) attention_keys_##name(                             \
        const bf16 *q, const bf16 *k, const bf16 *v, i64 q_stride, i64 k_stride, i64 v_stride,      \
        const i64 *offsets, const bf16 *dout, const float *lse, const float *dots, bf16 *dk,        \
        bf16 *dv, i64 tokens, Attention p) {                                                        \
        gradient_of_keys<E, QUERIES, DK, DV>(q, k, v, q_stride, k_stride, v_stride, offsets, dout,  \
                                             lse, dots, dk, dv, tokens, p);                         \
    }
#ifdef WARPGROUPS
typedef Groups<64, 1> Keys64;
typedef Groups<128, 2> Keys128;
KEYS(64, Keys64, 64, true, true, 2)
KEYS(128, Keys128, 64, true, true, 1)
#else
typedef Warps<64, 2, 4> Keys64;
typedef Warps<128, 1, 8> Keys128;
KEYS(64, Keys64, 32, true, true, 2)
KEYS(128, Keys128, 32, true, true, 1)
#endif
typedef Warps<256, 1, 4> Keys256;
KEYS(256_dk, Keys256, 16, true, false, 1)
KEYS(256_dv, Keys256, 16, false, true, 1)

// The gradients of a block of queries.
template <class E, int KEYS>
__device__ __forceinline__ void gradient_of_queries(const bf16 *q, const bf16 *k, const bf16 *v,
                                                    i64 q_stride, i64 k_stride, i64 v_stride,
                                                    const i64 *offsets, const bf16 *dout,
                                                    const float *lse, const float *dots, bf16 *dq,
                                                    i64 tokens, const Attention &p) {
    constexpr int D = E::D, M = E::M, QUERIES = E::ROWS, UNIT = E::UNIT, N = KEYS / 8;
    DYNAMIC_SHARED(shared);
    bf16 *own = (bf16 *)shared;          // [QUERIES, D]
    bf16 *grads = own + QUERIES * D;     // [QUERIES, D]
    bf16 *keys = grads + QUERIES * D;    // [2, KEYS, D]
    bf16 *values = keys + 2 * KEYS * D;  // [2, KEYS, D]

    Place here = place(p, offsets, p.heads);
    int len = here.len;
    int first = (p.low == 0 ? p.blocks - 1 - here.block : here.block) * QUERIES;
    if (first >= len) return;
    i64 width = (i64)p.heads * p.dims, start = here.start;
    q += start * q_stride + (i64)here.head * p.dims;
    dout += start * width + (i64)here.head * p.dims;
    k += start * k_stride + (i64)(here.head / p.group) * p.dims;
    v += start * v_stride + (i64)(here.head / p.group) * p.dims;
    Span seen = keys_of(p, first, min(first + QUERIES, len), len);

    auto load = [&](int block, int stage) {
        load_tile<E, KEYS>(keys + stage * KEYS * D, k, k_stride, block, len, p.dims);
        load_tile<E, KEYS>(values + stage * KEYS * D, v, v_stride, block, len, p.dims);
        cp_async_commit();
    };
    int block = seen.from / KEYS * KEYS;
    load_tile<E, QUERIES>(own, q, q_stride, first, len, p.dims);
    load_tile<E, QUERIES>(grads, dout, width, first, len, p.dims);
    load(block, 0);

    int g = threadIdx.x % 32 / 4;
    int query = first + E::row(), unit = first + E::unit();
    float c = exponent(p);
    bool plain = p.cap == 0 && p.keep == 0;
    float sums[M][D / 8][4], lse2[M][2], dot[M][2];
    clear(sums);
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            int i = query + 16 * m + 8 * r + g;
            i64 at = here.head * tokens + start + i;
            lse2[m][r] = i < len ? lse[at] * LOG2_E : 0;
            dot[m][r] = i < len ? dots[at] : 0;
        }

    for (int stage = 0; block < seen.to; block += KEYS, stage ^= 1) {
        cp_async_wait<0>();
        E::see_copies();
        __syncthreads();
        if (block + KEYS < seen.to) load(block + KEYS, stage ^ 1);
        if (none_visible(p, unit, UNIT, block, KEYS, len)) continue;
        u64 bits[M];
#pragma unroll
        for (int m = 0; m < M; m++)
            bits[m] = p.keep > 0 ? kept_of_queries<N>(p, (u32)start + query + 16 * m, block, here.head)
                                 : ~0ull;
        float s[M][N][4], dp[M][N][4];
        E::scores(s, own, keys + stage * KEYS * D);
        E::scores(dp, grads, values + stage * KEYS * D);
        E::commit();
        E::template wait<0>(s);
        E::template wait<0>(dp);
        if (!plain) {
            EACH(M, N, {
                float grow = bits[m] >> (4 * n + e) & 1 ? p.kept : 0;
                dp[m][n][e] = fmaf(dp[m][n][e], grow, -dot[m][e / 2]);
            })
            if (p.cap > 0) {
                squeeze(p, s);
                EACH(M, N, { dp[m][n][e] *= 1 - s[m][n][e] * s[m][n][e]; })
            }
        }
        if (!all_visible(p, unit, UNIT, block, KEYS, len)) hide(p, s, query, block, len);
        EACH(M, N, { s[m][n][e] = exp2_near(fmaf(s[m][n][e], c, -lse2[m][e / 2])); })
        if (plain) {
            EACH(M, N, { dp[m][n][e] = s[m][n][e] * (dp[m][n][e] - dot[m][e / 2]); })
        } else {
            EACH(M, N, { dp[m][n][e] *= s[m][n][e]; })
        }
        E::accumulate(sums, dp, keys + stage * KEYS * D);
        E::commit();
        E::template wait<0>(sums);
    }
    store(sums, p.scale, dq + start * width + (i64)here.head * p.dims, width, query, len,
             p.dims);
}

#define QUERIES(D, E, KEYS, BLOCKS)                                                                 \
    EXPORT __launch_bounds__(E::THREADS, BLOCKS) attention_queries_##D(                             \
        const bf16 *q, const bf16 *k, const bf16 *v, i64 q_stride, i64 k_stride, i64 v_stride,      \
        const i64 *offsets, const bf16 *dout, const float *lse, const float *dots, bf16 *dq,        \
        i64 tokens, Attention p) {                                                                  \
        gradient_of_queries<E, KEYS>(q, k, v, q_stride, k_stride, v_stride, offsets, dout, lse,     \
                                     dots, dq, tokens, p);                                          \
    }
#ifdef WARPGROUPS
typedef Groups<64, 1> Queries64;
typedef Groups<128, 2> Queries128;
QUERIES(64, Queries64, 64, 3)
QUERIES(128, Queries128, 64, 1)
#else
typedef Warps<64, 2, 4> Queries64;
typedef Warps<128, 1, 4> Queries128;
QUERIES(64, Queries64, 32, 2)
QUERIES(128, Queries128, 64, 2)
#endif
typedef Warps<256, 1, 4> Queries256;
QUERIES(256, Queries256, 16, 1)

#endif
