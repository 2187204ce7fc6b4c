// Rows of a table by index, and the gradient of that.
#include "common.cuh"

#define WARPS 8
#define THREADS 128

// y[i, :] = table[index[i], :], rows of `columns` units; a warp for each row of y.
template <class T>
__device__ void gather_rows(const T *table, const i64 *index, T *y, i64 rows, i64 columns) {
    i64 row = (i64)blockIdx.x * WARPS + threadIdx.x / 32;
    if (row >= rows) return;
    const T *from = table + index[row] * columns;
    T *to = y + row * columns;
#pragma unroll 4
    for (i64 i = threadIdx.x % 32; i < columns; i += 32) to[i] = from[i];
}
typedef Pack<u64, 2> u128;
#define GATHER(T)                                                                                  \
    EXPORT gather_rows_##T(const T *table, const i64 *index, T *y, i64 rows, i64 columns) {        \
        gather_rows(table, index, y, rows, columns);                                               \
    }
GATHER(u8)
GATHER(u16)
GATHER(u32)
GATHER(u64)
GATHER(u128)

// --- Adding rows up where they came from. The positions of the index are sorted by row, positions of one
// row staying in order, and cut into pieces; pieces of a row that has several are summed apart and joined
// in order.

// Positions order[first .. end] of the gradient, for row `to` of the table, or, if that is
// negative, for row -1 - to of the parts. There are blocks for as many pieces and joins as there can
// be: of those that there are not, `first` is `end`.
struct Piece {
    int first, end, to;
};
// Row `to` of the table is the sum of the rows first .. end of the parts.
struct Join {
    int first, end, to;
};

template <class T, int V>
__device__ __forceinline__ void store(T *to, const float (&sum)[V]) {
    Pack<T, V> pack;
#pragma unroll
    for (int v = 0; v < V; v++) pack.at[v] = narrow<T>(sum[v]);
    *(Pack<T, V> *)to = pack;
}

// dy [positions, columns], table [rows, columns], parts [_, columns]. A block has a piece
// (blockIdx.x) of THREADS * V columns (blockIdx.y).
template <class T, int V>
__device__ void scatter_pieces(const T *dy, const int *order, const Piece *pieces, T *table,
                               float *parts, i64 columns) {
    i64 column = ((i64)blockIdx.y * THREADS + threadIdx.x) * V;
    if (column >= columns) return;
    Piece piece = pieces[blockIdx.x];
    if (piece.first == piece.end) return;
    float sum[V];
#pragma unroll
    for (int v = 0; v < V; v++) sum[v] = 0;
#pragma unroll 8
    for (int i = piece.first; i < piece.end; i++) {
        Pack<T, V> pack = *(const Pack<T, V> *)(dy + order[i] * columns + column);
#pragma unroll
        for (int v = 0; v < V; v++) sum[v] += widen(pack.at[v]);
    }
    if (piece.to >= 0)
        store(table + piece.to * columns + column, sum);
    else
        store(parts + (-1 - piece.to) * columns + column, sum);
}

template <class T, int V>
__device__ void scatter_joins(const float *parts, const Join *joins, T *table, i64 columns) {
    i64 column = ((i64)blockIdx.y * THREADS + threadIdx.x) * V;
    if (column >= columns) return;
    Join join = joins[blockIdx.x];
    if (join.first == join.end) return;
    float sum[V];
#pragma unroll
    for (int v = 0; v < V; v++) sum[v] = 0;
#pragma unroll 8
    for (int i = join.first; i < join.end; i++) {
        Pack<float, V> pack = *(const Pack<float, V> *)(parts + i * columns + column);
#pragma unroll
        for (int v = 0; v < V; v++) sum[v] += pack.at[v];
    }
    store(table + join.to * columns + column, sum);
}
#define SCATTER(T, V, name)                                                                        \
    EXPORT scatter_pieces_##name(const T *dy, const int *order, const Piece *pieces, T *table,     \
                                 float *parts, i64 columns) {                                      \
        scatter_pieces<T, V>(dy, order, pieces, table, parts, columns);                            \
    }                                                                                              \
    EXPORT scatter_joins_##name(const float *parts, const Join *joins, T *table, i64 columns) {    \
        scatter_joins<T, V>(parts, joins, table, columns);                                         \
    }
SCATTER(float, 1, f32)
SCATTER(bf16, 1, bf16)
SCATTER(float, 4, f32_by4)
SCATTER(bf16, 4, bf16_by4)

// --- The order of an index: one block, so that one launch is enough and whatever it writes it can read
// again. Its time is that of 32 warps, each of which reads 32nds of all positions a few times.

#define SORTERS 1024                // threads
#define SORTER_WARPS (SORTERS / 32)
#define PIECE 64                    // the most positions of a piece
#define ALL 0xffffffffu

// What each thread has, added up over the threads before it; `total` of all. May be called again at once.
__device__ __forceinline__ int sum_before(int x, int &total) {
    __shared__ int of_warps[SORTER_WARPS];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, sum = x;
#pragma unroll
    for (int by = 1; by < 32; by *= 2) {
        int other = __shfl_up_sync(ALL, sum, by);
        if (lane >= by) sum += other;
    }
    __syncthreads(); // the sums of the call before have been read
    if (lane == 31) of_warps[warp] = sum;
    __syncthreads();
    int before = 0;
    total = 0;
    for (int w = 0; w < SORTER_WARPS; w++) {
        int one = of_warps[w];
        if (w < warp) before += one;
        total += one;
    }
    return before + sum - x;
}

