// Products by warpgroups as attention needs them: operands as `wgmma_operand` describes them.
#pragma once

#include "hopper.cuh"

#if !defined(GRAFT_SIMULATION) && defined(__CUDA_ARCH_FEAT_SM90_ALL)

// What products write has other values from here on.
__device__ __forceinline__ void wgmma_touch(float &x) { asm volatile("" : "+f"(x)::"memory"); }

// What products read lasts until here.
__device__ __forceinline__ void keep_until_here(u32 x) { asm volatile("" ::"r"(x) : "memory"); }

// Bytes that follow each other to shared memory, a multiple of 16 from an address that is one. The
// barrier gets them.
__device__ __forceinline__ void bulk_load(void *to, const void *from, int bytes, u64 *barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1], %2, [%3];" ::"r"(shared_address(to)),
                 "l"(from), "r"(bytes), "r"(shared_address(barrier))
                 : "memory");
}

// Counts this thread as arrived at a `named_barrier`, at which it does not wait.
__device__ __forceinline__ void named_arrive(int number, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

#define SUMS4(d, i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define SUMS16(d, i) SUMS4(d, i), SUMS4(d, i + 1), SUMS4(d, i + 2), SUMS4(d, i + 3)

// d = a * b, or d += a * b if `add`: a [64, 16], b [16, 8 columns of d], both with k along their rows
// in shared memory. Warp w of the group has rows 16 w .. + 16 of d, as the C of `mma.m16n8k16` side
// by side. Below, the same with a in registers, each warp's 16 rows as the A of `mma.m16n8k16`;
// ACROSS: rows of b in shared memory are k.
__device__ __forceinline__ void wgmma_product(float (&d)[8][4], u64 a, u64 b, bool add) {
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
__device__ __forceinline__ void wgmma_product(float (&d)[8][4], const u32 (&a)[4], u64 b,
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

__device__ __forceinline__ void wgmma_product(float (&d)[16][4], u64 a, u64 b, bool add) {
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
__device__ __forceinline__ void wgmma_product(float (&d)[16][4], const u32 (&a)[4], u64 b,
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
