//! What was asked of a device and has not been sent there yet. It is sent some tasks at a time, those that come up again
//! as one graph of the driver's: what every task would cost by itself, on this machine and on the device, then falls away.
//!
//! Nobody says what will come up again. Work is kept when it is sent; when work comes up that is like some that was sent
//! before - the same kernels in the same order, with the same numbers of threads, the same copies - and at most half of whose
//! arguments differ, a graph is made of it, and from the third time on the graph is sent, with the arguments that differ
//! set in it first: the keys of dropout, the factor of a loss. So whatever repeats is sent in graphs, training steps of
//! one shape above all, and nothing else changes: who asks for work computes every argument each time, and a graph is
//! sent only if it does exactly what was asked for.
//!
//! A device works on what was sent while the next tasks are asked for. Where it has run dry, because this machine waited
//! for it, few tasks are sent at first, and then twice as many each time.

use std::collections::HashMap;
use std::hash::{Hash, Hasher};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::backend::{Backend, Ready};
use super::environment::named;
use super::gpu::Limits;
use super::launch::{Arg, Launch};
use super::work::{Task, Work};
use super::{Error, Result};

/// Tasks that are sent first when a device has nothing to do.
const FIRST: usize = 16;
/// Tasks of a graph, at most, if the variable GRAFT_CUDA_GRAPHS says nothing else. On an H200 (2026-11-26) a step of
/// BERT-base took 9.3 ms with 64, 9.7 with 128, 10.2 without graphs.
const MOST: usize = 64;
/// No graph is made of fewer.
const LEAST: usize = 4;
/// Tasks of all work that is kept, at most: beyond, what was not sent for the longest time goes.
const KEPT: usize = 1 << 15;

/// How tasks were sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sent {
    /// Tasks by themselves
    pub alone: usize,
    /// Tasks in graphs
    pub in_graphs: usize,
    /// Graphs that were sent
    pub graphs: usize,
    /// Graphs that were made
    pub made: usize,
    /// Launches whose arguments were set in a graph
    pub set: usize,
}

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
struct Kept {
    entries: HashMap<u64, Vec<Entry>>,
    tasks: usize,
    clock: u64,
}

struct State {
    work: Work,
    /// As many tasks are sent together
    size: usize,
    /// At most as many
    most: usize,
    kept: Kept,
    sent: Sent,
    /// What went wrong where nobody could be told
    failed: Option<Error>,
}

/// See the module's text.
pub(super) struct Queue(Mutex<State>);

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

    fn clear(&mut self, backend: &Backend) {
        for entry in self.entries.drain().flat_map(|(_, same)| same) {
            if let Some(ready) = entry.ready {
                backend.forget(ready);
            }
        }
        self.tasks = 0;
    }
}

impl State {
    /// Sends what was asked for. What fails is not sent again, nor is what was to come behind it.
    fn send(&mut self, limits: &Limits, backend: &Backend) -> Result<()> {
        if let Some(error) = self.failed.take() {
            self.work.clear();
            return Err(error);
        }
        if self.work.is_empty() {
            return Ok(());
        }
        self.size = (2 * self.size).min(self.most);
        let result = self.send_work(limits, backend);
        self.work.clear();
        result
    }

