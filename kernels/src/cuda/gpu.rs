//! One GPU: its limits, its memory and its kernels, through the driver or simulated.

use std::ffi::c_void;
use std::fmt;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use super::backend::Backend;
use super::driver::{self, Driver};
use super::environment::variable;
use super::gemm::Library;
use super::launch::{Arg, Launch};
use super::module::Target;
use super::profile::Profile;
use super::queue::{Coming, Queue, Sent};
use super::record::{Asked, Record};
use super::simulation::{self, Simulation};
use super::work::Task;
use super::{Error, Result, Scalar, Slice, SliceMut};

/// What a device has, as far as kernels choose by it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Number of the device
    pub ordinal: usize,
    /// Its name
    pub name: String,
    /// Compute capability
    pub capability: (i32, i32),
    /// Which PTX it runs
    pub target: Target,
    /// Multiprocessors
    pub processors: usize,
    /// Bytes of shared memory that one block may ask for
    pub shared: usize,
    /// Bytes of memory
    pub memory: usize,
    /// Bytes of second-level cache
    pub cache: usize,
    /// The driver's version: 1000 major + 10 minor
    pub driver: i32,
}

/// A device, opened. Clones are the same device; it closes with the last of them.
#[derive(Clone)]
pub struct Gpu(Arc<Inner>);

struct Inner {
    limits: Limits,
    profile: Option<Profile>,
    record: Record,
    /// Loaded when it is asked for
    library: OnceLock<Result<Library>>,
    queue: Queue,
    backend: Backend,
}

impl Inner {
    fn device(&self) -> (&Limits, &Backend) {
        (&self.limits, &self.backend)
    }
}

impl Gpu {
    /// Device number `ordinal` of this machine. Where the variable GRAFT_CUDA_SIMULATION names the
    /// library of a simulated device, that is number 0 and the only one.
    ///
    /// # Errors
    /// No driver, no such device, one that is too old.
    pub fn open(ordinal: usize) -> Result<Gpu> {
        let (limits, backend) = match variable("GRAFT_CUDA_SIMULATION") {
            Some(_) if ordinal > 0 => return Err(Error::Ordinal { ordinal, count: 1 }),
            Some(library) => {
                let simulation = Simulation::load(Path::new(&library))?;
                let limits = Limits::simulated(simulation.target());
                (limits, Backend::Simulation(simulation))
            }
            None => {
                let (limits, driver) = Driver::open(ordinal)?;
                (limits, Backend::Driver(driver))
            }
        };
        let profile = Profile::wanted();
        // Both want to know of each kernel what it does.
        let alone = profile.is_some() || cfg!(feature = "cuda-checks");
        Ok(Gpu(Arc::new(Inner {
            limits,
            profile,
            record: Record::default(),
            library: OnceLock::new(),
            queue: Queue::new(alone)?,
            backend,
        })))
    }

    /// What every device of this machine has; those that cannot be used as an error.
    ///
    /// # Errors
    /// No driver, no device.
    pub fn list() -> Result<Vec<Result<Limits>>> {
        match variable("GRAFT_CUDA_SIMULATION") {
            Some(library) => {
                let simulation = Simulation::load(Path::new(&library))?;
                Ok(vec![Ok(Limits::simulated(simulation.target()))])
            }
            None => driver::list(),
        }
    }

    /// Runs `work`, and lists what it asks this device for.
    pub fn recorded<R>(&self, work: impl FnOnce() -> R) -> (R, Vec<Asked>) {
        self.0.record.start();
        let result = work();
        (result, self.0.record.take())
    }

    /// What the device has.
    pub fn limits(&self) -> &Limits {
        &self.0.limits
    }

    /// How what was asked for was sent so far.
    pub fn sent(&self) -> Sent {
        self.0.queue.sent()
    }

    /// From now on at most so many tasks are sent together, or as many as without a limit; what it was before. With 1, each
    /// is sent at once.
    ///
    /// # Errors
    /// What failed of those that were not sent yet.
    pub fn send_together(&self, most: Option<usize>) -> Result<Option<usize>> {
        self.0.queue.send(self.0.device())?;
        Ok(self.0.queue.limit(most.map(|most| most.max(1))))
    }

