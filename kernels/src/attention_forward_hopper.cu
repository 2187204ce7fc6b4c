// The forward pass of attention on Hopper, of heads of 64 or 128 dimensions: what attention_forward.cu
// computes, as attention_pipeline.cuh describes blocks and tasks. While a warpgroup takes powers of a
// step's scores, its sums over the step before are under way, and the other warpgroups multiply.
//
// Rejected: warpgroups that begin their products in turn, as they do in the backward pass: as fast (H200,
// 8 x 2048 x 16 heads of 128) or slower (GPT-2: 316 TFLOP/s in place of 336). Two warpgroups for heads of
// 64: as fast under a causal mask, else slower (16 x 2048 x 16: 420 in place of 466).
#include "attention_pipeline.cuh"

#ifdef WARPGROUPS

// Scores of a step become weights, and the row's maximum and sum go on. `shrink`: what sums so far
// are to be multiplied with.
template <int N>
__device__ __forceinline__ void soften(float (&s)[1][N][4], float c, float (&most)[2],
                                       float (&total)[2], float (&shrink)[2]) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float best = most[r];
#pragma unroll
        for (int n = 0; n < N; n++) best = fmaxf(best, fmaxf(s[0][n][2 * r], s[0][n][2 * r + 1]));
        best = fmaxf(best, __shfl_xor_sync(0xffffffffu, best, 1));
        best = fmaxf(best, __shfl_xor_sync(0xffffffffu, best, 2));
        // No visible key so far: any finite shift gives weights of 0 and not NaN.
        float shift = best == -INFINITE ? 0 : best * c;
        shrink[r] = exp2_near(most[r] * c - shift);
        most[r] = best;
        float sum = 0;
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int e = 2 * r; e < 2 * r + 2; e++) {
                s[0][n][e] = exp2_near(fmaf(s[0][n][e], c, -shift));
                sum += s[0][n][e];
            }
        total[r] = fmaf(total[r], shrink[r], sum);
    }
}

