// Attention without tensor cores: exact f32, and bf16 for devices, head sizes and layouts that the
// tensor cores' kernels do not take. The same three passes over the same blocks: 16 I rows of one
// side to a block of threads (queries, or keys for their gradients), which run over the rows of the
// other side, C at a time. Of a tile of 16 I x C scores a thread has I rows and every eighth column.
#include "attention.cuh"

#define THREADS 128

// Elements in memory: f32, or bf16 if `narrow`.
struct Elements {
    void *at;
    bool narrow;

    __device__ __forceinline__ float get(i64 i) const {
        return narrow ? widen(((const bf16 *)at)[i]) : ((const float *)at)[i];
    }
    __device__ __forceinline__ void set(i64 i, float x) const {
        if (narrow) ((bf16 *)at)[i] = to_bf16(x);
        else ((float *)at)[i] = x;
    }
};

template <int D> struct Pitch {
    // Eight rows of one column of four words lie in different banks.
    static constexpr int AT = D + 4;
};

// Rows `first` .. `first + rows` as f32, zeros for rows from `end` on and dimensions from `dims` on.
template <int D>
__device__ __forceinline__ void load_rows(float *tile, Elements x, i64 base, i64 stride, int first,
                                          int rows, int end, int dims) {
#pragma unroll 2
    for (int i = threadIdx.x; i < rows * D; i += THREADS) {
        int row = i / D, d = i % D;
        bool valid = first + row < end && d < dims;
        tile[row * Pitch<D>::AT + d] = valid ? x.get(base + (first + row) * stride + d) : 0;
    }
}

// s[i][j] = own[I * (thread / 8) + i] . other[thread % 8 + 8 j]
template <int D, int I, int J>
__device__ __forceinline__ void products(float (&s)[I][J], const float *own, const float *other,
                                         int dims) {
    own += threadIdx.x / 8 * I * Pitch<D>::AT;
    other += threadIdx.x % 8 * Pitch<D>::AT;
#pragma unroll
    for (int i = 0; i < I; i++)
#pragma unroll
        for (int j = 0; j < J; j++) s[i][j] = 0;
#pragma unroll 2
    for (int d = 0; d < dims; d += 4) {
        Pack<float, 4> a[I], b[J];
#pragma unroll
        for (int i = 0; i < I; i++) a[i] = *(const Pack<float, 4> *)(own + i * Pitch<D>::AT + d);
#pragma unroll
        for (int j = 0; j < J; j++)
            b[j] = *(const Pack<float, 4> *)(other + 8 * j * Pitch<D>::AT + d);
#pragma unroll
        for (int e = 0; e < 4; e++)
#pragma unroll
            for (int i = 0; i < I; i++)
#pragma unroll
                for (int j = 0; j < J; j++) s[i][j] = fmaf(a[i].at[e], b[j].at[e], s[i][j]);
    }
}

