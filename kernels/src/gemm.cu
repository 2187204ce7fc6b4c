// Dense matrix products with everything that gemm.rs does on their way into C. Sums are float; each
// element of C is summed in an order that the sizes fix.
//
// Names end in the order of A and of B: n is row-major, t is column-major. f32 operands are
// multiplied as they are. bf16 ones are multiplied by tensor cores where there are any; their
// rows (columns, if column-major) begin on 16-byte boundaries there.
#include "ptx.cuh"
#include "product.cuh"

// --- Products without tensor cores: 128 x 128 elements of C by 256 threads, 64 each, 16 of k at a
// time through shared memory, of which there are two sets.

constexpr int SIDE = 128;
constexpr int SLICE = 16;

// Up to four elements, zeros beyond.
template <class T>
__device__ __forceinline__ void read4(const T *x, int count, bool vector, float *to) {
    if (count >= 4 && vector) {
        Pack<T, 4> four = *(const Pack<T, 4> *)x;
#pragma unroll
        for (int i = 0; i < 4; i++) to[i] = widen(four.at[i]);
    } else {
#pragma unroll
        for (int i = 0; i < 4; i++) to[i] = i < count ? widen(x[i]) : 0;
    }
}

// The 128 x 16 elements of an operand that a block multiplies next, 8 to a thread, in two halves.
// ALONG_DEPTH: contiguous in k; threads have 4 k of sides t / 4 and t / 4 + 64. Otherwise they have
// 4 sides of k t / 32 and t / 32 + 8.
template <class T, bool ALONG_DEPTH> struct Strip {
    const T *x; // this thread's first element
    int step;
    int sides;  // that exist from this thread's first on
    bool vector;

    __device__ __forceinline__ void set(const void *base, i64 batch, i64 step_, i64 side, i64 all,
                                        i64 begin) {
        int t = threadIdx.x;
        const T *matrix = (const T *)base + batch;
        step = (int)step_;
        vector = (u64)matrix % (4 * sizeof(T)) == 0 && step % 4 == 0;
        int first = ALONG_DEPTH ? t / 4 : 4 * (t % 32);
        sides = (int)min((i64)SIDE, all - side) - first;
        side += first;
        if (ALONG_DEPTH) {
            x = matrix + side * step + begin + 4 * (t % 4);
        } else {
            x = matrix + (begin + t / 32) * step + side;
        }
    }

    // The next 16 of k, of which `left` exist.
    __device__ __forceinline__ void read(int left, float (&to)[8]) {
        int t = threadIdx.x;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            int count = ALONG_DEPTH ? (64 * h < sides ? left - 4 * (t % 4) : 0)
                                    : (t / 32 + 8 * h < left ? sides : 0);
            read4(x + (i64)(ALONG_DEPTH ? 64 : 8) * h * step, count, vector, to + 4 * h);
        }
        x += ALONG_DEPTH ? (i64)SLICE : (i64)SLICE * step;
    }

    // As [16 of k][128 sides]. Sides are exchanged in groups of 8 by k / 4: a warp that writes 16 k
    // of 8 sides then meets no bank twice.
    __device__ __forceinline__ static void write(const float (&from)[8], float *tile) {
        int t = threadIdx.x;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            if (ALONG_DEPTH) {
                int side = t / 4 + 64 * half, quarter = t % 4;
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    tile[(4 * quarter + i) * SIDE + (side ^ (quarter << 3))] = from[4 * half + i];
                }
            } else {
                int side = 4 * (t % 32), depth = t / 32 + 8 * half;
                float *to = tile + depth * SIDE + (side ^ (depth / 4 << 3));
                *(float4 *)to = make_float4(from[4 * half], from[4 * half + 1], from[4 * half + 2],
                                            from[4 * half + 3]);
            }
        }
    }
};

__device__ __forceinline__ void read_eight(const float *from, float (&to)[8]) {
    float4 low = *(const float4 *)from, high = *(const float4 *)(from + 64);
    to[0] = low.x, to[1] = low.y, to[2] = low.z, to[3] = low.w;
    to[4] = high.x, to[5] = high.y, to[6] = high.z, to[7] = high.w;
}

