//! Mistakes are refused, and the message names the operation, what was found and what was expected.

use graft_tensor::ops::attention::Attention;
use graft_tensor::ops::elementwise::add_assign;
use graft_tensor::ops::optimizer::{AdamW, adamw};
use graft_tensor::ops::rope::{Rope, rope};
use graft_tensor::ops::{self, Binary, Glu, Linear, Pool, Reduce, Unary, WeightLayout, loss, norm};
use graft_tensor::{DType, Error, Memory, Shape, Tensor};

use crate::common::{ids, upload};

/// Runs a mistake over a real and a planned memory; both must say the same.
#[track_caller]
fn refused<R: std::fmt::Debug>(f: impl Fn(&Memory) -> Result<R, Error>, message: &str) {
    for m in [Memory::cpu(), Memory::planned()] {
        let error = f(&m).expect_err(message).to_string();
        assert_eq!(error, message);
        assert_eq!(m.usage().live, [0; 5], "an error holds nothing back");
    }
}

fn f(m: &Memory, shape: &[usize]) -> Tensor {
    upload(m, DType::F32, vec![0.5; shape.iter().product()], shape)
}

fn wide(m: &Memory, shape: &[usize]) -> Tensor {
    upload(m, DType::F64, vec![0.5; shape.iter().product()], shape)
}

#[test]
fn shapes_and_views() {
    refused(
        |m| Tensor::from_vec(m, vec![1f32; 5], &[2, 3]),
        "from_slice: the data; found 5 elements, expected 6 for [2, 3]",
    );
    refused(
        |m| Tensor::from_bytes(m, DType::Bf16, &[2, 3], &[0; 11]),
        "from_bytes: the data; found 11 bytes, expected 12 for bf16 [2, 3]",
    );
    refused(
        |m| Tensor::zeros(m, DType::F32, &[1; 7]),
        "shape: [1, 1, 1, 1, 1, 1, 1] has 7 dimensions, at most 6",
    );
    refused(
        |m| Tensor::zeros(m, DType::F32, &[usize::MAX, 2]),
        &format!(
            "shape: [{}, 2] has more elements than can be addressed",
            usize::MAX
        ),
    );
    refused(
        |m| f(m, &[2, 3]).reshape(&[4, 2]),
        "reshape: the tensor; found [2, 3], expected 8 elements for [4, 2]",
    );
    refused(
        |m| f(m, &[2, 3]).t()?.reshape(&[6]),
        "the tensor [3, 2] is a strided view; call contiguous() before reading its elements",
    );
    refused(
        |m| f(m, &[2, 3]).permute(&[0, 0]),
        "permute: [0, 0] does not name each dimension of [2, 3] once",
    );
    refused(
        |m| f(m, &[2, 3]).permute(&[0, 7]),
        "permute: [0, 7] does not name each dimension of [2, 3] once",
    );
    refused(
        |m| f(m, &[3]).t(),
        "transpose: the tensor; found [3], expected at least [_, _]",
    );
    refused(
        |m| f(m, &[2, 3]).narrow(1, 2, 2),
        "narrow: dimension 1, 2 from 2, is not within [2, 3]",
    );
    refused(
        |m| f(m, &[2, 3]).narrow(1, usize::MAX, 1),
        &format!(
            "narrow: dimension 1, 1 from {}, is not within [2, 3]",
            usize::MAX
        ),
    );
    refused(
        |m| f(m, &[2, 3]).narrow(2, 0, 1),
        "narrow: dimension 2, 1 from 0, is not within [2, 3]",
    );
    refused(
        |m| f(m, &[2, 3]).expand(&[4, 3]),
        "expand: the tensor; found [2, 3], expected one that broadcasts to [4, 3]",
    );
    refused(
        |m| f(m, &[2, 3]).expand(&[3]),
        "expand: the tensor; found [2, 3], expected one that broadcasts to [3]",
    );
    refused(
        |m| f(m, &[2]).item(),
        "item: the tensor; found [2], expected one element",
    );
}

#[test]
fn reading_as_another_type() {
    let m = Memory::cpu();
    let mut x = f(&m, &[2]);
    assert_eq!(
        x.slice::<i64>().unwrap_err().to_string(),
        "read: the tensor [2] is f32, expected i64"
    );
    assert_eq!(
        x.slice_mut::<f64>().unwrap_err().to_string(),
        "write: the tensor [2] is f32, expected f64"
    );
    assert!(x.to_vec::<u8>().is_err());
    let view = f(&m, &[2, 2]).t().unwrap();
    assert_eq!(
        view.slice::<f32>().unwrap_err().to_string(),
        "the tensor [2, 2] is a strided view; call contiguous() before reading its elements"
    );
}

