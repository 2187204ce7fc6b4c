// Attention on Hopper in tasks: the rows of one side of a head that a block has as its own meet rows
// of the other side. A persistent block takes tasks until there are no more. One of its warps lets
// the copy engine bring both sides; warpgroups, with 64 of the own rows each, multiply.
#pragma once

#include "attention_tensor.cuh"

#ifdef WARPGROUPS

constexpr int GROUP = 128; // threads

struct Maps {
    TensorMap q, k, v, dout, out;
};

struct Task {
    int first, len;  // of its rows; of its sequence, or 0: there are no more tasks
    int head;        // of its side
    int from, steps; // of the other side: the first row, how many times OTHERS
    int start;       // of the sequence in all tokens
    int padded;      // of the sequence in numbers of each row
};

struct Barriers {
    u64 own_full[2], own_empty[2]; // slots of own rows
    u64 full[4], empty[4];         // stages of others
    Task tasks[2];                 // of the slots
};

// What a pass has as its own and what that meets: queries meet keys and values; keys and values meet
// queries and the gradients of outputs; queries, the gradients of outputs, and outputs meet keys and
// values.
enum Pass { FORWARD, OF_KEYS, OF_QUERIES };

// Shared memory: slots of one to three own tiles, stages of two others' tiles, two numbers for each row
// of a stage, barriers.
template <Pass PASS_, int DIMS, int GROUP_COUNT, int OTHER_ROWS, int SLOT_COUNT, int STAGE_COUNT>
struct Room {
    static constexpr Pass PASS = PASS_;
    static constexpr int D = DIMS, GROUPS = GROUP_COUNT, THREADS = (GROUPS + 1) * GROUP;
    static constexpr int OWN = 64 * GROUPS, OTHERS = OTHER_ROWS;
    static constexpr int SLOTS = SLOT_COUNT, STAGES = STAGE_COUNT;
    static constexpr int OWN_TILE = OWN * D * 2, SLOT = (PASS == FORWARD ? 1 : PASS == OF_KEYS ? 2 : 3) * OWN_TILE;
    static constexpr int TILE = OTHERS * D * 2, STAGE = 2 * TILE;
    static constexpr int NUMBERS = PASS == OF_KEYS ? OTHERS * 4 : 0;
    static constexpr int STAGES_AT = SLOTS * SLOT;
    static constexpr int NUMBERS_AT = STAGES_AT + STAGES * STAGE;
    static constexpr int BARRIERS_AT = NUMBERS_AT + STAGES * 2 * NUMBERS;
    static_assert(BARRIERS_AT + sizeof(Barriers) <= 225 << 10, "what launchers ask for");
};

// Two numbers for each query, [heads, padded] each: its log-sum-exp in powers of two, and the product
// of its output and the output's gradient. Beyond a sequence's end the first is infinite, so that
// such rows have no weight.
struct Numbers {
    float *lse2, *dots;
    i64 padded;
};

// Where a sequence's numbers begin: at a multiple of 128, and 128 of them for every 128 rows or less.
__device__ __forceinline__ i64 padded_start(i64 start, int sequence) {
    return (start + 128 * (i64)sequence) / 128 * 128;
}

// The next task of the launch, and how many of its blocks have seen the last one. A stream runs one
// launch at a time, which leaves both as it found them.
__device__ u32 next_task, blocks_done;

__device__ __forceinline__ void no_more_tasks() {
    if (atomicAdd(&blocks_done, 1u) == gridDim.x - 1) {
        atomicExch(&next_task, 0u);
        atomicExch(&blocks_done, 0u);
    }
}

// ROWS rows from `row` on of a head's D dimensions, as `Groups` has them: 64 dimensions of all rows
// come before the next 64. Rows after the sequence's are those of the next one.
template <int D, int ROWS>
__device__ __forceinline__ void load_head(u8 *tile, const TensorMap *map, u64 *barrier, int head,
                                          int row) {
#pragma unroll
    for (int half = 0; half < D / 64; half++)
        tensor_load(tile + half * ROWS * 128, map, barrier, head * D + 64 * half, row, 0);
}

