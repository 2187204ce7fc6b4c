//! A simulated GPU: the kernels' sources compiled as C++ for this machine, each thread of a block a
//! fiber. It needs no device, and finds what a device may forgive: missing barriers, divergent
//! exchanges, misaligned vectors, copies that nobody waited for.
//!
//! `cargo run -p xtask -- simulation` builds the library; `simulation/` says how it works. It
//! stands in for the driver where the variable GRAFT_CUDA_SIMULATION names that library.

use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::environment::{self, named, reason};
use super::launch::Launch;
use super::module::Target;
use super::tensor_map::TensorMap;
use super::{Error, Result};

/// Bytes that the device has.
pub(super) const MEMORY: usize = 4 << 30;

/// Runs a kernel: name, grid, block, shared memory, parameters, order. 0, or 1 with what went wrong in
/// the bytes at the end.
type Run = unsafe extern "C" fn(
    *const c_char,
    *const c_uint,
    *const c_uint,
    c_uint,
    *mut *mut c_void,
    c_uint,
    *mut c_char,
    usize,
) -> c_int;

/// Describes a tensor for the copy engine: where to, address, bytes of an element, dimensions, strides, box. 0, or 1
/// if the driver would refuse it.
type Describe =
    unsafe extern "C" fn(*mut u64, u64, u64, *const u64, *const u64, *const u64) -> c_int;

/// The library, loaded. A launch runs on the thread that asks for it; the library takes one at a time.
pub(super) struct Simulation {
    run: Run,
    /// Where there is a copy engine for tensors
    describe: Option<Describe>,
    target: Target,
    order: u32,
    /// Bytes that are allocated
    taken: AtomicUsize,
    /// Keeps `run` where it is.
    _library: libloading::Library,
}

impl Simulation {
    /// The library at `path`; in which order the threads of a block run is what the variable
    /// GRAFT_CUDA_ORDER says: 0 ascending (the default), 1 descending, others random.
    pub fn load(path: &Path) -> Result<Simulation> {
        let failed = |text: String| Error::Call {
            call: "loading the simulated GPU",
            text: format!("{}: {text}", path.display()),
        };
        // SAFETY: the library that xtask builds; its initialisers fill a table of kernels.
        let library = unsafe { environment::library(path) }.map_err(failed)?;
        // SAFETY: scheduler.cpp declares the function so.
        let run: Run = *unsafe { library.get(b"graft_simulation_launch\0") }
            .map_err(|e| failed(reason(&e)))?;
        // SAFETY: as above.
        let architecture: unsafe extern "C" fn() -> c_int =
            *unsafe { library.get(b"graft_simulation_architecture\0") }
                .map_err(|e| failed(reason(&e)))?;
        // SAFETY: it has no conditions.
        let target = match unsafe { architecture() } {
            700 => Target::Sm70,
            800 => Target::Sm80,
            _ => Target::Sm90a,
        };
        let describe = match target {
            // SAFETY: hopper.cpp declares the function so.
            Target::Sm90a => Some(
                *unsafe { library.get(b"graft_simulation_tensor_map\0") }
                    .map_err(|e| failed(reason(&e)))?,
            ),
            _ => None,
        };
        let order = named("GRAFT_CUDA_ORDER", "a number", |text| text.parse().ok())?;
        Ok(Simulation {
            run,
            describe,
            target,
            order: order.unwrap_or(0),
            taken: AtomicUsize::new(0),
            _library: library,
        })
    }

    /// Bytes that are allocated.
    pub fn taken(&self) -> usize {
        self.taken.load(Ordering::Relaxed).min(MEMORY)
    }

    /// What its kernels were compiled for.
    pub fn target(&self) -> Target {
        self.target
    }

    /// Bytes of this machine that play the device's memory.
    pub fn allocate(&self, bytes: usize) -> Result<u64> {
        let layout = layout(bytes).ok_or(Error::OutOfMemory { bytes })?;
        let before = self.taken.fetch_add(bytes, Ordering::Relaxed);
        if before.saturating_add(bytes) > MEMORY {
            self.taken.fetch_sub(bytes, Ordering::Relaxed);
            return Err(Error::OutOfMemory { bytes });
        }
        // SAFETY: the size is above 0.
        let memory = unsafe { std::alloc::alloc_zeroed(layout) };
        if memory.is_null() {
            return Err(Error::OutOfMemory { bytes });
        }
        Ok(memory as u64)
    }