#[test]
fn elementwise() {
    refused(
        |m| ops::unary(m, Unary::Exp, &ids(m, &[1])),
        "unary: the input is i64, expected a float type",
    );
    refused(
        |m| ops::affine(m, &ids(m, &[1]), 1.0, 0.0),
        "affine: the input is i64, expected a float type",
    );
    refused(
        |m| ops::cast(m, &f(m, &[1]), DType::I32),
        "cast: the input is i32, expected a float type",
    );
    refused(
        |m| ops::unary_backward(m, Unary::Ln, None, &f(m, &[2])),
        "unary backward: Ln needs its Input",
    );
    refused(
        |m| ops::unary_backward(m, Unary::Ln, Some(&f(m, &[3])), &f(m, &[2])),
        "unary backward: the saved tensor; found [3], expected [2]",
    );
    refused(
        |m| ops::binary(m, Binary::Add, &f(m, &[2, 3]), &f(m, &[2])),
        "binary: the second input; found [2], expected one that broadcasts with [2, 3]",
    );
    refused(
        |m| ops::binary(m, Binary::Add, &f(m, &[2]), &wide(m, &[2])),
        "binary: the second input is f64, expected f32",
    );
    refused(
        |m| ops::binary(m, Binary::Add, &ids(m, &[2]), &ids(m, &[2])),
        "binary: the input is i64, expected a float type",
    );
    refused(
        |m| ops::glu(m, Glu::Swiglu, &f(m, &[2]), &f(m, &[3])),
        "glu: up; found [3], expected [2]",
    );
    refused(
        |m| ops::glu(m, Glu::Swiglu, &f(m, &[2]), &wide(m, &[2])),
        "glu: up is f64, expected f32",
    );
    refused(
        |m| ops::dropout(m, &f(m, &[2]), 1.0, Default::default()),
        "dropout: p is 1, not in [0, 1)",
    );
    refused(
        |m| ops::dropout(m, &f(m, &[2]), f64::NAN, Default::default()),
        "dropout: p is NaN, not in [0, 1)",
    );
    refused(
        |m| add_assign(&mut f(m, &[2]), &f(m, &[1])),
        "add in place: the addend; found [1], expected [2]",
    );
    refused(
        |m| ops::reduce_to_shape(m, &f(m, &[2, 3]), &Shape::new(&[2]).unwrap()),
        "sum over broadcast dimensions: the gradient; found [2, 3], expected one that [2] broadcasts to",
    );
}

#[test]
fn products() {
    refused(
        |m| ops::matmul(m, &f(m, &[2, 3]), &f(m, &[4, 5])),
        "matmul: the second input, for a first one [2, 3]; found [4, 5], expected [.., 3, _]",
    );
    refused(
        |m| ops::matmul(m, &f(m, &[3]), &f(m, &[3, 5])),
        "matmul: the second input, for a first one [3]; found [3, 5], expected two matrices",
    );
    refused(
        |m| ops::matmul(m, &f(m, &[2, 4, 3]), &f(m, &[5, 3, 1])),
        "matmul: the second input's leading dimensions; found [5, 3, 1], expected ones that \
         broadcast with [2, 4, 3]",
    );
    let p = Linear {
        layout: WeightLayout::OutIn,
        activation: None,
    };
    refused(
        |m| ops::linear(m, &p, &f(m, &[2, 3]), &f(m, &[5, 4]), None, false),
        "linear: the input, for a weight [5, 4]; found [2, 3], expected [.., 4]",
    );
    refused(
        |m| ops::linear(m, &p, &f(m, &[2, 3]), &f(m, &[3]), None, false),
        "linear: the weight; found [3], expected [out, in]",
    );
    refused(
        |m| {
            ops::linear(
                m,
                &p,
                &f(m, &[2, 4]),
                &f(m, &[5, 4]),
                Some(&f(m, &[4])),
                false,
            )
        },
        "linear: the bias; found [4], expected [5]",
    );
    refused(
        |m| ops::linear(m, &p, &f(m, &[]), &f(m, &[5, 4]), None, false),
        "linear: the input; found [], expected at least one dimension",
    );
    refused(
        |m| ops::linear(m, &p, &wide(m, &[4]), &f(m, &[5, 4]), None, false),
        "linear: the weight is f32, expected f64",
    );
    refused(
        |m| {
            let (x, dy) = (f(m, &[2, 3]), f(m, &[4, 5]));
            ops::weight_gradient(m, WeightLayout::OutIn, &x, &dy, DType::F32)
        },
        "linear backward: the gradient; found [4, 5], expected 2 rows",
    );
}

