// The backward pass of attention on Hopper, of heads of 64 or 128 dimensions: what
// attention_backward.cu computes, in the same two passes over the scores, as
// attention_pipeline.cuh describes blocks and tasks. Products of the next step are under way while a
// step's sums are multiplied, and one warpgroup multiplies while the other takes powers.
#include "attention_pipeline.cuh"

#ifdef WARPGROUPS

constexpr int OWN = 128; // rows of a task

// The scores of both own tiles with both others', in turn with the other warpgroup.
template <class R, int N>
__device__ __forceinline__ void first_scores(int group, float (&s)[1][N][4], float (&dp)[1][N][4],
                                             u64 own, u64 other_own, const u8 *tile) {
    my_turn<R>(group);
    scores<R>(s, own, wgmma_operand(tile, 0, 1024));
    scores<R>(dp, other_own, wgmma_operand(tile + R::TILE, 0, 1024));
    your_turn<R>(group);
}

// The gradients of 64 keys and values of each task. Rows of scores are keys.
template <class R, bool DROP>
__device__ __forceinline__ void gradients_of_keys(const Attention &p, u8 *shared,
                                                  Barriers &barriers, bf16 *dk, bf16 *dv) {
    constexpr int D = R::D, N = R::OTHERS / 8;
    int group = threadIdx.x / GROUP, t = threadIdx.x % 4;
    float c = exponent(p);
    i64 width = (i64)(p.heads / p.group) * D;
    float dks[1][D / 8][4], dvs[1][D / 8][4], s[1][N][4], dp[1][N][4];
    u32 step = 0;
    if (group == R::GROUPS - 1) your_turn<R>(group);
#pragma unroll 1
    for (u32 turn = 0;; turn++) {
        Task task = task_at<R>(barriers, turn);
        if (task.len == 0) return;
        u32 slot = turn % R::SLOTS;
        const u8 *own = shared + slot * R::SLOT + group * 64 * 128;
        u64 keys = wgmma_operand(own, 0, 1024), values = wgmma_operand(own + R::OWN_TILE, 0, 1024);
        int unit = task.first + 64 * group, key = task.first + 16 * (threadIdx.x / 32);
        int head = task.head * p.group, query = task.from, left = task.steps * p.group;
        clear(dks);
        clear(dvs);
        const u8 *tile = stage_at<R>(shared, barriers, step);
        first_scores<R>(group, s, dp, keys, values, tile);
#pragma unroll 1
        for (;;) {
            const u8 *numbers = shared + R::NUMBERS_AT + step % R::STAGES * 2 * R::NUMBERS;
            const float2 *lse2 = (const float2 *)numbers + t;
            const float2 *dots = (const float2 *)(numbers + R::NUMBERS) + t;
            u64 bits = DROP ? kept_of_keys<N, 2>(p, (u32)(task.start + query), key, head) : 0;
            wgmma_wait<1>();
            arrived(s);
            if (!all_visible(p, query, R::OTHERS, unit, 64, task.len))
                hide_by_key(p, s, query, key, task.len);
#pragma unroll
            for (int n = 0; n < N; n++) {
                float2 shift = lse2[4 * n];
#pragma unroll
                for (int e = 0; e < 4; e++)
                    s[0][n][e] = exp2_near(fmaf(s[0][n][e], c, e % 2 ? -shift.y : -shift.x));
            }
            wgmma_wait<0>();
            arrived(dp);
            if (left == 1) release(&barriers.own_empty[slot]);
#pragma unroll
            for (int n = 0; n < N; n++) {
                float2 dot = dots[4 * n];
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    float less = e % 2 ? dot.y : dot.x;
                    if (DROP) {
                        float grow = bits >> (4 * n + e) & 1 ? p.kept : 0;
                        dp[0][n][e] = s[0][n][e] * fmaf(dp[0][n][e], grow, -less);
                        s[0][n][e] *= grow;
                    } else {
                        dp[0][n][e] = s[0][n][e] * (dp[0][n][e] - less);
                    }
                }
            }
            u32 weights[N / 2][4], changes[N / 2][4];
#pragma unroll
            for (int k = 0; k < N / 2; k++) {
                round_to_a(weights[k], s[0], k);
                round_to_a(changes[k], dp[0], k);
            }
            my_turn<R>(group);
            wgmma_fence();
            accumulate(dvs, weights, tile + R::TILE);
            accumulate(dks, changes, tile);
            wgmma_commit();
            u64 *done = &barriers.empty[step++ % R::STAGES];
            if (--left == 0) {
                your_turn<R>(group);
                wgmma_wait<0>();
                were_read(weights);
                were_read(changes);
                release(done);
                break;
            }
            query += R::OTHERS;
            if (query >= task.from + task.steps * R::OTHERS) query = task.from, head++;
            tile = stage_at<R>(shared, barriers, step);
            scores<R>(s, keys, wgmma_operand(tile, 0, 1024));
            wgmma_wait<1>();
            were_read(weights);
            were_read(changes);
            release(done);
            scores<R>(dp, values, wgmma_operand(tile + R::TILE, 0, 1024));
            your_turn<R>(group); // given before, this one's would come after the other's
        }
        arrived(dks);
        arrived(dvs);
        i64 to = task.start * width + task.head * D;
        if (dk) store_wide(dks, p.scale, dk + to, width, key, task.len);
        if (dv) store_wide(dvs, 1, dv + to, width, key, task.len);
    }
}