    /// Told that something is complete that the device will work on for as long as the next such thing takes to be asked
    /// for, as of a training step that nobody waits for: it is sent, and the next one is held until it is submitted, to be
    /// sent as one.
    ///
    /// # Errors
    /// What failed of what was not sent yet.
    pub fn submit(&self) -> Result<()> {
        self.0.queue.submit(self.0.device())
    }

    fn ask(&self, task: Task) -> Result<()> {
        self.0.queue.task(self.0.device(), task)
    }

    /// Sends what was asked for before this machine waits for it.
    fn send_and_wait(&self) -> Result<()> {
        self.0.queue.send_and_wait(self.0.device())
    }

    /// `bytes` of device memory, with unspecified contents.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub fn allocate(&self, bytes: usize) -> Result<Buffer> {
        self.0.record.add(Asked::Allocate(bytes));
        let address = match &self.0.backend {
            Backend::Driver(driver) => driver.allocate(bytes)?,
            Backend::Simulation(simulation) => simulation.allocate(bytes)?,
        };
        let gpu = self.clone();
        Ok(Buffer {
            gpu,
            address,
            bytes,
        })
    }

    /// Bytes that are free on the device, and all that it has.
    ///
    /// # Errors
    /// A failed call.
    pub fn free_memory(&self) -> Result<(usize, usize)> {
        match &self.0.backend {
            Backend::Driver(driver) => driver.free_memory(),
            Backend::Simulation(simulation) => {
                let all = self.0.limits.memory;
                Ok((all - simulation.taken(), all))
            }
        }
    }

    /// Copies bytes of this machine to the device. `from` may be used again at once.
    ///
    /// # Errors
    /// A failed call.
    ///
    /// # Panics
    /// If there are not as many bytes as elements take.
    pub fn upload(&self, from: &[u8], to: SliceMut<'_>) -> Result<()> {
        assert_eq!(from.len(), to.as_slice().bytes(), "upload: bytes");
        if from.is_empty() {
            return Ok(());
        }
        self.0.record.add(Asked::Upload(from.len()));
        if self.0.queue.upload(self.0.device(), from, to.address())? {
            return Ok(());
        }
        self.0.queue.send(self.0.device())?;
        match &self.0.backend {
            Backend::Driver(driver) => driver.upload(from, to),
            Backend::Simulation(simulation) => {
                simulation.write(from, to.address());
                Ok(())
            }
        }
    }

    /// Copies elements to this machine, after everything before is done.
    ///
    /// # Errors
    /// A failed call, of whatever ran before on the device too.
    ///
    /// # Panics
    /// If there are not as many bytes as elements take.
    pub fn download(&self, from: Slice<'_>, to: &mut [u8]) -> Result<()> {
        assert_eq!(to.len(), from.bytes(), "download: bytes");
        if to.is_empty() {
            return Ok(());
        }
        self.0.record.add(Asked::Download(to.len()));
        self.send_and_wait()?;
        match &self.0.backend {
            Backend::Driver(driver) => driver.download(from, to),
            Backend::Simulation(simulation) => {
                simulation.read(from.address(), to);
                Ok(())
            }
        }
    }

    /// Asks for elements, as they are when everything before is done. Of a few bytes, this machine waits for them only
    /// when it looks at them ([`Readback::bytes`]); for more, at once.
    ///
    /// # Errors
    /// As [`Gpu::download`].
    pub fn readback(&self, from: Slice<'_>) -> Result<Readback> {
        let (bytes, address) = (from.bytes(), from.address());
        if bytes > 0
            && let Some(coming) = self.0.queue.readback(self.0.device(), address, bytes)?
        {
            self.0.record.add(Asked::Readback(bytes));
            let gpu = self.clone();
            return Ok(Readback(Bytes::Coming { gpu, coming, bytes }));
        }
        let mut here = vec![0; bytes];
        self.download(from, &mut here)?;
        Ok(Readback(Bytes::Here(here)))
    }

    /// Copies elements on the device.
    ///
    /// # Errors
    /// A failed call.
    ///
    /// # Panics
    /// If the two differ in bytes.
    pub fn copy(&self, from: Slice<'_>, to: SliceMut<'_>) -> Result<()> {
        assert_eq!(from.bytes(), to.as_slice().bytes(), "copy: bytes");
        if from.count() == 0 {
            return Ok(());
        }
        self.0.record.add(Asked::Copy(from.bytes()));
        self.ask(Task::Copy {
            from: from.address(),
            to: to.address(),
            bytes: from.bytes(),
        })
    }

    /// Sets every byte.
    ///
    /// # Errors
    /// A failed call.
    pub fn set_bytes(&self, to: SliceMut<'_>, value: u8) -> Result<()> {
        if to.count() == 0 {
            return Ok(());
        }
        self.0.record.add(Asked::Set(to.as_slice().bytes()));
        self.ask(Task::Fill {
            to: to.address(),
            count: to.as_slice().bytes(),
            size: 1,
            value: u32::from(value),
        })
    }

    /// Sets every element, of at most four bytes, to the low bytes of `value`.
    ///
    /// # Errors
    /// A failed call.
    ///
    /// # Panics
    /// If elements are longer.
    pub fn fill(&self, to: SliceMut<'_>, value: u32) -> Result<()> {
        assert!(to.scalar().size() <= 4, "fill: {}", to.scalar());
        if to.count() == 0 {
            return Ok(());
        }
        self.0.record.add(Asked::Set(to.as_slice().bytes()));
        self.ask(Task::Fill {
            to: to.address(),
            count: to.count(),
            size: to.scalar().size(),
            value,
        })
    }

    /// Copies `rows` rows of `length` elements, each slice with its number of elements from one row
    /// to the next.
    ///
    /// # Errors
    /// A failed call.
    ///
    /// # Panics
    /// If types differ, rows overlap, or a slice does not hold them.
    pub fn copy_rows(
        &self,
        rows: usize,
        length: usize,
        (from, from_step): (Slice<'_>, usize),
        (to, to_step): (SliceMut<'_>, usize),
    ) -> Result<()> {
        assert_eq!(from.scalar(), to.scalar(), "copy rows: types");
        if rows == 0 || length == 0 {
            return Ok(());
        }
        let fits =
            |count: usize, step: usize| step >= length && (rows - 1) * step + length <= count;
        assert!(
            fits(from.count(), from_step) && fits(to.count(), to_step),
            "copy rows: {rows} of {length}, {from_step} and {to_step} apart, of {} and {}",
            from.count(),
            to.count()
        );
        if from_step == length && to_step == length {
            let all = 0..rows * length;
            return self.copy(from.part(all.clone()), to.part(all));
        }
        let size = from.scalar().size();
        self.0.record.add(Asked::Copy(rows * length * size));
        self.ask(Task::Rows {
            rows,
            length: length * size,
            from: (from.address(), from_step * size),
            to: (to.address(), to_step * size),
        })
    }

    /// Waits until everything that was asked for is done.
    ///
    /// # Errors
    /// What failed since the last time.
    pub fn synchronize(&self) -> Result<()> {
        self.send_and_wait()?;
        match &self.0.backend {
            Backend::Driver(driver) => driver.synchronize(),
            Backend::Simulation(_) => Ok(()),
        }
    }

    /// The driver's stream, for libraries that take one, behind all that was asked for; null if the device is simulated.
    pub fn stream(&self) -> *mut c_void {
        self.0.queue.send_silently(self.0.device());
        match &self.0.backend {
            Backend::Driver(driver) => driver.stream(),
            Backend::Simulation(_) => std::ptr::null_mut(),
        }
    }

    /// Makes the device this thread's, for direct calls of the driver.
    ///
    /// # Errors
    /// A simulated device, of which the driver knows nothing.
    pub(super) fn enter(&self) -> Result<()> {
        match &self.0.backend {
            Backend::Driver(driver) => driver.enter(),
            Backend::Simulation(_) => Err(Error::Unsupported {
                kernel: "the driver",
                what: "the GPU is simulated".into(),
            }),
        }
    }

    /// The simulation, if it is what does the device's work.
    pub(super) fn simulation(&self) -> Option<&Simulation> {
        match &self.0.backend {
            Backend::Driver(_) => None,
            Backend::Simulation(simulation) => Some(simulation),
        }
    }

    /// NVIDIA's library of products.
    ///
    /// # Errors
    /// None on this machine.
    pub(super) fn library(&self) -> Result<&Library> {
        let library = self.0.library.get_or_init(|| {
            self.enter()?;
            Library::load()
        });
        library.as_ref().map_err(Clone::clone)
    }

    /// Runs kernel `name` of source `file`. The arguments must be those that it declares: a kernel
    /// that is given others writes to device memory that is not its own.
    ///
    /// # Errors
    /// A kernel that there is not, or that cannot be started so.
    pub(crate) fn launch(
        &self,
        file: &'static str,
        name: &'static str,
        launch: Launch,
        args: &[Arg<'_>],
    ) -> Result<()> {
        if launch.grid.contains(&0) {
            return Ok(()); // nothing to do
        }
        self.0.record.add(Asked::Launch(name));
        let run = || {
            let device = self.0.device();
            self.0.queue.kernel(device, (file, name), launch, args)
        };
        let Some(profile) = &self.0.profile else {
            return run();
        };
        self.synchronize()?;
        let started = Instant::now();
        run()?;
        self.synchronize()?;
        profile.add(name, started.elapsed());
        Ok(())
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // Nobody can see any more what was not sent: whoever holds memory of the device holds the device.
        self.queue.close(&self.backend);
    }
}

impl fmt::Debug for Gpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cuda:{} ({})", self.0.limits.ordinal, self.0.limits.name)
    }
}

