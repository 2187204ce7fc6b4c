// What the attention kernels share: what is computed, which keys a query sees, dropout.
#pragma once

#include "common.cuh"

#define LOG2_E 1.44269504088896341f
#define LN_2 0.693147180559945309f

// Words of four bytes, in the order in which the launcher writes them.
struct Attention {
    int heads;
    int group;   // query heads to a key head
    int dims;    // of a head
    int low;     // query i sees key j if low <= i - j < window
    int window;
    float scale;
    float cap;   // 0 for none
    u32 keep;    // a weight is kept if its word >> 8 is at least this; 0 for all
    float kept;  // what kept weights grow by
    u32 key0, key1;
    int blocks;  // of the longest sequence
};

// What the scores are multiplied with before the softmax takes powers of two of them, and, under a
// cap, before that by its hyperbolic tangent.
__device__ __forceinline__ float exponent(const Attention &p) {
    return (p.cap > 0 ? p.cap : p.scale) * LOG2_E;
}
__device__ __forceinline__ float inside_cap(const Attention &p) { return p.scale / p.cap; }

__device__ __forceinline__ bool visible(const Attention &p, int query, int key, int len) {
    int behind = query - key;
    return key < len && behind >= p.low && behind < p.window;
}

// Whether every, or no query of i .. i + queries sees every, or any key of j .. j + keys.
__device__ __forceinline__ bool all_visible(const Attention &p, int i, int queries, int j, int keys,
                                            int len) {
    return j + keys <= len && i - (j + keys - 1) >= p.low && i + queries - 1 - j < p.window;
}
__device__ __forceinline__ bool none_visible(const Attention &p, int i, int queries, int j,
                                             int keys, int len) {
    return j >= len || i + queries - 1 - j < p.low || i - (j + keys - 1) >= p.window;
}

// From the first key that one of the queries i .. end sees to one past the last, and the same for
// the queries that see one of the keys j .. end.
struct Span {
    int from, to;
};
__device__ __forceinline__ Span keys_of(const Attention &p, int i, int end, int len) {
    return {max(0, i - p.window + 1), min(len, end - p.low)};
}
__device__ __forceinline__ Span queries_of(const Attention &p, int j, int end, int len) {
    return {max(0, j + p.low), min(len, end - 1 + p.window)};
}

// Which part of which sequence and head this block has.
struct Place {
    int block, head, sequence, len;
    i64 start;
};
__device__ __forceinline__ Place place(const Attention &p, const i64 *offsets, int heads) {
    u32 x = blockIdx.x;
    Place at;
    at.block = (int)(x % (u32)p.blocks);
    x /= (u32)p.blocks;
    at.head = (int)(x % (u32)heads);
    at.sequence = (int)(x / (u32)heads);
    at.start = offsets[at.sequence];
    at.len = (int)(offsets[at.sequence + 1] - at.start);
    return at;
}

// Where a sequence's keys are: where its queries are, or, if they were kept, in rows of their own,
// of which the last belong to the queries.
struct Kept {
    i64 start;
    int len, shift; // query i stands at key i + shift
};
__device__ __forceinline__ Kept kept_keys(const Place &here, const i64 *starts, const i64 *lengths) {
    if (!starts) return {here.start, here.len, 0};
    int len = (int)lengths[here.sequence];
    return {starts[here.sequence], len, len - here.len};
}

// --- Dropout: the word of head h, query token t of all and key j of the sequence is word j % 4 of
// the Philox block with counter [j / 4, t, h, 1].

__device__ __forceinline__ u32 keep_bits(const Attention &p, u32 key, u32 token, u32 head) {
    Words words = philox(p.key0, p.key1, key / 4, token, head, 1);
    u32 bits = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) bits |= (u32)(words.at[i] >> 8 >= p.keep) << i;
    return bits;
}

__device__ __forceinline__ bool is_kept(const Attention &p, u32 key, u32 token, u32 head) {
    return keep_bits(p, key, token, head) >> key % 4 & 1;
}