#[test]
fn reductions_and_norms() {
    refused(
        |m| ops::reduce(m, Reduce::Sum, &f(m, &[2, 3]), 2, false),
        "reduce: dimension 2 of [2, 3] does not exist",
    );
    refused(
        |m| ops::reduce(m, Reduce::Mean, &f(m, &[2, 0]), 1, false),
        "reduce: Mean over dimension 1 of [2, 0], which is empty",
    );
    refused(
        |m| ops::argmax(m, &f(m, &[2, 0])),
        "argmax: the input; found [2, 0], expected [.., 1 or more]",
    );
    let layer = |m: &Memory, x: &Tensor, r: Option<&Tensor>, w: Option<&Tensor>| {
        norm::layer_norm(m, x, r, w, None, 1e-5, false)
    };
    refused(
        |m| layer(m, &f(m, &[2, 3]), Some(&f(m, &[3])), None),
        "layer norm: the residual; found [3], expected [2, 3]",
    );
    refused(
        |m| layer(m, &f(m, &[2, 3]), None, Some(&f(m, &[2]))),
        "layer norm: the weight; found [2], expected [3]",
    );
    refused(
        |m| norm::rms_norm(m, &f(m, &[2, 3]), None, &wide(m, &[3]), 0.0, 1e-5, false),
        "rms norm: the weight is f64, expected f32",
    );
    refused(
        |m| norm::softmax(m, &f(m, &[]), false),
        "softmax: the input; found [], expected at least one dimension",
    );
    refused(
        |m| norm::softmax_backward(m, &f(m, &[2, 3]), &f(m, &[2, 2]), false),
        "softmax backward: the gradient; found [2, 2], expected [2, 3]",
    );
}

#[test]
fn indices_and_blocks() {
    let gather = |m: &Memory, index: &[i64]| ops::gather_rows(m, &f(m, &[4, 2]), &ids(m, index));
    refused(
        |m| gather(m, &[0, 3, 4]),
        "gather rows: index 4 at position 2 is outside 0..4",
    );
    refused(
        |m| gather(m, &[-1]),
        "gather rows: index -1 at position 0 is outside 0..4",
    );
    refused(
        |m| ops::gather_rows(m, &f(m, &[4]), &ids(m, &[0])),
        "gather rows: the table; found [4], expected [rows, columns]",
    );
    refused(
        |m| ops::gather_rows(m, &f(m, &[4, 2]), &f(m, &[1])),
        "gather rows: the index is f32, expected i64",
    );
    refused(
        |m| ops::scatter_add_rows(m, &f(m, &[2, 3]), &ids(m, &[0]), 4),
        "scatter rows: the gradient; found [2, 3], expected [1, 3]",
    );
    refused(|m| ops::concat(m, &[], 0), "concat: no tensors to join");
    refused(
        |m| ops::concat(m, &[&f(m, &[2])], 1),
        "concat: dimension 1 of [2] does not exist",
    );
    refused(
        |m| ops::concat(m, &[&f(m, &[2, 3]), &f(m, &[2, 4])], 0),
        "concat: a part; found [2, 4], expected [2, 3] except in dimension 0",
    );
    refused(
        |m| ops::concat(m, &[&f(m, &[2]), &wide(m, &[2])], 0),
        "concat: a part is f64, expected f32",
    );
    let shape = Shape::new(&[4, 3]).unwrap();
    refused(
        |m| ops::place(m, &f(m, &[2, 3]), &shape, 0, 3),
        "place: the block; found [2, 3], expected a block within [4, 3] at 3 of dimension 0",
    );
    let far = format!(
        "place: the block; found [2, 3], expected a block within [4, 3] at {} of dimension 0",
        usize::MAX
    );
    refused(
        |m| ops::place(m, &f(m, &[2, 3]), &shape, 0, usize::MAX),
        &far,
    );
}

