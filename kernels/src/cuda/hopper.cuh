// Hopper's instructions: the copy engine for tensors, barriers that count its bytes, products by
// warpgroups. For sm_90a alone.
#pragma once

#include "ptx.cuh"

// A description of a tensor in device memory, made by the driver; a kernel's parameter.
struct __align__(64) TensorMap {
    u64 words[16];
};

#if !defined(GRAFT_SIMULATION) && defined(__CUDA_ARCH_FEAT_SM90_ALL)

// --- Barriers in shared memory. They are in phases 0, 1, ..; a phase is over when as many arrivals
// as were announced have happened and all expected bytes are there.

__device__ __forceinline__ void barrier_init(u64 *barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
                 "r"(arrivals)
                 : "memory");
}

// After initialisation, before a barrier of threads: the copy engine and other blocks see it.
__device__ __forceinline__ void barrier_init_done() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Arrives, and announces bytes that will be copied.
__device__ __forceinline__ void barrier_expect(u64 *barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                     shared_address(barrier)),
                 "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void barrier_arrive(u64 *barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
                 : "memory");
}

// Waits for the end of the latest phase of this parity: at once if the barrier is in a phase of the
// other.
__device__ __forceinline__ void barrier_wait(u64 *barrier, u32 parity) {
    u32 done;
    do {
        asm volatile("{\n"
                     ".reg .pred p;\n"
                     "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
                     "selp.u32 %0, 1, 0, p;\n"
                     "}"
                     : "=r"(done)
                     : "r"(shared_address(barrier)), "r"(parity)
                     : "memory");
    } while (!done);
}

// A barrier of `threads` threads; number 0 is that of __syncthreads.
__device__ __forceinline__ void named_barrier(int number, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// --- The copy engine. Coordinates count elements, from the innermost dimension on; what lies
// outside of the tensor is read as zeros and not written.

__device__ __forceinline__ void tensor_prefetch(const TensorMap *map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// A box to shared memory. The barrier gets its bytes.
__device__ __forceinline__ void tensor_load(void *to, const TensorMap *map, u64 *barrier, int x,
                                            int y, int z) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(shared_address(to)),
                 "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z)
                 : "memory");
}

// A box from shared memory, which this thread's writes, and those it has waited for, filled.
__device__ __forceinline__ void tensor_store(const TensorMap *map, const void *from, int x, int y,
                                             int z) {
    asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group "
                 "[%0, {%2, %3, %4}], [%1];" ::"l"(map),
                 "r"(shared_address(from)), "r"(x), "r"(y), "r"(z)
                 : "memory");
}

__device__ __forceinline__ void tensor_store_commit() {
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Waits until at most PENDING of this thread's groups of stores have not yet read their source.
template <int PENDING> __device__ __forceinline__ void tensor_store_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}

// Ordinary writes to shared memory before this are seen by the copy engine after it.
__device__ __forceinline__ void fence_shared_async() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Four 8x8 matrices of 16-bit elements to shared memory: lane l gives the row l % 8 of matrix l / 8.
__device__ __forceinline__ void stmatrix_x4(void *row, u32 r0, u32 r1, u32 r2, u32 r3) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                     shared_address(row)),
                 "r"(r0), "r"(r1), "r"(r2), "r"(r3)
                 : "memory");
}

// --- Warpgroups: four warps, the first of which has a number that is a multiple of four.

template <int REGISTERS> __device__ __forceinline__ void more_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS> __device__ __forceinline__ void fewer_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// Before products that read registers which other instructions wrote.
__device__ __forceinline__ void wgmma_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits until at most PENDING groups of products are under way.
template <int PENDING> __device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// After waiting: the sums are read from here on, not before.
template <int N> __device__ __forceinline__ void wgmma_sums(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}

#define SUMS4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define SUMS16(d, i) SUMS4(d, i), SUMS4(d, i + 4), SUMS4(d, i + 8), SUMS4(d, i + 12)

// d = a * b, or d += a * b if `accumulate`: a [64, 16], b [16, 192] of bf16 in shared memory. Warp w
// of the group has rows 16 w + l / 4 (d[4 j], d[4 j + 1]) and 8 more (d[4 j + 2], d[4 j + 3]) of
// columns 8 j + 2 (l % 4) and the next. ACROSS: rows in shared memory are k.
template <bool A_ACROSS, bool B_ACROSS>
__device__ __forceinline__ void wgmma_64x192(float (&d)[96], u64 a, u64 b, bool accumulate) {
    asm volatile("{\n"
                 ".reg .pred p;\n"
                 "setp.ne.b32 p, %98, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n192k16.f32.bf16.bf16 {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, "
                 "%12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "
                 "%24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "
                 "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
                 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, "
                 "%60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, "
                 "%72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, "
                 "%84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
                 "}, %96, %97, p, 1, 1, %99, %100;\n"
                 "}"
                 : SUMS16(d, 0), SUMS16(d, 16), SUMS16(d, 32), SUMS16(d, 48), SUMS16(d, 64),
                   SUMS16(d, 80)
                 : "l"(a), "l"(b), "r"((int)accumulate), "n"((int)A_ACROSS), "n"((int)B_ACROSS));
}

#undef SUMS4
#undef SUMS16
#endif

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// An operand in shared memory as products take it, in rows of 128 bytes with the copy engine's
// swizzle of 128 bytes, from an address that is a multiple of 1024 on. `stride`: bytes from 8 rows
// to the next 8. `leading`: if rows are k, bytes from 64 elements of the other dimension to the next
// 64; else without meaning.
__device__ __forceinline__ u64 wgmma_operand(const void *at, int leading, int stride) {
    return (u64)(shared_address(at) >> 4 & 0x3fff) | (u64)(leading >> 4) << 16 |
           (u64)(stride >> 4) << 32 | (u64)1 << 62;
}

#endif
