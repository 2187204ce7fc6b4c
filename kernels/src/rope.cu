// Rotary position embedding.
#include "pack.cuh"

// Turns each head's first `rotary` dimensions by its token's angles and copies the others. x, y
// [tokens, heads * head]; cos, sin [positions, rotary / 2]; positions [tokens]. Pair i is dimensions
// (2i, 2i + 1) if `interleaved`, else (i, i + rotary / 2). `sign` is -1 to turn back.
//
// A thread has N pairs, or N dimensions that are copied; rotary / 2 and head are multiples of N, and
// everything can be read that many elements at a time.
template <class T, int N>
__device__ void rope(const T *x, const float *cos, const float *sin, const i64 *positions, T *y,
                     i64 tokens, int heads, int head, int rotary, bool interleaved, float sign) {
    int half = rotary / 2, turned = half / N;
    u32 each = turned + (head - rotary) / N; // threads of a head
    i64 item = (i64)blockIdx.x * blockDim.x + threadIdx.x, rest, token;
    u32 part, h;
    divide(item, each, rest, part);
    divide(rest, heads, token, h);
    if (token >= tokens) return;
    i64 start = (token * heads + h) * head;
    if (part >= turned) {
        i64 at = start + rotary + (i64)(part - turned) * N;
        store(y + at, load<N>(x + at));
        return;
    }
    i64 at = start + (interleaved ? 2 * N : N) * part, other = at + (interleaved ? N : half);
    Elements<T, N> p = load<N>(x + at), q = load<N>(x + other);
    constexpr int F = N < 4 ? N : 4; // floats of 16 bytes
    i64 angle = positions[token] * half + part * N;
    float c[N], s[N];
#pragma unroll
    for (int n = 0; n < N; n += F) {
        Elements<float, F> cs = load<F>(cos + angle + n), sn = load<F>(sin + angle + n);
#pragma unroll
        for (int e = 0; e < F; e++) {
            c[n + e] = cs[e];
            s[n + e] = sn[e] * sign;
        }
    }
    float low[N], high[N];
    if (interleaved) {
        // Pair i is elements 2i and 2i + 1 of the two in a row.
        float all[2 * N];
#pragma unroll
        for (int e = 0; e < N; e++) {
            all[e] = p[e];
            all[N + e] = q[e];
        }
#pragma unroll
        for (int i = 0; i < N; i++) {
            float a = all[2 * i], b = all[2 * i + 1];
            all[2 * i] = a * c[i] - b * s[i];
            all[2 * i + 1] = b * c[i] + a * s[i];
        }
#pragma unroll
        for (int e = 0; e < N; e++) {
            low[e] = all[e];
            high[e] = all[N + e];
        }
    } else {
#pragma unroll
        for (int i = 0; i < N; i++) {
            low[i] = p[i] * c[i] - q[i] * s[i];
            high[i] = q[i] * c[i] + p[i] * s[i];
        }
    }
    p.put(low);
    q.put(high);
    store(y + at, p);
    store(y + other, q);
}

#define KERNELS(T, name)                                                                           \
    EXPORT rope_##name(const T *x, const float *cos, const float *sin, const i64 *positions, T *y, \
                       i64 tokens, int heads, int head, int rotary, int interleaved, float sign) { \
        rope<T, Wide<T>::N>(x, cos, sin, positions, y, tokens, heads, head, rotary, interleaved,   \
                            sign);                                                                 \
    }                                                                                              \
    EXPORT rope_pairs_##name(const T *x, const float *cos, const float *sin, const i64 *positions, \
                             T *y, i64 tokens, int heads, int head, int rotary, int interleaved,   \
                             float sign) {                                                         \
        rope<T, 1>(x, cos, sin, positions, y, tokens, heads, head, rotary, interleaved, sign);     \
    }
KERNELS(float, f32)
KERNELS(bf16, bf16)
