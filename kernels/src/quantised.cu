// Codes of weights to numbers, as quantised/ has them: one product with one rounding for an element, and for NF4 one sum
// for its block, so that f32 has the bits that it has on the CPU, and bf16 is that rounded to nearest.
#include "pack.cuh"

constexpr int BLOCK = 64;  // elements that share a magnitude
constexpr int GROUP = 256; // blocks whose magnitudes are quantised together
constexpr int EIGHT = 8;   // elements of a thread at a time: of one block, and of whole bytes

// What codes stand for, as table.rs has it.
struct Tables {
    float nf4[16];      // of elements
    float dynamic[256]; // of magnitudes
};

// Where the parts of a matrix' bytes begin.
struct Coded {
    const u8 *bytes;
    i64 absmax, codes;
};

// Eight codes as they lie in memory: a word of NF4, the first element in the upper half of the first byte; two of int8.
template <int WORDS> struct __align__(4 * WORDS) Codes {
    u32 words[WORDS];
};

struct Nf4 {
    static constexpr int WORDS = 1;
    const Tables &tables;

    __device__ __forceinline__ float scale(const Coded &x, i64 block) const {
        float distance = tables.dynamic[x.bytes[x.absmax + block]];
        const float *head = (const float *)x.bytes; // the mean of all magnitudes, then those of groups
        return __fadd_rn(__fmul_rn(distance, head[1 + block / GROUP]), head[0]);
    }
    __device__ __forceinline__ float value(u32 code) const { return tables.nf4[code]; }
    __device__ __forceinline__ float value(const Codes<1> &codes, int i) const {
        return value(codes.words[0] >> (i / 2 * 8 + (i % 2 ? 0 : 4)) & 15);
    }
    __device__ __forceinline__ float value(const Coded &x, i64 element) const {
        return value(x.bytes[x.codes + element / 2] >> (element % 2 ? 0 : 4) & 15);
    }
};

struct Int8 {
    static constexpr int WORDS = 2;
    const Tables &tables;

    __device__ __forceinline__ float scale(const Coded &x, i64 block) const {
        return __fdiv_rn(((const float *)(x.bytes + x.absmax))[block], 127.f);
    }
    __device__ __forceinline__ float value(const Codes<2> &codes, int i) const {
        return (float)((int)(codes.words[i / 4] << (24 - i % 4 * 8)) >> 24);
    }
    __device__ __forceinline__ float value(const Coded &x, i64 element) const {
        return (float)(signed char)x.bytes[x.codes + element];
    }
};

template <int WORDS> struct Found {
    Codes<WORDS> codes;
    float scale;
};

// y[i] = element i. The tables wait in shared memory: threads of a warp look up different places.
template <class Format, class T>
__device__ __forceinline__ void dequantise(const Coded &x, const Tables &from, T *y, i64 count) {
    __shared__ Tables tables;
    const float *words = (const float *)&from;
    for (int i = threadIdx.x; i < (int)(sizeof(Tables) / 4); i += blockDim.x) {
        ((float *)&tables)[i] = words[i];
    }
    __syncthreads();
    Format format{tables};
    typedef Codes<Format::WORDS> Eight;
    const Eight *codes = (const Eight *)(x.bytes + x.codes);
    i64 eights = count / EIGHT, threads = (i64)gridDim.x * blockDim.x;
    i64 thread = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    auto find = [&](i64 i) {
        Found<Format::WORDS> found;
        found.codes = codes[i];
        found.scale = format.scale(x, i / (BLOCK / EIGHT));
        return found;
    };
    if (thread < eights) {
        // The next ones are under way while those before are written.
        auto next = find(thread);
        for (i64 i = thread; i < eights; i += threads) {
            auto now = next;
            if (i + threads < eights) next = find(i + threads);
            float values[EIGHT];
#pragma unroll
            for (int e = 0; e < EIGHT; e++) {
                values[e] = __fmul_rn(format.value(now.codes, e), now.scale);
            }
            Elements<T, EIGHT> out;
            out.put(values);
            typedef typename Wide<T>::Type Vector;
            Vector *to = (Vector *)(y + EIGHT * i);
#pragma unroll
            for (int v = 0; v < EIGHT / Wide<T>::N; v++) to[v] = ((const Vector *)&out)[v];
        }
    }
    // What is left of a last block.
    for (i64 i = EIGHT * eights + thread; i < count; i += threads) {
        y[i] = narrow<T>(__fmul_rn(format.value(x, i), format.scale(x, i / BLOCK)));
    }
}

#define KERNELS(Format, format, T, name)                                                           \
    EXPORT __launch_bounds__(256) dequantise_##format##_##name(                                    \
        Coded x, const __grid_constant__ Tables tables, T *y, i64 count) {                         \
        dequantise<Format>(x, tables, y, count);                                                   \
    }
KERNELS(Nf4, nf4, float, f32)
KERNELS(Nf4, nf4, bf16, bf16)
KERNELS(Int8, int8, float, f32)
KERNELS(Int8, int8, bf16, bf16)
