//! Whether a dropout probability that was asked for applies to anything.

use graft_nn::{Forward, TrainableSet};

use crate::config::RunConfig;
use crate::error::{Error, Result};
use crate::model::Model;
use crate::task::Task;

/// Refuses a dropout probability where no dropout lies above the lowest parameter of `set`, which is where dropout begins: a
/// pass over one example is rehearsed, without numbers, and draws no random numbers then.
///
/// # Errors
/// That; as the task's loss.
pub(crate) fn check<T: Task>(
    config: &RunConfig,
    task: &T,
    model: &mut Model<T::Network>,
    set: &TrainableSet,
) -> Result<()> {
    let Some(p) = config.strategy.dropout.filter(|&p| p > 0.0) else {
        return Ok(());
    };
    let mut planned = model.parameters.planned()?;
    std::mem::swap(&mut model.parameters, &mut planned);
    let drawn = drawn(task, model, set);
    std::mem::swap(&mut model.parameters, &mut planned);
    match drawn? {
        0 => Err(Error::config(
            "strategy.dropout",
            format!(
                "{p} has no effect: nothing that is trained lies below a dropout of this model"
            ),
            "remove it, or train more: strategy.name = \"last:2\"",
        )),
        _ => Ok(()),
    }
}

/// Random streams that the loss of an example draws.
fn drawn<T: Task>(task: &T, model: &Model<T::Network>, set: &TrainableSet) -> Result<u64> {
    let mut f = Forward::train(&model.parameters, set, 0, 0);
    task.loss(&mut f, model, task.prepare(1, &[0]), task.targets(0))?;
    Ok(f.tape.streams())
}
