//! Work that was sent before, and graphs of what came up again.
//!
//! Nobody says what will come up again. Work is kept when it is sent; when work comes up that is like some that was sent
//! before - the same kernels in the same order, with the same numbers of threads, the same copies - and at most half of whose
//! arguments differ, a graph is made of it, and from the third time on the graph is sent, with the arguments that differ
//! set in it first: the keys of dropout, the factor of a loss, where inputs lie on this machine.

use std::collections::HashMap;
use std::hash::{Hash, Hasher};

use super::Result;
use super::backend::{Backend, Ready};
use super::gpu::Limits;
use super::work::Work;

/// Tasks of all work that is kept, at most: beyond, what was not sent for the longest time goes.
const KEPT: usize = 1 << 15;

/// Work that was sent before.
struct Entry {
    /// With the arguments that it was sent with last
    work: Work,
    /// Once it came up again
    ready: Option<Ready>,
    /// When it was sent last
    used: u64,
}

/// All of it, by [`shape`].
#[derive(Default)]
pub(super) struct Kept {
    entries: HashMap<u64, Vec<Entry>>,
    tasks: usize,
    clock: u64,
    /// Once no graph could be made
    off: bool,
}

/// How work was sent as a graph.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct InGraph {
    /// Whether it was made for that
    pub made: bool,
    /// Tasks whose arguments were set
    pub set: usize,
}

/// Mixes whole words, as quickly as such few of them deserve.
struct Mix(u64);

impl Hasher for Mix {
    fn write(&mut self, bytes: &[u8]) {
        let (words, rest) = bytes.as_chunks::<8>();
        for &word in words {
            self.write_u64(u64::from_le_bytes(word));
        }
        for &byte in rest {
            self.write_u64(u64::from(byte));
        }
    }

    fn write_u32(&mut self, word: u32) {
        self.write_u64(u64::from(word));
    }

    fn write_u64(&mut self, word: u64) {
        self.0 = (self.0.rotate_left(5) ^ word).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    }

    fn write_usize(&mut self, word: usize) {
        self.write_u64(word as u64);
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

/// A number that work has in common with work that is like it.
fn shape(work: &Work) -> u64 {
    let mut mix = Mix(0);
    work.tasks.hash(&mut mix);
    mix.finish()
}

impl Kept {
    /// What was sent before that is like `work` and differs in few arguments, and the kernels that do.
    fn like(&mut self, shape: u64, work: &Work) -> Option<(&mut Entry, Vec<usize>)> {
        let same = self.entries.get_mut(&shape)?;
        let candidates = same.iter_mut().filter(|entry| entry.work.is_like(work));
        let (entry, differing) = candidates
            .map(|entry| {
                let differing = entry.work.differing(work);
                (entry, differing)
            })
            .min_by_key(|(_, differing)| differing.len())?;
        (2 * differing.len() <= work.tasks.len()).then_some((entry, differing))
    }

    /// Keeps work, in the place of what was not sent for the longest time.
    fn add(&mut self, shape: u64, work: &Work, backend: &Backend) {
        let used = self.clock;
        let (work, ready) = (work.clone(), None);
        self.tasks += work.tasks.len();
        let same = self.entries.entry(shape).or_default();
        same.push(Entry { work, ready, used });
        while self.tasks > KEPT {
            let all = self.entries.iter();
            let ages = all.flat_map(|(&shape, same)| {
                same.iter()
                    .enumerate()
                    .map(move |(i, e)| (e.used, shape, i))
            });
            let Some((_, shape, i)) = ages.min() else {
                return;
            };
            let Some(same) = self.entries.get_mut(&shape) else {
                return;
            };
            let oldest = same.swap_remove(i);
            if same.is_empty() {
                self.entries.remove(&shape);
            }
            self.tasks -= oldest.work.tasks.len();
            if let Some(ready) = oldest.ready {
                backend.forget(ready);
            }
        }
    }

    /// Sends `work` as a graph if it came up before. If not, it is kept, and whoever asked sends it task by task.
    ///
    /// # Errors
    /// A failed call.
    pub fn send(
        &mut self,
        (limits, backend): (&Limits, &Backend),
        work: &Work,
    ) -> Result<Option<InGraph>> {
        let shape = shape(work);
        self.clock += 1;
        let now = self.clock;
        let Some((entry, differing)) = self.like(shape, work) else {
            self.add(shape, work, backend);
            return Ok(None);
        };
        entry.used = now;
        entry.work.take_arguments(work);
        let mut sent = InGraph {
            made: false,
            set: 0,
        };
        match &mut entry.ready {
            Some(ready) => {
                let mut differing = differing.iter();
                sent.set = differing.len();
                let set = differing
                    .try_for_each(|&task| backend.set_arguments(limits, ready, work, task));
                if let Err(error) = set {
                    // Some are set and some are not.
                    if let Some(ready) = entry.ready.take() {
                        backend.forget(ready);
                    }
                    return Err(error);
                }
            }
            None => match backend.make_ready(limits, work) {
                Ok(ready) => {
                    entry.ready = Some(ready);
                    sent.made = true;
                }
                Err(_) => {
                    // Without graphs everything goes its usual way; if that is wrong too, it is said there.
                    self.clear(backend);
                    self.off = true;
                    return Ok(None);
                }
            },
        }
        let Some(ready) = &entry.ready else {
            unreachable!("it was made above");
        };
        backend.send_ready(limits, ready)?;
        Ok(Some(sent))
    }

    /// True once a graph could not be made: there will be none.
    pub fn is_off(&self) -> bool {
        self.off
    }

    /// Gives everything back.
    pub fn clear(&mut self, backend: &Backend) {
        for entry in self.entries.drain().flat_map(|(_, same)| same) {
            if let Some(ready) = entry.ready {
                backend.forget(ready);
            }
        }
        self.tasks = 0;
    }
}
