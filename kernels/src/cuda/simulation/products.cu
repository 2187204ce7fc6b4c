// Products of one warp by instructions alone, for the simulation: what tests hold the instructions against, and the
// kernels that are made of them.
#include "ptx.cuh"

#if __CUDA_ARCH__ >= 800

// d [16, 8] = c + a [16, 8] * b [8, 8], all row-major.
EXPORT product_tf32(const float *a, const float *b, const float *c, float *d) {
    int g = threadIdx.x / 4, t = threadIdx.x % 4;
    u32 own[4];
    float sums[4];
    for (int i = 0; i < 4; i++) {
        int row = g + i % 2 * 8, column = t + i / 2 * 4;
        own[i] = __float_as_uint(a[8 * row + column]);
        sums[i] = c[8 * (g + i / 2 * 8) + 2 * t + i % 2];
    }
    mma_tf32_1688(sums, own, __float_as_uint(b[8 * t + g]), __float_as_uint(b[8 * (t + 4) + g]));
    for (int i = 0; i < 4; i++) d[8 * (g + i / 2 * 8) + 2 * t + i % 2] = sums[i];
}
REGISTER(product_tf32)

// d [16, 8] = a [16, k] * b [k, 8] of f32 numbers in two parts, all of it summed by tensor cores: what
// gemm.cu must not do. k: a multiple of 8.
EXPORT product_long(const float *a, const float *b, float *d, i64 k) {
    int g = threadIdx.x / 4, t = threadIdx.x % 4;
    float sums[4] = {};
    for (i64 first = 0; first < k; first += 8) {
        u32 left[2][4], right[2][2];
        auto part = [](float x, u32 (&to)[2]) {
            to[0] = (__float_as_uint(x) + 0x1000) & 0xffffe000u;
            to[1] = __float_as_uint(x - __uint_as_float(to[0]));
        };
        for (int i = 0; i < 4; i++) {
            u32 two[2];
            part(a[(g + i % 2 * 8) * k + first + t + i / 2 * 4], two);
            left[0][i] = two[0], left[1][i] = two[1];
        }
        for (int i = 0; i < 2; i++) {
            u32 two[2];
            part(b[8 * (first + t + 4 * i) + g], two);
            right[0][i] = two[0], right[1][i] = two[1];
        }
        mma_tf32_1688(sums, left[1], right[0][0], right[0][1]);
        mma_tf32_1688(sums, left[0], right[1][0], right[1][1]);
        mma_tf32_1688(sums, left[0], right[0][0], right[0][1]);
    }
    for (int i = 0; i < 4; i++) d[8 * (g + i / 2 * 8) + 2 * t + i % 2] = sums[i];
}
REGISTER(product_long)

#endif
