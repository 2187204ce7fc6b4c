// Classification losses over rows of logits, as in cross_entropy.rs, with a soft cap of the logits
// (softcap.rs) where there is one. A row is read once for its loss: maximum and sum of exponentials
// are kept up while it passes (M. Milakov, N. Gimelshein, arXiv:1805.02867).
#include "activation.cuh"
#include "half.cuh"
#include "ptx.cuh"

// Threads of a block. A row of many classes has a large one, so that few rows are under way at once
// and what is read for the gradient, after the loss, is still in the cache. A row of few has a warp.
#define WIDE 1024
#define THREADS 256
// Blocks of a multiprocessor, for as many registers as there are then.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define RESIDENT 1
#else
#define RESIDENT 2
#endif
#define BOUNDS(ROW) __launch_bounds__(ROW == 32 ? THREADS : WIDE, RESIDENT)

// How a row is cut: `head` elements, `packs` packs of V, the rest. Head and rest are the `alone`
// elements, of which the i-th is at place(i).
struct Cut {
    int head, packs, alone, packed;

    __device__ __forceinline__ int place(int i) const { return i < head ? i : i + packed; }
};

template <int V, class S, class D>
__device__ __forceinline__ Cut cut(const S *x, const D *y, int n) {
    int head = (int)((V - (u64)x / sizeof(S) % V) % V);
    bool packs = head < n && (u64)(y + head) % (V * sizeof(D)) == 0;
    Cut c;
    c.head = packs ? head : n;
    c.packs = packs ? (n - head) / V : 0;
    c.packed = c.packs * V;
    c.alone = n - c.packed;
    return c;
}

// y = cap * tanh(x / cap), called for the sake of the kernels' size.
__device__ __noinline__ float soft_cap(float x, float cap) { return cap * tanhf(x / cap); }

// That, or x for kernels without a cap.
template <bool CAP> __device__ __forceinline__ float capped(float x, float cap) {
    return CAP ? soft_cap(x, cap) : x;
}

// What has been seen of a row: its largest element, the sum of exp(x - largest), the sum of x.
struct Seen {
    float most, exponentials, total;

    __device__ __forceinline__ void rise(float to) {
        if (to > most) {
            exponentials *= expf(most - to);
            most = to;
        }
    }
    __device__ __forceinline__ void add(float x) {
        // Nothing but -infinity so far: any finite shift avoids infinity minus infinity.
        exponentials += expf(x - (most == -INFINITE ? 0 : most));
        total += x;
    }
};

// ROW: threads that share a row, 32 (of THREADS) or WIDE.
template <int ROW> __device__ __forceinline__ float row_sum(float x) {
    return ROW == 32 ? warp_sum(x) : block_sum<WIDE>(x);
}
template <int ROW> __device__ __forceinline__ float row_max(float x) {
    return ROW == 32 ? warp_max(x) : block_max<WIDE>(x);
}
// The row of this thread.
template <int ROW> __device__ __forceinline__ i64 own_row() {
    return ROW == 32 ? (i64)blockIdx.x * (THREADS / 32) + threadIdx.x / 32 : (i64)blockIdx.x;
}

// Numbers that all rows share.
struct Loss {
    i64 ignore;   // the target of rows that do not count
    float keep;   // 1 - smoothing
    float smooth; // smoothing / classes
    float cap;    // of the logits, for kernels that have one
    int classes;
    int step; // elements from one row to the next; those after the classes get a gradient of 0
};

// dx = gradient of the loss of a row, times `scale`; may be x itself.
template <int ROW, int V, bool CAP, class S, class D>
__device__ __forceinline__ void gradient(const S *x, D *dx, int thread, i64 target, float lse,
                                         float scale, const Loss &p) {
    float at_target = p.keep * scale;
    bool counts = target != p.ignore;
    auto of = [=](float logit, int i) -> D {
        if (!counts) return narrow<D>(0);
        float y = capped<CAP>(logit, p.cap);
        float g = (expf(y - lse) - p.smooth) * scale;
        if (i == target) g -= at_target;
        if (CAP) {
            float t = y / p.cap;
            g *= 1 - t * t;
        }
        return narrow<D>(g);
    };
    Cut c = cut<V>(x, dx, p.classes);
    // Backwards: what was read last is the likeliest to be in the cache.
#pragma unroll 1
    for (int pack = c.packs - 1 - thread; pack >= 0; pack -= ROW) {
        int first = c.head + pack * V;
        Pack<S, V> from = *(const Pack<S, V> *)(x + first);
        Pack<D, V> to;
#pragma unroll
        for (int v = 0; v < V; v++) to.at[v] = of(widen(from.at[v]), first + v);
        *(Pack<D, V> *)(dx + first) = to;
    }
#pragma unroll 1
    for (int i = thread; i < c.alone; i += ROW) {
        int at = c.place(i);
        dx[at] = of(widen(x[at]), at);
    }
    for (int i = p.classes + thread; i < p.step; i += ROW) dx[i] = narrow<D>(0);
}

