//! Which instruction set is measured: the best of this processor, or one that an argument names.

use graft_kernels::gemm::Isa;

/// The instruction set named among the program's arguments (`portable`, `neon`, `avx2`, `avx512`, `avx512bf16`), the best
/// one if there is none, and the other arguments, without what begins with two dashes.
pub fn instructions() -> (Isa, Vec<String>) {
    let arguments = std::env::args().skip(1);
    let mut arguments: Vec<String> = arguments.filter(|x| !x.starts_with("--")).collect();
    let named = |isa: &Isa, argument: &String| format!("{isa:?}").to_lowercase() == *argument;
    let all = Isa::available();
    let asked = |isa: &&Isa| arguments.iter().any(|argument| named(isa, argument));
    let isa = all.iter().find(asked).copied().unwrap_or_else(Isa::detect);
    arguments.retain(|argument| !named(&isa, argument));
    (isa, arguments)
}
