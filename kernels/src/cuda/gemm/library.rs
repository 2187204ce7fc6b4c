//! Products by NVIDIA's cuBLASLt, where the library is found at run time. It is asked for plain
//! products alone, and only for ways that add in a fixed order.

use std::collections::HashMap;
use std::ffi::c_void;
use std::fmt;
use std::mem::size_of_val;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use cudarc::cublaslt::sys::{self, cublasStatus_t as Status};

use super::Sums;
use super::plan::{LIBRARY_ROOM, Operand, Plan};
use crate::cuda::environment::{self, variable};
use crate::cuda::{Error, Gpu, Result, Scalar};

/// The library, with the ways that it proposed for products so far.
pub(in crate::cuda) struct Library {
    handle: sys::cublasLtHandle_t,
    ways: Mutex<HashMap<Key, Way>>,
}

// SAFETY: the library may be called from any thread; what changes is behind a lock.
unsafe impl Send for Library {}
// SAFETY: as above.
unsafe impl Sync for Library {}

impl fmt::Debug for Library {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("cuBLASLt")
    }
}

/// What a way is found by: everything about a product but its addresses.
#[derive(PartialEq, Eq, Hash, Clone, Copy)]
struct Key {
    sizes: [usize; 3],
    along_depth: [bool; 2],
    steps: [usize; 2],
    batches: usize,
    strides: [usize; 3],
    types: [Scalar; 2],
}

/// How a product is done. The descriptions are never freed: there are as many as kinds of products.
struct Way {
    product: sys::cublasLtMatmulDesc_t,
    first: sys::cublasLtMatrixLayout_t,
    second: sys::cublasLtMatrixLayout_t,
    result: sys::cublasLtMatrixLayout_t,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

fn check(call: &'static str, status: Status) -> Result<()> {
    if status == Status::CUBLAS_STATUS_SUCCESS {
        return Ok(());
    }
    let text = format!("{status:?}");
    Err(Error::Call { call, text })
}

/// Calls a function of the library and checks what it returns.
macro_rules! call {
    ($function:ident($($arg:expr),* $(,)?)) => {
        check(stringify!($function), sys::$function($($arg),*))
    };
}

impl Library {
    /// The library that the system's loader finds, or the file that the variable GRAFT_CUBLASLT
    /// names, for the device that is this thread's.
    ///
    /// # Errors
    /// No such library, or one that does not start.
    pub fn load() -> Result<Library> {
        let missing = |what: String| Error::Unsupported {
            kernel: "cuBLASLt",
            what,
        };
        if let Some(file) = variable("GRAFT_CUBLASLT") {
            // SAFETY: NVIDIA's library, whose initialisers have no conditions.
            let library = unsafe { environment::library(Path::new(&file)) };
            // For as long as the process lives: what follows finds it by its name.
            std::mem::forget(library.map_err(missing)?);
        }
        // SAFETY: it only tries to load libraries of that name. Any other function would panic if
        // there is none.
        if !unsafe { sys::is_culib_present() } {
            return Err(missing(
                "the library was not found; name its file in GRAFT_CUBLASLT, or leave out \
                 GRAFT_GEMM=cublaslt"
                    .into(),
            ));
        }
        let mut handle = std::ptr::null_mut();
        // SAFETY: a valid pointer.
        unsafe { call!(cublasLtCreate(&mut handle))? };
        Ok(Library {
            handle,
            ways: Mutex::default(),
        })
    }

    /// The products of a plan, whose operands are at `a` and `b`. `room`: [`LIBRARY_ROOM`] bytes.
    pub(super) fn multiply(
        &self,
        gpu: &Gpu,
        plan: &Plan,
        batches: usize,
        a: u64,
        b: u64,
        sums: &Sums,
        room: u64,
    ) -> Result<()> {
        let key = Key {
            sizes: [plan.m, plan.n, plan.k],
            along_depth: [plan.a.along_depth, plan.b.along_depth],
            steps: [plan.a.step, plan.b.step],
            batches,
            strides: [plan.a.batch, plan.b.batch, sums.c_batch],
            types: [plan.scalar, sums.scalar()],
        };
        gpu.enter()?;
        let mut ways = self.ways.lock().unwrap_or_else(PoisonError::into_inner);
        let way = match ways.get(&key) {
            Some(way) => way,
            None => {
                let way = self.way(plan, batches, &key)?;
                ways.entry(key).or_insert(way)
            }
        };
        let one = 1f32;
        let old = f32::from(u8::from(sums.accumulate));
        // SAFETY: descriptions that `way` made, and addresses of as many elements as they say.
        unsafe {
            call!(cublasLtMatmul(
                self.handle,
                way.product,
                (&raw const one).cast(),
                b as *const c_void,
                way.first,
                a as *const c_void,
                way.second,
                (&raw const old).cast(),
                sums.c as *const c_void,
                way.result,
                sums.c as *mut c_void,
                way.result,
                &way.algorithm,
                room as *mut c_void,
                LIBRARY_ROOM,
                gpu.stream().cast(),
            ))
        }
    }