#[test]
fn offsets_of_sequences() {
    let pool =
        |m: &Memory, offsets: &[i64]| ops::pool(m, Pool::Mean, &f(m, &[5, 2]), &ids(m, offsets));
    let said = |found: &str| {
        format!("pool: sequence offsets must rise from 0 to 5 without falling: {found}")
    };
    for (offsets, found) in [
        (&[0, 3][..], "[0, 3]"),
        (&[1, 5], "[1, 5]"),
        (&[0, 4, 3, 5], "[0, 4, 3, 5]"),
        (&[0, -1, 5], "[0, -1, 5]"),
        (&[], "[]"),
        (&[0, 9, 1, 1, 1, 1, 1, 1, 5], "[0, 9, 1, 1, 1, 1, 1, 1] ..."),
    ] {
        refused(|m| pool(m, offsets), &said(found));
    }
    refused(
        |m| pool(m, &[0, 2, 2, 5]),
        "pool: sequence 1 has no tokens to take the Mean of",
    );
    refused(
        |m| ops::pool(m, Pool::Max, &f(m, &[5, 2]), &f(m, &[2])),
        "pool: the offsets is f32, expected i64",
    );
    refused(
        |m| ops::pool(m, Pool::Max, &f(m, &[5]), &ids(m, &[0, 5])),
        "pool: the input; found [5], expected [tokens, columns]",
    );
    refused(
        |m| ops::pool_backward(m, Pool::Max, None, &ids(m, &[0, 5]), &f(m, &[1, 2])),
        "pool backward: the maximum needs its input",
    );
    refused(
        |m| ops::pool_backward(m, Pool::Mean, None, &ids(m, &[0, 5]), &f(m, &[2, 2])),
        "pool backward: the gradient; found [2, 2], expected [1, columns]",
    );
    assert!(
        ops::pool_backward(
            &Memory::cpu(),
            Pool::Mean,
            None,
            &ids(&Memory::cpu(), &[0, -1]),
            &f(&Memory::cpu(), &[1, 2])
        )
        .is_err()
    );
}

#[test]
fn attention() {
    let attend = |m: &Memory, p: Attention, q: &[usize], k: &[usize], offsets: &[i64]| {
        let (q, k) = (f(m, q), f(m, k));
        ops::attention(m, &p, &q, &k, &k, &ids(m, offsets))
    };
    let p = Attention::bidirectional(2, 4);
    let fit: (&[usize], &[usize], &[i64]) = (&[3, 8], &[3, 8], &[0, 3]);
    let with = |p: Attention| move |m: &Memory| attend(m, p, fit.0, fit.1, fit.2);
    refused(
        with(Attention {
            heads: 2,
            kv_heads: 0,
            ..p
        }),
        "attention: 2 query heads cannot share 0 key heads",
    );
    refused(
        with(Attention {
            heads: 4,
            kv_heads: 3,
            ..p
        }),
        "attention: 4 query heads cannot share 3 key heads",
    );
    refused(
        with(Attention { dropout: 1.0, ..p }),
        "attention: dropout is 1, not in [0, 1)",
    );
    refused(
        with(Attention {
            window: Some(0),
            ..p
        }),
        "attention: a window of 0 leaves nothing to attend to",
    );
    refused(
        |m| attend(m, p, &[3, 7], &[3, 7], &[0, 3]),
        "attention: the query; found [3, 7], expected [tokens, 2 heads x head_dim]",
    );
    refused(
        |m| attend(m, p, &[3, 8], &[2, 8], &[0, 3]),
        "attention: the key; found [2, 8], expected [3, 8]",
    );
    refused(
        |m| attend(m, p, &[3, 8], &[3, 8], &[0, 2]),
        "attention: sequence offsets must rise from 0 to 3 without falling: [0, 2]",
    );
    refused(
        |m| {
            let (q, k) = (f(m, &[3, 8]), wide(m, &[3, 8]));
            ops::attention(m, &p, &q, &k, &k, &ids(m, &[0, 3]))
        },
        "attention: the key is f64, expected f32",
    );
}

