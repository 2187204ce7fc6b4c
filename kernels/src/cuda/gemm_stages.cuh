// How products on tensor cores get at their operands: asynchronous copies into stages of shared memory, and
// fragments for mma.sync from there. For sm_80 and later.
#pragma once

#include "product.cuh"
#include "ptx.cuh"

// Sides of an operand that a block multiplies, with those of the other.
constexpr int SIDE = 128;

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800

constexpr int STAGES = 4;
constexpr int STRIP = SIDE * 64; // bytes of one operand's part of a stage

// k of a stage: 64 bytes of each side.
template <class T> constexpr int DEEP = 64 / sizeof(T);

// Elements between chunks. The sums of split numbers leave registers for 32 bits; launchers see to it.
template <class T> struct Distance {
    typedef i64 Type;
};
template <> struct Distance<float> {
    typedef int Type;
};

// The 128 sides x 64 bytes of k of an operand in a stage, moved in chunks of 16 bytes.
//
// ALONG_DEPTH: rows are sides, of 4 chunks each; chunk c of row r is in place c ^ (r / 2 % 4), so
// that any 8 rows that follow each other have their chunk c in 8 different parts of the banks.
// Otherwise rows are k. Of bf16 they have 16 chunks each; chunk c of row r is in place c ^ (r % 8),
// likewise. Of float they have 32; chunk c of row r is in place c ^ (2 * (r % 4)), so that the same 8
// sides of any 4 rows that follow each other are in 32 different banks.
template <class T, bool ALONG_DEPTH> struct Staged {
    static constexpr int CHUNK = 16 / sizeof(T);
    static constexpr int ACROSS = SIDE / CHUNK; // chunks of a row that is k

    const T *x; // this thread's first chunk
    typename Distance<T>::Type quarter; // to the next of its four chunks
    int sides; // that exist from this thread's first on
    int to;    // bytes from the stage's begin to this thread's first chunk

    __device__ __forceinline__ static int place(int row, int chunk) {
        if (ALONG_DEPTH) return row * 64 + ((chunk ^ (row / 2 % 4)) * 16);
        return row * (16 * ACROSS) + ((chunk ^ (sizeof(T) == 2 ? row % 8 : row % 4 * 2)) * 16);
    }

    __device__ __forceinline__ void set(const void *base, i64 batch, i64 step, i64 side, i64 all,
                                        i64 begin) {
        int t = threadIdx.x;
        x = (const T *)base + batch;
        sides = (int)min(all - side, (i64)SIDE);
        if (ALONG_DEPTH) {
            int row = t / 4, chunk = t % 4;
            x += (side + row) * step + begin + CHUNK * chunk;
            quarter = (typename Distance<T>::Type)(32 * step);
            sides -= row;
            to = place(row, chunk);
        } else {
            int row = t / ACROSS, chunk = t % ACROSS;
            x += (begin + row) * step + side + CHUNK * chunk;
            quarter = (typename Distance<T>::Type)(DEEP<T> / 4 * step);
            sides -= CHUNK * chunk;
            to = place(row, chunk);
        }
    }

    // The next k, of which `left` exist.
    __device__ __forceinline__ void copy(int left, u8 *stage) {
        int t = threadIdx.x;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int count = ALONG_DEPTH ? (32 * i < sides ? left - CHUNK * (t % 4) : 0)
                                    : (t / ACROSS + DEEP<T> / 4 * i < left ? sides : 0);
            int bytes = (int)sizeof(T) * max(0, min(CHUNK, count));
            cp_async_part(stage + to + 2048 * i, x + i * (i64)quarter, bytes);
        }
        x += ALONG_DEPTH ? (i64)DEEP<T> : 4 * (i64)quarter;
    }

    // The element of a side at one k of the stage.
    __device__ __forceinline__ static T at(const u8 *stage, int side, int depth) {
        int row = ALONG_DEPTH ? side : depth, column = ALONG_DEPTH ? depth : side;
        return ((const T *)(stage + place(row, column / CHUNK)))[column % CHUNK];
    }
};

