// Dense products of bf16 matrices on Hopper's warpgroups, with the same epilogue as gemm.cu.
//
// A persistent block has one warp that lets the copy engine fill stages of shared memory, and two
// warpgroups that take turns at tiles of 128 x 192: while one multiplies, the other brings its sums
// to C. What is there already, and is added or gives the slope of an activation, the copy engine
// brings to the same buffers before.
//
// Rejected: pairs of blocks in a cluster that each load half of the B that both need. They took
// twice as long (H200, 8192 x 8192 x 8192: 421 TFLOP/s in place of 810).
#include "hopper_sums.cuh"
#include "product.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

constexpr int ROWS = 128;
constexpr int COLUMNS = 192;
constexpr int DEEP = 64; // of k in a stage: 128 bytes, the width of the swizzle
constexpr int STAGES = 4;
constexpr int A_BYTES = ROWS * DEEP * 2;
constexpr int B_BYTES = COLUMNS * DEEP * 2;
constexpr int STAGE = A_BYTES + B_BYTES;
constexpr int PART = 64 * DEEP * 2; // 64 sides of an operand that is contiguous along them
constexpr int BUFFER = 64 * 128; // 64 rows of 128 bytes on their way to C
constexpr int BUFFERS = 4;       // of each group
constexpr int GROUP = 128;       // threads

// Dynamic shared memory: stages, buffers of both groups, numbers of their tiles' columns and rows,
// barriers.
constexpr int BUFFERS_AT = STAGES * STAGE;
constexpr int NUMBERS_AT = BUFFERS_AT + 2 * BUFFERS * BUFFER;
constexpr int BARRIERS_AT = NUMBERS_AT + 2 * (COLUMNS + ROWS) * 4;

struct Barriers {
    u64 full[STAGES];      // the copy engine filled the stage
    u64 empty[STAGES];     // the warps that multiplied it are done
    u64 turn[2];           // the warps of the other group have seen its last stage
    u64 there[2][BUFFERS]; // what was there has come to the group's buffer
};

struct Maps {
    TensorMap a, b, c, pre; // pre: or what the slope is of
    TensorMap beside[2];    // a second pair of factors, if there is one
};

// Stages that a task's depth takes.
__device__ __forceinline__ int own_stages(const Task &task) { return (task.depth + DEEP - 1) / DEEP; }

// And those of a second pair of factors so deep, which are the first split's.
__device__ __forceinline__ int stages_of(const Task &task, int beside) {
    return own_stages(task) + (task.split == 0 ? (beside + DEEP - 1) / DEEP : 0);
}

__device__ __forceinline__ int tasks_of(const Product &p, int batches) {
    int rows = ((int)p.m + ROWS - 1) / ROWS, columns = ((int)p.n + COLUMNS - 1) / COLUMNS;
    return rows * columns * (int)p.splits * batches;
}

// One thread asks the copy engine for every stage of every task.
//
// An operand that is contiguous along k lies in a stage as rows of 64 k, one for each of its sides.
// The other kind lies there in parts of 64 sides, each of 64 rows (k) of 64 sides. A second pair of
// factors is more of the depth of the first: the copy engine writes zeros where it ends.
template <bool A_ALONG, bool B_ALONG>
__device__ __forceinline__ void load(const Product &p, int batches, int beside, const Maps &maps,
                                     u8 *shared, Barriers &barriers) {
    u32 slot = 0;
    int tasks = tasks_of(p, batches);
    for (int index = blockIdx.x; index < tasks; index += gridDim.x) {
        Task task = task_at<ROWS, COLUMNS>(p, index);
        int row = task.row, column = task.column, k = task.begin;
        int a_matrix = p.a_batch ? task.batch : 0, b_matrix = p.b_batch ? task.batch : 0;
        int own = own_stages(task), stages = stages_of(task, beside);
        const TensorMap *a_map = &maps.a, *b_map = &maps.b;
        for (int i = 0; i < stages; i++, slot++, k += DEEP) {
            if (i == own) k = 0, a_map = &maps.beside[0], b_map = &maps.beside[1];
            int stage = slot % STAGES;
            barrier_wait(&barriers.empty[stage], (slot / STAGES & 1) ^ 1);
            u64 *full = &barriers.full[stage];
            barrier_expect(full, STAGE);
            u8 *a = shared + stage * STAGE, *b = a + A_BYTES;
            if (A_ALONG) {
                tensor_load(a, a_map, full, k, row, a_matrix);
            } else {
                tensor_load(a, a_map, full, row, k, a_matrix);
                tensor_load(a + PART, a_map, full, row + 64, k, a_matrix);
            }
            if (B_ALONG) {
                tensor_load(b, b_map, full, k, column, b_matrix);
            } else {
                tensor_load(b, b_map, full, column, k, b_matrix);
                tensor_load(b + PART, b_map, full, column + 64, k, b_matrix);
                tensor_load(b + 2 * PART, b_map, full, column + 128, k, b_matrix);
            }
        }
    }
}