// Sums of I rows: dimension 32 n + 4 (thread % 8) + e.
template <int D, int I> struct Sums {
    float at[I][D / 32][4];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < I; i++) scale(i, 0);
    }

    __device__ __forceinline__ void scale(int i, float by) {
#pragma unroll
        for (int n = 0; n < D / 32; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) at[i][n][e] = by == 0 ? 0 : at[i][n][e] * by;
    }

    // += weights * other. The weights pass through `tile`, [16 I, C + 1]: a row of it is written and
    // read by one warp alone.
    template <int J>
    __device__ __forceinline__ void add(float *tile, const float (&weights)[I][J],
                                        const float *other, int dims) {
        constexpr int C = 8 * J;
        tile += threadIdx.x / 8 * I * (C + 1);
        int x = threadIdx.x % 8;
        __syncwarp(); // the weights before these have been read
#pragma unroll
        for (int i = 0; i < I; i++)
#pragma unroll
            for (int j = 0; j < J; j++) tile[i * (C + 1) + x + 8 * j] = weights[i][j];
        __syncwarp();
#pragma unroll 4
        for (int c = 0; c < C; c++) {
            float w[I];
#pragma unroll
            for (int i = 0; i < I; i++) w[i] = tile[i * (C + 1) + c];
#pragma unroll
            for (int n = 0; n < D / 32; n++) {
                if (32 * n >= dims) continue;
                Pack<float, 4> y = *(const Pack<float, 4> *)(other + c * Pitch<D>::AT + 32 * n + 4 * x);
#pragma unroll
                for (int i = 0; i < I; i++)
#pragma unroll
                    for (int e = 0; e < 4; e++) at[i][n][e] = fmaf(w[i], y.at[e], at[i][n][e]);
            }
        }
    }

    __device__ __forceinline__ void store(int i, float by, Elements y, i64 base, int dims) const {
#pragma unroll
        for (int n = 0; n < D / 32; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int d = 32 * n + 4 * (threadIdx.x % 8) + e;
                if (d < dims) y.set(base + d, at[i][n][e] * by);
            }
    }
};

// Bit J i + j: whether the weight of query token + i i_token + j j_token and key + i i_key + j j_key is
// kept.
template <int J, int I>
__device__ __forceinline__ u32 kept(const Attention &p, u32 token, int i_token, int j_token, u32 key,
                                    int i_key, int j_key, int head) {
    if (p.keep == 0) return ~0u;
    u32 bits = 0;
#pragma unroll 1
    for (int n = 0; n < I * J; n++) {
        int i = n / J, j = n % J;
        u32 is = is_kept(p, key + i * i_key + j * j_key, token + i * i_token + j * j_token, head);
        bits |= is << n;
    }
    return bits;
}

template <int D, int I, int J>
__device__ __forceinline__ void forward(Elements q, Elements k, Elements v, i64 q_stride,
                                        i64 k_stride, i64 v_stride, const i64 *offsets,
                                        const i64 *starts, const i64 *lengths, Elements out,
                                        float *lse, i64 tokens, const Attention &p) {
    constexpr int ROWS = 16 * I, C = 8 * J;
    DYNAMIC_SHARED(shared);
    float *own = (float *)shared;                  // [ROWS, D]
    float *others = own + ROWS * Pitch<D>::AT;     // [C, D]: keys, then values
    float *tile = others + C * Pitch<D>::AT;       // [ROWS, C + 1]

    Place here = place(p, offsets, p.heads);
    int len = here.len, first = here.block * ROWS;
    if (first >= len) return;
    i64 q_at = here.start * q_stride + (i64)here.head * p.dims;
    Kept keys = kept_keys(here, starts, lengths);
    i64 k_at = keys.start * k_stride + (i64)(here.head / p.group) * p.dims;
    i64 v_at = keys.start * v_stride + (i64)(here.head / p.group) * p.dims;
    Span seen = keys_of(p, first + keys.shift, min(first + ROWS, len) + keys.shift, keys.len);
    load_rows<D>(own, q, q_at, q_stride, first, ROWS, len, p.dims);

    int row = first + threadIdx.x / 8 * I, x = threadIdx.x % 8;
    float most[I], total[I];
    Sums<D, I> sums;
    sums.clear();
#pragma unroll
    for (int i = 0; i < I; i++) most[i] = -INFINITE, total[i] = 0;
    for (int block = seen.from; block < seen.to; block += C) {
        __syncthreads();
        load_rows<D>(others, k, k_at, k_stride, block, C, keys.len, p.dims);
        __syncthreads();
        float s[I][J];
        products<D>(s, own, others, p.dims);
        __syncthreads();
        load_rows<D>(others, v, v_at, v_stride, block, C, keys.len, p.dims);
        u32 bits = kept<J, I>(p, (u32)here.start + row, 1, 0, block + x, 0, 8, here.head);
#pragma unroll
        for (int i = 0; i < I; i++) {
            float best = most[i];
#pragma unroll
            for (int j = 0; j < J; j++) {
                s[i][j] = p.cap > 0 ? p.cap * tanhf(s[i][j] * inside_cap(p)) : s[i][j] * p.scale;
                if (!visible(p, row + i + keys.shift, block + x + 8 * j, keys.len)) s[i][j] = -INFINITE;
                best = fmaxf(best, s[i][j]);
            }
#pragma unroll
            for (int lane = 1; lane < 8; lane *= 2)
                best = fmaxf(best, __shfl_xor_sync(0xffffffffu, best, lane));
            // No visible key so far: any finite shift gives weights of 0 and not NaN.
            float shift = best == -INFINITE ? 0 : best;
            float shrink = expf(most[i] - shift), sum = 0;
            most[i] = best;
#pragma unroll
            for (int j = 0; j < J; j++) {
                s[i][j] = expf(s[i][j] - shift);
                sum += s[i][j];
                if (!(bits >> (J * i + j) & 1)) s[i][j] = 0;
            }
            total[i] = fmaf(total[i], shrink, sum);
            sums.scale(i, shrink);
        }
        __syncthreads();
        sums.add(tile, s, others, p.dims);
    }
#pragma unroll
    for (int i = 0; i < I; i++) {
        float sum = total[i];
#pragma unroll
        for (int lane = 1; lane < 8; lane *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lane);
        if (row + i >= len) continue;
        i64 token = here.start + row + i;
        if (lse && x == 0) lse[here.head * tokens + token] = most[i] + logf(sum);
        sums.store(i, p.kept / sum, out, (token * p.heads + here.head) * p.dims, p.dims);
    }
}