#[test]
fn positions_and_losses() {
    let p = Rope {
        heads: 2,
        rotary_dim: 4,
        interleaved: false,
    };
    let turn = |m: &Memory, p: Rope, x: &[usize], table: &[usize], positions: &[i64]| {
        let table = f(m, table);
        rope(m, &p, &f(m, x), &table, &table, &ids(m, positions), false)
    };
    refused(
        |m| turn(m, p, &[2, 8], &[9, 2], &[0, 9]),
        "rope: index 9 at position 1 is outside 0..9",
    );
    refused(
        |m| turn(m, p, &[2, 8], &[9, 3], &[0, 1]),
        "rope: cos; found [9, 3], expected [positions, 2]",
    );
    refused(
        |m| turn(m, p, &[2, 8], &[9, 2], &[0]),
        "rope: the positions; found [1], expected [2]",
    );
    refused(
        |m| turn(m, Rope { rotary_dim: 6, ..p }, &[2, 8], &[9, 3], &[0, 1]),
        "rope: the input; found [2, 8], expected 2 heads of at least 6",
    );
    let entropy = |m: &Memory, logits: &[usize], targets: &[i64], smoothing| {
        loss::cross_entropy(m, &f(m, logits), &ids(m, targets), smoothing)
    };
    refused(
        |m| entropy(m, &[2, 3], &[0, 3], 0.0),
        "cross-entropy: index 3 at position 1 is outside 0..3",
    );
    refused(
        |m| entropy(m, &[2, 3], &[-100, -1], 0.0),
        "cross-entropy: index -1 at position 1 is outside 0..3",
    );
    refused(
        |m| entropy(m, &[2, 3], &[0], 0.0),
        "cross-entropy: the targets; found [1], expected [2]",
    );
    refused(
        |m| entropy(m, &[2, 3, 1], &[0; 6], 0.0),
        "cross-entropy: the logits; found [2, 3, 1], expected [rows, classes]",
    );
    refused(
        |m| entropy(m, &[2, 3], &[0, 1], 1.0),
        "cross-entropy: smoothing is 1, not in [0, 1)",
    );
    let fused = |m: &Memory, w: &[usize], b: Option<&[usize]>, targets: &[i64]| {
        let b = b.map(|b| f(m, b));
        loss::linear_cross_entropy(
            m,
            &f(m, &[2, 4]),
            &f(m, w),
            b.as_ref(),
            &ids(m, targets),
            0.0,
            None,
            [false; 3],
        )
    };
    refused(
        |m| {
            let (x, w) = (f(m, &[2, 4]), f(m, &[5, 4]));
            let targets = ids(m, &[0, 0]);
            loss::linear_cross_entropy(m, &x, &w, None, &targets, 0.0, Some(0.0), [false; 3])
        },
        "linear cross-entropy: the cap of the logits is 0, not above 0",
    );
    refused(
        |m| fused(m, &[5, 3], None, &[0, 0]),
        "linear cross-entropy: the weight; found [5, 3], expected [classes, 4]",
    );
    refused(
        |m| fused(m, &[5, 4], None, &[0, 5]),
        "linear cross-entropy: index 5 at position 1 is outside 0..5",
    );
    refused(
        |m| fused(m, &[5, 4], Some(&[4]), &[0, 0]),
        "linear: the bias; found [4], expected [5]",
    );
    refused(
        |m| loss::bce_with_logits(m, &f(m, &[2]), &f(m, &[3])),
        "binary cross-entropy: the targets; found [3], expected [2]",
    );
}

#[test]
fn optimizers() {
    let p = AdamW {
        lr: 0.1,
        beta1: 0.9,
        beta2: 0.99,
        eps: 1e-8,
        weight_decay: 0.0,
        step: 1,
        grad_scale: 1.0,
    };
    let step = |m: &Memory, g: &[usize], moment: &[usize]| {
        adamw(
            &p,
            &mut f(m, &[2]),
            &f(m, g),
            &mut f(m, moment),
            &mut f(m, &[2]),
        )
    };
    refused(
        |m| step(m, &[3], &[2]),
        "adamw: the gradient; found [3], expected [2]",
    );
    refused(
        |m| step(m, &[2], &[3]),
        "adamw: the first moment; found [3], expected [2]",
    );
}

#[test]
fn kept_keys() {
    let cached = |m: &Memory, starts: &[i64], lengths: &[i64], causal: bool| {
        let p = Attention {
            causal,
            ..Attention::bidirectional(2, 3)
        };
        let kept = ops::Kept { starts, lengths };
        let (q, k) = (f(m, &[3, 6]), f(m, &[8, 6]));
        ops::attention_cached(m, &p, &q, &k, &k, &ids(m, &[0, 1, 3]), kept)
    };
    refused(
        |m| cached(m, &[0, 4], &[4, 5], true),
        "cached attention: sequence 1 has 2 queries and 5 keys from row 4 of 8",
    );
    refused(
        |m| cached(m, &[0, 4], &[4, 1], true),
        "cached attention: sequence 1 has 2 queries and 1 keys from row 4 of 8",
    );
    refused(
        |m| cached(m, &[-1, 4], &[4, 4], true),
        "cached attention: sequence 0 has 1 queries and 4 keys from row -1 of 8",
    );
    refused(
        |m| cached(m, &[0], &[4], true),
        "cached attention: 1 starts and 1 lengths of keys for 2 sequences",
    );
    refused(
        |m| cached(m, &[0, 4], &[4, 4], false),
        "cached attention: it is causal and without dropout",
    );
    let write = |m: &Memory, first: usize, shape: &[usize]| {
        ops::write_rows(m, &mut f(m, &[4, 6]), first, &f(m, shape))
    };
    refused(
        |m| write(m, 3, &[2, 6]),
        "write rows: rows 3..5 of a table of 4",
    );
    refused(
        |m| write(m, 0, &[2, 5]),
        "write rows: the rows; found [2, 5], expected [_, 6]",
    );
}
