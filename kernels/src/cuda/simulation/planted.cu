// Kernels in which what orders their accesses to memory can be left out: what races.cpp must find, and, with everything
// in its place, must not. For the simulation alone. Each does something like what the other kernels do. `without`: the
// number of what is left out, 0 for nothing.
#include "attention_hopper.cuh"

// --- A block's and a warp's barriers. `out`: one number for each thread.

EXPORT planted_block(int without, float *out) {
    __shared__ float numbers[128];
    int t = threadIdx.x;
    for (int i = 0; i < 2; i++) {
        numbers[t] = t + i;
        if (without != 1) __syncthreads();
        out[t] = numbers[(t + 64) % 128];
        if (without != 2) __syncthreads(); // read before it is written again
    }
}
REGISTER(planted_block)

EXPORT planted_warp(int without, float *out) {
    __shared__ float numbers[64];
    int t = threadIdx.x;
    float other = 0;
    for (int i = 0; i < 2; i++) {
        numbers[t] = t + i;
        // A shuffle orders nothing but what it exchanges.
        if (without == 3) other = __shfl_xor_sync(0xffffffffu, other, 1);
        if (without != 1 && without != 3) __syncwarp();
        other += numbers[t ^ 1];
        if (without != 2) __syncwarp();
    }
    out[t] = other;
}
REGISTER(planted_warp)

// Bytes beside each other are different memory; what nobody wrote is not read.
EXPORT planted_bytes(int without, float *out) {
    __shared__ u8 bytes[128];
    __shared__ u16 halves[128];
    int t = threadIdx.x;
    bytes[t] = t;
    if (without != 1 || t != 5) halves[t] = t;
    if (without == 2 && t == 7) bytes[6] = 0;
    __syncthreads();
    out[t] = bytes[127 - t] + halves[127 - t];
}
REGISTER(planted_bytes)

// --- Global memory. Two blocks.

EXPORT planted_global(int without, float *out) {
    int t = threadIdx.x, first = without == 1 ? 0 : 128 * blockIdx.x;
    out[first + t] = t;
    if (without != 2) __syncthreads();
    float other = out[first + (t + 64) % 128];
    // What another block writes is not read, at no time.
    if (without == 3 && blockIdx.x == 0) other = out[128 + t];
    __syncthreads();
    out[first + t] = other;
}
REGISTER(planted_global)

// --- Asynchronous copies of a thread. `from`: 4 numbers for each thread.

#if __CUDA_ARCH__ >= 800
EXPORT planted_copies(int without, const float *from, float *out) {
    __shared__ __align__(16) float numbers[2][512];
    int t = threadIdx.x;
    for (int i = 0; i < 2; i++) {
        cp_async_16(&numbers[i][4 * t], from + 4 * t, true);
        cp_async_commit();
    }
    float sum = 0;
    for (int i = 0; i < 2; i++) {
        if (without == 3) numbers[i][4 * t] = 0; // on its way
        if (without == 1) {
            cp_async_wait<1>(); // of the first alone
        } else {
            i == 0 ? cp_async_wait<1>() : cp_async_wait<0>();
        }
        if (without != 2) __syncthreads();
        sum += numbers[i][(4 * t + 64) % 512];
    }
    if (without != 4) __syncthreads();
    cp_async_16(&numbers[1][4 * t], from + 4 * t, true);
    cp_async_commit();
    cp_async_wait<0>();
    out[t] = sum;
}
REGISTER(planted_copies)
#endif

// --- Hopper.

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// The first of two warpgroups is told by the second, which does not wait.
EXPORT planted_named(int without, float *out) {
    __shared__ float numbers[128];
    int t = threadIdx.x % 128;
    if (threadIdx.x < 128) {
        if (without != 1) named_barrier(1, 256);
        out[t] = numbers[t];
    } else {
        if (without == 2) named_arrive(1, 256);
        numbers[t] = t;
        if (without != 1 && without != 2) named_arrive(1, 256);
    }
}
REGISTER(planted_named)

// Stages that the copy engine fills for two warps, for one thread of a third: from [5, 128] numbers.
EXPORT planted_engine(int without, const float *from, float *out) {
    __shared__ u64 full[2], empty[2];
    DYNAMIC_SHARED(shared);
    float *stages = (float *)shared;
    int t = threadIdx.x;
    if (t == 0) {
        for (int stage = 0; stage < 2; stage++) {
            barrier_init(&full[stage], 1);
            barrier_init(&empty[stage], without == 5 ? 1 : 2);
        }
        if (without != 7) barrier_init_done();
    }
    if (without != 6) __syncthreads();
    if (t >= 64) {
        if (t > 64) return;
        for (int step = 0; step < 5; step++) {
            int stage = step % 2;
            if (without != 2) barrier_wait(&empty[stage], (step / 2 & 1) ^ 1);
            barrier_expect(&full[stage], 512);
            bulk_load(stages + 128 * stage, from + 128 * step, 512, &full[stage]);
        }
    } else {
        float sum = 0;
        for (int step = 0; step < 5; step++) {
            int stage = step % 2;
            if (without != 1) barrier_wait(&full[stage], step / 2 & 1);
            if (without == 3 && t % 32 == 0) barrier_arrive(&empty[stage]); // before it was read
            sum += stages[128 * stage + (t + 70) % 128];
            if (without != 4) __syncwarp();
            bool tells = t % 32 == 0 && without != 3 && (without != 5 || t == 0);
            if (tells) barrier_arrive(&empty[stage]);
        }
        out[t] = sum;
    }
}
REGISTER(planted_engine)

