// Optimizer steps over many tensors at once, and the norm of all gradients. What a step reads beside
// the tensors (learning rate, corrections, the factor of clipping) lies in device memory, so that a
// recorded step can be run again with other numbers.
#include "common.cuh"

#define THREADS 256
// Elements of a block; blocks of a tensor start at multiples of it.
#define CHUNK 8192
// Blocks that sum squares, at most.
#define SUM_BLOCKS 1024

// One tensor of a step. `first_chunk` counts the chunks of the tensors before it; no tensor is empty.
struct Part {
    void *weight;
    const void *gradient;
    void *state0; // mean gradient, or velocity
    void *state1; // mean square
    bf16 *rounded; // a copy of an f32 weight that products read, or null
    i64 count;
    i64 first_chunk;
    i64 group; // whose numbers it is updated with
};

// What was found out about the gradients.
struct Norm {
    double squares; // the sum of their squares
    float clip;     // what they are multiplied with
    int broken;     // the first part with an element that is not finite, or -1; if there is one, nothing is updated
};

// Behind every part.
#define NO_PART 0x7fffffff

// Which of the parts holds a chunk.
__device__ __forceinline__ const Part *part_of(const Part *parts, int count, i64 chunk) {
    int low = 0, high = count; // it is one of low .. high
#pragma unroll 1
    while (high - low > 1) {
        int middle = (low + high) / 2;
        if (parts[middle].first_chunk <= chunk)
            low = middle;
        else
            high = middle;
    }
    return parts + low;
}

// --- The norm

// The sum of the block's numbers for its first thread, 0 for others.
__device__ __forceinline__ double block_sum_double(double x) {
    __shared__ double numbers[THREADS];
    __syncthreads();
    numbers[threadIdx.x] = x;
    for (int width = THREADS / 2; width > 0; width /= 2) {
        __syncthreads();
        if (threadIdx.x < width) numbers[threadIdx.x] += numbers[threadIdx.x + width];
    }
    return threadIdx.x == 0 ? numbers[0] : 0; // which only that thread has written
}

// The least of the block's numbers, for all of its threads.
__device__ __forceinline__ int block_min(int x) {
    __shared__ int least;
    if (threadIdx.x == 0) least = x;
    __syncthreads();
    atomicMin(&least, x);
    __syncthreads();
    return least;
}

// sums[b] = the sum of squares of the chunks b, b + blocks, b + 2 blocks, ...: in double precision
// they neither overflow nor lose small terms. Behind the SUM_BLOCKS sums, for each block: the first part with an element
// there that is not finite.
template <class T>
__device__ void sum_squares(const Part *parts, int count, i64 chunks, double *sums) {
    constexpr int V = 4;
    double sum = 0;
    int broken = NO_PART;
    for (i64 chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
        const Part *part = part_of(parts, count, chunk);
        const T *x = (const T *)part->gradient;
        i64 first = (chunk - part->first_chunk) * CHUNK;
        i64 end = first + CHUNK < part->count ? first + CHUNK : part->count;
        bool whole = aligned16(x); // chunks start at multiples of 16 bytes from there
#pragma unroll 1
        for (i64 i = first + threadIdx.x * V; i < end; i += THREADS * V) {
            if (whole && i + V <= end) {
                Pack<T, V> pack = *(const Pack<T, V> *)(x + i);
#pragma unroll
                for (int v = 0; v < V; v++) {
                    double value = widen(pack.at[v]);
                    sum += value * value;
                }
            } else {
#pragma unroll 1
                for (i64 j = i; j < i + V && j < end; j++) {
                    double value = widen(x[j]);
                    sum += value * value;
                }
            }
        }
        // What is not finite stays so, and parts come in their order.
        if (broken == NO_PART && !(sum - sum == 0)) broken = (int)(part - parts);
    }
    sum = block_sum_double(sum);
    broken = block_min(broken);
    if (threadIdx.x == 0) {
        sums[blockIdx.x] = sum;
        ((int *)(sums + SUM_BLOCKS))[blockIdx.x] = broken;
    }
}
EXPORT sum_squares_f32(const Part *parts, int count, i64 chunks, double *sums) {
    sum_squares<float>(parts, count, chunks, sums);
}
EXPORT sum_squares_bf16(const Part *parts, int count, i64 chunks, double *sums) {
    sum_squares<bf16>(parts, count, chunks, sums);
}

// Joins the sums and finds the factor that brings the norm down to `most`; negative: any norm. One
// block.
EXPORT join_squares(const double *sums, int count, double most, Norm *norm) {
    const int *first = (const int *)(sums + SUM_BLOCKS);
    double sum = 0;
    int broken = NO_PART;
#pragma unroll 1
    for (int i = threadIdx.x; i < count; i += THREADS) {
        sum += sums[i];
        if (first[i] < broken) broken = first[i];
    }
    sum = block_sum_double(sum);
    broken = block_min(broken);
    if (threadIdx.x == 0) {
        // As PyTorch's clip_grad_norm_, with its guard against a division by zero.
        double clip = most < 0 ? 1 : most / (sqrt(sum) + 1e-6);
        norm->squares = sum;
        norm->clip = clip < 1 ? (float)clip : 1;
        norm->broken = broken == NO_PART ? -1 : broken;
    }
}

// --- Updates