template <class T, bool A_ALONG, bool B_ALONG> __device__ __forceinline__ void simple(const Product &p) {
    // As many k side by side as there are registers for, beside the addresses of these orders; what is made of compute_70
    // needs more of them.
#if __CUDA_ARCH__ >= 800
    constexpr int AT_ONCE = A_ALONG == B_ALONG ? 4 : 1;
#else
    constexpr int AT_ONCE = 1;
#endif
    __shared__ __align__(16) float pool[4 * SLICE * SIDE]; // A and B, twice; then 64 rows of sums
    __shared__ Task task; // registers are for sums
    if (threadIdx.x == 0) task = task_at<SIDE, SIDE>(p, blockIdx.x);
    __syncthreads();
    Strip<T, A_ALONG> a;
    Strip<T, B_ALONG> b;
    a.set(p.a, task.batch * p.a_batch, p.a_step, task.row, p.m, task.begin);
    b.set(p.b, task.batch * p.b_batch, p.b_step, task.column, p.n, task.begin);
    // A warp has 4 x 8 threads; a thread has rows 4y.. and 64 + 4y.., columns 4x.. and 64 + 4x..
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int y = warp / 2 * 4 + lane / 8, x = warp % 2 * 8 + lane % 8;
    float sums[8][8] = {};
    // Each round reads one slice from memory, multiplies the one before, and puts the first where
    // nobody reads any more.
    int set = 0;
#pragma unroll 1
    for (int left = task.depth; left > -SLICE; left -= SLICE, set ^= 1) {
        bool first = left == task.depth;
        float next_a[8], next_b[8];
        if (left > 0) {
            a.read(left, next_a);
            b.read(left, next_b);
        }
        if (!first) {
            const float *tile = pool + (set ^ 1) * 2 * SLICE * SIDE;
#pragma unroll 1
            for (int quarter = 0; quarter < 4; quarter++) {
                const float *as = tile + quarter * 4 * SIDE + (4 * y ^ (quarter << 3));
                const float *bs = tile + (SLICE + quarter * 4) * SIDE + (4 * x ^ (quarter << 3));
#pragma unroll AT_ONCE
                for (int i = 0; i < 4; i++) {
                    float left[8], right[8];
                    read_eight(as + i * SIDE, left);
                    read_eight(bs + i * SIDE, right);
#pragma unroll
                    for (int r = 0; r < 8; r++) {
#pragma unroll
                        for (int c = 0; c < 8; c++) {
                            sums[r][c] = fmaf(left[r], right[c], sums[r][c]);
                        }
                    }
                }
            }
        }
        if (left > 0) {
            float *tile = pool + set * 2 * SLICE * SIDE;
            a.write(next_a, tile);
            b.write(next_b, tile + SLICE * SIDE);
        }
        __syncthreads();
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float(&s)[8] = sums[4 * half + i];
            int row = 4 * y + i;
            *(float4 *)(pool + staged_at(row, 4 * x)) = make_float4(s[0], s[1], s[2], s[3]);
            *(float4 *)(pool + staged_at(row, 64 + 4 * x)) = make_float4(s[4], s[5], s[6], s[7]);
        }
        __syncthreads();
        finish_staged(p, pool, 64, task.at(p), task.row + 64 * half, task.column);
        __syncthreads();
    }
}

#define SIMPLE(type, T, order, a, b)                                                               \
    EXPORT __launch_bounds__(256, 2) gemm_##type##_##order(const __grid_constant__ Product p) {    \
        simple<T, a, b>(p);                                                                        \
    }
SIMPLE(f32, float, nn, true, false)
SIMPLE(f32, float, nt, true, true)
SIMPLE(f32, float, tn, false, false)
SIMPLE(f32, float, tt, false, true)

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800

// --- Products on tensor cores: 128 x 128 elements of C by 4 warps of 64 x 64, 32 of k at a time
// through 4 stages of shared memory that asynchronous copies fill ahead.

constexpr int DEEP = 32;
constexpr int STAGES = 4;
constexpr int STRIP = SIDE * DEEP * sizeof(bf16); // bytes of one operand's part of a stage