    /// Asks the library how it would do it. It counts columns first, so that it computes the
    /// transpose of C from those of B and A.
    fn way(&self, plan: &Plan, batches: usize, key: &Key) -> Result<Way> {
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        use sys::cublasLtMatmulPreferenceAttributes_t as Preference;
        let Plan { m, n, k, .. } = *plan;
        // CUBLAS_OP_N and CUBLAS_OP_T
        let transposed = |yes: bool| i32::from(yes);
        // The transpose of a row-major matrix is what the library finds in its place.
        let (turn_b, turn_a) = (
            transposed(plan.b.along_depth),
            transposed(!plan.a.along_depth),
        );
        let operand = |x: &Operand, side: usize| {
            let (inner, outer) = if x.along_depth { (k, side) } else { (side, k) };
            layout(
                plan.scalar,
                [inner, outer],
                x.step.max(inner),
                batches,
                x.batch,
            )
        };
        let (first, second) = (operand(&plan.b, n)?, operand(&plan.a, m)?);
        let result = layout(key.types[1], [n, m], n, batches, key.strides[2])?;
        let mut product = std::ptr::null_mut();
        let mut preference = std::ptr::null_mut();
        // SAFETY: valid pointers, descriptions that live, attributes with the sizes that they have.
        unsafe {
            call!(cublasLtMatmulDescCreate(
                &mut product,
                sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
                sys::cudaDataType_t::CUDA_R_32F,
            ))?;
            for (attribute, value) in [
                (Attribute::CUBLASLT_MATMUL_DESC_TRANSA, turn_b),
                (Attribute::CUBLASLT_MATMUL_DESC_TRANSB, turn_a),
            ] {
                call!(cublasLtMatmulDescSetAttribute(
                    product,
                    attribute,
                    (&raw const value).cast(),
                    size_of_val(&value),
                ))?;
            }
            call!(cublasLtMatmulPreferenceCreate(&mut preference))?;
            // Partial sums in f32 that are added in order; never in place, by whoever comes first.
            let reductions = 2u32;
            let room = LIBRARY_ROOM;
            let words = [
                (
                    Preference::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
                    (&raw const reductions).cast(),
                    size_of_val(&reductions),
                ),
                (
                    Preference::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                    (&raw const room).cast(),
                    size_of_val(&room),
                ),
            ];
            let align = 16u32;
            let alignments = [
                Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
                Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
                Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
                Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
            ]
            .map(|name| (name, (&raw const align).cast(), size_of_val(&align)));
            for (attribute, value, size) in words.into_iter().chain(alignments) {
                call!(cublasLtMatmulPreferenceSetAttribute(
                    preference, attribute, value, size,
                ))?;
            }
            let mut found: sys::cublasLtMatmulHeuristicResult_t = std::mem::zeroed();
            let mut count = 0;
            let status = call!(cublasLtMatmulAlgoGetHeuristic(
                self.handle,
                product,
                first,
                second,
                result,
                result,
                preference,
                1,
                &mut found,
                &mut count,
            ));
            sys::cublasLtMatmulPreferenceDestroy(preference);
            status?;
            if count == 0 {
                return Err(Error::Unsupported {
                    kernel: "cuBLASLt",
                    what: format!("it knows no way for a product of {m} x {k} and {k} x {n}"),
                });
            }
            Ok(Way {
                product,
                first,
                second,
                result,
                algorithm: found.algo,
            })
        }
    }
}

/// `batches` matrices of columns that are `step` elements apart.
fn layout(
    scalar: Scalar,
    [rows, columns]: [usize; 2],
    step: usize,
    batches: usize,
    stride: usize,
) -> Result<sys::cublasLtMatrixLayout_t> {
    use sys::cublasLtMatrixLayoutAttribute_t as Attribute;
    let data_type = match scalar {
        Scalar::Bf16 => sys::cudaDataType_t::CUDA_R_16BF,
        _ => sys::cudaDataType_t::CUDA_R_32F,
    };
    let (count, offset) = (batches as i32, stride as i64);
    let mut layout = std::ptr::null_mut();
    // SAFETY: valid pointers, and attributes with the sizes that they have.
    unsafe {
        call!(cublasLtMatrixLayoutCreate(
            &mut layout,
            data_type,
            rows as u64,
            columns as u64,
            step as i64,
        ))?;
        call!(cublasLtMatrixLayoutSetAttribute(
            layout,
            Attribute::CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT,
            (&raw const count).cast(),
            size_of_val(&count),
        ))?;
        call!(cublasLtMatrixLayoutSetAttribute(
            layout,
            Attribute::CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET,
            (&raw const offset).cast(),
            size_of_val(&offset),
        ))?;
    }
    Ok(layout)
}

impl Drop for Library {
    fn drop(&mut self) {
        // SAFETY: made by `load`, and not used again.
        unsafe { sys::cublasLtDestroy(self.handle) };
    }
}
