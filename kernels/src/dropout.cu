// Dropout with a mask that is recomputed, never stored: word for word that of dropout.rs.
#include "pack.cuh"

// y[i] = x[i] scale where word i of the key's stream has at least `from` in its top 24 bits, else 0.
// y may be x.
template <class T>
__device__ void dropout(const T *x, T *y, i64 count, u32 key0, u32 key1, u32 from, float scale) {
    bool wide = aligned16(x) && aligned16(y);
    stream<Wide<T>::N>(
        count, wide, [&](auto n, i64 first) { return load<COUNT(n)>(x + first); },
        [&](auto n, i64 first, auto &at) {
            constexpr int N = COUNT(n), FOUR = N < 4 ? N : 4; // of the four words of a counter
            float result[N];
#pragma unroll
            for (int e = 0; e < N; e += FOUR) {
                Words words = stream_words(key0, key1, (u64)(first + e) / 4);
                if (N < 4) {
#pragma unroll
                    for (int w = 1; w < 4; w++)
                        if (first % 4 == w) words.at[0] = words.at[w];
                }
#pragma unroll
                for (int w = 0; w < FOUR; w++)
                    result[e + w] = words.at[w] >> 8 >= from ? at[e + w] * scale : 0.f;
            }
            at.put(result);
            store(y + first, at);
        });
}

EXPORT dropout_f32(const float *x, float *y, i64 count, u32 key0, u32 key1, u32 from, float scale) {
    dropout(x, y, count, key0, key1, from, scale);
}
EXPORT dropout_bf16(const bf16 *x, bf16 *y, i64 count, u32 key0, u32 key1, u32 from, float scale) {
    dropout(x, y, count, key0, key1, from, scale);
}
