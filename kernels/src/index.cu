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

// --- Adding rows up where they came from. The host has sorted the positions of the index by row,
// positions of one row staying in order, and cut them into pieces; pieces of a row that has several
// are summed apart and joined in order.

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
