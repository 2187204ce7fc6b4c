//! NVIDIA's driver, found at run time: context, stream, memory, kernels.

use std::cell::Cell;
use std::collections::HashMap;
use std::ffi::{CStr, CString, c_void};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use cudarc::driver::sys::{self, CUdevice_attribute as Attribute, CUresult};

use super::environment::{self, variable};
use super::gpu::Limits;
use super::launch::Launch;
use super::module::{Source, Target};
use super::nvrtc::OLDEST;
use super::{Error, Result, Slice, SliceMut};

/// The first driver that knows the PTX that is committed ([`OLDEST`]), and that has every function
/// which is called here: that of CUDA 12.0.
const NEEDED: i32 = 12000;
const NEWER: &str = "update the driver to one for CUDA 12.0 or later";
/// Shared memory that a block may have without asking, in bytes: variables of its kernel and the dynamic part together.
const UNASKED: u32 = 48 << 10;

/// A device of the driver's, opened; it closes when this is dropped.
pub(super) struct Driver {
    device: sys::CUdevice,
    context: sys::CUcontext,
    stream: sys::CUstream,
    loaded: Mutex<Loaded>,
    /// Events that nobody uses
    events: Mutex<Vec<Event>>,
}

/// A moment in the order of the stream. [`Driver::take_back`] takes it back.
#[derive(Debug)]
pub(super) struct Event(sys::CUevent);

// SAFETY: as of the driver.
unsafe impl Send for Event {}

/// What has been loaded so far.
#[derive(Default)]
struct Loaded {
    modules: HashMap<&'static str, sys::CUmodule>,
    functions: HashMap<(&'static str, &'static str), Function>,
}

#[derive(Clone, Copy)]
struct Function {
    handle: sys::CUfunction,
    /// Dynamic shared memory that it may have
    shared: u32,
}

// SAFETY: handles of the driver may be used from any thread; calls set the context first.
unsafe impl Send for Driver {}
// SAFETY: as above; what changes is behind a lock.
unsafe impl Sync for Driver {}

thread_local! {
    /// The context that this thread's calls go to.
    static CURRENT: Cell<sys::CUcontext> = const { Cell::new(std::ptr::null_mut()) };
}

fn text_of(result: CUresult) -> String {
    let mut text = std::ptr::null();
    // SAFETY: a valid pointer; what it is set to is the driver's own static string.
    unsafe {
        if sys::cuGetErrorString(result, &mut text) != CUresult::CUDA_SUCCESS || text.is_null() {
            return format!("{result:?}");
        }
        let text = CStr::from_ptr(text).to_string_lossy();
        format!("{text} ({result:?})")
    }
}

pub(super) fn check(call: &'static str, result: CUresult) -> Result<()> {
    if result == CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let text = text_of(result);
    Err(Error::Call { call, text })
}

/// Calls a function of the driver and checks what it returns.
macro_rules! call {
    ($function:ident($($arg:expr),* $(,)?)) => {
        check(stringify!($function), sys::$function($($arg),*))
    };
}

/// Starts the driver and says how many devices there are.
fn start() -> Result<usize> {
    // SAFETY: it only tries to load a library of that name. Every other function of the driver
    // would panic if there is none.
    if !unsafe { sys::is_culib_present() } {
        return Err(Error::NoDriver {
            text: why_there_is_none(),
        });
    }
    let mut count = 0;
    // SAFETY: initialisation, which may be repeated, and a valid pointer.
    let result = unsafe {
        match sys::cuInit(0) {
            CUresult::CUDA_SUCCESS => sys::cuDeviceGetCount(&mut count),
            failed => failed,
        }
    };
    match (result, count) {
        (CUresult::CUDA_SUCCESS, 1..) => Ok(count as usize),
        (CUresult::CUDA_SUCCESS, _) => Err(Error::NoDevice {
            text: "none".into(),
        }),
        (failed, _) => Err(Error::NoDevice {
            text: text_of(failed),
        }),
    }
}

/// Why the driver's library was not loaded.
fn why_there_is_none() -> String {
    const NAME: &str = "libcuda.so.1";
    // SAFETY: NVIDIA's library, whose initialisers have no conditions.
    match unsafe { environment::library(Path::new(NAME)) } {
        Err(why) if cfg!(unix) && !(why.contains(NAME) && why.contains("o such file")) => {
            format!("libcuda cannot be loaded ({why})")
        }
        _ => "libcuda was not found on this machine".into(),
    }
}

/// As [`Gpu::list`](super::Gpu::list).
pub(super) fn list() -> Result<Vec<Result<Limits>>> {
    let count = start()?;
    let of = |ordinal: usize| {
        let mut device = 0;
        // SAFETY: a valid pointer, and a number below the count.
        unsafe {
            call!(cuDeviceGet(&mut device, ordinal as i32))?;
            limits_of(ordinal, device)
        }
    };
    Ok((0..count).map(of).collect())
}