// Where a thread's part of 64 rows and 64 columns of 16-bit elements begins in a buffer, for
// stmatrix and ldmatrix of 16 columns: matrices are rows 0 to 7, 8 to 15, both again 8 columns on.
// Buffers are in the copy engine's swizzle: chunk c of 16 bytes of row r is in place c ^ (r % 8).
// `t`: the thread of the group.
__device__ __forceinline__ u8 *matrix_row(u8 *buffer, int s, int t) {
    int warp = t / 32, lane = t % 32, matrix = lane / 8;
    int row = 16 * warp + matrix % 2 * 8 + lane % 8, chunk = 2 * s + matrix / 2;
    return buffer + row * 128 + ((chunk ^ (lane % 8)) << 4);
}

// Of 16 columns a thread has rows r and r + 8 with columns c, c + 1, and the same with c + 8, c + 9:
// four words, or eight sums.
__device__ __forceinline__ void words_of(const float (&x)[8], u32 (&words)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++) words[i] = pack_bf16(x[2 * i], x[2 * i + 1]);
}
__device__ __forceinline__ void floats_of(const u32 (&words)[4], float (&x)[8]) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        x[2 * i] = __uint_as_float(words[i] << 16);
        x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
}

// Eight sums from number `first` on, with their biases.
__device__ __forceinline__ void biased(const float (&sums)[96], int first, const float *bias, int t,
                                       float (&x)[8]) {
    bias += 2 * first + 2 * (t % 4);
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
        float2 b = *(const float2 *)(bias + 2 * i);
        x[i] = sums[first + i] + b.x;
        x[i + 1] = sums[first + i + 1] + b.y;
        x[i + 2] = sums[first + i + 2] + b.x;
        x[i + 3] = sums[first + i + 3] + b.y;
    }
}

// Sums of 64 rows and 64 columns, which are `sums[FIRST ..]` of each thread, with their biases: to two
// buffers of float, or added to what a buffer holds of bf16.
template <bool WIDE, int FIRST>
__device__ __forceinline__ void put(const float (&sums)[96], const float *bias, u8 *to, int t) {
    int warp = t / 32, lane = t % 32;
#pragma unroll
    for (int s = 0; s < 4; s++) {
        float x[8];
        biased(sums, FIRST + 8 * s, bias, t, x);
        if (WIDE) {
            u8 *row = to + (16 * warp + lane / 4) * 128 + lane % 2 * 8;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int chunk = s % 2 * 4 + i / 2 * 2 + lane % 4 / 2;
                u8 *at = row + s / 2 * BUFFER + i % 2 * 1024 + ((chunk ^ (lane / 4)) << 4);
                *(float2 *)at = make_float2(x[2 * i], x[2 * i + 1]);
            }
            continue;
        }
        u8 *at = matrix_row(to, s, t);
        u32 words[4];
        float old[8];
        ldmatrix_x4(words, at);
        floats_of(words, old);
#pragma unroll
        for (int i = 0; i < 8; i++) x[i] += old[i];
        words_of(x, words);
        stmatrix_x4(at, words[0], words[1], words[2], words[3]);
    }
}

// The same of chunk `chunk` of a tile: three to each half of its rows.
template <bool WIDE>
__device__ __forceinline__ void put_chunk(int chunk, const float (&sums)[2][96], const float *bias,
                                          u8 *to, int t) {
    switch (chunk) {
    case 0: put<WIDE, 0>(sums[0], bias, to, t); break;
    case 1: put<WIDE, 32>(sums[0], bias, to, t); break;
    case 2: put<WIDE, 64>(sums[0], bias, to, t); break;
    case 3: put<WIDE, 0>(sums[1], bias, to, t); break;
    case 4: put<WIDE, 32>(sums[1], bias, to, t); break;
    default: put<WIDE, 64>(sums[1], bias, to, t);
    }
}

