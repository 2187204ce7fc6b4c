//! Which instruction set is measured: the best of this processor, or one that an argument names.

use graft_kernels::gemm::Isa;

/// The instruction set named among the arguments (`portable`, `neon`, `avx2`, `avx512`, `avx512bf16`), which is taken out
/// of them; the best one if there is none.
pub fn instructions(arguments: &mut Vec<String>) -> Isa {
    let named = |isa: &Isa, argument: &String| format!("{isa:?}").to_lowercase() == *argument;
    let all = Isa::available();
    let asked = |isa: &&Isa| arguments.iter().any(|argument| named(isa, argument));
    let isa = all.iter().find(asked).copied().unwrap_or_else(Isa::detect);
    arguments.retain(|argument| !named(&isa, argument));
    isa
}