// From the product of a query and a key and that of the gradient of the output and the value: the
// weight behind the dropout, in `s`, and the gradient of the score, short of the scale, in `dp`.
__device__ __forceinline__ void gradient(const Attention &p, float &s, float &dp, float lse,
                                         float dot, bool seen, bool kept) {
    float slope = 1;
    if (p.cap > 0) {
        float t = tanhf(s * inside_cap(p));
        slope = 1 - t * t;
        s = p.cap * t;
    } else {
        s *= p.scale;
    }
    float weight = seen ? expf(s - lse) : 0, grow = kept ? p.kept : 0;
    s = weight * grow;
    dp = weight * (dp * grow - dot) * slope;
}

template <int D, int I, int J>
__device__ __forceinline__ void gradient_of_keys(Elements q, Elements k, Elements v, i64 q_stride,
                                                 i64 k_stride, i64 v_stride, const i64 *offsets,
                                                 Elements dout, const float *lse,
                                                 const float *dots, Elements dk, Elements dv, i64 tokens,
                                                 const Attention &p) {
    constexpr int ROWS = 16 * I, C = 8 * J;
    DYNAMIC_SHARED(shared);
    float *keys = (float *)shared;                  // [ROWS, D]
    float *values = keys + ROWS * Pitch<D>::AT;     // [ROWS, D]
    float *queries = values + ROWS * Pitch<D>::AT;  // [C, D]
    float *douts = queries + C * Pitch<D>::AT;      // [C, D]
    float *tile = douts + C * Pitch<D>::AT;         // [ROWS, C + 1]

    Place here = place(p, offsets, p.heads / p.group);
    int len = here.len, first = here.block * ROWS;
    if (first >= len) return;
    i64 start = here.start, width = (i64)p.heads * p.dims;
    i64 k_at = start * k_stride + (i64)here.head * p.dims;
    i64 v_at = start * v_stride + (i64)here.head * p.dims;
    Span seen = queries_of(p, first, min(first + ROWS, len), len);
    load_rows<D>(keys, k, k_at, k_stride, first, ROWS, len, p.dims);
    load_rows<D>(values, v, v_at, v_stride, first, ROWS, len, p.dims);

    int row = first + threadIdx.x / 8 * I, x = threadIdx.x % 8;
    Sums<D, I> dks, dvs;
    dks.clear();
    dvs.clear();
    for (int head = here.head * p.group; head < (here.head + 1) * p.group; head++) {
        for (int block = seen.from; block < seen.to; block += C) {
            __syncthreads();
            load_rows<D>(queries, q, start * q_stride + (i64)head * p.dims, q_stride, block, C, len, p.dims);
            load_rows<D>(douts, dout, start * width + (i64)head * p.dims, width, block, C, len, p.dims);
            __syncthreads();
            float s[I][J], dp[I][J];
            products<D>(s, keys, queries, p.dims);
            products<D>(dp, values, douts, p.dims);
            u32 bits = kept<J, I>(p, (u32)start + block + x, 0, 8, row, 1, 0, head);
#pragma unroll
            for (int j = 0; j < J; j++) {
                int query = block + x + 8 * j;
                i64 at = head * tokens + start + min(query, len - 1);
#pragma unroll
                for (int i = 0; i < I; i++)
                    gradient(p, s[i][j], dp[i][j], lse[at], dots[at],
                             query < len && visible(p, query, row + i, len),
                             bits >> (J * i + j) & 1);
            }
            dvs.add(tile, s, douts, p.dims);
            dks.add(tile, dp, queries, p.dims);
        }
    }
#pragma unroll
    for (int i = 0; i < I; i++) {
        if (row + i >= len) continue;
        i64 to = ((start + row + i) * (p.heads / p.group) + here.head) * p.dims;
        if (dk.at) dks.store(i, p.scale, dk, to, p.dims);
        if (dv.at) dvs.store(i, 1, dv, to, p.dims);
    }
}

