// Products by warpgroups, four warps each, for attention on Hopper: operands in shared memory in rows
// of 128 bytes whose chunks of 16 bytes change places with the row's number modulo 8, each tile from
// a multiple of 1024 bytes on.
#pragma once

#include "ptx.cuh"

#if !defined(GRAFT_SIMULATION) && defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Ordinary and asynchronous copies to shared memory before this are seen by products after it.
__device__ __forceinline__ void group_see_copies() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Before products that read registers which other instructions wrote.
__device__ __forceinline__ void group_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void group_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits until at most PENDING groups of products are under way.
template <int PENDING> __device__ __forceinline__ void group_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
// The sums have other values from here on.
__device__ __forceinline__ void group_touch(float &x) { asm volatile("" : "+f"(x)::"memory"); }

// An operand: 8 rows are followed by the next 8. `leading`: if rows are k, bytes from 64 elements of
// the other dimension to the next 64; else without meaning.
__device__ __forceinline__ u64 group_operand(const void *at, int leading) {
    return (u64)(shared_address(at) >> 4) | (u64)(leading >> 4) << 16 | (u64)(1024 >> 4) << 32 |
           (u64)1 << 62;
}

#define SUMS4(d, i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define SUMS16(d, i) SUMS4(d, i), SUMS4(d, i + 1), SUMS4(d, i + 2), SUMS4(d, i + 3)

// d = a * b, or d += a * b if `add`: a [64, 16], b [16, 8 columns of d], both with k along their rows
// in shared memory. Warp w of the group has rows 16 w .. + 16 of d, as the C of `mma.m16n8k16` side
// by side. Below, the same with a in registers, each warp's 16 rows as the A of `mma.m16n8k16`;
// ACROSS: rows of b in shared memory are k.
__device__ __forceinline__ void group_product(float (&d)[8][4], u64 a, u64 b, bool add) {
    asm volatile("{\n"
                 ".reg .pred p;\n"
                 "setp.ne.b32 p, %34, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
                 "}, %32, %33, p, 1, 1, 0, 0;\n"
                 "}"
                 : SUMS16(d, 0),
                   SUMS16(d, 4)
                 : "l"(a), "l"(b), "r"((int)add));
}
template <bool ACROSS>
__device__ __forceinline__ void group_product(float (&d)[8][4], const u32 (&a)[4], u64 b,
                                              bool add) {
    asm volatile("{\n"
                 ".reg .pred p;\n"
                 "setp.ne.b32 p, %37, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
                 "}, {%32, %33, %34, %35}, %36, p, 1, 1, %38;\n"
                 "}"
                 : SUMS16(d, 0),
                   SUMS16(d, 4)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)add),
                   "n"((int)ACROSS));
}

__device__ __forceinline__ void group_product(float (&d)[16][4], u64 a, u64 b, bool add) {
    asm volatile("{\n"
                 ".reg .pred p;\n"
                 "setp.ne.b32 p, %66, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
                 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
                 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
                 "}, %64, %65, p, 1, 1, 0, 0;\n"
                 "}"
                 : SUMS16(d, 0),
                   SUMS16(d, 4),
                   SUMS16(d, 8),
                   SUMS16(d, 12)
                 : "l"(a), "l"(b), "r"((int)add));
}
template <bool ACROSS>
__device__ __forceinline__ void group_product(float (&d)[16][4], const u32 (&a)[4], u64 b,
                                              bool add) {
    asm volatile("{\n"
                 ".reg .pred p;\n"
                 "setp.ne.b32 p, %69, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
                 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
                 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
                 "}, {%64, %65, %66, %67}, %68, p, 1, 1, %70;\n"
                 "}"
                 : SUMS16(d, 0),
                   SUMS16(d, 4),
                   SUMS16(d, 8),
                   SUMS16(d, 12)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)add),
                   "n"((int)ACROSS));
}

#undef SUMS4
#undef SUMS16
#endif