    fn send_work(&mut self, limits: &Limits, backend: &Backend) -> Result<()> {
        let count = self.work.tasks.len();
        if self.most < LEAST || count < LEAST {
            return self.send_alone(limits, backend);
        }
        let State {
            work, kept, sent, ..
        } = self;
        let shape = shape(work);
        kept.clock += 1;
        let now = kept.clock;
        let Some((entry, differing)) = kept.like(shape, work) else {
            kept.add(shape, work, backend);
            return self.send_alone(limits, backend);
        };
        entry.used = now;
        entry.work.take_arguments(work);
        match &mut entry.ready {
            Some(ready) => {
                let mut differing = differing.iter();
                sent.set += differing.len();
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
                    sent.made += 1;
                }
                Err(_) => {
                    // Without graphs everything goes its usual way; if that is wrong too, it is said there.
                    kept.clear(backend);
                    self.most = 1;
                    self.size = 1;
                    return self.send_alone(limits, backend);
                }
            },
        }
        let Some(ready) = &entry.ready else {
            unreachable!("it was made above");
        };
        backend.send_ready(limits, ready)?;
        sent.graphs += 1;
        sent.in_graphs += count;
        Ok(())
    }

    fn send_alone(&mut self, limits: &Limits, backend: &Backend) -> Result<()> {
        self.sent.alone += self.work.tasks.len();
        let mut tasks = self.work.tasks.iter();
        tasks.try_for_each(|task| backend.send(limits, &self.work, task))
    }
}

impl Queue {
    /// One for a device; `alone` if nothing is to go in graphs.
    ///
    /// # Errors
    /// A value of GRAFT_CUDA_GRAPHS that is no number.
    pub fn new(alone: bool) -> Result<Queue> {
        let expected = "a number of launches, or 0 for no graphs";
        let wanted = named("GRAFT_CUDA_GRAPHS", expected, |text| text.parse().ok())?;
        let most = if alone {
            1
        } else {
            wanted.unwrap_or(MOST).max(1)
        };
        Ok(Queue(Mutex::new(State {
            work: Work::default(),
            size: FIRST.min(most),
            most,
            kept: Kept::default(),
            sent: Sent::default(),
            failed: None,
        })))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, limits: &Limits, backend: &Backend, add: impl FnOnce(&mut Work)) -> Result<()> {
        let mut state = self.state();
        add(&mut state.work);
        if state.work.tasks.len() < state.size {
            return Ok(());
        }
        state.send(limits, backend)
    }

    /// Asks for a launch.
    ///
    /// # Errors
    /// What failed of all that is sent with it.
    pub fn kernel(
        &self,
        (limits, backend): (&Limits, &Backend),
        (file, name): (&'static str, &'static str),
        launch: Launch,
        args: &[Arg<'_>],
    ) -> Result<()> {
        self.add(limits, backend, |work| {
            work.kernel(file, name, launch, args);
        })
    }

    /// Asks for a task that is no launch.
    ///
    /// # Errors
    /// As [`Queue::kernel`].
    pub fn task(&self, (limits, backend): (&Limits, &Backend), task: Task) -> Result<()> {
        self.add(limits, backend, |work| work.tasks.push(task))
    }

    /// Sends all that was asked for.
    ///
    /// # Errors
    /// As [`Queue::kernel`].
    pub fn send(&self, limits: &Limits, backend: &Backend) -> Result<()> {
        self.state().send(limits, backend)
    }

    /// The same before this machine waits for the device.
    ///
    /// # Errors
    /// As [`Queue::kernel`].
    pub fn send_and_wait(&self, limits: &Limits, backend: &Backend) -> Result<()> {
        let mut state = self.state();
        let result = state.send(limits, backend);
        state.size = FIRST.min(state.most);
        result
    }

    /// The same where nobody can be told what failed: whoever asks for something next is.
    pub fn send_silently(&self, limits: &Limits, backend: &Backend) {
        let mut state = self.state();
        let result = state.send(limits, backend);
        state.failed = result.err();
    }

    /// From now on at most so many tasks are sent together; how many it was before.
    pub fn limit(&self, most: usize) -> usize {
        let mut state = self.state();
        state.size = FIRST.min(most);
        std::mem::replace(&mut state.most, most)
    }

    /// How tasks were sent.
    pub fn sent(&self) -> Sent {
        self.state().sent
    }

    /// Gives back all that was kept, before the device closes.
    pub fn close(&mut self, backend: &Backend) {
        let state = self.0.get_mut().unwrap_or_else(PoisonError::into_inner);
        state.kept.clear(backend);
    }
}