// The epilogue of 64 rows and 64 columns that lie as float in two buffers, by ordinary writes: for
// rows of C that are no multiples of 16 bytes apart, and what is rarely asked for.
__device__ __forceinline__ void finish_buffers(const Product &p, const u8 *from, i64 at, int row,
                                               int column, int t) {
    int four = t % 16;
    column += 4 * four;
    int count = min(4, (int)p.n - column);
    if (count <= 0) return;
    bool whole = count == 4 && writes_fours(p);
    const float none[4] = {};
    from += four / 8 * BUFFER;
    at += column;
#pragma unroll 1
    for (int r = t / 16; r < 64 && row + r < p.m; r += GROUP / 16) {
        float4 sums = *(const float4 *)(from + r * 128 + ((four ^ r) % 8 << 4));
        float x[4] = {sums.x, sums.y, sums.z, sums.w};
        finish<1>(p, at + (row + r) * p.n, count, whole, x, none);
    }
}

// A tile's way through the buffers of a group, in six chunks of 64 rows and 64 columns.
struct Way {
    const Product &p;
    const Task &task;
    const Maps &maps;
    u8 *buffers;
    float *bias;  // of the tile's columns; what its rows are relative to
    u64 *there;   // one for each buffer
    u32 &used;    // buffers that the group has used so far
    int group, t; // t: the thread of the group

    // The same, so that what follows from it is not kept from chunk to chunk.
    __device__ __forceinline__ int thread() const {
        int thread = t;
        forget(thread);
        return thread;
    }
    __device__ __forceinline__ void meet() const { named_barrier(1 + group, GROUP); }
    __device__ __forceinline__ int row(int chunk) const { return task.row + chunk / 3 * 64; }
    __device__ __forceinline__ int column(int chunk) const { return task.column + chunk % 3 * 64; }
    __device__ __forceinline__ int matrix() const {
        return task.batch * (int)p.splits + task.split;
    }
    __device__ __forceinline__ u8 *buffer(u32 number) const {
        return buffers + number % BUFFERS * BUFFER;
    }

    __device__ __forceinline__ float *less() const { return bias + COLUMNS; }

    // --- Chunks for which something comes through their buffer first. One thread of the group asks.

    __device__ __forceinline__ void ask(const TensorMap &map, u32 first, int chunk) const {
        u64 *barrier = there + (first + chunk) % BUFFERS;
        barrier_expect(barrier, BUFFER);
        tensor_load(buffer(first + chunk), &map, barrier, column(chunk), row(chunk), matrix());
    }
    // For the chunks that there are buffers for. `first`: what was used before the tile.
    __device__ __forceinline__ void ask_first(const TensorMap &map, u32 first) const {
        tensor_store_wait_read<0>();
        for (int chunk = 0; chunk < BUFFERS; chunk++) ask(map, first, chunk);
    }
    // After `chunk` went on its way to C: the buffer of the one before it is free.
    __device__ __forceinline__ void ask_next(const TensorMap &map, u32 first, int chunk) const {
        if (chunk == 0 || chunk + BUFFERS - 1 >= 6) return;
        tensor_store_wait_read<1>();
        ask(map, first, chunk + BUFFERS - 1);
    }

    // While the other group multiplies: numbers of the tile, seen by all after the next meeting, and the
    // first of what comes through the buffers.
    __device__ __forceinline__ void prepare(bool joins, bool slope) const {
        for (int i = t; i < COLUMNS; i += GROUP) {
            int at = task.column + i;
            bias[i] = p.bias && at < p.n ? p.bias[at] : 0;
        }
        int at = task.row + t;
        less()[t] = p.relative && at < p.m ? p.relative[at] : 0;
        if (t != 0) return;
        if (joins) ask_first(maps.c, used);
        if (slope) ask_first(maps.pre, used);
    }
    __device__ __forceinline__ void wait_for(u32 first, int chunk) const {
        u32 number = first + chunk;
        barrier_wait(there + number % BUFFERS, number / BUFFERS & 1);
    }
};

