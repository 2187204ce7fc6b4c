//! Which device a command runs on, and what a machine has.

use std::fmt::{self, Write as _};
use std::str::FromStr;

use clap::Args;
use graft_tensor::device::{Gpu, Isa, Limits};
use graft_tensor::{DType, Device, Memory, Tensor, ops};
use serde::{Deserialize, Serialize};

use crate::error::Result;

/// `--device` and `train.device`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum DeviceChoice {
    /// The first GPU if there is one that can be used, else the CPU.
    Auto,
    /// This one.
    On(Device),
}

impl Default for DeviceChoice {
    fn default() -> Self {
        DeviceChoice::On(Device::Cpu)
    }
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DeviceChoice::Auto => f.write_str("auto"),
            DeviceChoice::On(device) => device.fmt(f),
        }
    }
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        if text == "auto" {
            return Ok(DeviceChoice::Auto);
        }
        let device = text.parse().map(DeviceChoice::On);
        device.map_err(|what| format!("{what}, or auto"))
    }
}

impl From<DeviceChoice> for String {
    fn from(choice: DeviceChoice) -> String {
        choice.to_string()
    }
}

impl TryFrom<String> for DeviceChoice {
    type Error = String;

    fn try_from(text: String) -> std::result::Result<Self, String> {
        text.parse()
    }
}

/// The option of the commands that use a model.
#[derive(Debug, Clone, Copy, Default, Args)]
pub struct DeviceArgs {
    /// Where to compute: cpu, cuda:N, or auto for a GPU if there is one.
    #[arg(long, value_name = "DEVICE", default_value_t = DeviceChoice::default())]
    pub device: DeviceChoice,
}

impl DeviceArgs {
    /// The memory of the device; a GPU that `auto` passes over is named on standard error.
    ///
    /// # Errors
    /// As [`DeviceChoice::open`].
    pub fn open(&self) -> Result<Memory> {
        let (memory, note) = self.device.open()?;
        if let Some(note) = note {
            eprintln!("{note}");
        }
        Ok(memory)
    }
}

impl DeviceChoice {
    /// The memory of the device, and why it is not a GPU's where `auto` found none.
    ///
    /// # Errors
    /// A GPU that was asked for by name and is not there, or cannot be used.
    pub fn open(self) -> Result<(Memory, Option<String>)> {
        match self {
            DeviceChoice::On(device) => Ok((Memory::of(device)?, None)),
            DeviceChoice::Auto => Ok(match Gpu::open(0) {
                Ok(gpu) => (Memory::cuda(gpu), None),
                Err(why) => (Memory::cpu(), Some(format!("computing on the CPU: {why}"))),
            }),
        }
    }
}

/// What `trainer doctor` prints: the processor, each GPU, and whether a kernel runs there.
pub fn doctor() -> String {
    let mut text = String::new();
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    // Writing to a String cannot fail.
    let _ = writeln!(text, "cpu: {threads} threads, {:?} kernels", Isa::detect());
    match Gpu::list() {
        Err(why) => {
            let _ = writeln!(text, "cuda: {why}");
        }
        Ok(devices) => {
            for (ordinal, device) in devices.iter().enumerate() {
                let line = match device {
                    Ok(limits) => format!("{}\n  {}", describe(limits), check(ordinal)),
                    Err(why) => why.to_string(),
                };
                let _ = writeln!(text, "cuda:{ordinal}: {line}");
            }
        }
    }
    text
}

fn describe(limits: &Limits) -> String {
    let gib = |bytes: usize| bytes as f64 / (1u64 << 30) as f64;
    let (major, minor) = limits.capability;
    format!(
        "{}, {:.1} GiB, {} multiprocessors, compute capability {major}.{minor} (kernels for {}), driver for CUDA {}.{}",
        limits.name,
        gib(limits.memory),
        limits.processors,
        limits.target.architecture(),
        limits.driver / 1000,
        limits.driver % 1000 / 10,
    )
}

/// Runs a kernel and looks at its result.
fn check(ordinal: usize) -> String {
    let run = || -> graft_tensor::Result<(f64, usize)> {
        let memory = Memory::of(Device::Cuda(ordinal))?;
        let x = Tensor::full(&memory, DType::F32, &[1000], 0.25)?;
        // A memset is no kernel: this is one.
        let y = ops::affine(&memory, &x, 1.5, 0.125)?;
        let sum: f64 = y.to_f64()?.iter().sum();
        let free = match memory.opened_gpu() {
            Some(gpu) => gpu.free_memory()?.0,
            None => 0,
        };
        Ok((sum, free))
    };
    match run() {
        Ok((500.0, free)) => format!(
            "kernels run; {:.1} GiB of its memory are free",
            free as f64 / (1u64 << 30) as f64
        ),
        Ok((sum, _)) => format!("kernels give wrong results: 1000 x (1.5 x 0.25 + 0.125) is {sum}"),
        Err(why) => format!("kernels do not run: {why}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_have_names() {
        for text in ["auto", "cpu", "cuda:0", "cuda:3"] {
            let choice: DeviceChoice = text.parse().unwrap();
            assert_eq!(choice.to_string(), text);
        }
        let error = "tpu".parse::<DeviceChoice>().unwrap_err();
        assert!(
            error.contains("\"tpu\"") && error.contains("auto"),
            "{error}"
        );
    }

    #[test]
    fn the_doctor_always_answers() {
        let text = doctor();
        assert!(text.contains("cpu: ") && text.contains("cuda:"), "{text}");
    }

    #[test]
    fn auto_gives_a_device_and_says_why_it_is_the_cpu() {
        let (memory, note) = DeviceChoice::Auto.open().unwrap();
        assert_eq!(memory.device() == Device::Cpu, note.is_some());
    }
}