template <int D, int I, int J>
__device__ __forceinline__ void gradient_of_queries(Elements q, Elements k, Elements v,
                                                    i64 q_stride, i64 k_stride, i64 v_stride,
                                                    const i64 *offsets, Elements dout,
                                                    const float *lse, const float *dots, Elements dq,
                                                    i64 tokens, const Attention &p) {
    constexpr int ROWS = 16 * I, C = 8 * J;
    DYNAMIC_SHARED(shared);
    float *own = (float *)shared;                // [ROWS, D]
    float *grads = own + ROWS * Pitch<D>::AT;    // [ROWS, D]
    float *keys = grads + ROWS * Pitch<D>::AT;   // [C, D]
    float *values = keys + C * Pitch<D>::AT;     // [C, D]
    float *tile = values + C * Pitch<D>::AT;     // [ROWS, C + 1]

    Place here = place(p, offsets, p.heads);
    int len = here.len, first = here.block * ROWS;
    if (first >= len) return;
    i64 start = here.start, width = (i64)p.heads * p.dims;
    i64 q_at = start * q_stride + (i64)here.head * p.dims;
    i64 dout_at = start * width + (i64)here.head * p.dims;
    i64 k_at = start * k_stride + (i64)(here.head / p.group) * p.dims;
    i64 v_at = start * v_stride + (i64)(here.head / p.group) * p.dims;
    Span seen = keys_of(p, first, min(first + ROWS, len), len);
    load_rows<D>(own, q, q_at, q_stride, first, ROWS, len, p.dims);
    load_rows<D>(grads, dout, dout_at, width, first, ROWS, len, p.dims);

    int row = first + threadIdx.x / 8 * I, x = threadIdx.x % 8;
    Sums<D, I> sums;
    sums.clear();
    for (int block = seen.from; block < seen.to; block += C) {
        __syncthreads();
        load_rows<D>(keys, k, k_at, k_stride, block, C, len, p.dims);
        load_rows<D>(values, v, v_at, v_stride, block, C, len, p.dims);
        __syncthreads();
        float s[I][J], dp[I][J];
        products<D>(s, own, keys, p.dims);
        products<D>(dp, grads, values, p.dims);
        u32 bits = kept<J, I>(p, (u32)start + row, 1, 0, block + x, 0, 8, here.head);
#pragma unroll
        for (int i = 0; i < I; i++) {
            i64 at = here.head * tokens + start + min(row + i, len - 1);
#pragma unroll
            for (int j = 0; j < J; j++)
                gradient(p, s[i][j], dp[i][j], lse[at], dots[at],
                         visible(p, row + i, block + x + 8 * j, len), bits >> (J * i + j) & 1);
        }
        sums.add(tile, dp, keys, p.dims);
    }
#pragma unroll
    for (int i = 0; i < I; i++)
        if (row + i < len)
            sums.store(i, p.scale, dq, ((start + row + i) * p.heads + here.head) * p.dims, p.dims);
}