// Sums of a tile to C, added to the bf16 that is there.
__device__ __forceinline__ void bring_joined(const Way &way, const float (&sums)[2][96]) {
    u32 first = way.used;
#pragma unroll 1
    for (int chunk = 0; chunk < 6; chunk++) {
        int t = way.thread();
        way.meet();
        way.wait_for(first, chunk);
        u8 *to = way.buffer(first + chunk);
        put_chunk<false>(chunk, sums, way.bias, to, t);
        fence_shared_async();
        way.meet();
        if (t == 0) {
            tensor_store(&way.maps.c, to, way.column(chunk), way.row(chunk), way.matrix());
            tensor_store_commit();
            way.ask_next(way.maps.c, first, chunk);
        }
    }
    way.used += 6;
}

// The same of float, and by ordinary writes of both.
__device__ __forceinline__ void bring_wide(const Way &way, const float (&sums)[2][96]) {
    const Product &p = way.p;
    bool by_hand = p.direct || p.activation || p.pre;
#pragma unroll 1
    for (int chunk = 0; chunk < 6; chunk++, way.used += 2) {
        int t = way.thread();
        if (t == 0) tensor_store_wait_read<BUFFERS / 2 - 1>();
        way.meet();
        u8 *to = way.buffer(way.used);
        put_chunk<true>(chunk, sums, way.bias, to, t);
        int row = way.row(chunk), column = way.column(chunk);
        if (by_hand) {
            way.meet();
            finish_buffers(p, to, way.task.at(p), row, column, t);
            continue;
        }
        fence_shared_async();
        way.meet();
        if (t != 0) continue;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            u8 *from = to + i * BUFFER;
            if (p.accumulate) {
                // One addition to each element of a launch.
                tensor_add(&way.maps.c, from, column + 32 * i, row, way.matrix());
            } else {
                tensor_store(&way.maps.c, from, column + 32 * i, row, way.matrix());
            }
        }
        tensor_store_commit();
    }
}

// Of eight numbers their values, or their products with the slopes at `at`.
template <class F, bool SLOPE>
__device__ __forceinline__ void apply(float (&x)[8], const float (&at)[8]) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
        float y = SLOPE ? at[i] : x[i];
        Parts parts = F::template parts<bf16>(y);
        x[i] = SLOPE ? x[i] * F::slope(y, parts) : F::value(y, parts);
    }
}

// Sums to 16-bit elements of C. All of them are rounded first: their words are found by a number, in code
// that is short enough to stay where instructions are fetched from, and leave registers to compute several
// activations at a time. GELUS: bf16 elements may go through GELU, or with SLOPE get the factor of its
// slope.
template <bool GELUS, bool SLOPE>
__device__ __forceinline__ void bring_short(const Way &way, const float (&sums)[2][96]) {
    const Product &p = way.p;
    bool late = GELUS && p.activation, twice = late && !SLOPE && p.pre;
    u32 first = way.used;
    way.meet();
    u32 words[24][4];
    if (!SLOPE && p.relative) {
        const float *less = way.less() + way.t / 32 * 16 + way.t % 32 / 4;
        float rows[2][2] = {{less[0], less[8]}, {less[64], less[72]}};
#pragma unroll
        for (int i = 0; i < 24; i++) {
            float x[8];
            biased(sums[i / 12], i % 12 * 8, way.bias, way.t, x);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                float row = rows[i / 12][j % 2];
                words[i][j] = pack_half(x[2 * j] - row, x[2 * j + 1] - row);
            }
        }
    } else {
#pragma unroll
        for (int i = 0; i < 24; i++) {
            float x[8];
            biased(sums[i / 12], i % 12 * 8, way.bias, way.t, x);
            words_of(x, words[i]);
        }
    }