// One thread takes tasks, and asks the copy engine for all that they read.
template <class R>
__device__ __forceinline__ void load(const Attention &p, const i64 *offsets, const Numbers &numbers,
                                     u32 tasks, const Maps &maps, u8 *shared, Barriers &barriers) {
    constexpr int D = R::D, OWN = R::OWN, OTHERS = R::OTHERS;
    constexpr bool KEYS = R::PASS == OF_KEYS;
    u32 heads = KEYS ? p.heads / p.group : p.heads;
    u32 turn = 0, step = 0, index = atomicAdd(&next_task, 1u);
    while (index < tasks) {
        // Blocks of a head follow each other, those with most to do first.
        u32 block = index % (u32)p.blocks, x = index / (u32)p.blocks;
        int sequence = (int)(x / heads);
        i64 start = offsets[sequence];
        index = atomicAdd(&next_task, 1u); // long before it is needed
        Task task;
        task.head = (int)(x % heads);
        task.start = (int)start;
        task.padded = (int)padded_start(start, sequence);
        task.len = (int)(offsets[sequence + 1] - start);
        task.first = (int)(!KEYS && p.low == 0 ? p.blocks - 1 - block : block) * OWN;
        if (task.first >= task.len) continue;
        int end = min(task.first + OWN, task.len);
        Span seen = KEYS ? queries_of(p, task.first, end, task.len)
                         : keys_of(p, task.first, end, task.len);
        task.from = seen.from / OTHERS * OTHERS;
        task.steps = (seen.to - task.from + OTHERS - 1) / OTHERS;

        u32 slot = turn % R::SLOTS;
        barrier_wait(&barriers.own_empty[slot], (turn / R::SLOTS & 1) ^ 1);
        barriers.tasks[slot] = task;
        u64 *there = &barriers.own_full[slot];
        barrier_expect(there, R::SLOT);
        u8 *own = shared + slot * R::SLOT;
        int row = task.start + task.first;
        load_head<D, OWN>(own, KEYS ? &maps.k : &maps.q, there, task.head, row);
        if (R::PASS != FORWARD)
            load_head<D, OWN>(own + R::OWN_TILE, KEYS ? &maps.v : &maps.dout, there, task.head, row);
        if (R::PASS == OF_QUERIES)
            load_head<D, OWN>(own + 2 * R::OWN_TILE, &maps.out, there, task.head, row);
        turn++;

        i64 padded = task.padded + task.from;
        for (int i = 0; i < (KEYS ? p.group : 1); i++) {
            int head = KEYS ? task.head * p.group + i : task.head / p.group;
            const float *lse2 = numbers.lse2 + head * numbers.padded + padded;
            const float *dots = numbers.dots + head * numbers.padded + padded;
            row = task.start + task.from;
            for (int left = task.steps; left > 0; left--, step++, row += OTHERS) {
                u32 stage = step % R::STAGES;
                barrier_wait(&barriers.empty[stage], (step / R::STAGES & 1) ^ 1);
                u64 *full = &barriers.full[stage];
                barrier_expect(full, R::STAGE + 2 * R::NUMBERS);
                u8 *tile = shared + R::STAGES_AT + stage * R::STAGE;
                load_head<D, OTHERS>(tile, KEYS ? &maps.q : &maps.k, full, head, row);
                load_head<D, OTHERS>(tile + R::TILE, KEYS ? &maps.dout : &maps.v, full, head, row);
                if (KEYS) {
                    u8 *to = shared + R::NUMBERS_AT + stage * 2 * R::NUMBERS;
                    bulk_load(to, lse2, R::NUMBERS, full);
                    bulk_load(to + R::NUMBERS, dots, R::NUMBERS, full);
                    lse2 += OTHERS;
                    dots += OTHERS;
                }
            }
        }
    }
    u32 slot = turn % R::SLOTS;
    barrier_wait(&barriers.own_empty[slot], (turn / R::SLOTS & 1) ^ 1);
    barriers.tasks[slot] = Task(); // of no sequence
    barrier_arrive(&barriers.own_full[slot]);
    no_more_tasks();
}

// Task number `turn` of a block, when its own rows are there: of no sequence after the last one.
template <class R> __device__ __forceinline__ Task task_at(Barriers &barriers, u32 turn) {
    u32 slot = turn % R::SLOTS;
    barrier_wait(&barriers.own_full[slot], turn / R::SLOTS & 1);
    return barriers.tasks[slot];
}

// What a warpgroup reads of stage number `step` of all, when it is there.
template <class R>
__device__ __forceinline__ const u8 *stage_at(const u8 *shared, Barriers &barriers, u32 step) {
    u32 stage = step % R::STAGES;
    barrier_wait(&barriers.full[stage], step / R::STAGES & 1);
    return shared + R::STAGES_AT + stage * R::STAGE;
}

// One lane of each warp tells that the warp is done with a stage or a slot.
__device__ __forceinline__ void release(u64 *barrier) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(barrier);
}

