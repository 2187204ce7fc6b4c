// Dense matrix products with everything that gemm.rs does on their way into C. Sums are float; each
// element of C is summed in an order that the sizes fix.
//
// Names end in the order of A and of B: n is row-major, t is column-major. bf16 operands are
// multiplied by tensor cores where there are any, f32 ones as they are or, split in two, by tensor
// cores; rows (columns, if column-major) of what those multiply begin on 16-byte boundaries.
#include "gemm_stages.cuh"

// --- Products without tensor cores: 128 x 128 elements of C by 256 threads, 64 each, 16 of k at a
// time through shared memory, of which there are two sets.

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
    if (threadIdx.x == 0) {
        // By way of registers: what a function returns in memory, the watched simulation does not see written.
        Task own = task_at<SIDE, SIDE>(p, blockIdx.x);
        task = own;
    }
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

// --- Products on tensor cores: 128 x 128 elements of C by 4 warps of 64 x 64, 32 of k in bf16 and 16 in
// f32 at a time through 4 stages of shared memory that asynchronous copies fill ahead.

// f32 numbers as sums of two that TF32 holds: a product of two is then three products, of which the
// fourth, of both small parts, is less than 2^-22 of the whole. (Ootomo and Yokota, "Recovering single
// precision accuracy from Tensor Cores while surpassing the FP32 theoretical peak performance", 2022.)
//
// Tensor cores do not round sums, they cut them, which over long sums would all go one way. So they
// add the products of 8 k alone, from zero and the small ones first, of which the last addition is
// cut; and what they made is added to the other sums as any f32.
//
// `high` is the nearest number of 10 bits behind the first, and `low` what is left, exactly: at most
// 12 bits, of which the product cuts the last if it comes to that, in one direction as often as in the
// other. In all, x is wrong by at most 2^-23 of itself or 2^-136, TF32's smallest number. Infinities,
// what is not a number, and what becomes infinite when it is rounded (all from 2^128 - 2^115 on) give
// sums that are not finite, for which see `sum_again`.
__device__ __forceinline__ void split(const u32 (&x)[4], u32 (&high)[4], u32 (&low)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        high[i] = (x[i] + 0x1000) & 0xffffe000u;
        low[i] = __float_as_uint(__uint_as_float(x[i]) - __uint_as_float(high[i]));
    }
}

// sums[0 .. 4] += a * b of 16 x 8 and 8 x 32 elements. Products that follow each other are of different
// sums: none waits for the one before.
__device__ __forceinline__ void multiply_split(float (*sums)[4], const u32 (&high)[4], const u32 (&low)[4],
                                               const u32 (*b_high)[4], const u32 (*b_low)[4]) {
    float parts[4][4] = {};
#pragma unroll
    for (int c = 0; c < 4; c++) mma_tf32_1688(parts[c], low, b_high[c / 2][c % 2 * 2], b_high[c / 2][c % 2 * 2 + 1]);
#pragma unroll
    for (int c = 0; c < 4; c++) mma_tf32_1688(parts[c], high, b_low[c / 2][c % 2 * 2], b_low[c / 2][c % 2 * 2 + 1]);
#pragma unroll
    for (int c = 0; c < 4; c++) mma_tf32_1688(parts[c], high, b_high[c / 2][c % 2 * 2], b_high[c / 2][c % 2 * 2 + 1]);
#pragma unroll
    for (int c = 0; c < 4; c++) {
#pragma unroll
        for (int i = 0; i < 4; i++) sums[c][i] += parts[c][i];
    }
}

// Where a warp has its 64 x 64 sums in the block's 128 x 128. Lane l has rows l / 4 and l / 4 + 8 of
// a 16 x 8 fragment, columns 2 (l % 4) and the next.
struct Part {
    int row, column, lane;

    __device__ __forceinline__ Part() {
        int warp = threadIdx.x / 32;
        row = warp / 2 * 64, column = warp % 2 * 64, lane = threadIdx.x % 32;
    }
    __device__ __forceinline__ int row_of(int r, int half) const { return row + 16 * r + 8 * half + lane / 4; }
    __device__ __forceinline__ int column_of(int c) const { return column + 8 * c + lane % 4 * 2; }
};

// Puts what `simple` would sum in place of sums that are not finite: split, an infinity times a number
// can be none. The block streams its operands once for each 16 rows of its warps.
template <bool A_ALONG, bool B_ALONG>
__device__ __forceinline__ void sum_again(const Product &p, const Task &task, u8 *stages, const Part &part,
                                          float (&sums)[4][8][4]) {
    typedef Staged<float, A_ALONG> Left;
    typedef Staged<float, B_ALONG> Right;
#pragma unroll 1
    for (int r = 0; r < 4; r++) {
        Left a;
        Right b;
        a.set(p.a, task.batch * p.a_batch, p.a_step, task.row, p.m, task.begin);
        b.set(p.b, task.batch * p.b_batch, p.b_step, task.column, p.n, task.begin);
        float again[8][4] = {};
        stream(task.depth, DEEP<float>, stages, 2 * STRIP, [&](int left, u8 *stage) {
            a.copy(left, stage);
            b.copy(left, stage + STRIP);
        }, [&](const u8 *stage) {
#pragma unroll 1
            for (int k = 0; k < DEEP<float>; k++) {
                float left[2];
#pragma unroll
                for (int half = 0; half < 2; half++) left[half] = Left::at(stage, part.row_of(r, half), k);
#pragma unroll
                for (int c = 0; c < 8; c++) {
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        float right = Right::at(stage + STRIP, part.column_of(c) + i % 2, k);
                        again[c][i] = fmaf(left[i / 2], right, again[c][i]);
                    }
                }
            }
        });
        // The rows of the next round come first; after four, all are where they were.
#pragma unroll
        for (int c = 0; c < 8; c++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float sum = isfinite(sums[0][c][i]) ? sums[0][c][i] : again[c][i];
                sums[0][c][i] = sums[1][c][i], sums[1][c][i] = sums[2][c][i];
                sums[2][c][i] = sums[3][c][i], sums[3][c][i] = sum;
            }
        }
    }
}

