// Dense products of bf16 matrices on Hopper's warpgroups, with the same epilogue as gemm.cu.
//
// A persistent block has one warp that lets the copy engine fill stages of shared memory, and two
// warpgroups that take turns at tiles of 128 x 192: while one multiplies, the other brings its sums
// to C. Two blocks of a cluster have tiles one below the other, and each loads half of the part of B
// that both need.
#include "hopper.cuh"
#include "product.cuh"

#if !defined(GRAFT_SIMULATION) && defined(__CUDA_ARCH_FEAT_SM90_ALL)

constexpr int ROWS = 128;
constexpr int COLUMNS = 192;
constexpr int DEEP = 64; // of k in a stage: 128 bytes, the width of the swizzle
constexpr int STAGES = 4;
constexpr int A_BYTES = ROWS * DEEP * 2;
constexpr int B_BYTES = COLUMNS * DEEP * 2;
constexpr int STAGE = A_BYTES + B_BYTES;
constexpr int BUFFER = 64 * 128; // 64 rows of 128 bytes on their way to C
constexpr int BUFFERS = 4;       // of each group
constexpr int GROUP = 128;       // threads

// Dynamic shared memory: stages, buffers of both groups, barriers.
constexpr int BUFFERS_AT = STAGES * STAGE;
constexpr int BARRIERS_AT = BUFFERS_AT + 2 * BUFFERS * BUFFER;

struct Barriers {
    u64 full[STAGES];  // the copy engine filled the stage
    u64 empty[STAGES]; // the warps that multiplied it are done
    u64 turn[2];       // the other group has seen its last stage
};

struct Maps {
    TensorMap a, b, c, pre;
};

// Stages that a task's depth takes.
__device__ __forceinline__ int stages_of(const Task &task) { return (task.depth + DEEP - 1) / DEEP; }

template <int CLUSTER> __device__ __forceinline__ Task hopper_task(const Product &p, int index, int rank) {
    Task task = task_at<ROWS * CLUSTER, COLUMNS>(p, index);
    task.row += ROWS * rank;
    return task;
}

template <int CLUSTER> __device__ __forceinline__ int hopper_tasks(const Product &p, int batches) {
    int rows = ((int)p.m + ROWS * CLUSTER - 1) / (ROWS * CLUSTER);
    return rows * (((int)p.n + COLUMNS - 1) / COLUMNS) * (int)p.splits * batches;
}

// One thread asks the copy engine for every stage of every task.
//
// An operand that is contiguous along k lies in a stage as rows of 64 k, one for each of its sides.
// The other kind lies there in parts of 64 sides, each of 64 rows (k) of 64 sides.
template <bool A_ALONG, bool B_ALONG, int CLUSTER>
__device__ __forceinline__ void load(const Product &p, int batches, const Maps &maps, u8 *shared,
                                     Barriers &barriers, int rank) {
    u32 slot = 0;
    int tasks = hopper_tasks<CLUSTER>(p, batches);
    for (int index = blockIdx.x / CLUSTER; index < tasks; index += gridDim.x / CLUSTER) {
        Task task = hopper_task<CLUSTER>(p, index, rank);
        int row = task.row, column = task.column, k = task.begin;
        int a_matrix = p.a_batch ? task.batch : 0, b_matrix = p.b_batch ? task.batch : 0;
        for (int left = stages_of(task); left > 0; left--, slot++, k += DEEP) {
            int stage = slot % STAGES;
            barrier_wait(&barriers.empty[stage], (slot / STAGES & 1) ^ 1);
            u64 *full = &barriers.full[stage];
            barrier_expect(full, STAGE);
            u8 *a = shared + stage * STAGE, *b = a + A_BYTES;
            if (A_ALONG) {
                tensor_load(a, &maps.a, full, k, row, a_matrix);
            } else {
                tensor_load(a, &maps.a, full, row, k, a_matrix);
                tensor_load(a + A_BYTES / 2, &maps.a, full, row + 64, k, a_matrix);
            }
            // Of B, this block's share: a range of its columns, or of the rows of each part.
            if (B_ALONG) {
                int first = rank * (COLUMNS / CLUSTER);
                if (CLUSTER == 1) {
                    tensor_load(b, &maps.b, full, k, column, b_matrix);
                } else {
                    tensor_load_all(b + first * 128, &maps.b, full, k, column + first, b_matrix,
                                    (1 << CLUSTER) - 1);
                }
            } else {
                int first = rank * (DEEP / CLUSTER);
#pragma unroll
                for (int part = 0; part < COLUMNS / 64; part++) {
                    u8 *to = b + part * 8192 + first * 128;
                    int x = column + 64 * part;
                    if (CLUSTER == 1) {
                        tensor_load(to, &maps.b, full, x, k, b_matrix);
                    } else {
                        tensor_load_all(to, &maps.b, full, x, k + first, b_matrix,
                                        (1 << CLUSTER) - 1);
                    }
                }
            }
        }
    }
}

// What a thread has of 16 columns of 64 rows: rows r and r + 8, columns c, c + 1, c + 8 and c + 9.
#define SIXTEEN(i)                                                                                 \
    case i:                                                                                        \
        for (int j = 0; j < 8; j++) x[j] = sums[i / 12][i % 12 * 8 + j];                           \
        break;