// losses[r] and lse[r] of logits [rows, step], and, unless it is null, the gradient of the sum of
// the losses, which may overwrite the logits.
template <int ROW, int V, bool CAP, class S, class D>
__device__ void cross_entropy(const S *logits, const i64 *targets, float *losses, float *lse,
                              D *dlogits, i64 rows, const Loss &p) {
    int thread = threadIdx.x % ROW;
    i64 row = own_row<ROW>();
    if (row >= rows) return; // whole warps, or none of the block
    const S *x = logits + row * p.step;
    Seen seen = {-INFINITE, 0, 0};
    Cut c = cut<V>(x, x, p.classes);
#pragma unroll 1
    for (int pack = thread; pack < c.packs; pack += ROW) {
        Pack<S, V> from = *(const Pack<S, V> *)(x + c.head + pack * V);
        float y[V];
        float most = -INFINITE;
#pragma unroll
        for (int v = 0; v < V; v++) {
            y[v] = capped<CAP>(widen(from.at[v]), p.cap);
            most = fmaxf(most, y[v]);
        }
        seen.rise(most);
#pragma unroll
        for (int v = 0; v < V; v++) seen.add(y[v]);
    }
#pragma unroll 1
    for (int i = thread; i < c.alone; i += ROW) {
        float y = capped<CAP>(widen(x[c.place(i)]), p.cap);
        seen.rise(y);
        seen.add(y);
    }

    float most = row_max<ROW>(seen.most);
    float share = seen.most == -INFINITE ? 0 : expf(seen.most - most);
    float sum = row_sum<ROW>(seen.exponentials * share);
    float total = row_sum<ROW>(seen.total);
    float of_row = most + logf(sum);
    i64 target = targets[row];
    if (thread == 0) {
        lse[row] = of_row;
        float loss = 0;
        if (target != p.ignore) {
            loss = of_row - p.keep * capped<CAP>(widen(x[target]), p.cap);
            if (p.smooth != 0) loss -= p.smooth * total;
        }
        losses[row] = loss;
    }
    if (dlogits == nullptr) return;
    // The target's logit has been read before it is overwritten.
    if (ROW == 32)
        __syncwarp();
    else
        __syncthreads();
    gradient<ROW, V, CAP>(x, dlogits + row * p.step, thread, target, of_row, 1, p);
}
#define FORWARD(name, ROW, V, CAP, S, D)                                                           \
    EXPORT BOUNDS(ROW) name(const S *logits, const i64 *targets, float *losses, float *lse,        \
                            D *dlogits, i64 rows, Loss p) {                                        \
        cross_entropy<ROW, V, CAP>(logits, targets, losses, lse, dlogits, rows, p);                \
    }
FORWARD(cross_entropy_f32_f32, WIDE, 4, false, float, float)
FORWARD(cross_entropy_bf16_bf16, WIDE, 4, false, bf16, bf16)
FORWARD(cross_entropy_f32_f32_narrow, 32, 1, false, float, float)
FORWARD(cross_entropy_bf16_bf16_narrow, 32, 1, false, bf16, bf16)
FORWARD(cross_entropy_f32_f32_capped, WIDE, 4, true, float, float)
FORWARD(cross_entropy_bf16_bf16_capped, WIDE, 2, true, bf16, bf16)

// dlogits = the gradient of the losses' sum, times dy[0]; from lse [rows].
template <int ROW, int V, class T>
__device__ void cross_entropy_backward(const T *logits, const i64 *targets, const float *lse,
                                       const float *dy, T *dlogits, i64 rows, const Loss &p) {
    i64 row = own_row<ROW>();
    if (row >= rows) return;
    i64 at = row * p.step;
    gradient<ROW, V, false>(logits + at, dlogits + at, threadIdx.x % ROW, targets[row], lse[row], *dy, p);
}
#define BACKWARD(name, ROW, V, T)                                                                  \
    EXPORT BOUNDS(ROW) name(const T *logits, const i64 *targets, const float *lse,                 \
                            const float *dy, T *dlogits, i64 rows, Loss p) {                       \
        cross_entropy_backward<ROW, V>(logits, targets, lse, dy, dlogits, rows, p);                \
    }
BACKWARD(cross_entropy_backward_f32, WIDE, 4, float)
BACKWARD(cross_entropy_backward_bf16, WIDE, 4, bf16)
BACKWARD(cross_entropy_backward_f32_narrow, 32, 1, float)
BACKWARD(cross_entropy_backward_bf16_narrow, 32, 1, bf16)