// What these do, and with which errors, stands at the methods of `Gpu` of the same names, which
// check lengths.
impl Driver {
    pub fn open(ordinal: usize) -> Result<(Limits, Driver)> {
        let count = start()?;
        if ordinal >= count {
            return Err(Error::Ordinal { ordinal, count });
        }
        // SAFETY: each call gets valid pointers and handles that the calls before it made.
        unsafe {
            let mut device = 0;
            call!(cuDeviceGet(&mut device, ordinal as i32))?;
            let limits = limits_of(ordinal, device)?;
            let mut context = std::ptr::null_mut();
            call!(cuDevicePrimaryCtxRetain(&mut context, device))?;
            call!(cuCtxSetCurrent(context))?;
            CURRENT.set(context);
            let mut stream = std::ptr::null_mut();
            let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
            call!(cuStreamCreate(&mut stream, flags))?;
            let driver = Driver {
                device,
                context,
                stream,
                loaded: Mutex::default(),
                events: Mutex::default(),
            };
            Ok((limits, driver))
        }
    }

    /// Makes the device this thread's.
    pub(super) fn enter(&self) -> Result<()> {
        let context = self.context;
        if CURRENT.get() == context {
            return Ok(());
        }
        // SAFETY: the context lives as long as this does.
        unsafe { call!(cuCtxSetCurrent(context))? };
        CURRENT.set(context);
        Ok(())
    }

    fn loaded(&self) -> MutexGuard<'_, Loaded> {
        self.loaded.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn allocate(&self, bytes: usize) -> Result<u64> {
        self.enter()?;
        let mut address = 0;
        // SAFETY: a valid pointer.
        match unsafe { sys::cuMemAlloc_v2(&mut address, bytes) } {
            CUresult::CUDA_ERROR_OUT_OF_MEMORY => Err(Error::OutOfMemory { bytes }),
            result => check("cuMemAlloc", result).map(|()| address),
        }
    }

    pub fn free(&self, address: u64) {
        if self.enter().is_ok() {
            // SAFETY: allocated by `allocate`; the driver waits for kernels that use it.
            unsafe { sys::cuMemFree_v2(address) };
        }
    }

    pub fn free_memory(&self) -> Result<(usize, usize)> {
        self.enter()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: valid pointers.
        unsafe { call!(cuMemGetInfo_v2(&mut free, &mut total))? };
        Ok((free, total))
    }

    pub fn upload(&self, from: &[u8], to: SliceMut<'_>) -> Result<()> {
        self.enter()?;
        // SAFETY: both ranges hold that many bytes; the driver has copied what is not pinned when
        // it returns.
        unsafe {
            call!(cuMemcpyHtoDAsync_v2(
                to.address(),
                from.as_ptr().cast(),
                from.len(),
                self.stream,
            ))
        }
    }

    /// Copies bytes of pinned memory when the stream gets there.
    pub fn copy_from_pinned(&self, from: u64, to: u64, bytes: usize) -> Result<()> {
        self.enter()?;
        let from = from as *const c_void;
        // SAFETY: both ranges hold that many bytes; the pinned ones change when the copy is done.
        unsafe { call!(cuMemcpyHtoDAsync_v2(to, from, bytes, self.stream)) }
    }

    /// Copies bytes to pinned memory when the stream gets there.
    pub fn copy_to_pinned(&self, from: u64, to: u64, bytes: usize) -> Result<()> {
        self.enter()?;
        let to = to as *mut c_void;
        // SAFETY: both ranges hold that many bytes; the pinned ones are used when the copy is done.
        unsafe { call!(cuMemcpyDtoHAsync_v2(to, from, bytes, self.stream)) }
    }

    pub fn pin(&self, bytes: usize) -> Result<*mut u8> {
        self.enter()?;
        let mut memory = std::ptr::null_mut();
        // SAFETY: a valid pointer.
        unsafe { call!(cuMemAllocHost_v2(&mut memory, bytes))? };
        Ok(memory.cast())
    }

    pub fn unpin(&self, memory: *mut u8) {
        if self.enter().is_ok() {
            // SAFETY: made by `pin`, and no copy from it or to it is left, which the wait says.
            unsafe {
                sys::cuStreamSynchronize(self.stream);
                sys::cuMemFreeHost(memory.cast());
            }
        }
    }