// Sums of a tile to C. They go through buffers of 64 rows of 128 bytes, in the copy engine's
// swizzle. `used`: buffers that the group has used so far.
__device__ __forceinline__ void bring(const Product &p, const Task &task, const Maps &maps,
                                      const float (&sums)[2][96], u8 *buffers, int group,
                                      u32 &used) {
    int t = threadIdx.x % GROUP, warp = t / 32, lane = t % 32;
    bool wide = p.wide;
    int together = wide ? 2 : 4; // sixteens of a buffer
    int matrix = task.batch * (int)p.splits + task.split;
#pragma unroll 1
    for (int sixteen = 0; sixteen < 24; sixteen++) {
        float x[8];
        switch (sixteen) {
            SIXTEEN(0) SIXTEEN(1) SIXTEEN(2) SIXTEEN(3) SIXTEEN(4) SIXTEEN(5)
            SIXTEEN(6) SIXTEEN(7) SIXTEEN(8) SIXTEEN(9) SIXTEEN(10) SIXTEEN(11)
            SIXTEEN(12) SIXTEEN(13) SIXTEEN(14) SIXTEEN(15) SIXTEEN(16) SIXTEEN(17)
            SIXTEEN(18) SIXTEEN(19) SIXTEEN(20) SIXTEEN(21) SIXTEEN(22) SIXTEEN(23)
        }
        int half = sixteen / 12, within = sixteen % 12; // rows, columns
        int row = task.row + 64 * half + 16 * warp + lane / 4;
        int column = task.column + 16 * within + 2 * (lane % 4);
        if (p.accumulate) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int r = row + 8 * (i % 2), c = column + 8 * (i / 2);
                if (r < p.m && c < p.n) { // n is even
                    i64 at = task.batch * p.c_batch + r * p.n + c;
                    if (wide) {
                        float2 old = *(const float2 *)((const float *)p.c + at);
                        x[2 * i] += old.x;
                        x[2 * i + 1] += old.y;
                    } else {
                        Pack<bf16, 2> old = *(const Pack<bf16, 2> *)((const bf16 *)p.c + at);
                        x[2 * i] += widen(old.at[0]);
                        x[2 * i + 1] += widen(old.at[1]);
                    }
                }
            }
        }
        if (p.bias) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                int c = column + 8 * i;
                if (c < p.n) {
                    float low = p.bias[c], high = p.bias[c + 1];
                    x[4 * i] += low;
                    x[4 * i + 1] += high;
                    x[4 * i + 2] += low;
                    x[4 * i + 3] += high;
                }
            }
        }
        int number = within % together; // of its buffer
        if (number == 0) {
            // Of 4 buffers, the two that are next have been read.
            if (t == 0) tensor_store_wait_read<2>();
            named_barrier(1 + group, GROUP);
        }
        // The place of these elements in a buffer.
        auto put = [&](u8 *buffer) {
            if (wide) {
                int r = 16 * warp + lane / 4;
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    int chunk = 4 * number + i / 2 * 2 + lane % 4 / 2;
                    u8 *to = buffer + (r + i % 2 * 8) * 128 + ((chunk ^ (lane / 4)) << 4) +
                             lane % 2 * 8;
                    *(float2 *)to = make_float2(x[2 * i], x[2 * i + 1]);
                }
            } else {
                int q = lane / 8, r = 16 * warp + q % 2 * 8 + lane % 8;
                int chunk = 2 * number + q / 2;
                stmatrix_x4(buffer + r * 128 + ((chunk ^ (lane % 8)) << 4), pack_bf16(x[0], x[1]),
                            pack_bf16(x[2], x[3]), pack_bf16(x[4], x[5]), pack_bf16(x[6], x[7]));
            }
        };
        u8 *pre = buffers + used % BUFFERS * BUFFER;
        u8 *to = p.pre ? buffers + (used + 1) % BUFFERS * BUFFER : pre;
        if (p.pre) put(pre);
        if (p.activation) {
#pragma unroll
            for (int i = 0; i < 8; i++) x[i] = activated(p, x[i]);
        }
        put(to);
        if (number == together - 1) {
            fence_shared_async();
            named_barrier(1 + group, GROUP);
            if (t == 0) {
                int first = task.column + 16 * (within + 1 - together);
                int y = task.row + 64 * half;
                if (p.pre) {
                    tensor_store(&maps.pre, pre, first, y, matrix);
                    tensor_store_commit();
                }
                tensor_store(&maps.c, to, first, y, matrix);
                tensor_store_commit();
            }
            used += p.pre ? 2 : 1;
        }
    }
}