// --- The loss of a language model, whose logits come out of a product as f16, less the logit of their
// row's target: what is near that decides about the loss, and keeps its digits.

// relative[r] = x[r] w[target] + bias[target], for targets that count, else 0. x [rows, width], w
// [classes, width]; bias may be null. A warp for each row.
EXPORT target_logits(const bf16 *x, const bf16 *w, const float *bias, const i64 *targets,
                     float *relative, i64 rows, int width, i64 ignore) {
    i64 row = (i64)blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
    if (row >= rows) return;
    i64 target = targets[row];
    float sum = 0;
    if (target != ignore) {
        x += row * width;
        w += target * width;
        int whole = aligned16(x) && aligned16(w) ? width / 8 * 8 : 0, lane = threadIdx.x % 32;
        for (int i = 8 * lane; i < whole; i += 256) {
            Pack<bf16, 8> a = *(const Pack<bf16, 8> *)(x + i), b = *(const Pack<bf16, 8> *)(w + i);
#pragma unroll
            for (int e = 0; e < 8; e++) sum = fmaf(widen(a.at[e]), widen(b.at[e]), sum);
        }
        for (int i = whole + lane; i < width; i += 32) sum = fmaf(widen(x[i]), widen(w[i]), sum);
    }
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) {
        relative[row] = target != ignore && bias ? sum + bias[target] : sum;
    }
}

// Eight logits of a row.
struct __align__(16) Eight {
    u16 at[8];
};

// losses [rows] of logits [rows, step], and unless `keep_logits` the gradient of their sum in their
// place, as bf16. Rows begin on 16-byte boundaries. `kept`: a row fits into shared memory.
template <bool CAP>
__device__ __forceinline__ void relative_loss(u16 *logits, const float *relative, const i64 *targets,
                                              float *losses, const Loss &p, bool keep_logits,
                                              bool kept) {
    DYNAMIC_SHARED(shared);
    i64 row = blockIdx.x;
    i64 target = targets[row];
    bool counts = target != p.ignore;
    Eight *x = (Eight *)(logits + row * p.step), *own = kept ? (Eight *)shared : x;
    int packs = p.step / 8, whole = p.classes / 8, rest = p.classes % 8;
    if (!counts) {
        if (threadIdx.x == 0) losses[row] = 0;
        if (!keep_logits) {
            for (int pack = threadIdx.x; pack < packs; pack += WIDE) x[pack] = Eight();
        }
        return;
    }
    // Without a cap, logits stay relative: the loss does not change if all become larger.
    float zero = CAP ? relative[row] : 0;
    auto logit = [&](u16 bits) { return capped<CAP>(from_half(bits) + zero, p.cap); };

    // The largest, the sum of exponentials and of all, as far as they have passed.
    float most = -INFINITE, sum = 0, total = 0;
    auto add = [&](const float (&y)[8], int count) {
        float above = y[0];
#pragma unroll
        for (int e = 1; e < 8; e++) above = fmaxf(above, y[e]);
        if (above > most) {
            sum *= exp2_fast((most - above) * LOG2_E);
            most = above;
        }
        float less = most * LOG2_E;
#pragma unroll
        for (int e = 0; e < 8; e++) sum += exp2_fast(fmaf(y[e], LOG2_E, -less));
        if (p.smooth != 0) {
#pragma unroll
            for (int e = 0; e < 8; e++) total += e < count ? y[e] : 0;
        }
    };
    // Which pack a thread has follows from its place, so that each reads what it copied itself.
    bool has_rest = rest > 0 && whole % WIDE == (int)threadIdx.x;
    int middle = whole / 2 / WIDE * WIDE;
#if __CUDA_ARCH__ >= 800
    if (kept) {
        for (int pack = threadIdx.x; pack < middle; pack += WIDE) {
            cp_async_16(own + pack, x + pack, true);
        }
        cp_async_commit();
        for (int pack = middle + threadIdx.x; pack < whole + has_rest; pack += WIDE) {
            cp_async_16(own + pack, x + pack, true);
        }
        cp_async_commit();
        cp_async_wait<1>();
    }
    auto second_half = [] { cp_async_wait<0>(); };
#else
    if (kept) {
        for (int pack = threadIdx.x; pack < whole + has_rest; pack += WIDE) own[pack] = x[pack];
    }
    auto second_half = [] {};
#endif
#pragma unroll 1
    for (int pack = threadIdx.x; pack < whole; pack += WIDE) {
        if (pack - (int)threadIdx.x == middle) second_half();
        Eight eight = own[pack];
        float y[8];
#pragma unroll
        for (int e = 0; e < 8; e++) y[e] = logit(eight.at[e]);
        add(y, 8);
    }
    second_half();
    if (has_rest) {
        Eight eight = own[whole];
        float y[8];
#pragma unroll
        for (int e = 0; e < 8; e++) y[e] = e < rest ? logit(eight.at[e]) : -INFINITE;
        add(y, rest);
    }
    float at_target = logit(((const u16 *)x)[target]); // before it is overwritten
    float all = block_max<WIDE>(most);
    sum = block_sum<WIDE>(sum == 0 ? 0 : sum * exp2_fast((most - all) * LOG2_E));
    if (p.smooth != 0) total = block_sum<WIDE>(total);
    float of_row = all + logf(sum);
    if (threadIdx.x == 0) {
        float loss = of_row - p.keep * at_target;
        if (p.smooth != 0) loss -= p.smooth * total;
        losses[row] = loss;
    }
    if (keep_logits) return;

    float less = of_row * LOG2_E;
    auto gradient = [&](const Eight &eight, int pack, int count) {
        Pack<bf16, 8> to;
#pragma unroll
        for (int e = 0; e < 8; e++) {
            float y = logit(eight.at[e]), g = exp2_fast(fmaf(y, LOG2_E, -less)) - p.smooth;
            if (8 * pack + e == (int)target) g -= p.keep;
            if (CAP) {
                float t = y / p.cap;
                g *= 1 - t * t;
            }
            to.at[e] = to_bf16(e < count ? g : 0);
        }
        *(Pack<bf16, 8> *)(x + pack) = to;
    };
#pragma unroll 1
    for (int pack = threadIdx.x; pack < whole; pack += WIDE) gradient(own[pack], pack, 8);
    if (has_rest) gradient(own[whole], whole, rest);
    whole += rest > 0;
    for (int pack = whole + threadIdx.x; pack < packs; pack += WIDE) x[pack] = Eight();
}
#define RELATIVE(name, CAP)                                                                        \
    EXPORT __launch_bounds__(WIDE, CAP ? 1 : RESIDENT)                                             \
        name(u16 *logits, const float *relative, const i64 *targets, float *losses, Loss p,        \
             int keep_logits, int kept) {                                                          \
        relative_loss<CAP>(logits, relative, targets, losses, p, keep_logits, kept);               \
    }