// Reads an operand's fragments of 16 sides and 32 bytes of k: four matrices of 8 sides and 16 bytes of
// k. A's are (side 0, depth 0), (1, 0), (0, 1), (1, 1) as mma.m16n8k16 takes them in bf16 and mma.m16n8k8
// in TF32; B's are (0, 0), (0, 1), (1, 0), (1, 1), two for each of two groups of 8 columns.
template <class T, bool ALONG_DEPTH, bool IS_A> struct Fragments {
    // What ldmatrix transposes are elements of 16 bits; of float, each lane reads its own.
    static constexpr bool BY_LANE = !ALONG_DEPTH && sizeof(T) == 4;

    int from; // bytes from the stage's begin to what this lane names first, at k = 0

    __device__ __forceinline__ void set(int first_side) {
        int lane = threadIdx.x % 32, row = lane % 8, matrix = lane / 8;
        int side = IS_A ? matrix % 2 : matrix / 2, depth = IS_A ? matrix / 2 : matrix % 2;
        if (ALONG_DEPTH) {
            from = Staged<T, true>::place(first_side + 8 * side + row, depth);
        } else if (BY_LANE) {
            // Side lane / 4 at k lane % 4.
            int first = first_side + lane / 4;
            from = Staged<T, false>::place(lane % 4, first / 4) + first % 4 * 4;
        } else {
            from = Staged<T, false>::place(8 * depth + row, first_side / 8 + side);
        }
    }

    // Sides first_side + 16 i .., and 32 bytes of k from so many times 32 on. First sides are multiples of
    // 64, or of 32 if i is 0 or 1.
    __device__ __forceinline__ void read(const u8 *stage, int i, int deep, u32 (&to)[4]) const {
        if (ALONG_DEPTH) {
            // Chunk 2 deep + depth: the bit of `deep` is exchanged by itself.
            ldmatrix_x4(to, stage + 1024 * i + (from ^ (32 * deep)));
        } else if (BY_LANE) {
#pragma unroll
            for (int side = 0; side < 2; side++) {
#pragma unroll
                for (int depth = 0; depth < 2; depth++) {
                    // Bits of 16 i and of 8 side likewise.
                    const u8 *at = stage + 4096 * deep + 2048 * depth + (from ^ (64 * i + 32 * side));
                    to[IS_A ? side + 2 * depth : 2 * side + depth] = *(const u32 *)at;
                }
            }
        } else {
            // Chunk 2 i + side of the 8 that a warp has: bits of i likewise.
            ldmatrix_x4_trans(to, stage + 4096 * deep + (from ^ (32 * i)));
        }
    }
};

// Streams `deep` of k after the other through STAGES stages of `bytes` each: `copy(left, stage)` asks for
// the next, of which `left` exist, while `multiply(stage)` multiplies what has arrived. In the end all
// threads are past the last stage.
template <class Copy, class Multiply>
__device__ __forceinline__ void stream(int depth, int deep, u8 *stages, int bytes, Copy copy,
                                       Multiply multiply) {
    int left_to_copy = depth, filled = 0;
    auto next = [&] {
        if (left_to_copy > 0) {
            copy(left_to_copy, stages + bytes * filled);
            left_to_copy -= deep;
            filled = filled + 1 == STAGES ? 0 : filled + 1;
        }
        cp_async_commit();
    };
#pragma unroll 1
    for (int i = 0; i < STAGES - 1; i++) next();
    int stage = 0;
#pragma unroll 1
    for (int to_multiply = depth; to_multiply > 0; to_multiply -= deep) {
        cp_async_wait<STAGES - 2>();
        __syncthreads(); // this stage has arrived, and the one before has been read by all
        next();
        multiply(stages + bytes * stage);
        stage = stage + 1 == STAGES ? 0 : stage + 1;
    }
    cp_async_wait<0>();
    __syncthreads();
}

#endif
