//! Rows by index, and blocks written into tensors.

use graft_kernels::cuda::Scalar;
use graft_kernels::cuda::index::{PIECE, Scatter, order_rows};
use graft_tensor::ops::{cast, concat, gather_rows, place, scatter_add_rows, write_rows};
use graft_tensor::{DType, Error, Shape, Tensor};
use proptest::prelude::*;

use crate::common::{assert_same, cpu, gpu, integers, normal, on_gpu};
use crate::within::assert_within;

const FLOATS: [DType; 2] = [DType::F32, DType::Bf16];

/// The sums of rows against the CPU's in f32: there, bf16 would be rounded after each addition.
fn check_scatter(dtype: DType, index: &[i64], rows: usize, columns: usize, seed: u64) {
    let dy = normal(dtype, &[index.len(), columns], seed);
    let index = integers(index);
    let there = |m| scatter_add_rows(m, &on_gpu(&dy), &on_gpu(&index), rows).unwrap();
    let found = there(gpu());
    let wide = cast(cpu(), &dy, DType::F32).unwrap();
    let expected = scatter_add_rows(cpu(), &wide, &index, rows).unwrap();
    let expected = cast(cpu(), &expected, dtype).unwrap();
    // The CPU adds up to so many rows one after the other: partial sums of about their root, each
    // rounded.
    let mut most = vec![0; rows];
    for &row in index.slice::<i64>().unwrap() {
        most[row as usize] += 1;
    }
    let most = most.into_iter().max().unwrap_or(0) as f64;
    let allowed = 4e-7 * most.max(4.0);
    assert_within("sums of rows", &found, &expected, allowed);
    assert_same("a second time", &there(gpu()), &found);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    #[ignore = "needs a GPU"]
    fn rows_and_their_gradients(
        rows in 1usize..50, columns in 0usize..70, seed in 0u64..1000,
        picks in prop::collection::vec(0usize..1000, 0..400),
    ) {
        let index: Vec<i64> = picks.iter().map(|p| (p % rows) as i64).collect();
        for dtype in FLOATS {
            let table = normal(dtype, &[rows, columns], seed);
            let at = integers(&index);
            let y = gather_rows(gpu(), &on_gpu(&table), &on_gpu(&at)).unwrap();
            assert_same("rows", &y, &gather_rows(cpu(), &table, &at).unwrap());
            check_scatter(dtype, &index, rows, columns, seed);
        }
    }

    #[test]
    #[ignore = "needs a GPU"]
    fn orders_of_any_index(
        rows in 1usize..20, picks in prop::collection::vec(0usize..1000, 0..700),
    ) {
        let index: Vec<i64> = picks.iter().map(|p| (p % rows / 2) as i64).collect();
        check_order(&index, rows);
    }

    #[test]
    #[ignore = "needs a GPU"]
    fn joined_and_placed(
        dims in prop::collection::vec(1usize..7, 1..5), axis in 0usize..4, other in 1usize..9,
        seed in 0u64..1000, turned in any::<bool>(), short in any::<bool>(),
    ) {
        let dtype = FLOATS[usize::from(short)];
        let axis = axis % dims.len();
        let x = normal(dtype, &dims, seed);
        let mut longer = dims.clone();
        longer[axis] = other;
        let y = normal(dtype, &longer, seed + 1);
        let parts = |x: &Tensor, y: &Tensor| -> Vec<Tensor> {
            match turned && dims.len() > 1 {
                true => vec![x.t().unwrap(), y.t().unwrap(), x.t().unwrap()],
                false => vec![x.clone(), y.clone(), x.clone()],
            }
        };
        let axis = match (turned && dims.len() > 1, dims.len() - axis) {
            (true, 1) => dims.len() - 2,
            (true, 2) => dims.len() - 1,
            _ => axis,
        };
        let here = parts(&x, &y);
        let there = parts(&on_gpu(&x), &on_gpu(&y));
        let all = |parts: &[Tensor], m| {
            concat(m, &parts.iter().collect::<Vec<_>>(), axis).unwrap()
        };
        let joined = all(&here, cpu());
        assert_same("joined", &all(&there, gpu()), &joined);
        let shape = Shape::new(joined.shape()).unwrap();
        let start = here[0].shape()[axis];
        let placed = place(gpu(), &there[1], &shape, axis, start).unwrap();
        assert_same("placed", &placed, &place(cpu(), &here[1], &shape, axis, start).unwrap());
    }
}

/// The numbers of an order, by a sort on this machine: positions by row, pieces of at most so many, joins of the rows that
/// have several.
fn order_here(index: &[i64], rows: usize) -> Vec<i32> {
    let scatter = Scatter::new(index.len(), rows).unwrap();
    let mut order: Vec<usize> = (0..index.len()).collect();
    order.sort_by_key(|&position| (index[position], position));
    let (mut pieces, mut joins) = (Vec::new(), Vec::new());
    let (mut parts, mut first) = (0, 0);
    for run in order.chunk_by(|&a, &b| index[a] == index[b]) {
        let (row, end, before) = (index[run[0]] as i32, first + run.len(), parts);
        for start in (first..end).step_by(PIECE) {
            let large = run.len() > PIECE;
            let to = if large { -1 - parts } else { row };
            parts += i32::from(large);
            pieces.extend([start as i32, (start + PIECE).min(end) as i32, to]);
        }
        if parts > before {
            joins.extend([before, parts, row]);
        }
        first = end;
    }
    pieces.resize(3 * scatter.pieces(), 0);
    joins.resize(3 * Scatter::joins(index.len()), 0);
    assert!(parts as usize <= Scatter::parts(index.len()));
    let order = order.into_iter().map(|position| position as i32);
    order.chain(pieces).chain(joins).collect()
}