RELATIVE(relative_cross_entropy, false)
RELATIVE(relative_cross_entropy_capped, true)

// y[i] = x[i] * factor[0]; y may be x. Four elements a thread.
template <class D> __device__ void times(const float *x, const float *factor, D *y, i64 count) {
    i64 first = 4 * ((i64)blockIdx.x * blockDim.x + threadIdx.x);
    float by = *factor;
    if (first + 4 <= count && aligned16(x) && aligned16(y)) {
        Pack<float, 4> from = *(const Pack<float, 4> *)(x + first);
        Pack<D, 4> to;
#pragma unroll
        for (int i = 0; i < 4; i++) to.at[i] = narrow<D>(from.at[i] * by);
        *(Pack<D, 4> *)(y + first) = to;
    } else {
        for (i64 i = first; i < first + 4 && i < count; i++) y[i] = narrow<D>(x[i] * by);
    }
}
EXPORT times_f32_f32(const float *x, const float *factor, float *y, i64 count) {
    times(x, factor, y, count);
}
EXPORT times_f32_bf16(const float *x, const float *factor, bf16 *y, i64 count) {
    times(x, factor, y, count);
}

// --- Binary cross-entropy of logits: max(x, 0) - x * t + ln(1 + e^-|x|), and its gradient,
// (sigmoid(x) - t) * dy[0].

template <class T> __device__ void bce(const T *x, const T *targets, float *losses, i64 count) {
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    float logit = widen(x[i]);
    losses[i] = fmaxf(logit, 0) - logit * widen(targets[i]) + log1pf(expf(-fabsf(logit)));
}
template <class T>
__device__ void bce_backward(const T *x, const T *targets, const float *dy, T *dx, i64 count) {
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    float logit = widen(x[i]);
    float small = expf(-fabsf(logit));
    float sigmoid = (logit < 0 ? small : 1) / (1 + small);
    dx[i] = narrow<T>((sigmoid - widen(targets[i])) * *dy);
}
#define BCE(T, name)                                                                               \
    EXPORT bce_##name(const T *x, const T *targets, float *losses, i64 count) {                    \
        bce(x, targets, losses, count);                                                            \
    }                                                                                              \
    EXPORT bce_backward_##name(const T *x, const T *targets, const float *dy, T *dx, i64 count) {  \
        bce_backward(x, targets, dy, dx, count);                                                   \
    }
BCE(float, f32)
BCE(bf16, bf16)
