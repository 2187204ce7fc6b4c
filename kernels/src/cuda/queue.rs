//! What was asked of a device and has not been sent there yet. It is sent some tasks at a time, those that come up again
//! as one graph of the driver's (`kept.rs`): what every task would cost by itself, on this machine and on the device, then
//! falls away. Whatever repeats is sent in graphs, training steps of one shape above all, and nothing else changes: who
//! asks for work computes every argument each time, and a graph is sent only if it does exactly what was asked for.
//!
//! A device works on what was sent while the next tasks are asked for. Where it has run dry, because this machine waited
//! for it, few tasks are sent at first, and then twice as many each time. Where it has a whole step to work on
//! ([`Queue::submit`]), all of the next one is held until that is submitted, and goes as one.
//!
//! Bytes from this machine and back to it are tasks, too (`staging.rs`). Sends are numbered, and a mark behind each that
//! carries bytes says when they have arrived.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::backend::{Backend, Mark};
use super::environment::named;
use super::gpu::Limits;
use super::kept::{InGraph, Kept};
use super::launch::{Arg, Launch};
use super::staging::{Full, Number, Staging};
use super::work::{Task, Work};
use super::{Error, Result};

/// Tasks that are sent first when a device has nothing to do.
const FIRST: usize = 16;
/// Tasks of a graph behind those, at most, if the variable GRAFT_CUDA_GRAPHS says nothing else. On an H200 (2026-11-26) a
/// step of BERT-base, each waited for, took 9.3 ms with 64, 9.7 with 128, 10.2 without graphs.
const MOST: usize = 64;
/// No graph is made of fewer.
const LEAST: usize = 4;
/// Marks that are kept, at most: who only sends never waits for one.
const MARKS: usize = 256;

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
    /// Tasks whose arguments were set in a graph
    pub set: usize,
}

struct State {
    work: Work,
    /// As many tasks are sent together
    size: usize,
    /// True while the device works on something that was submitted
    busy: bool,
    /// At most as many tasks, if somebody has said so
    limit: Option<usize>,
    kept: Kept,
    sent: Sent,
    /// What went wrong where nobody could be told
    failed: Option<Error>,
    /// Of the last send
    number: Number,
    /// Whether what was asked for carries bytes from this machine or to it
    carries: bool,
    /// Behind sends that did
    marks: VecDeque<(Number, Mark)>,
    /// The last send that was waited for
    arrived: Number,
    /// Sends that failed, and what they carried is lost
    lost: Vec<(Number, Error)>,
    /// Once there are bytes to carry; an error where no memory could be pinned
    staging: Option<Result<Staging>>,
}

/// See the module's text.
pub(super) struct Queue(Mutex<State>);

/// What is read back: the send that brings it, and its place.
#[derive(Debug)]
pub(super) struct Coming {
    number: Number,
    place: usize,
}

type Device<'a> = (&'a Limits, &'a Backend);

impl State {
    /// Tasks that are sent together at most, behind the first ones.
    fn most(&self) -> usize {
        self.limit.unwrap_or(MOST)
    }

    /// Tasks that are sent together now.
    fn due(&self) -> usize {
        match self.busy {
            true => self.limit.unwrap_or(usize::MAX),
            false => self.size,
        }
    }

    /// Told that the device has nothing to do.
    fn dry(&mut self) {
        self.size = FIRST.min(self.most());
        self.busy = false;
    }

    /// Sends what was asked for. What fails is not sent again, nor is what was to come behind it.
    fn send(&mut self, device: Device<'_>) -> Result<()> {
        if self.work.is_empty() {
            return self.failed.take().map_or(Ok(()), Err);
        }
        self.size = (2 * self.size).min(self.most());
        self.number += 1;
        let result = match self.failed.take() {
            None => self.send_work(device),
            Some(error) => Err(error),
        };
        self.work.clear();
        if std::mem::take(&mut self.carries) {
            // Of what failed, something may be on its way.
            let marked = self.mark(device);
            let result = result.and(marked);
            if let Err(error) = &result {
                self.lost.push((self.number, error.clone()));
            }
            return result;
        }
        result
    }

    fn send_work(&mut self, device: Device<'_>) -> Result<()> {
        let count = self.work.tasks.len();
        if self.limit.is_some_and(|limit| limit < LEAST) || self.kept.is_off() || count < LEAST {
            return self.send_alone(device);
        }
        let Some(InGraph { made, set }) = self.kept.send(device, &self.work)? else {
            return self.send_alone(device);
        };
        self.sent.graphs += 1;
        self.sent.in_graphs += count;
        self.sent.made += usize::from(made);
        self.sent.set += set;
        Ok(())
    }

