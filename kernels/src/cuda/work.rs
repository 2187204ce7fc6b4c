//! What a device is to do next, as it was asked for: launches with their arguments, copies, memsets.

use std::ffi::c_void;
use std::ops::Range;

use super::launch::{Arg, Launch};

/// Most arguments of a kernel.
const ARGUMENTS: usize = 32;

/// One thing to do.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) enum Task {
    /// To run kernel `name` of source `file`
    Kernel {
        file: &'static str,
        name: &'static str,
        launch: Launch,
        /// Its arguments, in [`Work`]
        first: u32,
        end: u32,
    },
    /// To copy bytes from one address to another
    Copy { from: u64, to: u64, bytes: usize },
    /// To copy `rows` rows of `length` bytes; addresses with the bytes from one row to the next
    Rows {
        rows: usize,
        length: usize,
        from: (u64, usize),
        to: (u64, usize),
    },
    /// To set `count` elements of `size` bytes, at most four, to the low bytes of `value`
    Fill {
        to: u64,
        count: usize,
        size: usize,
        value: u32,
    },
    /// To copy bytes from pinned memory of this machine
    Upload {
        /// Their address there, an argument in [`Work`]
        place: u32,
        to: u64,
        bytes: usize,
    },
    /// To copy bytes to pinned memory of this machine
    Readback {
        from: u64,
        /// As of [`Task::Upload`]
        place: u32,
        bytes: usize,
    },
}

impl Task {
    /// Its arguments, `first .. end` of those in [`Work`].
    fn arguments(&self) -> (u32, u32) {
        match *self {
            Task::Kernel { first, end, .. } => (first, end),
            Task::Upload { place, .. } | Task::Readback { place, .. } => (place, place + 1),
            Task::Copy { .. } | Task::Rows { .. } | Task::Fill { .. } => (0, 0),
        }
    }
}

/// Tasks in their order, and what the kernels among them are given.
#[derive(Clone, Default, Debug)]
pub(super) struct Work {
    pub tasks: Vec<Task>,
    /// Where each argument, of kernels and of copies from and to this machine, begins among the words
    starts: Vec<u32>,
    words: Vec<u64>,
}

/// A kernel's arguments as the driver takes them: a pointer to each.
pub(super) struct Pointers([*mut c_void; ARGUMENTS]);

impl Pointers {
    /// The first of the pointers. What they point to must still be there, and is only read.
    pub fn as_mut_ptr(&mut self) -> *mut *mut c_void {
        self.0.as_mut_ptr()
    }
}