// A warpgroup multiplies what the copy engine brings, 64 rows of 64 numbers that are both factors: from [3, 64, 64].
EXPORT planted_products(int without, const bf16 *from, float *out) {
    __shared__ u64 full[2], empty[2];
    DYNAMIC_SHARED(shared);
    int t = threadIdx.x;
    if (t == 0) {
        for (int stage = 0; stage < 2; stage++) barrier_init(&full[stage], 1), barrier_init(&empty[stage], 4);
        barrier_init_done();
    }
    __syncthreads();
    if (t >= 128) {
        if (t > 128) return;
        for (int step = 0; step < 3; step++) {
            int stage = step % 2;
            barrier_wait(&empty[stage], (step / 2 & 1) ^ 1);
            barrier_expect(&full[stage], 8192);
            bulk_load(shared + 8192 * stage, from + 4096 * step, 8192, &full[stage]);
        }
        return;
    }
    float sums[8][4] = {};
    auto release = [&](int step) {
        __syncwarp();
        if (t % 32 == 0) barrier_arrive(&empty[step % 2]);
    };
    for (int step = 0; step < 3; step++) {
        int stage = step % 2;
        if (without != 1) barrier_wait(&full[stage], step / 2 & 1);
        u64 operand = wgmma_operand(shared + 8192 * stage, 0, 1024);
        wgmma_fence();
        for (int k = 0; k < 4; k++) wgmma_product(sums, operand + 2 * k, operand + 2 * k, true);
        wgmma_commit();
        if (without == 2) {
            release(step); // its products are under way
            wgmma_wait<0>();
            continue;
        }
        // The products of the step before are done; those of this one, if all are waited for.
        wgmma_wait<1>();
        if (step > 0 || without == 3) release(without == 3 ? step : step - 1);
    }
    wgmma_wait<0>();
    for (int n = 0; n < 8; n++)
        for (int e = 0; e < 4; e++) out[(t * 8 + n) * 4 + e] = sums[n][e];
}
REGISTER(planted_products)

// What threads wrote, a warpgroup multiplies: a fence and a meeting are between. out [128, 32].
EXPORT planted_fence(int without, float *out) {
    DYNAMIC_SHARED(shared);
    int t = threadIdx.x;
    for (int i = 0; i < 16; i++) ((u32 *)shared)[i * 128 + t] = 0x3f803f80;
    if (without == 3) __syncthreads();
    if (without != 1) fence_shared_async();
    if (without == 3) ((u32 *)shared)[t] = 0; // behind the fence
    if (without != 2) __syncthreads();
    float sums[8][4] = {};
    u64 operand = wgmma_operand(shared, 0, 1024);
    wgmma_fence();
    wgmma_product(sums, operand, operand, true);
    wgmma_commit();
    if (without == 4) ((u32 *)shared)[t] = 0; // while it is read
    wgmma_wait<0>();
    for (int n = 0; n < 8; n++)
        for (int e = 0; e < 4; e++) out[(t * 8 + n) * 4 + e] = sums[n][e];
}
REGISTER(planted_fence)

// What threads wrote, the copy engine brings to `map`, [128, 32] numbers, 64 rows at a time from the same buffer.
EXPORT planted_stores(int without, const __grid_constant__ TensorMap map) {
    DYNAMIC_SHARED(shared);
    int t = threadIdx.x;
    for (int part = 0; part < 2; part++) {
        if (t == 0 && without != 1) tensor_store_wait_read<0>();
        if (without != 2) named_barrier(1, 128);
        for (int i = 0; i < 16; i++) ((float *)shared)[i * 128 + t] = part + 1;
        if (without != 3) fence_shared_async();
        if (without != 4) named_barrier(1, 128);
        if (t == 0) {
            // Rows that both parts write come in no order.
            tensor_store(&map, shared, 0, without == 5 ? 32 * part : 64 * part, 0);
            tensor_store_commit();
        }
    }
    if (t == 0 && without != 6) tensor_store_wait_read<0>();
}
REGISTER(planted_stores)

#endif