impl Limits {
    /// A small device, so that work of little size takes the paths of large work.
    fn simulated(target: Target) -> Limits {
        Limits {
            ordinal: 0,
            name: "simulated GPU".into(),
            capability: match target {
                Target::Sm70 => (7, 0),
                Target::Sm80 => (8, 0),
                Target::Sm90a => (9, 0),
            },
            target,
            processors: 4,
            shared: match target {
                Target::Sm90a => 227 << 10,
                _ => 163 << 10,
            },
            memory: simulation::MEMORY,
            cache: 4 << 20,
            driver: 0,
        }
    }
}

/// What was asked for by [`Gpu::readback`].
#[derive(Debug)]
pub struct Readback(Bytes);

#[derive(Debug)]
enum Bytes {
    Here(Vec<u8>),
    Coming {
        gpu: Gpu,
        coming: Coming,
        bytes: usize,
    },
}

impl Readback {
    /// The bytes, which are waited for.
    ///
    /// # Errors
    /// What failed of everything that was asked for before them.
    pub fn bytes(mut self) -> Result<Vec<u8>> {
        match &mut self.0 {
            Bytes::Here(here) => Ok(std::mem::take(here)),
            Bytes::Coming { gpu, coming, bytes } => {
                let mut here = vec![0; *bytes];
                let queue = &gpu.0.queue;
                queue.read(gpu.0.device(), coming, &mut here)?;
                Ok(here)
            }
        }
    }
}

