//! Which kernels are chosen, and what workspace they are given.

use super::*;

fn layout(scalar: Scalar, rows: usize, cols: usize, transposed: bool) -> Layout {
    let (row_stride, col_stride) = if transposed { (1, rows) } else { (cols, 1) };
    Layout {
        scalar,
        rows,
        cols,
        row_stride,
        col_stride,
        aligned: true,
    }
}

fn products(a: Layout, b: Layout, operands: Operands) -> Products {
    let batch = Batch {
        count: 1,
        a_stride: 0,
        b_stride: 0,
        c_stride: a.rows * b.cols,
    };
    let c = Scalar::F32;
    Products {
        kernels: Kernels::Auto,
        operands,
        batch,
        a,
        b,
        c,
    }
}

#[test]
fn operands_in_place_need_no_workspace() {
    for scalar in [Scalar::F32, Scalar::Bf16] {
        for order in 0..4 {
            let a = layout(scalar, 4096, 768, order & 1 > 0);
            let b = layout(scalar, 768, 3072, order & 2 > 0);
            let plan = products(a, b, Operands::AsStored)
                .plan(Target::Sm80)
                .unwrap();
            assert_eq!((plan.workspace, plan.splits), (0, 1));
            assert_eq!(plan.scalar, scalar);
            assert_eq!(plan.a.along_depth, order & 1 == 0);
            assert_eq!(plan.b.along_depth, order & 2 > 0);
        }
    }
}

#[test]
fn what_tensor_cores_cannot_read_is_copied() {
    let b = layout(Scalar::Bf16, 50, 64, false);
    // Rows of 50 bf16 do not begin on 16-byte boundaries; in f32, or without chunks, they may.
    let a = layout(Scalar::Bf16, 300, 50, false);
    let plan = |a, target| products(a, b, Operands::Bf16).plan(target).unwrap();
    let packed = plan(a, Target::Sm80).a;
    assert_eq!((packed.step, packed.along_depth), (56, true));
    assert_eq!(packed.packed.unwrap().cols, 50);
    assert_eq!(
        plan(a, Target::Sm80).workspace,
        300 * 56 * 2 / 256 * 256 + 256
    );
    assert_eq!(plan(a, Target::Sm70).a.packed, None);
    // f32 is rounded on its way.
    let wide = layout(Scalar::F32, 300, 50, true);
    let packed = plan(wide, Target::Sm70).a;
    assert_eq!((packed.step, packed.along_depth), (304, false));
    let rows = packed.packed.unwrap();
    assert_eq!((rows.rows, rows.cols, rows.row_stride), (50, 300, 300));
    // No unit stride at all.
    let gaps = Layout {
        row_stride: 200,
        col_stride: 2,
        ..layout(Scalar::F32, 300, 50, false)
    };
    let b = layout(Scalar::F32, 50, 64, false);
    let plan = products(gaps, b, Operands::AsStored).plan(Target::Sm80);
    assert_eq!(plan.unwrap().a.packed.unwrap().col_stride, 2);
}

#[test]
fn splits_cover_k_and_fill_the_device() {
    for tiles in [1, 6, 36, 100, 264, 265, 5000] {
        for k in [0, 1, 63, 64, 65, 512, 768, 3072, 50257, 65536] {
            let (splits, depth) = split(tiles, k, 264);
            assert!(splits * depth >= k && (splits - 1) * depth < k.max(1));
            assert!(depth.is_multiple_of(DEPTH));
            assert!(
                splits == 1 || tiles * splits <= 5 * 264,
                "{tiles} {k} {splits}"
            );
        }
    }
    let (splits, _) = split(36, 65536, 264);
    assert_eq!(splits, 7, "one wave of the gradient of a 768 x 768 weight");
    assert_eq!(split(512, 768, 264).0, 1);
    assert_eq!(
        split(96, 65536, 132).0,
        4,
        "nearly three waves, not most of one"
    );
}

