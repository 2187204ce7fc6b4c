// What products on Hopper need beside hopper.cuh. For sm_90a alone.
#pragma once

#include "hopper.cuh"

#if !defined(GRAFT_SIMULATION) && defined(__CUDA_ARCH_FEAT_SM90_ALL)

// As tensor_store, added to what is there. Sums have a fixed order only where nothing else of a launch
// adds to the same elements.
__device__ __forceinline__ void tensor_add(const TensorMap *map, const void *from, int x, int y,
                                           int z) {
    asm volatile("cp.reduce.async.bulk.tensor.3d.global.shared::cta.add.tile.bulk_group "
                 "[%0, {%2, %3, %4}], [%1];" ::"l"(map),
                 "r"(shared_address(from)), "r"(x), "r"(y), "r"(z)
                 : "memory");
}

// The compiler no longer knows what `x` is: what follows from it is computed from here on, not kept
// from before.
__device__ __forceinline__ void forget(int &x) { asm volatile("" : "+r"(x)); }

#endif
