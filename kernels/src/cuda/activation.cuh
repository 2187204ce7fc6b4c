// Activation functions with their slopes, as kernels apply them on their way. The type T is the one
// that arguments and results are stored in: beside bf16, whose numbers are 2^-8 apart, the tail of
// the normal distribution is computed to 3e-5, beside f32 to 3e-7 of its value.
//
// An activation that is fused into a kernel must be applied to the argument as it is stored, by
// `activate` of that type: what is rebuilt from the stored argument has then the same bits.
#pragma once

#include "common.cuh"

// Numbered as in activation.rs.
enum Activation { GELU, GELU_TANH, RELU, TANH, SILU };

#ifndef GRAFT_SIMULATION
// 2^x to 2 ulp; results below the smallest normal number are 0.
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// 1 / x to 1 ulp; below the smallest normal number, x counts as 0, and a result is 0.
__device__ __forceinline__ float reciprocal_fast(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
#endif

#define LOG2_E 1.44269504f

// What value and slope of a function at x have in common.
struct Parts {
    float gate, other;
};

// The normal distribution function at x and its density there. With t = |x| and u = 1 / (1 + t/2),
// the tail is e^(-t^2/2) u P(1 - u): P is a polynomial, fitted by least squares with Lawson's
// reweighting, as in math.rs.
template <class T> __device__ __forceinline__ Parts normal_parts(float x) {
    float t = fminf(fabsf(x), 14.5f); // NaN goes away: callers multiply by x
    float u = reciprocal_fast(fmaf(0.5f, t, 1.f));
    float v = 0.5f * t * u;
    float p;
    if (sizeof(T) == 2) {
        p = -0.0782152191f;
        p = fmaf(p, v, 0.180227041f);
        p = fmaf(p, v, -0.0217389595f);
        p = fmaf(p, v, -0.0816509128f);
        p = fmaf(p, v, -0.299016953f);
        p = fmaf(p, v, 0.50001502f);
    } else {
        p = -0.039068032f;
        p = fmaf(p, v, 0.20321552f);
        p = fmaf(p, v, -0.3822643f);
        p = fmaf(p, v, 0.34272692f);
        p = fmaf(p, v, -0.20518877f);
        p = fmaf(p, v, 0.091413245f);
        p = fmaf(p, v, 0.03806577f);
        p = fmaf(p, v, 0.04434688f);
        p = fmaf(p, v, -0.09588513f);
        p = fmaf(p, v, -0.29788172f);
        p = fmaf(p, v, 0.5f);
    }
    float bell = exp2_fast(t * t * (-0.5f * LOG2_E));
    float tail = bell * (u * p);
    Parts parts;
    parts.gate = x > 0.f ? 1.f - tail : tail;
    parts.other = bell * 0.3989423f;
    return parts;
}

// 1 / (1 + e^-x), and 1 minus that without the cancellation.
__device__ __forceinline__ Parts logistic_parts(float x) {
    float z = exp2_fast(-LOG2_E * fabsf(x));
    float s = reciprocal_fast(1.f + z);
    Parts parts;
    parts.gate = x < 0.f ? z * s : s;
    parts.other = x < 0.f ? s : z * s;
    return parts;
}

// x times the normal distribution function: D. Hendrycks, K. Gimpel, "Gaussian Error Linear Units".
struct Gelu {
    template <class T> static __device__ __forceinline__ Parts parts(float x) {
        return normal_parts<T>(x);
    }
    static __device__ __forceinline__ float value(float x, Parts p) { return x * p.gate; }
    static __device__ __forceinline__ float slope(float x, Parts p) {
        return fmaf(x, p.other, p.gate);
    }
};

// The same by a hyperbolic tangent: (1 + tanh(u)) / 2 = logistic(2u) with u = sqrt(2/pi) (x +
// 0.044715 x^3).
struct GeluTanh {
    template <class T> static __device__ __forceinline__ Parts parts(float x) {
        return logistic_parts(fmaf(0.0713548163f * x, x * x, 1.59576912f * x));
    }
    static __device__ __forceinline__ float value(float x, Parts p) { return x * p.gate; }
    static __device__ __forceinline__ float slope(float x, Parts p) {
        // Beyond |x| = 1000 the product is 0; the square must not become infinite.
        float square = fminf(x * x, 1e6f);
        return fmaf(x * p.gate * p.other, fmaf(0.214064449f, square, 1.59576912f), p.gate);
    }
};

// x logistic(x)
struct Silu {
    template <class T> static __device__ __forceinline__ Parts parts(float x) {
        return logistic_parts(x);
    }
    static __device__ __forceinline__ float value(float x, Parts p) { return x * p.gate; }
    static __device__ __forceinline__ float slope(float x, Parts p) {
        return fmaf(x * p.gate, p.other, p.gate);
    }
};

// NaN stays NaN.
struct Relu {
    template <class T> static __device__ __forceinline__ Parts parts(float) { return Parts(); }
    static __device__ __forceinline__ float value(float x, Parts) { return x < 0.f ? 0.f : x; }
    static __device__ __forceinline__ float slope(float x, Parts) { return x > 0.f ? 1.f : 0.f; }
};

struct Tanh {
    template <class T> static __device__ __forceinline__ Parts parts(float x) {
        Parts parts;
        parts.gate = tanhf(x);
        return parts;
    }
    static __device__ __forceinline__ float value(float, Parts p) { return p.gate; }
    static __device__ __forceinline__ float slope(float, Parts p) {
        return fmaf(-p.gate, p.gate, 1.f);
    }
};

// The function of a kind at x, stored as T.
template <class T> __device__ __forceinline__ float activate(int kind, float x) {
    switch (kind) {
    case GELU: return Gelu::value(x, Gelu::parts<T>(x));
    case GELU_TANH: return GeluTanh::value(x, GeluTanh::parts<T>(x));
    case RELU: return Relu::value(x, Parts());
    case TANH: return tanhf(x);
    default: return Silu::value(x, Silu::parts<T>(x));
    }
}