    fn events(&self) -> MutexGuard<'_, Vec<Event>> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The moment behind everything that was sent so far.
    pub fn record(&self) -> Result<Event> {
        self.enter()?;
        let free = self.events().pop();
        let event = match free {
            Some(event) => event,
            None => {
                let mut event = std::ptr::null_mut();
                // Times are not asked for.
                let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
                // SAFETY: a valid pointer.
                unsafe { call!(cuEventCreate(&mut event, flags))? };
                Event(event)
            }
        };
        // SAFETY: an event and a stream of one device.
        let result = unsafe { call!(cuEventRecord(event.0, self.stream)) };
        match result {
            Ok(()) => Ok(event),
            Err(error) => {
                self.take_back(event);
                Err(error)
            }
        }
    }

    pub fn wait(&self, event: &Event) -> Result<()> {
        self.enter()?;
        // SAFETY: an event that `record` gave.
        unsafe { call!(cuEventSynchronize(event.0)) }
    }

    pub fn take_back(&self, event: Event) {
        self.events().push(event);
    }

    pub fn download(&self, from: Slice<'_>, to: &mut [u8]) -> Result<()> {
        self.enter()?;
        // SAFETY: both ranges hold that many bytes, and `to` is borrowed until the copy is done.
        unsafe {
            call!(cuMemcpyDtoHAsync_v2(
                to.as_mut_ptr().cast(),
                from.address(),
                to.len(),
                self.stream,
            ))?;
        }
        self.synchronize()
    }

    pub fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<()> {
        self.enter()?;
        // SAFETY: both ranges hold that many bytes.
        unsafe { call!(cuMemcpyDtoDAsync_v2(to, from, bytes, self.stream)) }
    }

    /// Sets `count` elements of `size` bytes to the low bytes of `value`.
    pub fn fill(&self, to: u64, count: usize, size: usize, value: u32) -> Result<()> {
        self.enter()?;
        // SAFETY: the range holds that many elements of the size that is set.
        unsafe {
            match size {
                1 => call!(cuMemsetD8Async(to, value as u8, count, self.stream)),
                2 => call!(cuMemsetD16Async(to, value as u16, count, self.stream)),
                _ => call!(cuMemsetD32Async(to, value, count, self.stream)),
            }
        }
    }

    /// Rows of `length` bytes; addresses with the bytes from one row to the next.
    pub fn copy_rows(
        &self,
        rows: usize,
        length: usize,
        (from, from_step): (u64, usize),
        (to, to_step): (u64, usize),
    ) -> Result<()> {
        self.enter()?;
        let device = sys::CUmemorytype::CU_MEMORYTYPE_DEVICE;
        let copy = sys::CUDA_MEMCPY2D {
            srcXInBytes: 0,
            srcY: 0,
            srcMemoryType: device,
            srcHost: std::ptr::null(),
            srcDevice: from,
            srcArray: std::ptr::null_mut(),
            srcPitch: from_step,
            dstXInBytes: 0,
            dstY: 0,
            dstMemoryType: device,
            dstHost: std::ptr::null_mut(),
            dstDevice: to,
            dstArray: std::ptr::null_mut(),
            dstPitch: to_step,
            WidthInBytes: length,
            Height: rows,
        };
        // SAFETY: both sides hold the rows, which `Gpu::copy_rows` checks. Unlike the other call for
        // such copies, this one takes any distance between rows.
        unsafe { call!(cuMemcpy2DAsync_v2(&copy, self.stream)) }
    }

    pub fn synchronize(&self) -> Result<()> {
        self.enter()?;
        // SAFETY: the stream lives as long as this does.
        unsafe { call!(cuStreamSynchronize(self.stream)) }
    }

    pub fn stream(&self) -> *mut c_void {
        self.stream.cast()
    }

    pub(super) fn context(&self) -> sys::CUcontext {
        self.context
    }

    pub fn launch(
        &self,
        limits: &Limits,
        file: &'static str,
        name: &'static str,
        launch: Launch,
        parameters: *mut *mut c_void,
    ) -> Result<()> {
        self.enter()?;
        let function = self.function(limits, file, name, launch.shared)?;
        let ([gx, gy, gz], [bx, by, bz]) = (launch.grid, launch.block);
        // SAFETY: the function is loaded, and each parameter points to at least as many bytes as
        // its type has; the driver copies them before it returns.
        let result = unsafe {
            sys::cuLaunchKernel(
                function,
                gx,
                gy,
                gz,
                bx,
                by,
                bz,
                launch.shared,
                self.stream,
                parameters,
                std::ptr::null_mut(),
            )
        };
        check(name, result)?;
        if cfg!(feature = "cuda-checks") {
            // A fault is reported by the kernel that caused it.
            // SAFETY: as in `synchronize`.
            check(name, unsafe { sys::cuStreamSynchronize(self.stream) })?;
        }
        Ok(())
    }