// The lanes whose digit, of eight bits, is this one's; of the lanes that are `valid`.
__device__ __forceinline__ u32 lanes_alike(int digit, bool valid) {
    u32 alike = __ballot_sync(ALL, valid);
#pragma unroll
    for (int bit = 0; bit < 8; bit++) {
        u32 set = __ballot_sync(ALL, digit >> bit & 1);
        alike &= digit >> bit & 1 ? set : ~set;
    }
    return alike;
}

// What a pass of `order_rows` meets at position i: a row, its digit of eight bits, and which lanes meet the same digit. The
// first pass reads the index itself, others what the pass before wrote.
struct Met {
    int row, digit;
    u32 alike;
};
__device__ __forceinline__ Met meet(const i64 *index, const int *rows, int pass, int i, bool valid) {
    int row = !valid ? 0 : pass == 0 ? (int)index[i] : rows[i];
    int digit = row >> (8 * pass) & 255;
    return {row, digit, lanes_alike(digit, valid)};
}

// The first of rows[from .. to], which rise, that is at least (or more than) `row`.
__device__ __forceinline__ int bound(const int *rows, int from, int to, int row, bool above) {
    while (from < to) {
        int middle = from + (to - from) / 2;
        bool left = above ? rows[middle] <= row : rows[middle] < row;
        if (left)
            from = middle + 1;
        else
            to = middle;
    }
    return from;
}

// numbers: the order [count], then [pieces, 3] and [joins, 3]; room [3, count]. Row by row in passes over
// eight bits each, the least first: each warp counts the digits of its range of positions and then moves
// them behind those of the digits, and of the warps, before.
EXPORT __launch_bounds__(SORTERS, 1)
    order_rows(const i64 *index, int count, int bits, int *numbers, int pieces, int joins, int *room) {
    __shared__ int counts[SORTER_WARPS][256], firsts[256];
    int t = threadIdx.x, lane = t % 32, warp = t / 32;
    int *rows = room, *other_rows = room + count, *order = numbers, *other_order = room + 2 * (i64)count;
    int range = (count + SORTERS - 1) / SORTERS * 32; // counts are below 2^30
    int from = min((i64)count, (i64)warp * range), to = min((i64)count, (i64)from + range);
    int passes = (bits + 7) / 8;
    for (int pass = 0; pass < passes; pass++) {
        // The last pass writes to `order`.
        bool swapped = (passes - 1 - pass) % 2;
        int *to_rows = swapped ? other_rows : rows, *to_order = swapped ? other_order : order;
        const int *from_rows = swapped ? rows : other_rows, *from_order = swapped ? order : other_order;
        for (int d = lane; d < 256; d += 32) counts[warp][d] = 0;
        __syncwarp();
#pragma unroll 1
        for (int i = from + lane; i - lane < to; i += 32) {
            bool valid = i < to;
            Met met = meet(index, from_rows, pass, i, valid);
            if (valid && lane == __ffs(met.alike) - 1) counts[warp][met.digit] += __popc(met.alike);
            __syncwarp();
        }
        __syncthreads();
        int sum = 0, all;
        if (t < 256)
            for (int w = 0; w < SORTER_WARPS; w++) {
                int one = counts[w][t];
                counts[w][t] = sum;
                sum += one;
            }
        int first = sum_before(sum, all);
        if (t < 256) firsts[t] = first;
        __syncthreads();
#pragma unroll 1
        for (int i = from + lane; i - lane < to; i += 32) {
            bool valid = i < to;
            Met met = meet(index, from_rows, pass, i, valid);
            int rank = __popc(met.alike & ((1u << lane) - 1));
            int at = firsts[met.digit] + counts[warp][met.digit] + rank;
            __syncwarp();
            if (valid) {
                to_rows[at] = met.row;
                to_order[at] = pass == 0 ? i : from_order[i];
                if (rank == 0) counts[warp][met.digit] += __popc(met.alike);
            }
            __syncwarp();
        }
        __syncthreads();
    }
    // Pieces begin every so many positions of a row. A thread has a range of the sorted positions.
    range = (count + SORTERS - 1) / SORTERS;
    from = min((i64)count, (i64)t * range), to = min((i64)count, (i64)from + range);
    int start = from < to ? bound(rows, 0, from, rows[from], false) : 0; // of the row
    int piece = 0, part = 0, join = 0, all_pieces, all_parts, all_joins;
    int *piece_at = numbers + count, *join_at = piece_at + 3 * (i64)pieces;
    for (int writing = 0; writing < 2; writing++) {
        int begin = start;
        for (int i = from; i < to; i++) {
            int row = rows[i];
            if (i > from && row != rows[i - 1]) begin = i;
            if ((i - begin) % PIECE != 0) continue;
            bool large = begin + PIECE < count && rows[begin + PIECE] == row;
            if (writing) {
                int *at = piece_at + 3 * (i64)piece;
                at[0] = i;
                at[1] = bound(rows, i, min(count, i + PIECE), row, true);
                at[2] = large ? -1 - part : row;
                if (large && i == begin) {
                    at = join_at + 3 * (i64)join;
                    at[0] = part;
                    at[1] = part + (bound(rows, i, count, row, true) - i + PIECE - 1) / PIECE;
                    at[2] = row;
                }
            }
            piece++;
            part += large;
            join += large && i == begin;
        }
        if (writing) break;
        piece = sum_before(piece, all_pieces);
        part = sum_before(part, all_parts);
        join = sum_before(join, all_joins);
    }
    for (i64 i = 3 * (i64)all_pieces + t; i < 3 * (i64)pieces; i += SORTERS) piece_at[i] = 0;
    for (i64 i = 3 * (i64)all_joins + t; i < 3 * (i64)joins; i += SORTERS) join_at[i] = 0;
}
