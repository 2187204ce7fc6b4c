// Dense products of bf16 matrices on Hopper's warpgroups, with the same epilogue as gemm.cu.
//
// A persistent block has one warp that lets the copy engine fill stages of shared memory, and two
// warpgroups that take turns at tiles of 128 x 192: while one multiplies, the other brings its sums
// to C.
//
// Rejected: pairs of blocks in a cluster that each load half of the B that both need. They took
// twice as long (H200, 8192 x 8192 x 8192: 421 TFLOP/s in place of 810).
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
constexpr int PART = 64 * DEEP * 2; // 64 sides of an operand that is contiguous along them
constexpr int BUFFER = 64 * 128; // 64 rows of 128 bytes on their way to C
constexpr int BUFFERS = 4;       // of each group
constexpr int GROUP = 128;       // threads

// Dynamic shared memory: stages, buffers of both groups, biases of their tiles, barriers.
constexpr int BUFFERS_AT = STAGES * STAGE;
constexpr int BIASES_AT = BUFFERS_AT + 2 * BUFFERS * BUFFER;
constexpr int BARRIERS_AT = BIASES_AT + 2 * COLUMNS * 4;

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

__device__ __forceinline__ int tasks_of(const Product &p, int batches) {
    int rows = ((int)p.m + ROWS - 1) / ROWS, columns = ((int)p.n + COLUMNS - 1) / COLUMNS;
    return rows * columns * (int)p.splits * batches;
}

// One thread asks the copy engine for every stage of every task.
//
// An operand that is contiguous along k lies in a stage as rows of 64 k, one for each of its sides.
// The other kind lies there in parts of 64 sides, each of 64 rows (k) of 64 sides.
template <bool A_ALONG, bool B_ALONG>
__device__ __forceinline__ void load(const Product &p, int batches, const Maps &maps, u8 *shared,
                                     Barriers &barriers) {
    u32 slot = 0;
    int tasks = tasks_of(p, batches);
    for (int index = blockIdx.x; index < tasks; index += gridDim.x) {
        Task task = task_at<ROWS, COLUMNS>(p, index);
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
                tensor_load(a + PART, &maps.a, full, row + 64, k, a_matrix);
            }
            if (B_ALONG) {
                tensor_load(b, &maps.b, full, k, column, b_matrix);
            } else {
                tensor_load(b, &maps.b, full, column, k, b_matrix);
                tensor_load(b + PART, &maps.b, full, column + 64, k, b_matrix);
                tensor_load(b + 2 * PART, &maps.b, full, column + 128, k, b_matrix);
            }
        }
    }
}

// Sums of 64 rows and 64 columns, which are `sums[FIRST ..]` of each thread, with their biases, to
// one buffer of bf16 or two of float. Buffers are in the copy engine's swizzle: chunk c of 16 bytes
// of row r is in place c ^ (r % 8).
//
// Of 16 columns a thread has rows r and r + 8 with columns c, c + 1, and the same with c + 8, c + 9.
template <bool WIDE, int FIRST>
__device__ __forceinline__ void put(const float (&sums)[96], const float *bias, u8 *to) {
    int warp = threadIdx.x % GROUP / 32, lane = threadIdx.x % 32, matrix = lane / 8;
    bias += 2 * FIRST + 2 * (lane % 4);
    to += WIDE ? (16 * warp + lane / 4) * 128 + lane % 2 * 8
               : (16 * warp + matrix % 2 * 8 + lane % 8) * 128;
#pragma unroll
    for (int s = 0; s < 4; s++) {
        float x[8];
#pragma unroll
        for (int i = 0; i < 8; i += 4) {
            float2 b = *(const float2 *)(bias + 16 * s + 2 * i);
            const float *from = sums + FIRST + 8 * s + i;
            x[i] = from[0] + b.x;
            x[i + 1] = from[1] + b.y;
            x[i + 2] = from[2] + b.x;
            x[i + 3] = from[3] + b.y;
        }
        if (WIDE) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int chunk = s % 2 * 4 + i / 2 * 2 + lane % 4 / 2;
                u8 *at = to + s / 2 * BUFFER + i % 2 * 1024 + ((chunk ^ (lane / 4)) << 4);
                *(float2 *)at = make_float2(x[2 * i], x[2 * i + 1]);
            }
        } else {
            int chunk = 2 * s + matrix / 2;
            stmatrix_x4(to + ((chunk ^ (lane % 8)) << 4), pack_bf16(x[0], x[1]),
                        pack_bf16(x[2], x[3]), pack_bf16(x[4], x[5]), pack_bf16(x[6], x[7]));
        }
    }
}