// The 128 x 32 elements of an operand in a stage, moved in chunks of 8 elements, 16 bytes.
//
// ALONG_DEPTH: rows are sides, of 4 chunks each; chunk c of row r is in place c ^ (r / 2 % 4), so
// that any 8 rows that follow each other have their chunk c in 8 different parts of the banks.
// Otherwise rows are k, of 16 chunks each; chunk c of row r is in place c ^ (r % 8), likewise.
template <bool ALONG_DEPTH> struct Staged {
    const bf16 *x; // this thread's first chunk
    i64 quarter;   // elements to the next of its four chunks
    int sides;     // that exist from this thread's first on
    int to;        // bytes from the stage's begin to this thread's first chunk

    __device__ __forceinline__ void set(const void *base, i64 batch, i64 step, i64 side, i64 all,
                                        i64 begin) {
        int t = threadIdx.x;
        x = (const bf16 *)base + batch;
        sides = (int)min(all - side, (i64)SIDE);
        if (ALONG_DEPTH) {
            int row = t / 4, chunk = t % 4;
            x += (side + row) * step + begin + 8 * chunk;
            quarter = 32 * step;
            sides -= row;
            to = row * 64 + ((chunk ^ (row / 2 % 4)) * 16);
        } else {
            int row = t / 16, chunk = t % 16;
            x += (begin + row) * step + side + 8 * chunk;
            quarter = 8 * step;
            sides -= 8 * chunk;
            to = row * 256 + ((chunk ^ (row % 8)) * 16);
        }
    }

    // The next 32 of k, of which `left` exist.
    __device__ __forceinline__ void copy(int left, u8 *stage) {
        int t = threadIdx.x;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int count = ALONG_DEPTH ? (32 * i < sides ? left - 8 * (t % 4) : 0)
                                    : (t / 16 + 8 * i < left ? sides : 0);
            int bytes = 2 * max(0, min(8, count));
            cp_async_part(stage + to + 2048 * i, x + i * quarter, bytes);
        }
        x += ALONG_DEPTH ? (i64)DEEP : 4 * quarter;
    }
};

// Reads an operand's fragments of 16 sides and 16 of k: four 8 x 8 matrices. A's are (side 0, depth
// 0), (1, 0), (0, 1), (1, 1) as mma.m16n8k16 takes them; B's are (0, 0), (0, 1), (1, 0), (1, 1), two
// for each of two groups of 8 columns.
template <bool ALONG_DEPTH, bool IS_A> struct Fragments {
    int from; // bytes from the stage's begin to this lane's row of its matrix, at k = 0

    __device__ __forceinline__ void set(int first_side) {
        int lane = threadIdx.x % 32, row = lane % 8, matrix = lane / 8;
        int side = IS_A ? matrix % 2 : matrix / 2, depth = IS_A ? matrix / 2 : matrix % 2;
        if (ALONG_DEPTH) {
            int r = first_side + 8 * side + row;
            from = r * 64 + ((depth ^ (r / 2 % 4)) * 16);
        } else {
            int r = 8 * depth + row; // r % 8 == row
            from = r * 256 + (((first_side / 8 + side) ^ row) * 16);
        }
    }

    // Sides first_side + 16 i .., k 16 deep ... First sides are multiples of 64, or of 32 if i is 0
    // or 1.
    __device__ __forceinline__ void read(const u8 *stage, int i, int deep, u32 (&to)[4]) const {
        if (ALONG_DEPTH) {
            // Chunk 2 deep + depth: the bit of `deep` is exchanged by itself.
            ldmatrix_x4(to, stage + 1024 * i + (from ^ (32 * deep)));
        } else {
            // Chunk 2 i + side of the 8 that a warp has: bits of i likewise.
            ldmatrix_x4_trans(to, stage + 4096 * deep + (from ^ (32 * i)));
        }
    }
};

// Streams DEEP of k after the other through STAGES stages of `bytes` each: `copy(left, stage)` asks for
// the next, of which `left` exist, while `multiply(stage)` multiplies what has arrived. In the end all
// threads are past the last stage.
template <class Copy, class Multiply>
__device__ __forceinline__ void stream(int depth, u8 *stages, int bytes, Copy copy, Multiply multiply) {
    int left_to_copy = depth, filled = 0;
    auto next = [&] {
        if (left_to_copy > 0) {
            copy(left_to_copy, stages + bytes * filled);
            left_to_copy -= DEEP;
            filled = filled + 1 == STAGES ? 0 : filled + 1;
        }
        cp_async_commit();
    };
#pragma unroll 1
    for (int i = 0; i < STAGES - 1; i++) next();
    int stage = 0;
#pragma unroll 1
    for (int to_multiply = depth; to_multiply > 0; to_multiply -= DEEP) {
        cp_async_wait<STAGES - 2>();
        __syncthreads(); // this stage has arrived, and the one before has been read by all
        next();
        multiply(stages + bytes * stage);
        stage = stage + 1 == STAGES ? 0 : stage + 1;
    }
    cp_async_wait<0>();
    __syncthreads();
}