// A group multiplies every other task of its block.
template <bool A_ALONG, bool B_ALONG, int CLUSTER>
__device__ __forceinline__ void multiply(const Product &p, int batches, const Maps &maps,
                                         u8 *shared, Barriers &barriers, int rank, int group) {
    // Rows of 64 k: 16 of them are 32 bytes further in each row. Rows that are k: 16 rows further.
    constexpr int A_NEXT = (A_ALONG ? 32 : 16 * 128) >> 4, B_NEXT = (B_ALONG ? 32 : 16 * 128) >> 4;
    // The second 64 rows of A are 64 rows, or one part, further.
    constexpr int A_HALF = A_BYTES / 2 >> 4;
    float sums[2][96];
    u32 slot = 0, used = 0, turn = 0;
    int lane = threadIdx.x % 32;
    u8 *buffers = shared + BUFFERS_AT + group * BUFFERS * BUFFER;
    auto release = [&](u32 slot) {
        u64 *empty = &barriers.empty[slot % STAGES];
        if (CLUSTER == 1) {
            if (lane == 0) barrier_arrive(empty);
        } else {
            if (lane < CLUSTER) barrier_arrive_at(empty, lane);
        }
    };
    int tasks = hopper_tasks<CLUSTER>(p, batches);
#pragma unroll 1
    for (int index = blockIdx.x / CLUSTER; index < tasks; index += gridDim.x / CLUSTER, turn++) {
        Task task = hopper_task<CLUSTER>(p, index, rank);
        int stages = stages_of(task);
        if (turn % 2 == group) {
            // Barriers of stages tell one phase from the next, not from the one after: a group looks
            // at them only when the other has seen all phases before. The first turn of group 0
            // comes without waiting.
            barrier_wait(&barriers.turn[group], (turn / 2 & 1) ^ (group == 0));
#pragma unroll 1
            for (int i = 0; i < stages; i++) {
                u32 stage = (slot + i) % STAGES;
                barrier_wait(&barriers.full[stage], (slot + i) / STAGES & 1);
                if (i == stages - 1 && threadIdx.x % GROUP == 0) {
                    barrier_arrive(&barriers.turn[group ^ 1]);
                }
                const u8 *at = shared + stage * STAGE;
                u64 a = wgmma_operand(at, 8192, 1024), b = wgmma_operand(at + A_BYTES, 8192, 1024);
                wgmma_fence();
#pragma unroll
                for (int deep = 0; deep < DEEP / 16; deep++) {
                    bool more = i > 0 || deep > 0;
                    wgmma_64x192<!A_ALONG, !B_ALONG>(sums[0], a, b, more);
                    wgmma_64x192<!A_ALONG, !B_ALONG>(sums[1], a + A_HALF, b, more);
                    a += A_NEXT;
                    b += B_NEXT;
                }
                wgmma_commit();
                wgmma_wait<1>(); // the stage before has been multiplied
                if (i > 0) release(slot + i - 1);
            }
            wgmma_wait<0>();
            release(slot + stages - 1);
            bring(p, task, maps, sums, buffers, group, used);
        }
        slot += stages;
    }
    // The copy engine reads buffers as long as the block lives.
    if (threadIdx.x % GROUP == 0) tensor_store_wait_read<0>();
}

template <bool A_ALONG, bool B_ALONG, int CLUSTER>
__device__ __forceinline__ void hopper(const Product &p, int batches, const Maps &maps) {
    DYNAMIC_SHARED(shared);
    Barriers &barriers = *(Barriers *)(shared + BARRIERS_AT);
    int rank = CLUSTER == 1 ? 0 : cluster_rank();
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < STAGES; stage++) {
            barrier_init(&barriers.full[stage], 1);
            barrier_init(&barriers.empty[stage], 4 * CLUSTER);
        }
        barrier_init(&barriers.turn[0], 1);
        barrier_init(&barriers.turn[1], 1);
        barrier_init_done();
    }
    __syncthreads();
    if (CLUSTER > 1) cluster_sync();
    int group = threadIdx.x / GROUP;
    if (group == 2) {
        fewer_registers<24>();
        if (threadIdx.x == 2 * GROUP) {
            tensor_prefetch(&maps.a);
            tensor_prefetch(&maps.b);
            load<A_ALONG, B_ALONG, CLUSTER>(p, batches, maps, shared, barriers, rank);
        }
    } else {
        more_registers<240>();
        multiply<A_ALONG, B_ALONG, CLUSTER>(p, batches, maps, shared, barriers, rank, group);
    }
    // Blocks of a cluster arrive at each other's barriers, and copy into each other's memory.
    if (CLUSTER > 1) cluster_sync();
}

#define HOPPER(order, a, b)                                                                        \
    EXPORT __launch_bounds__(3 * GROUP, 1)                                                         \
        gemm_hopper_##order(const __grid_constant__ Product p, int batches,                        \
                            const __grid_constant__ Maps maps) {                                   \
        hopper<a, b, 1>(p, batches, maps);                                                         \
    }                                                                                              \
    EXPORT __cluster_dims__(2, 1, 1) __launch_bounds__(3 * GROUP, 1)                               \
        gemm_hopper_pair_##order(const __grid_constant__ Product p, int batches,                   \
                                 const __grid_constant__ Maps maps) {                              \
        hopper<a, b, 2>(p, batches, maps);                                                         \
    }
HOPPER(nn, true, false)
HOPPER(nt, true, true)
HOPPER(tn, false, false)
HOPPER(tt, false, true)

#endif