impl Drop for Readback {
    fn drop(&mut self) {
        if let Bytes::Coming { gpu, coming, .. } = &self.0 {
            gpu.0.queue.leave(coming);
        }
    }
}

/// Device memory that goes back when this is dropped.
#[derive(Debug)]
pub struct Buffer {
    gpu: Gpu,
    address: u64,
    bytes: usize,
}

impl Buffer {
    /// Bytes of it.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    fn range(&self, first: usize, count: usize, scalar: Scalar) -> u64 {
        let end = count
            .checked_mul(scalar.size())
            .and_then(|bytes| bytes.checked_add(first));
        assert!(
            end.is_some_and(|end| end <= self.bytes) && first.is_multiple_of(scalar.size()),
            "{count} x {scalar} from byte {first} of {}",
            self.bytes
        );
        self.address + first as u64
    }

    /// `count` elements from byte `first`.
    ///
    /// # Panics
    /// If they are not within the buffer, or not aligned.
    pub fn slice(&self, first: usize, count: usize, scalar: Scalar) -> Slice<'_> {
        Slice::new(self.range(first, count, scalar), count, scalar)
    }

    /// The same, to write: whoever cuts a buffer into ranges sees to it that no two that are
    /// written overlap. Memory of this machine is safe whatever happens on the device.
    ///
    /// # Panics
    /// As [`Buffer::slice`].
    pub fn slice_mut(&self, first: usize, count: usize, scalar: Scalar) -> SliceMut<'_> {
        SliceMut::new(self.range(first, count, scalar), count, scalar)
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let gpu = &self.gpu.0;
        gpu.queue.send_silently(gpu.device());
        match &gpu.backend {
            Backend::Driver(driver) => driver.free(self.address),
            Backend::Simulation(simulation) => simulation.free(self.address, self.bytes),
        }
    }
}