template <bool A_ALONG, bool B_ALONG> __device__ __forceinline__ void tensor(const Product &p) {
    DYNAMIC_SHARED(stages); // STAGES x (A, B); then the sums
    Task task = task_at<SIDE, SIDE>(p, blockIdx.x);
    Staged<A_ALONG> a;
    Staged<B_ALONG> b;
    a.set(p.a, task.batch * p.a_batch, p.a_step, task.row, p.m, task.begin);
    b.set(p.b, task.batch * p.b_batch, p.b_step, task.column, p.n, task.begin);
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int warp_row = warp / 2 * 64, warp_column = warp % 2 * 64;
    Fragments<A_ALONG, true> left;
    Fragments<B_ALONG, false> right;
    left.set(warp_row);
    right.set(warp_column);
    float sums[4][8][4] = {};
    stream(task.depth, stages, 2 * STRIP, [&](int left, u8 *stage) {
        a.copy(left, stage);
        b.copy(left, stage + STRIP);
    }, [&](const u8 *as) {
        const u8 *bs = as + STRIP;
#pragma unroll
        for (int deep = 0; deep < 2; deep++) {
            u32 fa[4][4], fb[4][4];
#pragma unroll
            for (int r = 0; r < 4; r++) left.read(as, r, deep, fa[r]);
#pragma unroll
            for (int c = 0; c < 4; c++) right.read(bs, c, deep, fb[c]);
#pragma unroll
            for (int r = 0; r < 4; r++) {
#pragma unroll
                for (int c = 0; c < 8; c++) {
                    mma_bf16_16816(sums[r][c], fa[r], fb[c / 2][c % 2 * 2], fb[c / 2][c % 2 * 2 + 1]);
                }
            }
        }
    });
    // Lane l has rows l / 4 and l / 4 + 8 of a 16 x 8 fragment, columns 2 (l % 4) and the next.
    float *staged = (float *)stages;
#pragma unroll
    for (int r = 0; r < 4; r++) {
#pragma unroll
        for (int c = 0; c < 8; c++) {
            int row = warp_row + 16 * r + lane / 4, column = warp_column + 8 * c + lane % 4 * 2;
            const float(&s)[4] = sums[r][c];
            *(float2 *)(staged + staged_at(row, column)) = make_float2(s[0], s[1]);
            *(float2 *)(staged + staged_at(row + 8, column)) = make_float2(s[2], s[3]);
        }
    }
    __syncthreads();
    finish_staged(p, staged, SIDE, task.at(p), task.row, task.column);
}

#define TENSOR(order, a, b)                                                                        \
    EXPORT __launch_bounds__(128, 2) gemm_bf16_##order(const __grid_constant__ Product p) {        \
        tensor<a, b>(p);                                                                           \
    }
TENSOR(nn, true, false)
TENSOR(nt, true, true)
TENSOR(tn, false, false)
TENSOR(tt, false, true)

// --- Products with an operand of at most 16 sides, which are over when the other one has been read:
// 128 of its sides by 4 warps, 32 each. As many blocks as a multiprocessor holds wait for it.

constexpr int FEW = 16;
constexpr int FEW_STRIP = FEW * DEEP * sizeof(bf16);
constexpr int FEW_STAGE = STRIP + FEW_STRIP;

// The 16 x 32 elements of the small operand in a stage, one chunk each for half of the threads.
//
// ALONG_DEPTH: as in Staged. Otherwise rows are k, of 2 chunks each; chunk c of row r is in place
// c ^ (r / 4 % 2).
template <bool ALONG_DEPTH> struct StagedFew {
    const bf16 *x; // this thread's chunk
    i64 next;      // elements to its next one
    int sides;     // that exist from this thread's first on
    int to;

    __device__ __forceinline__ void set(const void *base, i64 batch, i64 step, i64 all, i64 begin) {
        int t = threadIdx.x;
        x = (const bf16 *)base + batch;
        if (ALONG_DEPTH) {
            int row = t / 4, chunk = t % 4;
            x += row * step + begin + 8 * chunk;
            next = DEEP;
            sides = (int)all - row;
            to = row * 64 + ((chunk ^ (row / 2 % 4)) * 16);
        } else {
            int row = t / 2, chunk = t % 2;
            x += (begin + row) * step + 8 * chunk;
            next = DEEP * step;
            sides = (int)all - 8 * chunk;
            to = row * 32 + ((chunk ^ (row / 4 % 2)) * 16);
        }
    }

    // The next 32 of k, of which `left` exist.
    __device__ __forceinline__ void copy(int left, u8 *stage) {
        int t = threadIdx.x;
        if (t >= FEW_STRIP / 16) return;
        int count = ALONG_DEPTH ? (sides > 0 ? left - 8 * (t % 4) : 0) : (t / 2 < left ? sides : 0);
        cp_async_part(stage + to, x, 2 * max(0, min(8, count)));
        x += next;
    }

    // The fragments of 16 sides and the 16 of k from 16 deep on, as those of B.
    __device__ __forceinline__ static void read(const u8 *stage, int deep, u32 (&to)[4]) {
        int lane = threadIdx.x % 32, row = lane % 8, matrix = lane / 8;
        int side = matrix / 2, depth = matrix % 2;
        if (ALONG_DEPTH) {
            int r = 8 * side + row, chunk = 2 * deep + depth;
            ldmatrix_x4(to, stage + r * 64 + ((chunk ^ (r / 2 % 4)) * 16));
        } else {
            int r = 16 * deep + 8 * depth + row;
            ldmatrix_x4_trans(to, stage + r * 32 + ((side ^ (r / 4 % 2)) * 16));
        }
    }
};