// Runs `update` on the elements of this block's chunk, four at a time where all lie at multiples of
// 16 bytes (the rounded copy, of 8). Tensors that are null are neither read nor written.
template <class T, class Update>
__device__ __forceinline__ void each_element(const Part *part, i64 chunk, Update update) {
    constexpr int V = 4;
    i64 first = (chunk - part->first_chunk) * CHUNK;
    i64 end = first + CHUNK < part->count ? first + CHUNK : part->count;
    T *weight = (T *)part->weight;
    const T *gradient = (const T *)part->gradient;
    T *state0 = (T *)part->state0, *state1 = (T *)part->state1;
    bf16 *rounded = sizeof(T) == sizeof(float) ? part->rounded : nullptr;
    bool whole = aligned16(weight) && aligned16(gradient) && aligned16(state0) && aligned16(state1) &&
                 ((u64)rounded & 7) == 0;
#pragma unroll 1
    for (i64 i = first + threadIdx.x * V; i < end; i += THREADS * V) {
        if (whole && i + V <= end) {
            Pack<T, V> w = *(const Pack<T, V> *)(weight + i);
            Pack<T, V> g = *(const Pack<T, V> *)(gradient + i);
            Pack<T, V> s0 = w, s1 = w;
            Pack<bf16, V> r;
            if (state0) s0 = *(const Pack<T, V> *)(state0 + i);
            if (state1) s1 = *(const Pack<T, V> *)(state1 + i);
#pragma unroll
            for (int v = 0; v < V; v++) {
                float of[3] = {widen(w.at[v]), widen(s0.at[v]), widen(s1.at[v])};
                update(widen(g.at[v]), of[0], of[1], of[2]);
                w.at[v] = narrow<T>(of[0]);
                r.at[v] = to_bf16(of[0]);
                s0.at[v] = narrow<T>(of[1]);
                s1.at[v] = narrow<T>(of[2]);
            }
            *(Pack<T, V> *)(weight + i) = w;
            if (rounded) *(Pack<bf16, V> *)(rounded + i) = r;
            if (state0) *(Pack<T, V> *)(state0 + i) = s0;
            if (state1) *(Pack<T, V> *)(state1 + i) = s1;
        } else {
#pragma unroll 1
            for (i64 j = i; j < i + V && j < end; j++) {
                float w = widen(weight[j]);
                float s0 = state0 ? widen(state0[j]) : 0, s1 = state1 ? widen(state1[j]) : 0;
                update(widen(gradient[j]), w, s0, s1);
                weight[j] = narrow<T>(w);
                if (rounded) rounded[j] = to_bf16(w);
                if (state0) state0[j] = narrow<T>(s0);
                if (state1) state1[j] = narrow<T>(s1);
            }
        }
    }
}

// The numbers of AdamW: see optimizer.rs.
struct Adam {
    float keep, beta1, one_minus_beta1, beta2, one_minus_beta2, eps, step_size, correction;
};

template <class T>
__device__ void adamw(const Part *parts, int count, const Adam *groups, const Norm *norm) {
    if (norm->broken >= 0) return;
    const Part *part = part_of(parts, count, blockIdx.x);
    Adam p = groups[part->group];
    float clip = norm->clip;
    each_element<T>(part, blockIdx.x, [=](float gradient, float &weight, float &mean, float &square) {
        float g = gradient * clip;
        mean = fmaf(p.one_minus_beta1, g, p.beta1 * mean);
        square = fmaf(p.one_minus_beta2 * g, g, p.beta2 * square);
        float root = sqrtf(square) / p.correction + p.eps;
        weight = fmaf(-p.step_size, mean / root, weight * p.keep);
    });
}
EXPORT adamw_f32(const Part *parts, int count, const Adam *groups, const Norm *norm) {
    adamw<float>(parts, count, groups, norm);
}
EXPORT adamw_bf16(const Part *parts, int count, const Adam *groups, const Norm *norm) {
    adamw<bf16>(parts, count, groups, norm);
}

// The numbers of stochastic gradient descent: see optimizer.rs. `moving`: there is a velocity;
// `first`: it becomes the gradient.
struct Descent {
    float lr, momentum, fresh, ahead, straight, weight_decay;
    int moving, first;
};

template <class T>
__device__ void sgd(const Part *parts, int count, const Descent *groups, const Norm *norm) {
    if (norm->broken >= 0) return;
    const Part *part = part_of(parts, count, blockIdx.x);
    Descent p = groups[part->group];
    float clip = norm->clip;
    each_element<T>(part, blockIdx.x, [=](float gradient, float &weight, float &velocity, float &) {
        float g = fmaf(p.weight_decay, weight, gradient * clip);
        float by = g;
        if (p.moving) {
            float moved = fmaf(p.momentum, velocity, p.fresh * g);
            velocity = p.first ? g : moved;
            by = fmaf(p.ahead, velocity, p.straight * g);
        }
        weight = fmaf(-p.lr, by, weight);
    });
}
EXPORT sgd_f32(const Part *parts, int count, const Descent *groups, const Norm *norm) {
    sgd<float>(parts, count, groups, norm);
}
EXPORT sgd_bf16(const Part *parts, int count, const Descent *groups, const Norm *norm) {
    sgd<bf16>(parts, count, groups, norm);
}