// The same of chunk `chunk` of a tile: three to each half of its rows.
template <bool WIDE>
__device__ __forceinline__ void put_chunk(int chunk, const float (&sums)[2][96], const float *bias,
                                          u8 *to) {
    switch (chunk) {
    case 0: put<WIDE, 0>(sums[0], bias, to); break;
    case 1: put<WIDE, 32>(sums[0], bias, to); break;
    case 2: put<WIDE, 64>(sums[0], bias, to); break;
    case 3: put<WIDE, 0>(sums[1], bias, to); break;
    case 4: put<WIDE, 32>(sums[1], bias, to); break;
    default: put<WIDE, 64>(sums[1], bias, to);
    }
}

template <class T, class F>
__device__ __forceinline__ void activate_some(const typename Wide<T>::Type &from,
                                              typename Wide<T>::Type &to) {
#pragma unroll
    for (int i = 0; i < Wide<T>::N; i++) {
        float x = widen(from.at[i]);
        to.at[i] = narrow<T>(F::value(x, F::template parts<T>(x)));
    }
}

// The activation of what buffers hold, 64 bytes for each thread of a group and buffer. `to` may be
// `from`.
template <class T>
__device__ __forceinline__ void activate_buffers(int activation, const u8 *from, u8 *to, int count) {
    typedef typename Wide<T>::Type Vector;
    int t = threadIdx.x % GROUP;
#pragma unroll 1
    for (int i = t * 16; i < count * BUFFER; i += GROUP * 16) {
        Vector x = *(const Vector *)(from + i);
        switch (activation - 1) {
        case GELU: activate_some<T, Gelu>(x, x); break;
        case GELU_TANH: activate_some<T, GeluTanh>(x, x); break;
        case RELU: activate_some<T, Relu>(x, x); break;
        case TANH: activate_some<T, Tanh>(x, x); break;
        case SILU: activate_some<T, Silu>(x, x); break;
        }
        *(Vector *)(to + i) = x;
    }
}

// The epilogue of 64 rows and 64 columns that lie as float in two buffers, by ordinary writes: where
// old elements of C are added, or rows of C are no multiples of 16 bytes apart.
__device__ __forceinline__ void finish_buffers(const Product &p, const u8 *from, i64 at, int row,
                                               int column) {
    int t = threadIdx.x % GROUP, four = t % 16;
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
        finish(p, at + (row + r) * p.n, count, whole, x, none);
    }
}

// Sums of a tile to C, 64 rows and 64 columns at a time, through the group's buffers. `used`:
// buffers that it has used so far.
__device__ __forceinline__ void bring(const Product &p, const Task &task, const Maps &maps,
                                      const float (&sums)[2][96], u8 *buffers, float *bias,
                                      int group, u32 &used) {
    int t = threadIdx.x % GROUP;
    bool by_hand = p.direct || p.accumulate;
    bool wide = p.wide || by_hand, twice = p.pre && !by_hand;
    int each = wide ? 2 : 1, needed = twice ? 2 * each : each;
    int matrix = task.batch * (int)p.splits + task.split;
    for (int i = t; i < COLUMNS; i += GROUP) {
        int column = task.column + i;
        bias[i] = p.bias && column < p.n ? p.bias[column] : 0;
    }
#pragma unroll 1
    for (int chunk = 0; chunk < 6; chunk++) {
        // The copy engine has read what the buffers held that are next.
        if (t == 0) {
            if (needed == 1) {
                tensor_store_wait_read<BUFFERS - 1>();
            } else if (needed == 2) {
                tensor_store_wait_read<BUFFERS / 2 - 1>();
            } else {
                tensor_store_wait_read<0>();
            }
        }
        named_barrier(1 + group, GROUP);
        u8 *first = buffers + used % BUFFERS * BUFFER;
        if (wide) {
            put_chunk<true>(chunk, sums, bias, first);
        } else {
            put_chunk<false>(chunk, sums, bias, first);
        }
        int row = task.row + chunk / 3 * 64, column = task.column + chunk % 3 * 64;
        if (by_hand) {
            named_barrier(1 + group, GROUP);
            finish_buffers(p, first, task.at(p), row, column);
            used += needed;
            continue;
        }
        u8 *last = twice ? first + each * BUFFER : first;
        if (p.activation || twice) {
            named_barrier(1 + group, GROUP);
            if (wide) {
                activate_buffers<float>((int)p.activation, first, last, each);
            } else {
                activate_buffers<bf16>((int)p.activation, first, last, each);
            }
        }
        fence_shared_async();
        named_barrier(1 + group, GROUP);
        if (t == 0) {
            for (int i = 0; i < each; i++) {
                if (twice) tensor_store(&maps.pre, first + i * BUFFER, column + 32 * i, row, matrix);
                tensor_store(&maps.c, last + i * BUFFER, column + 32 * i, row, matrix);
            }
            tensor_store_commit();
        }
        used += needed;
    }
}