// Warpgroups may let their products begin in turn, so that one multiplies while others take powers. The
// last one begins by giving the turn to the first.
template <class R> __device__ __forceinline__ void my_turn(int group) {
    named_barrier(1 + group, 2 * GROUP);
}
template <class R> __device__ __forceinline__ void your_turn(int group) {
    named_arrive(1 + (group + 1 == R::GROUPS ? 0 : group + 1), 2 * GROUP);
}

// s = own * other^T, of 64 rows of an own tile and all of another. Both are `wgmma_operand`s.
template <class R, int N>
__device__ __forceinline__ void scores(float (&s)[1][N][4], u64 own, u64 other) {
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < R::D / 16; k++)
        wgmma_product(s[0], own + k / 4 * (R::OWN * 8) + k % 4 * 2,
                      other + k / 4 * (8 * N * 8) + k % 4 * 2, k > 0);
    wgmma_commit();
}

// sums += weights * other, of weights for the rows of the other tile.
template <int C, int K>
__device__ __forceinline__ void accumulate(float (&sums)[1][C][4], const u32 (&weights)[K][4],
                                           const u8 *tile) {
    u64 other = wgmma_operand(tile, 16 * K * 128, 1024);
#pragma unroll
    for (int k = 0; k < K; k++) wgmma_product<true>(sums[0], weights[k], other + k * (16 * 8), true);
}

// After waiting for products: what they wrote is read from here on.
template <int N> __device__ __forceinline__ void arrived(float (&sums)[1][N][4]) {
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) wgmma_touch(sums[0][n][e]);
}

// After waiting for products: what they read in registers need not last any longer.
template <int K> __device__ __forceinline__ void were_read(const u32 (&weights)[K][4]) {
#pragma unroll
    for (int k = 0; k < K; k++)
#pragma unroll
        for (int i = 0; i < 4; i++) keep_until_here(weights[k][i]);
}

// Rows `first` .. of a warp's sums, times `by`, to rows `stride` apart: 16 bytes at a time, for which
// the four lanes of a row exchange what they have of four chunks.
template <int N>
__device__ __forceinline__ void store_wide(const float (&sums)[1][N][4], float by, bf16 *to,
                                           i64 stride, int first, int len) {
    typedef Pack<u32, 4> Chunk;
    int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    bool odd = t & 1, high = t & 2;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        int row = first + 8 * r + g;
        bf16 *y = to + row * stride + 8 * t;
#pragma unroll
        for (int n = 0; n < N; n += 4) {
            u32 w[4];
#pragma unroll
            for (int i = 0; i < 4; i++)
                w[i] = pack_bf16(sums[0][n + i][2 * r] * by, sums[0][n + i][2 * r + 1] * by);
            // Chunks 2 high and the next, of this lane and of the one two apart.
            u32 a0 = high ? w[2] : w[0], a1 = high ? w[3] : w[1];
            u32 b0 = __shfl_xor_sync(0xffffffffu, high ? w[0] : w[2], 2);
            u32 b1 = __shfl_xor_sync(0xffffffffu, high ? w[1] : w[3], 2);
            // Chunk t, of this lane and of the one beside it.
            u32 a = odd ? a1 : a0, b = odd ? b1 : b0;
            u32 c = __shfl_xor_sync(0xffffffffu, odd ? a0 : a1, 1);
            u32 d = __shfl_xor_sync(0xffffffffu, odd ? b0 : b1, 1);
            u32 near[2] = {odd ? c : a, odd ? a : c}, far[2] = {odd ? d : b, odd ? b : d};
            Chunk chunk;
#pragma unroll
            for (int i = 0; i < 2; i++) {
                chunk.at[i] = high ? far[i] : near[i];
                chunk.at[2 + i] = high ? near[i] : far[i];
            }
            if (row < len) *(Chunk *)(y + 8 * n) = chunk;
        }
    }
}

template <class R> __device__ __forceinline__ void init(Barriers &barriers) {
    if (threadIdx.x == 0) {
        for (int slot = 0; slot < R::SLOTS; slot++) {
            barrier_init(&barriers.own_full[slot], 1);
            barrier_init(&barriers.own_empty[slot], 4 * R::GROUPS);
        }
        for (int stage = 0; stage < R::STAGES; stage++) {
            barrier_init(&barriers.full[stage], 1);
            barrier_init(&barriers.empty[stage], 4 * R::GROUPS);
        }
        barrier_init_done();
    }
    __syncthreads();
}

#endif