// 64 queries of each task.
template <class R>
__device__ __forceinline__ void forward(const Attention &p, u8 *shared, Barriers &barriers, bf16 *out,
                                        float *lse, i64 tokens) {
    constexpr int D = R::D, N = R::OTHERS / 8;
    int group = threadIdx.x / GROUP, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    float c = exponent(p);
    i64 width = (i64)p.heads * D;
    float sums[1][D / 8][4], s[1][N][4], most[2], total[2], shrink[2];
    u32 weights[N / 2][4];
    u32 step = 0;
#pragma unroll 1
    for (u32 turn = 0;; turn++) {
        Task task = task_at<R>(barriers, turn);
        if (task.len == 0) return;
        u32 slot = turn % R::SLOTS;
        u64 *own_empty = &barriers.own_empty[slot];
        u64 own = wgmma_operand(shared + slot * R::SLOT + group * 64 * 128, 0, 1024);
        int unit = task.first + 64 * group, query = task.first + 16 * (threadIdx.x / 32);
        // The steps that these 64 queries see; those of later ones may be more.
        int seen = (keys_of(p, unit, min(unit + 64, task.len), task.len).to - task.from + R::OTHERS - 1) /
                   R::OTHERS;
        int key = task.from, left = task.steps;
        if (unit < task.len) {
            left -= seen;
            clear(sums);
            // Weights of the scores that have arrived. Those of hidden keys are 0.
            auto weigh = [&]() {
                if (!all_visible(p, unit, 64, key, R::OTHERS, task.len))
                    hide(p, s, query, key, task.len);
                soften(s, c, most, total, shrink);
            };
            auto round = [&]() {
#pragma unroll
                for (int k = 0; k < N / 2; k++) round_to_a(weights[k], s[0], k);
            };
#pragma unroll
            for (int r = 0; r < 2; r++) most[r] = -INFINITE, total[r] = 0;
            const u8 *values = stage_at<R>(shared, barriers, step) + R::TILE;
            scores<R>(s, own, wgmma_operand(values - R::TILE, 0, 1024));
            wgmma_wait<0>();
            arrived(s);
            if (seen == 1) release(own_empty);
            weigh();
            round();
#pragma unroll 1
            while (--seen > 0) {
                u64 *done = &barriers.empty[step++ % R::STAGES];
                key += R::OTHERS;
                const u8 *next = stage_at<R>(shared, barriers, step);
                scores<R>(s, own, wgmma_operand(next, 0, 1024));
                accumulate(sums, weights, values);
                wgmma_commit();
                values = next + R::TILE;
                wgmma_wait<1>();
                arrived(s);
                if (seen == 1) release(own_empty);
                weigh();
                wgmma_wait<0>();
                arrived(sums);
                were_read(weights);
                release(done);
#pragma unroll
                for (int n = 0; n < D / 8; n++)
#pragma unroll
                    for (int e = 0; e < 4; e++) sums[0][n][e] *= shrink[e / 2];
                round();
            }
            wgmma_fence();
            accumulate(sums, weights, values);
            wgmma_commit();
            wgmma_wait<0>();
            arrived(sums);
            were_read(weights);
            release(&barriers.empty[step++ % R::STAGES]);
            // Each row's sum is spread over four lanes.
#pragma unroll
            for (int r = 0; r < 2; r++) {
                float sum = total[r];
                sum += __shfl_xor_sync(0xffffffffu, sum, 1);
                sum += __shfl_xor_sync(0xffffffffu, sum, 2);
                float by = p.kept / sum;
#pragma unroll
                for (int n = 0; n < D / 8; n++) {
                    sums[0][n][2 * r] *= by;
                    sums[0][n][2 * r + 1] *= by;
                }
                int i = query + 8 * r + g;
                if (lse && t == 0 && i < task.len)
                    lse[task.head * tokens + task.start + i] = most[r] * c * LN_2 + logf(sum);
            }
            store_wide(sums, 1, out + task.start * width + task.head * D, width, query, task.len);
        } else {
            release(own_empty);
        }
        for (; left > 0; left--) {
            stage_at<R>(shared, barriers, step);
            release(&barriers.empty[step++ % R::STAGES]);
        }
    }
}

// LOADER, OTHERS: registers of the warps that load and of those that multiply.
template <class R, int LOADER, int OTHERS>
__device__ __forceinline__ void pass(const Attention &p, const i64 *offsets, u32 tasks,
                                     const Maps &maps, bf16 *out, float *lse, i64 tokens) {
    DYNAMIC_SHARED(shared);
    Barriers &barriers = *(Barriers *)(shared + R::BARRIERS_AT);
    init<R>(barriers);
    if (threadIdx.x / GROUP == R::GROUPS) {
        fewer_registers<LOADER>();
        if (threadIdx.x == R::GROUPS * GROUP)
            load<R>(p, offsets, {nullptr, nullptr, 0}, tasks, maps, shared, barriers);
    } else {
        more_registers<OTHERS>();
        forward<R>(p, shared, barriers, out, lse, tokens);
    }
}

#define PASS(D, R, LOADER, OTHERS)                                                                  \
    EXPORT __launch_bounds__(R::THREADS, 1) attention_hopper_##D(                                   \
        const i64 *offsets, bf16 *out, float *lse, i64 tokens, int tasks,                           \
        const __grid_constant__ Attention p, const __grid_constant__ Maps maps) {                   \
        pass<R, LOADER, OTHERS>(p, offsets, tasks, maps, out, lse, tokens);                         \
    }
typedef Room<FORWARD, 64, 3, 128, 2, 4> Forward64;
typedef Room<FORWARD, 128, 2, 128, 1, 3> Forward128;
PASS(64, Forward64, 32, 160)
PASS(128, Forward128, 40, 232)

#endif