// The product of a row of an own tile with the same row of the next tile, shared out among the four
// lanes that call this with one row.
template <class R> __device__ __forceinline__ float row_product(const u8 *tile, int row) {
    typedef Pack<bf16, 8> Eight;
    int t = threadIdx.x % 4;
    float sum = 0;
#pragma unroll
    for (int i = 0; i < R::D / 32; i++) {
        const u8 *at = tile + (i / 2 * R::OWN + row) * 128 + (((i % 2 * 4 + t) ^ (row & 7)) << 4);
        Eight a = *(const Eight *)at, b = *(const Eight *)(at + R::OWN_TILE);
#pragma unroll
        for (int e = 0; e < 8; e++) sum = fmaf(widen(a.at[e]), widen(b.at[e]), sum);
    }
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    return sum + __shfl_xor_sync(0xffffffffu, sum, 2);
}

// The gradients of 64 queries of each task, and the numbers that the other pass reads. Rows of scores
// are queries.
template <class R, bool DROP>
__device__ __forceinline__ void gradients_of_queries(const Attention &p, const float *lse, i64 tokens,
                                                     const Numbers &numbers, u8 *shared,
                                                     Barriers &barriers, bf16 *dq) {
    constexpr int D = R::D, N = R::OTHERS / 8;
    int group = threadIdx.x / GROUP, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    float c = exponent(p);
    i64 width = (i64)p.heads * D;
    float dqs[1][D / 8][4], s[1][N][4], dp[1][N][4];
    u32 step = 0;
    if (group == R::GROUPS - 1) your_turn<R>(group);
#pragma unroll 1
    for (u32 turn = 0;; turn++) {
        Task task = task_at<R>(barriers, turn);
        if (task.len == 0) return;
        u32 slot = turn % R::SLOTS;
        const u8 *slot_at = shared + slot * R::SLOT, *own = slot_at + group * 64 * 128;
        u64 queries = wgmma_operand(own, 0, 1024), grads = wgmma_operand(own + R::OWN_TILE, 0, 1024);
        int unit = task.first + 64 * group, query = task.first + 16 * (threadIdx.x / 32);
        int key = task.from, left = task.steps;
        clear(dqs);
        const u8 *tile = stage_at<R>(shared, barriers, step);
        first_scores<R>(group, s, dp, queries, grads, tile);
        float lse2[2], dot[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            int row = query + 8 * r + g;
            bool valid = row < task.len;
            float product = row_product<R>(slot_at + R::OWN_TILE, row - task.first);
            i64 at = task.head * numbers.padded + task.padded + row;
            lse2[r] = valid ? lse[task.head * tokens + task.start + row] * LOG2_E : INFINITE;
            dot[r] = valid ? product : 0;
            if (t == 0) numbers.lse2[at] = lse2[r], numbers.dots[at] = dot[r];
        }
#pragma unroll 1
        for (;;) {
            u64 bits = DROP ? kept_of_queries<N, 2>(p, (u32)(task.start + query), key, task.head) : 0;
            wgmma_wait<1>();
            arrived(s);
            if (!all_visible(p, unit, 64, key, R::OTHERS, task.len))
                hide(p, s, query, key, task.len);
#pragma unroll
            for (int n = 0; n < N; n++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    s[0][n][e] = exp2_near(fmaf(s[0][n][e], c, -lse2[e / 2]));
            wgmma_wait<0>();
            arrived(dp);
            if (left == 1) release(&barriers.own_empty[slot]);
#pragma unroll
            for (int n = 0; n < N; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    float change = dp[0][n][e];
                    if (DROP) change *= bits >> (4 * n + e) & 1 ? p.kept : 0;
                    dp[0][n][e] = s[0][n][e] * (change - dot[e / 2]);
                }
            u32 changes[N / 2][4];
#pragma unroll
            for (int k = 0; k < N / 2; k++) round_to_a(changes[k], dp[0], k);
            my_turn<R>(group);
            wgmma_fence();
            accumulate(dqs, changes, tile);
            wgmma_commit();
            u64 *done = &barriers.empty[step++ % R::STAGES];
            if (--left == 0) {
                your_turn<R>(group);
                wgmma_wait<0>();
                were_read(changes);
                release(done);
                break;
            }
            key += R::OTHERS;
            tile = stage_at<R>(shared, barriers, step);
            scores<R>(s, queries, wgmma_operand(tile, 0, 1024));
            your_turn<R>(group);
            wgmma_wait<1>();
            were_read(changes);
            release(done);
            scores<R>(dp, grads, wgmma_operand(tile + R::TILE, 0, 1024));
        }
        arrived(dqs);
        if (dq) store_wide(dqs, p.scale, dq + task.start * width + task.head * D, width, query, task.len);
    }
}

template <class R, bool DROP>
__device__ __forceinline__ void pass(const Attention &p, const i64 *offsets, const float *lse,
                                     i64 tokens, const Numbers &numbers, u32 tasks, const Maps &maps,
                                     bf16 *first, bf16 *second) {
    DYNAMIC_SHARED(shared);
    Barriers &barriers = *(Barriers *)(shared + R::BARRIERS_AT);
    init<R>(barriers);
    if (threadIdx.x / GROUP == R::GROUPS) {
        fewer_registers<40>();
        if (threadIdx.x == R::GROUPS * GROUP)
            load<R>(p, offsets, numbers, tasks, maps, shared, barriers);
    } else {
        more_registers<232>();
        if constexpr (R::PASS == OF_KEYS)
            gradients_of_keys<R, DROP>(p, shared, barriers, first, second);
        else
            gradients_of_queries<R, DROP>(p, lse, tokens, numbers, shared, barriers, first);
    }
}

#define PASS(name, R, DROP)                                                                         \
    EXPORT __launch_bounds__(R::THREADS, 1) attention_hopper_##name(                                \
        const i64 *offsets, const float *lse, i64 tokens, float *lse2, float *dots, i64 padded,     \
        int tasks, bf16 *first, bf16 *second, const __grid_constant__ Attention p,                  \
        const __grid_constant__ Maps maps) {                                                        \
        pass<R, DROP>(p, offsets, lse, tokens, {lse2, dots, padded}, tasks, maps, first, second);   \
    }
typedef Room<OF_QUERIES, 64, OWN / 64, 128, 2, 4> Queries64;
typedef Room<OF_QUERIES, 128, OWN / 64, 128, 1, 2> Queries128;
typedef Room<OF_KEYS, 64, OWN / 64, 128, 2, 4> Keys64;
typedef Room<OF_KEYS, 128, OWN / 64, 64, 1, 4> Keys128;
PASS(queries_64, Queries64, false)
PASS(queries_64_drop, Queries64, true)
PASS(queries_128, Queries128, false)
PASS(keys_64, Keys64, false)
PASS(keys_64_drop, Keys64, true)
PASS(keys_128, Keys128, false)

#endif
