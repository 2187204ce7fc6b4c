// Numbers of 16 bits with five of exponent (f16), which no tensor has: logits less one of their row, on
// their way from a product to the loss.
#pragma once

#include "common.cuh"

#ifndef GRAFT_SIMULATION

// To nearest, ties to even; at most 65504 in size; NaN stays NaN.
__device__ __forceinline__ u16 to_half(float x) {
    u16 y;
    x = x > 65504.f ? 65504.f : x < -65504.f ? -65504.f : x;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}

// Two of them side by side, `low` in the low half.
__device__ __forceinline__ u32 pack_half(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    u32 y;
    asm("{\n"
        ".reg .f32 l, h;\n"
        "min.NaN.f32 l, %1, 0f477FE000;\n"
        "min.NaN.f32 h, %2, 0f477FE000;\n"
        "max.NaN.f32 l, l, 0fC77FE000;\n"
        "max.NaN.f32 h, h, 0fC77FE000;\n"
        "cvt.rn.f16x2.f32 %0, h, l;\n"
        "}"
        : "=r"(y)
        : "f"(low), "f"(high));
    return y;
#else
    return (u32)to_half(low) | (u32)to_half(high) << 16;
#endif
}

__device__ __forceinline__ float from_half(u16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
}

#endif
