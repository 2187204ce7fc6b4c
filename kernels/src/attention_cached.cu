// Attention of a few queries over many kept keys: a block of threads has up to HEADS heads that
// share a key head, of one query, and a part of the keys, each of which it reads once, CHUNK at a
// time; `attention_combine` adds up what the parts gave, in their order.
#include "attention.cuh"

#define THREADS 128
#define CHUNK 128
#define HEADS 4

struct Eight {
    float at[8];
};

// Dimensions d .. d + 8 of a row, zeros from `dims` on.
template <class T>
__device__ __forceinline__ Eight load_eight(const T *row, int d, int dims, bool wide) {
    Eight x;
    if (wide) {
        constexpr int N = Wide<T>::N;
#pragma unroll
        for (int part = 0; part < 8; part += N) {
            typename Wide<T>::Type words = *(const typename Wide<T>::Type *)(row + d + part);
#pragma unroll
            for (int e = 0; e < N; e++) x.at[part + e] = widen(words.at[e]);
        }
    } else {
#pragma unroll
        for (int e = 0; e < 8; e++) x.at[e] = d + e < dims ? widen(row[d + e]) : 0;
    }
    return x;
}

// Whether every row can be read 16 bytes at a time.
template <class T> __device__ __forceinline__ bool is_wide(const T *x, i64 stride, int dims) {
    return aligned16(x) && stride % Wide<T>::N == 0 && dims % 8 == 0;
}

// stats: [queries * heads, parts, 2]: the largest score and the sum of exponentials; sums: [queries *
// heads, parts, dims]. There are p.blocks parts of `span` keys.
template <class T>
__device__ __forceinline__ void cached(const T *q, const T *k, const T *v, i64 q_stride,
                                       i64 k_stride, i64 v_stride, const i64 *offsets,
                                       const i64 *starts, const i64 *lengths, float *stats,
                                       float *sums, int sequences, int span,
                                       const Attention &p) {
    __shared__ float queries[HEADS][256];
    __shared__ float weights[HEADS][CHUNK];
    __shared__ float parts[THREADS][8];
    __shared__ float most[HEADS], total[HEADS], shrink[HEADS];
    int tid = threadIdx.x, kv_heads = p.heads / p.group, tiles = (p.group + HEADS - 1) / HEADS;
    u32 task = blockIdx.x;
    int split = (int)(task % (u32)p.blocks);
    task /= (u32)p.blocks;
    int tile = (int)(task % (u32)tiles);
    task /= (u32)tiles;
    int kv_head = (int)(task % (u32)kv_heads);
    i64 token = task / (u32)kv_heads;
    int head = kv_head * p.group + tile * HEADS, heads = min(HEADS, p.group - tile * HEADS);

    // The sequence s with offsets[s] <= token < offsets[s + 1].
    int s = 0;
    for (int end = sequences; end - s > 1;) {
        int middle = (s + end) / 2;
        if (offsets[middle] <= token) s = middle;
        else end = middle;
    }
    int query = (int)(lengths[s] - (offsets[s + 1] - token));
    int from = max(split * span, query - p.window + 1);
    int all = min((split + 1) * span, query + 1) - from;
    i64 result = (token * p.heads + head) * p.blocks + split;
    if (all <= 0) {
        if (tid < heads) {
            stats[2 * (result + (i64)tid * p.blocks)] = -INFINITE;
            stats[2 * (result + (i64)tid * p.blocks) + 1] = 0;
        }
        return;
    }
    k += (starts[s] + from) * k_stride + (i64)kv_head * p.dims;
    v += (starts[s] + from) * v_stride + (i64)kv_head * p.dims;
    q += token * q_stride + (i64)head * p.dims;
    for (int i = tid; i < heads * 256; i += THREADS) {
        int h = i / 256, d = i % 256;
        queries[h][d] = d < p.dims ? widen(q[h * p.dims + d]) : 0;
    }
    if (tid < HEADS) most[tid] = -INFINITE, total[tid] = 0;

    int columns = (p.dims + 7) / 8, slots = THREADS / columns;
    int column = tid % columns, slot = tid / columns;
    bool wide_k = is_wide(k, k_stride, p.dims), wide_v = is_wide(v, v_stride, p.dims);
    float part[HEADS][8];
#pragma unroll
    for (int h = 0; h < HEADS; h++)
#pragma unroll
        for (int e = 0; e < 8; e++) part[h][e] = 0;
    for (int chunk = 0; chunk < all; chunk += CHUNK, k += CHUNK * k_stride, v += CHUNK * v_stride) {
        int count = min(CHUNK, all - chunk);
        __syncthreads(); // the queries are there, and the weights before these have been read

        // Scores: eight lanes to a key.
        int lane = tid % 8;
        for (int base = 0; base < count; base += THREADS / 8) {
            int j = base + tid / 8;
            float dot[HEADS];
#pragma unroll
            for (int h = 0; h < HEADS; h++) dot[h] = 0;
            if (j < count)
                for (int d = 8 * lane; d < p.dims; d += 64) {
                    Eight x = load_eight(k + j * k_stride, d, p.dims, wide_k);
#pragma unroll
                    for (int h = 0; h < HEADS; h++)
                        if (h < heads)
#pragma unroll
                            for (int e = 0; e < 8; e++)
                                dot[h] = fmaf(x.at[e], queries[h][d + e], dot[h]);
                }
#pragma unroll
            for (int h = 0; h < HEADS; h++) {
                if (h >= heads) break;
                float sum = dot[h];
#pragma unroll
                for (int other = 1; other < 8; other *= 2)
                    sum += __shfl_xor_sync(0xffffffffu, sum, other);
                if (lane == 0 && j < count)
                    weights[h][j] = p.cap > 0 ? p.cap * tanhf(sum * inside_cap(p)) : sum * p.scale;
            }
        }
        __syncthreads();

        // Weights: a warp to a head.
        for (int h = tid / 32; h < heads; h += THREADS / 32) {
            float best = most[h], sum = 0;
            for (int j = tid % 32; j < count; j += 32) best = fmaxf(best, weights[h][j]);
            best = warp_max(best);
            for (int j = tid % 32; j < count; j += 32) {
                float weight = expf(weights[h][j] - best);
                weights[h][j] = weight;
                sum += weight;
            }
            sum = warp_sum(sum);
            __syncwarp(); // everybody has read `most`
            if (tid % 32 == 0) {
                float by = expf(most[h] - best);
                shrink[h] = by;
                most[h] = best;
                total[h] = fmaf(total[h], by, sum);
            }
        }
        __syncthreads();

        // Sums: a thread has eight dimensions of every so manieth key.
#pragma unroll
        for (int h = 0; h < HEADS; h++)
            if (h < heads)
#pragma unroll
                for (int e = 0; e < 8; e++) part[h][e] *= shrink[h];
        if (slot >= slots) continue;
        for (int j = slot; j < count; j += slots) {
            Eight x = load_eight(v + j * v_stride, 8 * column, p.dims, wide_v);
#pragma unroll
            for (int h = 0; h < HEADS; h++)
                if (h < heads)
#pragma unroll
                    for (int e = 0; e < 8; e++)
                        part[h][e] = fmaf(weights[h][j], x.at[e], part[h][e]);
        }
    }

    if (tid < heads) {
        stats[2 * (result + (i64)tid * p.blocks)] = most[tid];
        stats[2 * (result + (i64)tid * p.blocks) + 1] = total[tid];
    }
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
        if (h >= heads) break;
        __syncthreads();
#pragma unroll
        for (int e = 0; e < 8; e++) parts[tid][e] = part[h][e];
        __syncthreads();
        for (int d = tid; d < p.dims; d += THREADS) {
            float sum = 0;
            for (int i = 0; i < slots; i++) sum += parts[i * columns + d / 8][d % 8];
            sums[(result + (i64)h * p.blocks) * p.dims + d] = sum;
        }
    }
}