    /// Takes back what `allocate` gave for so many bytes.
    pub fn free(&self, address: u64, bytes: usize) {
        self.taken.fetch_sub(bytes, Ordering::Relaxed);
        if let Some(layout) = layout(bytes) {
            // SAFETY: allocated with this layout, and not used any more.
            unsafe { std::alloc::dealloc(address as *mut u8, layout) };
        }
    }

    /// Bytes of this machine that the device may use: as it does all of them.
    pub fn pin(&self, bytes: usize) -> Result<*mut u8> {
        let layout = layout(bytes).ok_or(Error::OutOfMemory { bytes })?;
        // SAFETY: the size is above 0.
        let memory = unsafe { std::alloc::alloc_zeroed(layout) };
        match memory.is_null() {
            true => Err(Error::OutOfMemory { bytes }),
            false => Ok(memory),
        }
    }

    /// Takes back what `pin` gave for so many bytes.
    pub fn unpin(&self, memory: *mut u8, bytes: usize) {
        if let Some(layout) = layout(bytes) {
            // SAFETY: allocated with this layout, and not used any more.
            unsafe { std::alloc::dealloc(memory, layout) };
        }
    }

    /// Copies from this machine; the caller has checked that the range is one of the device's.
    pub fn write(&self, from: &[u8], to: u64) {
        // SAFETY: a range of memory that `allocate` gave.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to as *mut u8, from.len()) };
    }

    /// Copies to this machine.
    pub fn read(&self, from: u64, to: &mut [u8]) {
        // SAFETY: as in `write`.
        unsafe { std::ptr::copy_nonoverlapping(from as *const u8, to.as_mut_ptr(), to.len()) };
    }

    /// Copies on the device, or between it and what is pinned.
    pub fn copy(&self, from: u64, to: u64, bytes: usize) {
        // SAFETY: two ranges of memory that `allocate` or `pin` gave.
        unsafe { std::ptr::copy(from as *const u8, to as *mut u8, bytes) };
    }

    /// Sets elements to the bytes of one.
    pub fn fill(&self, to: u64, count: usize, element: &[u8]) {
        for i in 0..count {
            self.write(element, to + (i * element.len()) as u64);
        }
    }

    /// What a kernel takes as `TensorMap`; strides in bytes.
    ///
    /// # Errors
    /// What a driver refuses.
    pub fn tensor_map(
        &self,
        address: u64,
        element: u64,
        dims: [u64; 3],
        strides: [u64; 2],
        box_dims: [u64; 3],
    ) -> Result<TensorMap> {
        let mut map = [0; 16];
        let (d, s, b) = (dims.as_ptr(), strides.as_ptr(), box_dims.as_ptr());
        // SAFETY: 128 bytes to write to, and as many dimensions as are read.
        let made = self
            .describe
            .map(|describe| unsafe { describe(map.as_mut_ptr(), address, element, d, s, b) });
        match made {
            Some(0) => Ok(map),
            _ => Err(Error::Call {
                call: "a tensor map",
                text: format!(
                    "the simulated GPU takes no {dims:?} of {element} bytes at {address:#x}, \
                     {strides:?} bytes apart, in boxes of {box_dims:?}"
                ),
            }),
        }
    }

    /// Runs a kernel to its end.
    pub fn launch(
        &self,
        name: &'static str,
        launch: Launch,
        parameters: *mut *mut c_void,
    ) -> Result<()> {
        let c_name = CString::new(name).expect("names of kernels hold no NUL");
        let mut text = [0 as c_char; 2048];
        // SAFETY: the parameters are as many and as long as the kernel declares, which its launcher
        // sees to; what they point to is memory that this process allocated.
        let failed = unsafe {
            (self.run)(
                c_name.as_ptr(),
                launch.grid.as_ptr(),
                launch.block.as_ptr(),
                launch.shared,
                parameters,
                self.order,
                text.as_mut_ptr(),
                text.len(),
            )
        };
        if failed == 0 {
            return Ok(());
        }
        // SAFETY: the library ends what it writes with NUL.
        let text = unsafe { CStr::from_ptr(text.as_ptr()) };
        let text = text.to_string_lossy().into_owned();
        Err(Error::Call { call: name, text })
    }
}

/// Aligned as the driver aligns.
fn layout(bytes: usize) -> Option<std::alloc::Layout> {
    std::alloc::Layout::from_size_align(bytes.max(1), 256).ok()
}

#[cfg(test)]
mod products;
#[cfg(test)]
mod tests;