// IS_A: the small operand is A.
template <bool A_ALONG, bool B_ALONG, bool IS_A> __device__ __forceinline__ void few(const Product &p) {
    constexpr bool ALONG = IS_A ? B_ALONG : A_ALONG, FEW_ALONG = IS_A ? A_ALONG : B_ALONG;
    DYNAMIC_SHARED(stages); // STAGES x (large, small); then the sums
    Task task = IS_A ? task_at<FEW, SIDE>(p, blockIdx.x) : task_at<SIDE, FEW>(p, blockIdx.x);
    i64 a_batch = task.batch * p.a_batch, b_batch = task.batch * p.b_batch;
    Staged<ALONG> large;
    StagedFew<FEW_ALONG> small;
    if (IS_A) {
        large.set(p.b, b_batch, p.b_step, task.column, p.n, task.begin);
        small.set(p.a, a_batch, p.a_step, p.m, task.begin);
    } else {
        large.set(p.a, a_batch, p.a_step, task.row, p.m, task.begin);
        small.set(p.b, b_batch, p.b_step, p.n, task.begin);
    }
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    Fragments<ALONG, true> left;
    left.set(32 * warp);
    float sums[2][2][4] = {};
    stream(task.depth, stages, FEW_STAGE, [&](int left, u8 *stage) {
        large.copy(left, stage);
        small.copy(left, stage + STRIP);
    }, [&](const u8 *at) {
#pragma unroll
        for (int deep = 0; deep < 2; deep++) {
            u32 fa[2][4], fb[4];
#pragma unroll
            for (int r = 0; r < 2; r++) left.read(at, r, deep, fa[r]);
            small.read(at + STRIP, deep, fb);
#pragma unroll
            for (int r = 0; r < 2; r++) {
#pragma unroll
                for (int c = 0; c < 2; c++) {
                    mma_bf16_16816(sums[r][c], fa[r], fb[2 * c], fb[2 * c + 1]);
                }
            }
        }
    });
    // As in `tensor`; rows of C are the small operand's sides if that is A.
    float *staged = (float *)stages;
#pragma unroll
    for (int r = 0; r < 2; r++) {
#pragma unroll
        for (int c = 0; c < 2; c++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int side = 32 * warp + 16 * r + lane / 4 + i / 2 * 8;
                int other = 8 * c + lane % 4 * 2 + i % 2;
                staged[IS_A ? staged_at(other, side) : side * FEW + other] = sums[r][c][i];
            }
        }
    }
    __syncthreads();
    if (IS_A) {
        finish_staged(p, staged, FEW, task.at(p), task.row, task.column);
        return;
    }
    int column = threadIdx.x % 4 * 4, count = min(4, (int)p.n - column);
    if (count <= 0) return;
    bool whole = count == 4 && writes_fours(p);
    float bias[4];
#pragma unroll
    for (int i = 0; i < 4; i++) bias[i] = p.bias && i < count ? p.bias[column + i] : 0;
#pragma unroll 1
    for (int r = threadIdx.x / 4; r < SIDE && task.row + r < p.m; r += 32) {
        float4 four = *(const float4 *)(staged + r * FEW + column);
        float x[4] = {four.x, four.y, four.z, four.w};
        finish<1>(p, task.at(p) + (i64)(task.row + r) * p.n + column, count, whole, x, bias);
    }
}