#[test]
fn kernels_are_chosen_by_sizes_and_alignment() {
    let path = |m, n, k, target, kernels| {
        let a = layout(Scalar::Bf16, m, k, false);
        let b = layout(Scalar::Bf16, k, n, false);
        let mut products = products(a, b, Operands::Bf16);
        (products.c, products.kernels) = (Scalar::Bf16, kernels);
        products.plan(target).unwrap().path
    };
    let auto = |m, n, k| path(m, n, k, Target::Sm90a, Kernels::Auto);
    assert_eq!(auto(4096, 768, 768), Path::Hopper);
    // Rows of A and B that do not begin on 16-byte boundaries are copied.
    assert_eq!(auto(4096, 1105, 1103), Path::Hopper);
    assert_eq!(auto(4096, 768, 0), Path::TensorCores);
    assert_eq!(auto(4096, 17, 768), Path::TensorCores);
    assert_eq!(auto(4096, 16, 768), Path::FewColumns);
    assert_eq!(auto(16, 4096, 768), Path::FewRows);
    assert_eq!(path(8, 8, 8, Target::Sm70, Kernels::Auto), Path::Simple);
    let large = |target, kernels| path(4096, 768, 768, target, kernels);
    let general = Kernels::General;
    assert_eq!(large(Target::Sm90a, general), Path::TensorCores);
    assert_eq!(large(Target::Sm80, Kernels::Hopper), Path::TensorCores);
    assert_eq!(large(Target::Sm70, Kernels::Auto), Path::Simple);
    assert_eq!(large(Target::Sm80, Kernels::CublasLt), Path::Library);
    assert_eq!(large(Target::Sm90a, Kernels::Simt), Path::Hopper);
}

#[test]
fn f32_is_split_where_that_is_faster() {
    let b = layout(Scalar::F32, 50, 64, true);
    let plan = |cols, kernels, target| {
        let a = layout(Scalar::F32, 300, cols, false);
        let b = Layout { rows: cols, ..b };
        let b = Layout {
            col_stride: cols,
            ..b
        };
        let products = products(a, b, Operands::AsStored);
        let plan = Products {
            kernels,
            ..products
        }
        .plan(target)
        .unwrap();
        (plan.path, plan.a.packed.is_some(), plan.workspace)
    };
    // Rows of 50 f32 do not begin on 16-byte boundaries; rows of 52 do.
    let split = plan(50, Kernels::Auto, Target::Sm80);
    assert_eq!((split.0, split.1), (Path::TensorCores, true));
    let in_place = (Path::TensorCores, false, 0);
    for kernels in [Kernels::Auto, Kernels::General, Kernels::Hopper] {
        assert_eq!(plan(52, kernels, Target::Sm90a), in_place);
    }
    let simple = (Path::Simple, false, 0);
    assert_eq!(plan(1 << 27, Kernels::Auto, Target::Sm80).0, Path::Simple);
    assert_eq!(plan(50, Kernels::Auto, Target::Sm70), simple);
    assert_eq!(plan(50, Kernels::Simt, Target::Sm80), simple);
    for (kernels, capability, expected) in [
        (Kernels::Auto, (8, 0), Kernels::Auto),
        (Kernels::Auto, (9, 0), Kernels::Auto),
        (Kernels::Auto, (8, 6), Kernels::Simt),
        (Kernels::Auto, (12, 0), Kernels::Simt),
        (Kernels::General, (8, 6), Kernels::General),
    ] {
        assert_eq!(kernels.on(capability), expected);
    }
}

#[test]
fn types_without_kernels_are_refused() {
    let a = layout(Scalar::F16, 8, 8, false);
    let b = layout(Scalar::F32, 8, 8, false);
    let error = products(a, b, Operands::AsStored).workspace(Target::Sm80);
    assert!(matches!(error, Err(Error::Scalar { .. })));
}
