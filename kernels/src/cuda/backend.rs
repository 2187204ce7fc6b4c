//! Who does a device's work: the driver, or the simulation.

use super::driver::{Driver, Event};
use super::gpu::Limits;
use super::graph::Graph;
use super::simulation::Simulation;
use super::work::{Task, Work};
use super::{Error, Result};

pub(super) enum Backend {
    Driver(Driver),
    Simulation(Simulation),
}

/// Work that was made ready to be sent by one call.
#[derive(Debug)]
pub(super) enum Ready {
    Driver(Graph),
    /// What is run is what is kept here, as a device has it.
    Simulation(Work),
}

/// A moment in the order of what was sent.
#[derive(Debug)]
pub(super) enum Mark {
    Driver(Event),
    /// What is sent there is done.
    Simulation,
}

impl Backend {
    /// So many bytes of memory of this machine that the device reads and writes by itself.
    ///
    /// # Errors
    /// No more memory to pin.
    pub fn pin(&self, bytes: usize) -> Result<*mut u8> {
        match self {
            Backend::Driver(driver) => driver.pin(bytes),
            Backend::Simulation(simulation) => simulation.pin(bytes),
        }
    }

    /// Takes back what [`Backend::pin`] gave for so many bytes, when everything that was sent is done.
    pub fn unpin(&self, memory: *mut u8, bytes: usize) {
        match self {
            Backend::Driver(driver) => driver.unpin(memory),
            Backend::Simulation(simulation) => simulation.unpin(memory, bytes),
        }
    }

    /// The moment behind everything that was sent so far.
    ///
    /// # Errors
    /// A failed call.
    pub fn mark(&self) -> Result<Mark> {
        match self {
            Backend::Driver(driver) => driver.record().map(Mark::Driver),
            Backend::Simulation(_) => Ok(Mark::Simulation),
        }
    }

    /// Waits for a moment.
    ///
    /// # Errors
    /// What failed of what was sent before it.
    pub fn wait(&self, mark: &Mark) -> Result<()> {
        match (self, mark) {
            (Backend::Driver(driver), Mark::Driver(event)) => driver.wait(event),
            (Backend::Simulation(_), Mark::Simulation) => Ok(()),
            _ => Err(foreign()),
        }
    }

    /// Takes a mark back.
    pub fn unmark(&self, mark: Mark) {
        if let (Backend::Driver(driver), Mark::Driver(event)) = (self, mark) {
            driver.take_back(event);
        }
    }

    /// Sends one task of `work`.
    ///
    /// # Errors
    /// A kernel that there is not, or that cannot be started so.
    pub fn send(&self, limits: &Limits, work: &Work, task: &Task) -> Result<()> {
        match self {
            Backend::Driver(driver) => match *task {
                Task::Kernel {
                    file,
                    name,
                    launch,
                    first,
                    end,
                } => {
                    let mut pointers = work.pointers(first, end);
                    driver.launch(limits, file, name, launch, pointers.as_mut_ptr())
                }
                Task::Copy { from, to, bytes } => driver.copy(from, to, bytes),
                Task::Rows {
                    rows,
                    length,
                    from,
                    to,
                } => driver.copy_rows(rows, length, from, to),
                Task::Fill {
                    to,
                    count,
                    size,
                    value,
                } => driver.fill(to, count, size, value),
                Task::Upload { place, to, bytes } => {
                    driver.copy_from_pinned(work.pinned(place), to, bytes)
                }
                Task::Readback { from, place, bytes } => {
                    driver.copy_to_pinned(from, work.pinned(place), bytes)
                }
            },
            Backend::Simulation(simulation) => {
                match *task {
                    Task::Kernel {
                        name,
                        launch,
                        first,
                        end,
                        ..
                    } => {
                        let mut pointers = work.pointers(first, end);
                        return simulation.launch(name, launch, pointers.as_mut_ptr());
                    }
                    Task::Copy { from, to, bytes } => simulation.copy(from, to, bytes),
                    Task::Rows {
                        rows,
                        length,
                        from,
                        to,
                    } => {
                        for row in 0..rows as u64 {
                            let at = |(first, step): (u64, usize)| first + row * step as u64;
                            simulation.copy(at(from), at(to), length);
                        }
                    }
                    Task::Fill {
                        to,
                        count,
                        size,
                        value,
                    } => simulation.fill(to, count, &value.to_le_bytes()[..size]),
                    // Memory of this machine plays the device's.
                    Task::Upload { place, to, bytes } => {
                        simulation.copy(work.pinned(place), to, bytes);
                    }
                    Task::Readback { from, place, bytes } => {
                        simulation.copy(from, work.pinned(place), bytes);
                    }
                }
                Ok(())
            }
        }
    }

    /// Makes `work` ready to be sent as often as is wanted.
    ///
    /// # Errors
    /// No more memory for that; a kernel that there is not.
    pub fn make_ready(&self, limits: &Limits, work: &Work) -> Result<Ready> {
        match self {
            Backend::Driver(driver) => driver.graph(limits, work).map(Ready::Driver),
            Backend::Simulation(_) => Ok(Ready::Simulation(work.clone())),
        }
    }

    /// Gives task number `task` the arguments that it has in `work`, from now on.
    ///
    /// # Errors
    /// A failed call.
    pub fn set_arguments(
        &self,
        limits: &Limits,
        ready: &mut Ready,
        work: &Work,
        task: usize,
    ) -> Result<()> {
        match (self, ready) {
            (Backend::Driver(driver), Ready::Driver(graph)) => {
                driver.set_arguments(limits, graph, work, task)
            }
            (Backend::Simulation(_), Ready::Simulation(kept)) => {
                kept.set_arguments(work, task);
                Ok(())
            }
            _ => Err(foreign()),
        }
    }

    /// Sends what was made ready.
    ///
    /// # Errors
    /// As [`Backend::send`].
    pub fn send_ready(&self, limits: &Limits, ready: &Ready) -> Result<()> {
        match (self, ready) {
            (Backend::Driver(driver), Ready::Driver(graph)) => driver.launch_graph(graph),
            (Backend::Simulation(_), Ready::Simulation(work)) => work
                .tasks
                .iter()
                .try_for_each(|task| self.send(limits, work, task)),
            _ => Err(foreign()),
        }
    }

    /// Gives back what was made ready.
    pub fn forget(&self, ready: Ready) {
        if let (Backend::Driver(driver), Ready::Driver(graph)) = (self, ready) {
            driver.forget(graph);
        }
    }
}

fn foreign() -> Error {
    Error::Unsupported {
        kernel: "a graph",
        what: "it was made for another device".into(),
    }
}