#define FEW_SIDES(order, a, b)                                                                     \
    EXPORT __launch_bounds__(128, 5) gemm_bf16_few_rows_##order(                                   \
        const __grid_constant__ Product p) {                                                       \
        few<a, b, true>(p);                                                                        \
    }                                                                                              \
    EXPORT __launch_bounds__(128, 5) gemm_bf16_few_columns_##order(                                \
        const __grid_constant__ Product p) {                                                       \
        few<a, b, false>(p);                                                                       \
    }
FEW_SIDES(nn, true, false)
FEW_SIDES(nt, true, true)
FEW_SIDES(tn, false, false)
FEW_SIDES(tt, false, true)

#else

SIMPLE(bf16, bf16, nn, true, false)
SIMPLE(bf16, bf16, nt, true, true)
SIMPLE(bf16, bf16, tn, false, false)
SIMPLE(bf16, bf16, tt, false, true)

#endif

// --- The second pass where k was split: parts [batches, splits, m, n] are added in order.
EXPORT gemm_sum_splits(const __grid_constant__ Product p, const float *parts, i64 batches) {
    i64 fours = (p.n + 3) / 4;
    i64 index = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (index >= batches * p.m * fours) return;
    i64 batch = index / (p.m * fours), row = index / fours % p.m, column = index % fours * 4;
    int count = (int)min((i64)4, p.n - column);
    bool aligned = p.n % 4 == 0; // parts are
    float x[4] = {}, bias[4];
    const float *from = parts + (batch * p.splits * p.m + row) * p.n + column;
    for (i64 split = 0; split < p.splits; split++, from += p.m * p.n) {
        if (aligned) {
            float4 four = *(const float4 *)from;
            x[0] += four.x, x[1] += four.y, x[2] += four.z, x[3] += four.w;
        } else {
#pragma unroll
            for (int i = 0; i < 4; i++) x[i] += i < count ? from[i] : 0;
        }
    }
#pragma unroll
    for (int i = 0; i < 4; i++) bias[i] = p.bias && i < count ? p.bias[column + i] : 0;
    bool whole = count == 4 && writes_fours(p);
    i64 to = batch * p.c_batch + row * p.n + column;
    finish<1>(p, to, count, whole, x, bias);
}

// --- Operands that kernels cannot read in place: other types, strides, alignments.

// y [batches, rows, step] = x at those strides, zeros from column `columns` on. step: a multiple of
// 8; a thread writes 8 elements. y is aligned.
template <class S, class D>
__device__ void pack(const S *x, D *y, i64 batches, i64 rows, i64 columns, i64 batch_stride,
                     i64 row_stride, i64 column_stride, i64 step) {
    i64 index = (i64)blockIdx.x * blockDim.x + threadIdx.x, eights = step / 8;
    if (index >= batches * rows * eights) return;
    i64 column = index % eights * 8, row = index / eights % rows, batch = index / (eights * rows);
    const S *from = x + batch * batch_stride + row * row_stride + column * column_stride;
    Pack<S, 8> read;
    if (column_stride == 1 && column + 8 <= columns && aligned16(from)) {
        typedef typename Wide<S>::Type Vector;
#pragma unroll
        for (int i = 0; i < 8; i += Wide<S>::N) {
            *(Vector *)(read.at + i) = *(const Vector *)(from + i);
        }
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            read.at[i] = column + i < columns ? from[i * column_stride] : narrow<S>(0);
        }
    }
    typedef typename Wide<D>::Type Vector;
    D *to = y + 8 * index;
#pragma unroll
    for (int i = 0; i < 8; i += Wide<D>::N) {
        Vector vector;
#pragma unroll
        for (int j = 0; j < Wide<D>::N; j++) vector.at[j] = narrow<D>(widen(read.at[i + j]));
        *(Vector *)(to + i) = vector;
    }
}
#define PACK(from, S, to, D)                                                                       \
    EXPORT gemm_pack_##from##_##to(const S *x, D *y, i64 batches, i64 rows, i64 columns,           \
                                   i64 batch_stride, i64 row_stride, i64 column_stride,            \
                                   i64 step) {                                                     \
        pack<S, D>(x, y, batches, rows, columns, batch_stride, row_stride, column_stride, step);   \
    }
PACK(f32, float, f32, float)
PACK(f32, float, bf16, bf16)
PACK(bf16, bf16, f32, float)
PACK(bf16, bf16, bf16, bf16)