// A block of threads to a head of a query.
template <class T>
__device__ __forceinline__ void combine(const float *stats, const float *sums, T *out, int splits,
                                        int dims) {
    i64 row = blockIdx.x;
    stats += 2 * row * splits;
    sums += row * splits * dims;
    float best = -INFINITE, total = 0;
    for (int s = 0; s < splits; s++) best = fmaxf(best, stats[2 * s]);
    for (int s = 0; s < splits; s++)
        if (stats[2 * s] != -INFINITE) total = fmaf(stats[2 * s + 1], expf(stats[2 * s] - best), total);
    for (int d = threadIdx.x; d < dims; d += THREADS) {
        float sum = 0;
        for (int s = 0; s < splits; s++)
            if (stats[2 * s] != -INFINITE) // else nothing was written
                sum = fmaf(sums[(i64)s * dims + d], expf(stats[2 * s] - best), sum);
        out[row * dims + d] = narrow<T>(sum / total);
    }
}

#define CACHED(T, type)                                                                             \
    EXPORT __launch_bounds__(THREADS) attention_cached_##type(                                      \
        const T *q, const T *k, const T *v, i64 q_stride, i64 k_stride, i64 v_stride,               \
        const i64 *offsets, const i64 *starts, const i64 *lengths, float *stats, float *sums,       \
        int sequences, int span, Attention p) {                                                     \
        cached(q, k, v, q_stride, k_stride, v_stride, offsets, starts, lengths, stats, sums,        \
               sequences, span, p);                                                                 \
    }                                                                                               \
    EXPORT __launch_bounds__(THREADS) attention_combine_##type(                                     \
        const float *stats, const float *sums, T *out, int splits, int dims) {                      \
        combine(stats, sums, out, splits, dims);                                                    \
    }
CACHED(float, f32)
CACHED(bf16, bf16)