    /// A kernel that may have `shared` bytes of dynamic shared memory.
    pub(super) fn function(
        &self,
        limits: &Limits,
        file: &'static str,
        name: &'static str,
        shared: u32,
    ) -> Result<sys::CUfunction> {
        let mut loaded = self.loaded();
        let known = loaded.functions.get(&(file, name)).copied();
        let mut function = match known {
            Some(function) if shared <= function.shared => return Ok(function.handle),
            Some(function) => function,
            None => {
                let module = match loaded.modules.get(file) {
                    Some(&module) => module,
                    None => {
                        let module = self.load(limits, file)?;
                        loaded.modules.insert(file, module);
                        module
                    }
                };
                let mut handle = std::ptr::null_mut();
                let c_name = CString::new(name).expect("names of kernels hold no NUL");
                // SAFETY: a loaded module and a string that ends with NUL.
                check(name, unsafe {
                    sys::cuModuleGetFunction(&mut handle, module, c_name.as_ptr())
                })?;
                let fixed = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES;
                let mut bytes = 0;
                // SAFETY: a valid pointer and a loaded function.
                check(name, unsafe {
                    sys::cuFuncGetAttribute(&mut bytes, fixed, handle)
                })?;
                let shared = UNASKED.saturating_sub(bytes as u32);
                Function { handle, shared }
            }
        };
        if shared > function.shared {
            let most = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: a loaded function.
            check(name, unsafe {
                sys::cuFuncSetAttribute(function.handle, most, shared as i32)
            })?;
            function.shared = shared;
        }
        loaded.functions.insert((file, name), function);
        Ok(function.handle)
    }

    fn load(&self, limits: &Limits, file: &'static str) -> Result<sys::CUmodule> {
        let source = Source::find(file).expect("launchers name sources that there are");
        let ptx = source.code(limits.target)?;
        let text = CString::new(ptx.as_ref()).expect("PTX holds no NUL");
        let mut module = std::ptr::null_mut();
        // SAFETY: PTX that ends with NUL, and a valid pointer.
        match unsafe { sys::cuModuleLoadData(&mut module, text.as_ptr().cast()) } {
            result @ CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION => Err(Error::Driver {
                version: limits.driver,
                text: text_of(result),
                help: match variable("GRAFT_CUDA_COMPILE") {
                    None => NEWER,
                    Some(_) => "name an NVRTC that is no newer than the driver in GRAFT_NVRTC",
                },
            }),
            result => {
                check(file, result)?;
                Ok(module)
            }
        }
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        // SAFETY: handles that `open` and `load` made, which nothing uses any more: what is on the
        // device holds a `Gpu`. A failure leaves nothing to be done.
        unsafe {
            sys::cuCtxSetCurrent(self.context);
            sys::cuStreamSynchronize(self.stream);
            for Event(event) in self.events().drain(..) {
                sys::cuEventDestroy_v2(event);
            }
            let loaded = self
                .loaded
                .get_mut()
                .unwrap_or_else(PoisonError::into_inner);
            for &module in loaded.modules.values() {
                sys::cuModuleUnload(module);
            }
            sys::cuStreamDestroy_v2(self.stream);
            sys::cuDevicePrimaryCtxRelease_v2(self.device);
        }
        CURRENT.set(std::ptr::null_mut());
    }
}

/// # Safety
/// The driver is started, and `device` is one of its devices.
unsafe fn limits_of(ordinal: usize, device: sys::CUdevice) -> Result<Limits> {
    let attribute = |attribute: Attribute| {
        let mut value = 0;
        // SAFETY: a valid pointer and a device.
        unsafe { call!(cuDeviceGetAttribute(&mut value, attribute, device))? };
        Ok(value)
    };
    let mut name = [0 as std::ffi::c_char; 256];
    let (mut memory, mut driver) = (0, 0);
    // SAFETY: valid pointers; the name ends with NUL within its length.
    let name = unsafe {
        call!(cuDeviceGetName(
            name.as_mut_ptr(),
            name.len() as i32,
            device
        ))?;
        call!(cuDeviceTotalMem_v2(&mut memory, device))?;
        call!(cuDriverGetVersion(&mut driver))?;
        CStr::from_ptr(name.as_ptr()).to_string_lossy().into_owned()
    };
    let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    let Some(target) = Target::of(major, minor) else {
        return Err(Error::TooOld {
            ordinal,
            name,
            major,
            minor,
        });
    };
    // Said before anything is loaded.
    if driver < NEEDED {
        return Err(Error::Driver {
            version: driver,
            text: format!("it does not know PTX {OLDEST}"),
            help: NEWER,
        });
    }
    let shared = Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
    Ok(Limits {
        ordinal,
        name,
        capability: (major, minor),
        target: target.wanted()?,
        processors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as usize,
        shared: attribute(shared)? as usize,
        memory,
        cache: attribute(Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)? as usize,
        driver,
    })
}