// dots[head, token] = the sum over the head's dimensions of out * dout; a warp each.
template <class T>
__device__ __forceinline__ void dots(const T *out, const T *dout, float *dots, i64 tokens,
                                     int heads, int dims) {
    i64 number = ((i64)blockIdx.x * blockDim.x + threadIdx.x) / 32;
    if (number >= tokens * heads) return;
    i64 token = number / heads, head = number % heads;
    out += number * dims;
    dout += number * dims;
    float sum = 0;
    for (int d = threadIdx.x % 32; d < dims; d += 32) sum = fmaf(widen(out[d]), widen(dout[d]), sum);
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) dots[head * tokens + token] = sum;
}
EXPORT attention_dots_f32(const float *out, const float *dout, float *y, i64 tokens, int heads,
                          int dims) {
    dots(out, dout, y, tokens, heads, dims);
}
EXPORT attention_dots_bf16(const bf16 *out, const bf16 *dout, float *y, i64 tokens, int heads,
                           int dims) {
    dots(out, dout, y, tokens, heads, dims);
}

#define SIMT(D, I, J)                                                                               \
    EXPORT __launch_bounds__(THREADS, 2) attention_simt_##D(                                           \
        void *q, void *k, void *v, i64 q_stride, i64 k_stride, i64 v_stride, const i64 *offsets,    \
        const i64 *starts, const i64 *lengths, void *out, float *lse, i64 tokens, int narrow,       \
        Attention p) {                                                                              \
        bool is = narrow;                                                                           \
        forward<D, I, J>({q, is}, {k, is}, {v, is}, q_stride, k_stride, v_stride, offsets, starts,  \
                         lengths, {out, is}, lse, tokens, p);                                       \
    }                                                                                               \
    EXPORT __launch_bounds__(THREADS, 2) attention_keys_simt_##D(                                      \
        void *q, void *k, void *v, i64 q_stride, i64 k_stride, i64 v_stride, const i64 *offsets,    \
        void *dout, const float *lse, const float *dots, void *dk, void *dv, i64 tokens,            \
        int narrow, Attention p) {                                                                  \
        bool is = narrow;                                                                           \
        gradient_of_keys<D, I, J>({q, is}, {k, is}, {v, is}, q_stride, k_stride, v_stride, offsets, \
                                  {dout, is}, lse, dots, {dk, is}, {dv, is}, tokens, p);            \
    }                                                                                               \
    EXPORT __launch_bounds__(THREADS, 2) attention_queries_simt_##D(                                   \
        void *q, void *k, void *v, i64 q_stride, i64 k_stride, i64 v_stride, const i64 *offsets,    \
        void *dout, const float *lse, const float *dots, void *dq, i64 tokens, int narrow,          \
        Attention p) {                                                                              \
        bool is = narrow;                                                                           \
        gradient_of_queries<D, I, J>({q, is}, {k, is}, {v, is}, q_stride, k_stride, v_stride,       \
                                     offsets, {dout, is}, lse, dots, {dq, is}, tokens, p);          \
    }
SIMT(128, 2, 2)
SIMT(256, 1, 1)
