//! The sources of the kernels and the PTX that was made of them.

use std::borrow::Cow;
use std::path::Path;

use sha2::{Digest, Sha256};

use super::environment::{named, variable};
use super::{Result, nvrtc};

/// What PTX is made for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, PartialOrd, Ord)]
pub enum Target {
    /// Volta and later: no tensor cores
    Sm70,
    /// Ampere and later: `mma.sync` in bf16, asynchronous copies
    Sm80,
    /// Hopper alone: `wgmma`, the tensor copy engine
    Sm90a,
}

impl Target {
    /// Every target.
    pub const ALL: [Target; 3] = [Target::Sm70, Target::Sm80, Target::Sm90a];

    /// The best target for a device of this compute capability.
    pub fn of(major: i32, minor: i32) -> Option<Target> {
        match (major, minor) {
            (9, 0) => Some(Target::Sm90a),
            (8.., _) => Some(Target::Sm80),
            (7, _) => Some(Target::Sm70),
            _ => None,
        }
    }

    /// An older one than this if the variable GRAFT_CUDA_TARGET names it: devices run what was made
    /// for older ones, so that tests on one reach every kernel.
    ///
    /// # Errors
    /// Another name.
    pub(super) fn wanted(self) -> Result<Target> {
        let older = || Target::ALL.into_iter().filter(|target| *target <= self);
        let names = older().map(Target::architecture).collect::<Vec<_>>();
        let find = |name: &str| older().find(|target| target.architecture() == name);
        let found = named("GRAFT_CUDA_TARGET", &names.join(" or "), find)?;
        Ok(found.unwrap_or(self))
    }

    /// The compiler's name of it.
    pub fn architecture(self) -> &'static str {
        match self {
            Target::Sm70 => "compute_70",
            Target::Sm80 => "compute_80",
            Target::Sm90a => "compute_90a",
        }
    }
}

/// A source file with what was made of it.
#[derive(Clone, Copy, Debug)]
pub struct Source {
    /// Name of the file, without `.cu`
    pub name: &'static str,
    /// Its text
    pub text: &'static str,
    /// PTX for each target that it is written for, in rising order; empty before it is made for the
    /// first time
    pub ptx: &'static [(Target, &'static str)],
}

macro_rules! sources {
    ($($name:literal for $($target:ident $architecture:literal)+;)*) => {
        /// Every source of kernels.
        pub const SOURCES: &[Source] = &[$(Source {
            name: $name,
            text: include_str!(concat!("../", $name, ".cu")),
            ptx: &[$((
                Target::$target,
                include_str!(concat!("ptx/", $name, ".", $architecture, ".ptx")),
            )),+],
        }),*];
    };
}

// What a later device can do better is a further target of the source, or a source for it alone.
sources! {
    "activation" for Sm70 "compute_70" Sm80 "compute_80";
    "attention_backward" for Sm80 "compute_80" Sm90a "compute_90a";
    "attention_backward_hopper" for Sm90a "compute_90a";
    "attention_cached" for Sm70 "compute_70";
    "attention_forward" for Sm80 "compute_80" Sm90a "compute_90a";
    "attention_forward_hopper" for Sm90a "compute_90a";
    "attention_simt" for Sm70 "compute_70";
    "binary" for Sm70 "compute_70" Sm80 "compute_80";
    "copy" for Sm70 "compute_70" Sm80 "compute_80";
    "cross_entropy" for Sm70 "compute_70" Sm80 "compute_80";
    "dropout" for Sm70 "compute_70" Sm80 "compute_80";
    "gemm" for Sm70 "compute_70" Sm80 "compute_80";
    "gemm_hopper" for Sm90a "compute_90a";
    "index" for Sm70 "compute_70" Sm80 "compute_80";
    "norm" for Sm70 "compute_70" Sm80 "compute_80";
    "norm_held" for Sm70 "compute_70" Sm80 "compute_80";
    "optimizer" for Sm70 "compute_70" Sm80 "compute_80";
    "pool" for Sm70 "compute_70" Sm80 "compute_80";
    "quantised" for Sm70 "compute_70" Sm80 "compute_80";
    "reduce" for Sm70 "compute_70" Sm80 "compute_80";
    "rope" for Sm70 "compute_70" Sm80 "compute_80";
    "softcap" for Sm70 "compute_70" Sm80 "compute_80";
    "softmax" for Sm70 "compute_70" Sm80 "compute_80";
}