impl Work {
    /// True if there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.tasks.is_empty()
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.tasks.clear();
        self.starts.clear();
        self.words.clear();
    }

    /// Adds a launch.
    ///
    /// # Panics
    /// If there are more arguments than any kernel has.
    pub fn kernel(
        &mut self,
        file: &'static str,
        name: &'static str,
        launch: Launch,
        args: &[Arg<'_>],
    ) {
        assert!(args.len() <= ARGUMENTS, "{name}: arguments");
        let first = self.starts.len() as u32;
        for arg in args {
            self.starts.push(self.words.len() as u32);
            match *arg {
                Arg::Word(word) => self.words.push(word),
                Arg::Bytes(bytes) => {
                    let (whole, rest) = bytes.as_chunks::<8>();
                    self.words
                        .extend(whole.iter().map(|&word| u64::from_ne_bytes(word)));
                    if !rest.is_empty() {
                        let mut last = [0; 8];
                        last[..rest.len()].copy_from_slice(rest);
                        self.words.push(u64::from_ne_bytes(last));
                    }
                }
            }
        }
        self.tasks.push(Task::Kernel {
            file,
            name,
            launch,
            first,
            end: self.starts.len() as u32,
        });
    }

    /// Adds a copy of so many bytes from an address of pinned memory.
    pub fn upload(&mut self, from: u64, to: u64, bytes: usize) {
        let place = self.address(from);
        self.tasks.push(Task::Upload { place, to, bytes });
    }

    /// Adds a copy of so many bytes to an address of pinned memory.
    pub fn readback(&mut self, from: u64, to: u64, bytes: usize) {
        let place = self.address(to);
        self.tasks.push(Task::Readback { from, place, bytes });
    }

    /// Adds an argument that is an address.
    fn address(&mut self, address: u64) -> u32 {
        self.starts.push(self.words.len() as u32);
        self.words.push(address);
        self.starts.len() as u32 - 1
    }

    /// The address of pinned memory that is argument number `place`.
    pub fn pinned(&self, place: u32) -> u64 {
        self.words[self.starts[place as usize] as usize]
    }

    /// The arguments number `first .. end`.
    pub fn pointers(&self, first: u32, end: u32) -> Pointers {
        let mut pointers = [std::ptr::null_mut(); ARGUMENTS];
        let starts = &self.starts[first as usize..end as usize];
        for (pointer, &start) in pointers.iter_mut().zip(starts) {
            *pointer = std::ptr::from_ref(&self.words[start as usize])
                .cast_mut()
                .cast();
        }
        Pointers(pointers)
    }

    /// The words of the arguments number `first .. end`.
    fn words_of(&self, first: u32, end: u32) -> Range<usize> {
        let start = |argument: u32| match self.starts.get(argument as usize) {
            Some(&start) => start as usize,
            None => self.words.len(),
        };
        start(first)..start(end)
    }

    /// True if the same is done in the same order, but for the contents of kernels' arguments.
    pub fn is_like(&self, other: &Work) -> bool {
        self.tasks == other.tasks
            && self.starts == other.starts
            && self.words.len() == other.words.len()
    }

    /// Numbers of the tasks whose arguments are not those of `other`, which is like this.
    pub fn differing(&self, other: &Work) -> Vec<usize> {
        if self.words == other.words {
            return Vec::new();
        }
        let differs = |task: &Task| {
            let (first, end) = task.arguments();
            let words = self.words_of(first, end);
            self.words[words.clone()] != other.words[words]
        };
        let numbers = self.tasks.iter().enumerate();
        numbers
            .filter(|(_, task)| differs(task))
            .map(|(i, _)| i)
            .collect()
    }

    /// Takes over the arguments of task number `task` of `other`, which is like this.
    pub fn set_arguments(&mut self, other: &Work, task: usize) {
        let (first, end) = self.tasks[task].arguments();
        let words = self.words_of(first, end);
        self.words[words.clone()].copy_from_slice(&other.words[words]);
    }

    /// Takes over the arguments of `other`, which is like this.
    pub fn take_arguments(&mut self, other: &Work) {
        self.words.copy_from_slice(&other.words);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::launch::args;

    fn work(key: u32, threads: u32, options: &[u8]) -> Work {
        let mut work = Work::default();
        let launch = Launch::linear(3, threads);
        work.kernel("file", "first", launch, args![7usize, key, 0.5f32]);
        let (from, to, bytes) = (256, 512, 64);
        work.tasks.push(Task::Copy { from, to, bytes });
        work.kernel("file", "second", launch, args![options, 9usize]);
        work
    }

    #[test]
    fn work_is_like_other_work_whose_arguments_differ() {
        let one = work(1, 64, &[1; 12]);
        assert!(one.is_like(&work(2, 64, &[1; 12])));
        assert_eq!(one.differing(&one.clone()), []);
        assert_eq!(one.differing(&work(2, 64, &[1; 12])), [0]);
        let mut options = [1; 12];
        options[11] = 5;
        assert_eq!(one.differing(&work(2, 64, &options)), [0, 2]);
        for other in [
            work(1, 32, &[1; 12]),
            work(1, 64, &[1; 20]),
            Work::default(),
        ] {
            assert!(!one.is_like(&other));
        }
    }

    #[test]
    fn addresses_of_this_machine_may_differ_like_arguments() {
        let work = |up: u64, down: u64, to: u64| {
            let mut work = Work::default();
            work.kernel("file", "first", Launch::linear(3, 64), args![7usize]);
            work.upload(up, to, 64);
            work.readback(to, down, 4);
            work
        };
        let mut one = work(0x1000, 0x2000, 256);
        assert_eq!(one.differing(&one.clone()), []);
        assert_eq!(one.differing(&work(0x1100, 0x2000, 256)), [1]);
        let other = work(0x1100, 0x2200, 256);
        assert_eq!(one.differing(&other), [1, 2]);
        one.set_arguments(&other, 2);
        let pinned = |work: &Work, task: usize| match work.tasks[task] {
            Task::Upload { place, .. } | Task::Readback { place, .. } => work.pinned(place),
            other => panic!("{other:?}"),
        };
        assert_eq!((pinned(&one, 1), pinned(&one, 2)), (0x1000, 0x2200));
        // Where bytes lie on the device may not.
        assert!(!one.is_like(&work(0x1000, 0x2200, 512)));
    }

    #[test]
    fn arguments_are_taken_over_one_kernel_at_a_time() {
        let (mut one, other) = (work(1, 64, &[1; 12]), work(2, 64, &[3; 12]));
        one.set_arguments(&other, 2);
        assert_eq!(one.differing(&other), [0]);
        one.set_arguments(&other, 0);
        assert_eq!(one.differing(&other), []);
    }

    #[test]
    fn pointers_lead_to_the_bytes_of_arguments() {
        let work = work(11, 64, &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]);
        let Task::Kernel { first, end, .. } = work.tasks[2] else {
            panic!("the third task is a kernel");
        };
        let range = work.words_of(first, end);
        let bytes: &[u8] = bytemuck::cast_slice(&work.words[range]);
        assert_eq!(bytes[..12], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]);
        assert_eq!(bytes[12..], [0, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0]);
        let mut pointers = work.pointers(first, end);
        // Only compared, never followed: they point to what `words_of` gives.
        let second = std::ptr::from_ref(&work.words[work.words_of(first + 1, end).start]);
        assert_eq!(pointers.0[1].cast_const().cast(), second);
        assert!(!pointers.as_mut_ptr().is_null());
    }
}
