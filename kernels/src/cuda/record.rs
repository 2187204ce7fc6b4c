//! What a device is asked for, listed for tests of what a step costs.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

/// Something that a device was asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// To run a kernel of this name
    Launch(&'static str),
    /// To set so many bytes
    Set(usize),
    /// To copy so many bytes from one place of its memory to another
    Copy(usize),
    /// To take so many bytes from this machine
    Upload(usize),
    /// To give so many bytes to this machine, which waits for them
    Download(usize),
    /// To give so many bytes to this machine, which looks at them later
    Readback(usize),
    /// For so many bytes of memory
    Allocate(usize),
}

/// The list, while one is kept.
#[derive(Default)]
pub(super) struct Record {
    on: AtomicBool,
    list: Mutex<Vec<Asked>>,
}

impl Record {
    /// Lists what is asked for from now on.
    pub fn start(&self) {
        self.take();
        self.on.store(true, Ordering::Release);
    }

    /// Notes something, if a list is kept.
    pub fn add(&self, asked: Asked) {
        if self.on.load(Ordering::Acquire) {
            let mut list = self.list.lock().unwrap_or_else(PoisonError::into_inner);
            list.push(asked);
        }
    }

    /// Ends the list.
    pub fn take(&self) -> Vec<Asked> {
        self.on.store(false, Ordering::Release);
        std::mem::take(&mut self.list.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