#pragma unroll 1
    for (int chunk = 0; chunk < 6; chunk++) {
        int t = way.thread();
        // The copy engine has read what the buffers held that are next.
        if (t == 0 && !SLOPE) {
            if (twice) {
                tensor_store_wait_read<BUFFERS / 2 - 1>();
            } else {
                tensor_store_wait_read<BUFFERS - 1>();
            }
        }
        way.meet();
        if (SLOPE) way.wait_for(first, chunk);
        u32 now[4][4];
        switch (chunk) {
#define NOW(number)                                                                                \
    case number:                                                                                   \
        _Pragma("unroll") for (int i = 0; i < 16; i++) now[i / 4][i % 4] =                         \
            words[4 * number + i / 4][i % 4];                                                      \
        break;
            NOW(0) NOW(1) NOW(2) NOW(3) NOW(4) NOW(5)
#undef NOW
        }
        u8 *before = way.buffer(way.used), *after = twice ? way.buffer(way.used + 1) : before;
        way.used += twice ? 2 : 1;
        if (!late || twice) {
#pragma unroll
            for (int s = 0; s < 4; s++) {
                stmatrix_x4(matrix_row(before, s, t), now[s][0], now[s][1], now[s][2], now[s][3]);
            }
        }
        if (GELUS && late) {
#pragma unroll 1
            for (int s = 0; s < 4; s += 2) {
                float x[2][8], at[2][8];
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    floats_of(now[i], x[i]);
                    if (SLOPE) {
                        u32 there[4];
                        ldmatrix_x4(there, matrix_row(before, s + i, t));
                        floats_of(there, at[i]);
                    }
                }
                if (p.activation - 1 == GELU) {
                    apply<Gelu, SLOPE>(x[0], at[0]);
                    apply<Gelu, SLOPE>(x[1], at[1]);
                } else {
                    apply<GeluTanh, SLOPE>(x[0], at[0]);
                    apply<GeluTanh, SLOPE>(x[1], at[1]);
                }
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    u32 done[4];
                    words_of(x[i], done);
                    stmatrix_x4(matrix_row(after, s + i, t), done[0], done[1], done[2], done[3]);
#pragma unroll
                    for (int j = 0; j < 4; j++) now[i][j] = now[i + 2][j];
                }
            }
        }
        fence_shared_async();
        way.meet();
        if (t == 0) {
            int row = way.row(chunk), column = way.column(chunk);
            if (twice) tensor_store(&way.maps.pre, before, column, row, way.matrix());
            tensor_store(&way.maps.c, after, column, row, way.matrix());
            tensor_store_commit();
            if (SLOPE) way.ask_next(way.maps.pre, first, chunk);
        }
    }
}