// A group multiplies every other task of its block.
template <bool A_ALONG, bool B_ALONG>
__device__ __forceinline__ void multiply(const Product &p, int batches, const Maps &maps,
                                         u8 *shared, Barriers &barriers, int group) {
    // Rows of 64 k: 16 of them are 32 bytes further in each row. Rows that are k: 16 rows further.
    constexpr int A_NEXT = (A_ALONG ? 32 : 16 * 128) >> 4, B_NEXT = (B_ALONG ? 32 : 16 * 128) >> 4;
    // The second 64 rows of A are 64 rows, or one part, further.
    constexpr int A_HALF = A_BYTES / 2 >> 4;
    float sums[2][96];
    u32 slot = 0, used = 0, turn = 0;
    int lane = threadIdx.x % 32;
    u8 *buffers = shared + BUFFERS_AT + group * BUFFERS * BUFFER;
    float *bias = (float *)(shared + BIASES_AT) + group * COLUMNS;
    auto release = [&](u32 slot) {
        if (lane == 0) barrier_arrive(&barriers.empty[slot % STAGES]);
    };
    int tasks = tasks_of(p, batches);
#pragma unroll 1
    for (int index = blockIdx.x; index < tasks; index += gridDim.x, turn++) {
        Task task = task_at<ROWS, COLUMNS>(p, index);
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
                u64 a = wgmma_operand(at, PART, 1024), b = wgmma_operand(at + A_BYTES, PART, 1024);
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
            wgmma_sums(sums[0]);
            wgmma_sums(sums[1]);
            release(slot + stages - 1);
            bring(p, task, maps, sums, buffers, bias, group, used);
        }
        slot += stages;
    }
    // The copy engine reads buffers as long as the block lives.
    if (threadIdx.x % GROUP == 0) tensor_store_wait_read<0>();
}

template <bool A_ALONG, bool B_ALONG>
__device__ __forceinline__ void hopper(const Product &p, int batches, const Maps &maps) {
    DYNAMIC_SHARED(shared);
    Barriers &barriers = *(Barriers *)(shared + BARRIERS_AT);
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < STAGES; stage++) {
            barrier_init(&barriers.full[stage], 1);
            barrier_init(&barriers.empty[stage], GROUP / 32);
        }
        barrier_init(&barriers.turn[0], 1);
        barrier_init(&barriers.turn[1], 1);
        barrier_init_done();
    }
    __syncthreads();
    int group = threadIdx.x / GROUP;
    if (group == 2) {
        fewer_registers<24>();
        if (threadIdx.x == 2 * GROUP) {
            tensor_prefetch(&maps.a);
            tensor_prefetch(&maps.b);
            load<A_ALONG, B_ALONG>(p, batches, maps, shared, barriers);
        }
    } else {
        more_registers<240>();
        multiply<A_ALONG, B_ALONG>(p, batches, maps, shared, barriers, group);
    }
}

#define HOPPER(order, a, b)                                                                        \
    EXPORT __launch_bounds__(3 * GROUP, 1)                                                         \
        gemm_hopper_##order(const __grid_constant__ Product p, int batches,                        \
                            const __grid_constant__ Maps maps) {                                   \
        hopper<a, b>(p, batches, maps);                                                            \
    }
HOPPER(nn, true, false)
HOPPER(nt, true, true)
HOPPER(tn, false, false)
HOPPER(tt, false, true)

#endif
