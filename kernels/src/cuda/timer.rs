//! How long a GPU takes, by its own clock.

use cudarc::driver::sys::{self, CUevent};

use super::driver::check;
use super::{Gpu, Result};

/// A point in what a GPU does.
struct Event(CUevent);

impl Event {
    fn new() -> Result<Event> {
        let mut event = std::ptr::null_mut();
        // SAFETY: a valid pointer; the caller has made the device this thread's.
        check("cuEventCreate", unsafe {
            sys::cuEventCreate(&mut event, 0)
        })?;
        Ok(Event(event))
    }

    fn record(&self, gpu: &Gpu) -> Result<()> {
        // SAFETY: an event and a stream of one device.
        check("cuEventRecord", unsafe {
            sys::cuEventRecord(self.0, gpu.stream().cast())
        })
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: made by `new`, and not used again; the driver waits for it if need be.
        unsafe { sys::cuEventDestroy_v2(self.0) };
    }
}

impl Gpu {
    /// Seconds between the start and the end of what `work` asks this device to do.
    ///
    /// # Errors
    /// What `work` returns, and what fails on the device meanwhile.
    pub fn seconds(&self, work: impl FnOnce() -> Result<()>) -> Result<f64> {
        self.enter()?;
        // What takes time is the work, not that it comes up again.
        let together = self.send_together(Some(1))?;
        let (start, end) = (Event::new()?, Event::new()?);
        start.record(self)?;
        let worked = work();
        self.send_together(together)?;
        worked?;
        end.record(self)?;
        self.synchronize()?;
        let mut milliseconds = 0.0;
        // SAFETY: a valid pointer and two events that have happened.
        check("cuEventElapsedTime_v2", unsafe {
            sys::cuEventElapsedTime_v2(&mut milliseconds, start.0, end.0)
        })?;
        Ok(f64::from(milliseconds) * 1e-3)
    }
}