// A group multiplies every other task of its block.
template <bool A_ALONG, bool B_ALONG>
__device__ __forceinline__ void multiply(const Product &p, int batches, int beside,
                                         const Maps &maps, u8 *shared, Barriers &barriers,
                                         int group) {
    // Rows of 64 k: 16 of them are 32 bytes further in each row. Rows that are k: 16 rows further.
    constexpr int A_NEXT = (A_ALONG ? 32 : 16 * 128) >> 4, B_NEXT = (B_ALONG ? 32 : 16 * 128) >> 4;
    // The second 64 rows of A are 64 rows, or one part, further.
    constexpr int A_HALF = A_BYTES / 2 >> 4;
    u32 slot = 0, used = 0, turn = 0;
    int lane = threadIdx.x % 32;
    auto release = [&](u32 slot) {
        if (lane == 0) barrier_arrive(&barriers.empty[slot % STAGES]);
    };
    int tasks = tasks_of(p, batches);
#pragma unroll 1
    for (int index = blockIdx.x; index < tasks; index += gridDim.x, turn++) {
        Task task = task_at<ROWS, COLUMNS>(p, index);
        int stages = stages_of(task, beside);
        if (turn % 2 == group) {
            float *bias = (float *)(shared + NUMBERS_AT) + group * (COLUMNS + ROWS);
            u8 *buffers = shared + BUFFERS_AT + group * BUFFERS * BUFFER;
            u64 *there = barriers.there[group];
            // Weights' gradients, whose A is not contiguous along k, go through no activation.
            bool gelu = p.activation - 1 == GELU || p.activation - 1 == GELU_TANH;
            bool late = A_ALONG && gelu && !p.direct && !p.wide && !p.accumulate;
            bool wide = !late && (p.wide || p.direct || p.activation || p.pre);
            {
                int t = threadIdx.x % GROUP;
                Way way = {p, task, maps, buffers, bias, there, used, group, t};
                way.prepare(p.accumulate && !wide, late && p.slope_of);
            }
            // Written here, so that their registers are free while the last ones are in C's shape.
            float sums[2][96] = {};
            wgmma_sums(sums[0]);
            wgmma_sums(sums[1]);
            // Barriers of stages tell one phase from the next, not from the one after: a group looks
            // at them only when the other has seen all phases before. The first turn of group 0
            // comes without waiting.
            barrier_wait(&barriers.turn[group], (turn / 2 & 1) ^ (group == 0));
#pragma unroll 1
            for (int i = 0; i < stages; i++) {
                u32 stage = (slot + i) % STAGES;
                barrier_wait(&barriers.full[stage], (slot + i) / STAGES & 1);
                if (i == stages - 1) {
                    // Of each warp, so that none still waits for its own turn, which may come again.
                    __syncwarp();
                    if (threadIdx.x % 32 == 0) barrier_arrive(&barriers.turn[group ^ 1]);
                }
                const u8 *at = shared + stage * STAGE;
                u64 a = wgmma_operand(at, PART, 1024), b = wgmma_operand(at + A_BYTES, PART, 1024);
                wgmma_fence();
#pragma unroll
                for (int deep = 0; deep < DEEP / 16; deep++) {
                    wgmma_64x192<!A_ALONG, !B_ALONG>(sums[0], a, b, true);
                    wgmma_64x192<!A_ALONG, !B_ALONG>(sums[1], a + A_HALF, b, true);
                    a += A_NEXT;
                    b += B_NEXT;
                }
                wgmma_commit();
                wgmma_wait<1>(); // the stage before has been multiplied
                if (i > 0) release(slot + i - 1);
            }
            wgmma_wait<0>();
            wgmma_sums(sums[0]);
            wgmma_sums(sums[1]);
            release(slot + stages - 1);
            // What of this thread and task it takes to reach C is computed here, not kept until now.
            int t = threadIdx.x % GROUP, at = index;
            forget(t);
            forget(at);
            Task done = task_at<ROWS, COLUMNS>(p, at);
            Way way = {p, done, maps, buffers, bias, there, used, group, t};
            if (wide) {
                bring_wide(way, sums);
            } else if (p.accumulate) {
                bring_joined(way, sums);
            } else if (A_ALONG && p.slope_of) {
                bring_short<true, true>(way, sums);
            } else {
                bring_short<A_ALONG, false>(way, sums);
            }
        }
        slot += stages;
    }
    // The copy engine reads buffers as long as the block lives.
    if (threadIdx.x % GROUP == 0) tensor_store_wait_read<0>();
}

template <bool A_ALONG, bool B_ALONG>
__device__ __forceinline__ void hopper(const Product &p, int batches, int beside, const Maps &maps) {
    DYNAMIC_SHARED(shared);
    Barriers &barriers = *(Barriers *)(shared + BARRIERS_AT);
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < STAGES; stage++) {
            barrier_init(&barriers.full[stage], 1);
            barrier_init(&barriers.empty[stage], GROUP / 32);
        }
        for (int group = 0; group < 2; group++) {
            barrier_init(&barriers.turn[group], GROUP / 32);
            for (int i = 0; i < BUFFERS; i++) barrier_init(&barriers.there[group][i], 1);
        }
        barrier_init_done();
    }
    __syncthreads();
    int group = threadIdx.x / GROUP;
    if (group == 2) {
        fewer_registers<24>();
        if (threadIdx.x == 2 * GROUP) {
            tensor_prefetch(&maps.a);
            tensor_prefetch(&maps.b);
            load<A_ALONG, B_ALONG>(p, batches, beside, maps, shared, barriers);
        }
    } else {
        more_registers<240>();
        multiply<A_ALONG, B_ALONG>(p, batches, beside, maps, shared, barriers, group);
    }
}

#define HOPPER(order, a, b)                                                                        \
    EXPORT __launch_bounds__(3 * GROUP, 1)                                                         \
        gemm_hopper_##order(const __grid_constant__ Product p, int batches, int beside,            \
                            const __grid_constant__ Maps maps) {                                   \
        hopper<a, b>(p, batches, beside, maps);                                                    \
    }
HOPPER(nn, true, false)
HOPPER(nt, true, true)
HOPPER(tn, false, false)
HOPPER(tt, false, true)

#endif