/// The headers that sources include, by the name that they are included under.
pub const HEADERS: &[(&str, &str)] = &[
    ("activation.cuh", include_str!("activation.cuh")),
    ("attention.cuh", include_str!("attention.cuh")),
    ("attention_hopper.cuh", include_str!("attention_hopper.cuh")),
    (
        "attention_pipeline.cuh",
        include_str!("attention_pipeline.cuh"),
    ),
    ("attention_tensor.cuh", include_str!("attention_tensor.cuh")),
    ("common.cuh", include_str!("common.cuh")),
    ("gemm_stages.cuh", include_str!("gemm_stages.cuh")),
    ("half.cuh", include_str!("half.cuh")),
    ("pack.cuh", include_str!("pack.cuh")),
    ("ptx.cuh", include_str!("ptx.cuh")),
    ("rows.cuh", include_str!("rows.cuh")),
    ("hopper.cuh", include_str!("hopper.cuh")),
    ("hopper_sums.cuh", include_str!("hopper_sums.cuh")),
    ("product.cuh", include_str!("product.cuh")),
];

impl Source {
    /// The source of this name.
    pub fn find(name: &str) -> Option<&'static Source> {
        SOURCES.iter().find(|source| source.name == name)
    }

    /// The PTX for exactly this target.
    pub fn ptx(&self, target: Target) -> Option<&'static str> {
        let found = self.ptx.iter().find(|(of, _)| *of == target);
        found.map(|(_, ptx)| *ptx)
    }

    /// The best of the source's targets that a device of `target` runs.
    pub fn best(&self, target: Target) -> Target {
        let possible = self
            .ptx
            .iter()
            .map(|(of, _)| *of)
            .filter(|of| *of <= target);
        possible.max().unwrap_or(target)
    }

    /// The PTX that a device of `target` is to run: what was committed, or, where the variable
    /// GRAFT_CUDA_COMPILE says so, what the compiler library makes of the source now.
    ///
    /// # Errors
    /// No compiler library, or a source that it refuses.
    pub fn code(&self, target: Target) -> Result<Cow<'static, str>> {
        let target = self.best(target);
        match variable("GRAFT_CUDA_COMPILE") {
            None => Ok(self.ptx(target).unwrap_or_default().into()),
            Some(cache) => nvrtc::cached(Path::new(&cache), self, target).map(Cow::from),
        }
    }

    /// The headers that the source includes, itself or through others.
    fn headers(&self) -> Vec<&'static str> {
        let mut included = vec![false; HEADERS.len()];
        let mut texts = vec![self.text];
        while let Some(text) = texts.pop() {
            for (i, (name, header)) in HEADERS.iter().enumerate() {
                if !included[i] && text.contains(&format!("#include \"{name}\"")) {
                    included[i] = true;
                    texts.push(header);
                }
            }
        }
        let all = HEADERS.iter().zip(included);
        all.filter(|(_, is)| *is)
            .map(|((_, text), _)| *text)
            .collect()
    }

    /// SHA-256 of the source and of the headers that it includes, in hexadecimal: the first line of
    /// PTX that was made of them says it.
    pub fn hash(&self) -> String {
        let mut hash = Sha256::new();
        for text in self.headers().into_iter().chain([self.text]) {
            hash.update((text.len() as u64).to_le_bytes());
            hash.update(text);
        }
        hexadecimal(hash)
    }

    /// The first line of PTX made of this source.
    pub fn stamp(&self) -> String {
        format!("// made of sources with SHA-256 {}\n", self.hash())
    }
}

/// The digits of a hash.
pub(super) fn hexadecimal(hash: Sha256) -> String {
    let bytes = hash.finalize();
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ptx_is_made_of_these_sources() {
        for source in SOURCES {
            for (target, ptx) in source.ptx {
                assert!(
                    ptx.starts_with(&source.stamp()),
                    "{}.cu or a header changed since its PTX for {target:?} was made; run `cargo \
                     run -p xtask -- ptx`",
                    source.name
                );
            }
        }
    }

    #[test]
    fn a_device_runs_the_best_that_there_is() {
        let copy = Source::find("copy").expect("copy.cu");
        assert_eq!(copy.best(Target::Sm70), Target::Sm70);
        assert_eq!(copy.best(Target::Sm90a), Target::Sm80);
        assert_eq!(Target::of(9, 0), Some(Target::Sm90a));
        assert_eq!(Target::of(12, 0), Some(Target::Sm80));
        assert_eq!(Target::of(7, 5), Some(Target::Sm70));
        assert_eq!(Target::of(6, 1), None);
    }
}