    fn send_alone(&mut self, (limits, backend): Device<'_>) -> Result<()> {
        self.sent.alone += self.work.tasks.len();
        let mut tasks = self.work.tasks.iter();
        tasks.try_for_each(|task| backend.send(limits, &self.work, task))
    }

    /// Marks the end of the last send.
    fn mark(&mut self, device: Device<'_>) -> Result<()> {
        if self.marks.len() >= MARKS {
            let (oldest, _) = self.marks[MARKS / 2];
            self.pass(device, oldest)?;
        }
        let mark = device.1.mark()?;
        self.marks.push_back((self.number, mark));
        Ok(())
    }

    /// Waits for what send `number` carries, which is sent first if it was not.
    fn wait(&mut self, device: Device<'_>, number: Number) -> Result<()> {
        self.pass(device, number)?;
        match self.lost.iter().find(|(lost, _)| *lost == number) {
            Some((_, error)) => Err(error.clone()),
            None => Ok(()),
        }
    }

    /// Waits until the device is behind send `number`, whatever became of it.
    fn pass(&mut self, device: Device<'_>, number: Number) -> Result<()> {
        if number > self.number {
            self.send(device)?;
        }
        if number <= self.arrived {
            return Ok(());
        }
        let of = |(marked, _): &(Number, Mark)| *marked >= number;
        let Some(first) = self.marks.iter().position(of) else {
            // It carried nothing, or no mark could be made.
            let unmarked = self.lost.iter().find(|(lost, _)| *lost >= number);
            return unmarked.map_or(Ok(()), |(_, error)| Err(error.clone()));
        };
        let waited = device.1.wait(&self.marks[first].1);
        for (marked, mark) in self.marks.drain(..=first) {
            device.1.unmark(mark);
            self.arrived = marked;
            if let Err(error) = &waited {
                self.lost.push((marked, error.clone()));
            }
        }
        if let Some(Ok(staging)) = &mut self.staging {
            staging.arrived(self.arrived);
        }
        if self.marks.is_empty() && self.work.is_empty() {
            self.dry();
        }
        waited
    }

    /// The pinned memory, if there is any.
    fn staging(&mut self, device: Device<'_>) -> Option<&mut Staging> {
        let make = || device.1.pin(Staging::BYTES).map(Staging::over);
        self.staging.get_or_insert_with(make).as_mut().ok()
    }

    /// What `take` takes of the pinned memory for the next send, once there is room; nothing if that cannot be.
    fn take<T>(
        &mut self,
        device: Device<'_>,
        mut take: impl FnMut(&mut Staging, Number) -> Option<std::result::Result<T, Full>>,
    ) -> Result<Option<T>> {
        loop {
            let next = self.number + 1;
            let Some(staging) = self.staging(device) else {
                return Ok(None);
            };
            match take(staging, next) {
                None => return Ok(None),
                Some(Ok(taken)) => {
                    self.carries = true;
                    return Ok(Some(taken));
                }
                Some(Err(full)) => self.pass(device, full)?,
            }
        }
    }

    /// Told that nobody will look at what is read back any more.
    fn leave(&mut self, coming: &Coming) {
        if let Some(Ok(staging)) = &mut self.staging {
            staging.leave(coming.place);
        }
    }

    fn send_if_due(&mut self, device: Device<'_>) -> Result<()> {
        match self.work.tasks.len() < self.due() {
            true => Ok(()),
            false => self.send(device),
        }
    }
}

impl Queue {
    /// One for a device; `alone` if nothing is to go in graphs.
    ///
    /// # Errors
    /// A value of GRAFT_CUDA_GRAPHS that is no number.
    pub fn new(alone: bool) -> Result<Queue> {
        let expected = "a number of launches, or 0 for no graphs";
        let wanted: Option<usize> = named("GRAFT_CUDA_GRAPHS", expected, |text| text.parse().ok())?;
        let limit = match alone {
            true => Some(1),
            false => wanted.map(|most| most.max(1)),
        };
        Ok(Queue(Mutex::new(State {
            work: Work::default(),
            size: FIRST.min(limit.unwrap_or(MOST)),
            busy: false,
            limit,
            kept: Kept::default(),
            sent: Sent::default(),
            failed: None,
            number: 0,
            carries: false,
            marks: VecDeque::new(),
            arrived: 0,
            lost: Vec::new(),
            staging: None,
        })))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, device: Device<'_>, add: impl FnOnce(&mut Work)) -> Result<()> {
        let mut state = self.state();
        add(&mut state.work);
        state.send_if_due(device)
    }