template <class T, bool A_ALONG, bool B_ALONG> __device__ __forceinline__ void tensor(const Product &p) {
    DYNAMIC_SHARED(stages); // STAGES x (A, B); then the sums
    __shared__ Task task;   // registers are for sums
    if (threadIdx.x == 0) {
        Task own = task_at<SIDE, SIDE>(p, blockIdx.x); // as in `simple`
        task = own;
    }
    __syncthreads();
    Staged<T, A_ALONG> a;
    Staged<T, B_ALONG> b;
    a.set(p.a, task.batch * p.a_batch, p.a_step, task.row, p.m, task.begin);
    b.set(p.b, task.batch * p.b_batch, p.b_step, task.column, p.n, task.begin);
    Part part;
    Fragments<T, A_ALONG, true> left;
    Fragments<T, B_ALONG, false> right;
    left.set(part.row);
    right.set(part.column);
    float sums[4][8][4] = {};
    stream(task.depth, DEEP<T>, stages, 2 * STRIP, [&](int left, u8 *stage) {
        a.copy(left, stage);
        b.copy(left, stage + STRIP);
    }, [&](const u8 *as) {
        const u8 *bs = as + STRIP;
        if constexpr (sizeof(T) == 2) {
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
        } else {
#pragma unroll 1 // there are registers for one
            for (int deep = 0; deep < 2; deep++) {
                u32 high[4][4], low[4][4];
#pragma unroll
                for (int c = 0; c < 4; c++) {
                    u32 whole[4];
                    right.read(bs, c, deep, whole);
                    split(whole, high[c], low[c]);
                }
#pragma unroll
                for (int r = 0; r < 4; r++) {
                    u32 whole[4], a_high[4], a_low[4];
                    left.read(as, r, deep, whole);
                    split(whole, a_high, a_low);
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        multiply_split(sums[r] + 4 * half, a_high, a_low, high + 2 * half, low + 2 * half);
                    }
                }
            }
        }
    });
    if constexpr (sizeof(T) == 4) {
        float zero = 0; // none any more if a sum is not finite
#pragma unroll
        for (int r = 0; r < 4; r++) {
#pragma unroll
            for (int c = 0; c < 8; c++) {
#pragma unroll
                for (int i = 0; i < 4; i++) zero = fmaf(sums[r][c][i], 0.f, zero);
            }
        }
        if (__syncthreads_or(zero != 0)) sum_again<A_ALONG, B_ALONG>(p, task, stages, part, sums);
    }
    float *staged = (float *)stages;
#pragma unroll
    for (int r = 0; r < 4; r++) {
#pragma unroll
        for (int c = 0; c < 8; c++) {
            int row = part.row_of(r, 0), column = part.column_of(c);
            const float(&s)[4] = sums[r][c];
            *(float2 *)(staged + staged_at(row, column)) = make_float2(s[0], s[1]);
            *(float2 *)(staged + staged_at(row + 8, column)) = make_float2(s[2], s[3]);
        }
    }
    __syncthreads();
    finish_staged(p, staged, SIDE, task.at(p), task.row, task.column);
}

#define TENSOR(type, T, order, a, b)                                                               \
    EXPORT __launch_bounds__(128, 2) gemm_##type##_##order(const __grid_constant__ Product p) {    \
        tensor<T, a, b>(p);                                                                        \
    }
TENSOR(bf16, bf16, nn, true, false)
TENSOR(bf16, bf16, nt, true, true)
TENSOR(bf16, bf16, tn, false, false)
TENSOR(bf16, bf16, tt, false, true)
TENSOR(split, float, nn, true, false)
TENSOR(split, float, nt, true, true)
TENSOR(split, float, tn, false, false)
TENSOR(split, float, tt, false, true)

// --- Products with an operand of at most 16 sides, which are over when the other one has been read:
// 128 of its sides by 4 warps, 32 each. As many blocks as a multiprocessor holds wait for it.

constexpr int FEW = 16;
constexpr int FEW_STRIP = FEW * 64;
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
            next = DEEP<bf16>;
            sides = (int)all - row;
            to = row * 64 + ((chunk ^ (row / 2 % 4)) * 16);
        } else {
            int row = t / 2, chunk = t % 2;
            x += (begin + row) * step + 8 * chunk;
            next = DEEP<bf16> * step;
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
    Staged<bf16, ALONG> large;
    StagedFew<FEW_ALONG> small;
    if (IS_A) {
        large.set(p.b, b_batch, p.b_step, task.column, p.n, task.begin);
        small.set(p.a, a_batch, p.a_step, p.m, task.begin);
    } else {
        large.set(p.a, a_batch, p.a_step, task.row, p.m, task.begin);
        small.set(p.b, b_batch, p.b_step, p.n, task.begin);
    }
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    Fragments<bf16, ALONG, true> left;
    left.set(32 * warp);
    float sums[2][2][4] = {};
    stream(task.depth, DEEP<bf16>, stages, FEW_STAGE, [&](int left, u8 *stage) {
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