/// The order that the GPU makes is the one of this machine, number by number.
fn check_order(index: &[i64], rows: usize) {
    let gpu = gpu().opened_gpu().unwrap();
    let scatter = Scatter::new(index.len(), rows).unwrap();
    let (count, room) = (scatter.numbers(), scatter.order_workspace());
    let there = gpu.allocate(8 * index.len().max(1)).unwrap();
    let bytes: Vec<u8> = index.iter().flat_map(|i| i.to_le_bytes()).collect();
    gpu.upload(&bytes, there.slice_mut(0, bytes.len(), Scalar::U8))
        .unwrap();
    let numbers = gpu.allocate(4 * count.max(1)).unwrap();
    gpu.set_bytes(numbers.slice_mut(0, 4 * count, Scalar::U8), 255)
        .unwrap();
    let scratch = gpu.allocate(4 * room.max(1)).unwrap();
    order_rows(
        gpu,
        &scatter,
        there.slice(0, index.len(), Scalar::I64),
        numbers.slice_mut(0, count, Scalar::I32),
        scratch.slice_mut(0, room, Scalar::I32),
    )
    .unwrap();
    let mut found = vec![0; 4 * count];
    gpu.download(numbers.slice(0, 4 * count, Scalar::U8), &mut found)
        .unwrap();
    let found: Vec<i32> = found
        .as_chunks::<4>()
        .0
        .iter()
        .map(|bytes| i32::from_le_bytes(*bytes))
        .collect();
    let wanted = order_here(index, rows);
    let first = found.iter().zip(&wanted).position(|(f, w)| f != w);
    let what = format!("{} positions over {rows} rows", index.len());
    assert_eq!(first, None, "{what}: number {first:?} differs");
    assert_eq!(found.len(), wanted.len(), "{what}");
}

#[test]
#[ignore = "needs a GPU"]
fn orders_of_every_size() {
    // One pass over the bits of a row, two, three; a warp's range and its edges; long runs and none.
    for rows in [1, 2, 256, 257, 50_257, 70_000, 20_000_000] {
        for count in [0, 1, 31, 33, 64, 65, 1024, 1025, 3000] {
            let mixed = |i: i64| (i * 7919 + i * i * 31) % 20_000_003 % rows as i64;
            check_order(&(0..count).map(mixed).collect::<Vec<_>>(), rows);
            let few = |i: i64| (rows as i64 - 1) * (i % 3) / 2;
            check_order(&(0..count).map(few).collect::<Vec<_>>(), rows);
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn many_positions_of_one_row() {
    // Token types, positions, and words: one row, few rows, many rows of which most have no token.
    let tokens = 4000i64;
    let scattered = |i: i64| i * 7919 % 50_257 * (i % 3) / 2 % 50_257;
    for dtype in FLOATS {
        for columns in [1, 64, 520] {
            check_scatter(dtype, &vec![1; 1000], 2, columns, 1);
            let positions: Vec<i64> = (0..tokens).map(|i| i % 67).collect();
            check_scatter(dtype, &positions, 512, columns, 2);
        }
        let words: Vec<i64> = (0..tokens).map(scattered).collect();
        check_scatter(dtype, &words, 50_257, 96, 3);
        for count in [0, 1, 63, 64, 65, 128, 129] {
            check_scatter(dtype, &vec![0; count], 1, 5, 4);
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn indices_are_checked() {
    let table = on_gpu(&normal(DType::F32, &[4, 3], 1));
    for bad in [-1, 4] {
        let index = on_gpu(&integers(&[0, bad]));
        let error = gather_rows(gpu(), &table, &index).unwrap_err();
        assert!(matches!(error, Error::Index { position: 1, .. }), "{error}");
        let dy = on_gpu(&normal(DType::F32, &[2, 3], 1));
        assert!(scatter_add_rows(gpu(), &dy, &index, 4).is_err());
    }
}

#[test]
#[ignore = "needs a GPU"]
fn tables_of_integers_stay_here() {
    let table = Tensor::from_slice(cpu(), &[1i64, 2, 3, 4, 5, 6], &[3, 2]).unwrap();
    let y = gather_rows(gpu(), &on_gpu(&table), &on_gpu(&integers(&[2, 0]))).unwrap();
    assert_eq!(y.slice::<i64>().unwrap(), [5, 6, 1, 2]);
    let joined = concat(gpu(), &[&y, &on_gpu(&table)], 0).unwrap();
    assert_eq!(joined.slice::<i64>().unwrap()[..6], [5, 6, 1, 2, 1, 2]);
}

#[test]
#[ignore = "needs a GPU"]
fn rows_are_written_in_place() {
    for dtype in FLOATS {
        let (table, rows) = (normal(dtype, &[9, 5], 1), normal(dtype, &[5, 5], 2));
        let mut here = table.copy(cpu()).unwrap();
        let mut there = on_gpu(&table);
        for (first, count) in [(0, 2), (4, 5), (8, 1), (9, 0)] {
            let part = rows.narrow(0, 0, count).unwrap();
            write_rows(cpu(), &mut here, first, &part).unwrap();
            let part = on_gpu(&rows).narrow(0, 0, count).unwrap();
            write_rows(gpu(), &mut there, first, &part).unwrap();
            assert_same("a table", &there, &here);
        }
        // Columns of something wider.
        let wide = normal(dtype, &[2, 7], 3);
        let part = |x: &Tensor| x.narrow(1, 1, 5).unwrap();
        write_rows(cpu(), &mut here, 3, &part(&wide)).unwrap();
        write_rows(gpu(), &mut there, 3, &part(&on_gpu(&wide))).unwrap();
        assert_same("a table", &there, &here);
    }
}