    /// Asks for a launch.
    ///
    /// # Errors
    /// What failed of all that is sent with it.
    pub fn kernel(
        &self,
        device: Device<'_>,
        (file, name): (&'static str, &'static str),
        launch: Launch,
        args: &[Arg<'_>],
    ) -> Result<()> {
        self.add(device, |work| work.kernel(file, name, launch, args))
    }

    /// Asks for a task that has no arguments.
    ///
    /// # Errors
    /// As [`Queue::kernel`].
    pub fn task(&self, device: Device<'_>, task: Task) -> Result<()> {
        self.add(device, |work| work.tasks.push(task))
    }

    /// Asks for a copy of bytes of this machine, which may be used again at once, to the device; false if they do not go
    /// this way.
    ///
    /// # Errors
    /// As [`Queue::kernel`].
    pub fn upload(&self, device: Device<'_>, from: &[u8], to: u64) -> Result<bool> {
        if !Staging::sends(from.len()) {
            return Ok(false);
        }
        let mut state = self.state();
        let put = |staging: &mut Staging, number| Some(staging.put(from, number));
        let Some(pinned) = state.take(device, put)? else {
            return Ok(false);
        };
        state.work.upload(pinned, to, from.len());
        state.send_if_due(device)?;
        Ok(true)
    }

    /// Asks for bytes of the device, which [`Queue::read`] then gives; nothing if they do not go this way.
    ///
    /// # Errors
    /// As [`Queue::kernel`].
    pub fn readback(&self, device: Device<'_>, from: u64, bytes: usize) -> Result<Option<Coming>> {
        if !Staging::reads(bytes) {
            return Ok(None);
        }
        let mut state = self.state();
        let taken = state.take(device, |staging, number| {
            let place = staging.place(number)?;
            Some(place.map(|(place, address)| (Coming { number, place }, address)))
        })?;
        let Some((coming, address)) = taken else {
            return Ok(None);
        };
        state.work.readback(from, address, bytes);
        match state.send_if_due(device) {
            Ok(()) => Ok(Some(coming)),
            Err(error) => {
                state.leave(&coming);
                Err(error)
            }
        }
    }

    /// Waits for what is read back, and copies it.
    ///
    /// # Errors
    /// What failed of what was sent until then.
    pub fn read(&self, device: Device<'_>, coming: &Coming, to: &mut [u8]) -> Result<()> {
        let mut state = self.state();
        state.wait(device, coming.number)?;
        if let Some(Ok(staging)) = &state.staging {
            staging.read(coming.place, to);
        }
        Ok(())
    }

    /// Told that nobody will look at what is read back any more.
    pub fn leave(&self, coming: &Coming) {
        self.state().leave(coming);
    }

    /// Sends all that was asked for.
    ///
    /// # Errors
    /// As [`Queue::kernel`].
    pub fn send(&self, device: Device<'_>) -> Result<()> {
        self.state().send(device)
    }

    /// The same behind something that the device will work on for as long as the next such thing takes to be asked for: all
    /// of that is then held until it is submitted.
    ///
    /// # Errors
    /// As [`Queue::kernel`].
    pub fn submit(&self, device: Device<'_>) -> Result<()> {
        let mut state = self.state();
        state.send(device)?;
        state.busy = true;
        Ok(())
    }

    /// The same before this machine waits for the device.
    ///
    /// # Errors
    /// As [`Queue::kernel`].
    pub fn send_and_wait(&self, device: Device<'_>) -> Result<()> {
        let mut state = self.state();
        let result = state.send(device);
        state.dry();
        result
    }

    /// The same where nobody can be told what failed: whoever asks for something next is.
    pub fn send_silently(&self, device: Device<'_>) {
        let mut state = self.state();
        let result = state.send(device);
        state.failed = result.err();
    }

    /// From now on at most so many tasks are sent together, or as many as without a limit; what it was before.
    pub fn limit(&self, most: Option<usize>) -> Option<usize> {
        let mut state = self.state();
        let before = std::mem::replace(&mut state.limit, most);
        state.dry();
        before
    }

    /// How tasks were sent.
    pub fn sent(&self) -> Sent {
        self.state().sent
    }

    /// Gives back all that was kept, before the device closes.
    pub fn close(&mut self, backend: &Backend) {
        let state = self.0.get_mut().unwrap_or_else(PoisonError::into_inner);
        state.kept.clear(backend);
        for (_, mark) in state.marks.drain(..) {
            backend.unmark(mark);
        }
        if let Some(Ok(staging)) = state.staging.take() {
            backend.unpin(staging.memory(), Staging::BYTES);
        }
    }
}
