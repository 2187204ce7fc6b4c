//! Optimizer steps on a GPU: all tensors in one launch, whose addresses and numbers lie in tables
//! there.

use std::borrow::Cow;
use std::fmt;

use graft_kernels::cuda::{Gpu, Readback, optimizer as on_gpu};

use super::optimizer::{Outcome, Rule, Stepped, Update, clip, wrong_states};
use super::{same_dtype, same_shape};
use crate::error::{Error, Result};
use crate::memory::OnGpu;
use crate::{Category, DType, Memory, Tensor};

/// What [`send`](super::optimizer::send) keeps on a GPU from one step to the next: where the tensors lie, the numbers of the
/// step, and what it found out about the gradients.
#[derive(Default)]
pub struct Tables {
    /// The bytes that were uploaded, and where they are
    lines: Option<(Vec<u8>, Tensor)>,
    groups: Option<(Vec<u8>, Tensor)>,
}

impl fmt::Debug for Tables {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Tables")
    }
}

/// Room for at least `bytes` bytes on the device of `m`.
fn room(m: &Memory, bytes: usize) -> Result<Tensor> {
    Tensor::empty(m, DType::F64, &[bytes.div_ceil(8)])
}

/// Room for `bytes` bytes, that which there is if it is enough.
fn room_in(place: &mut Option<(Vec<u8>, Tensor)>, m: &Memory, bytes: usize) -> Result<()> {
    let enough = |(_, room): &(Vec<u8>, Tensor)| room.count() * 8 >= bytes;
    if !place.as_ref().is_some_and(enough) {
        *place = None;
        *place = Some((Vec::new(), room(m, bytes)?));
    }
    Ok(())
}

/// Brings `bytes` to their place, unless they are there.
fn bring(gpu: &Gpu, bytes: Vec<u8>, place: &mut Option<(Vec<u8>, Tensor)>) -> Result<()> {
    if let Some((there, room)) = place.as_mut().filter(|(there, _)| *there != bytes) {
        // What is there may be lost on the way.
        there.clear();
        upload(gpu, &bytes, room)?;
        *there = bytes;
    }
    Ok(())
}

/// Uploads whole words to the beginning of their room.
fn upload(gpu: &Gpu, bytes: &[u8], room: &mut Tensor) -> Result<()> {
    Ok(gpu.upload(bytes, room.device_mut()?.part(0..bytes.len() / 8))?)
}

/// Numbers of updates, each once, in the order in which they come up.
#[derive(Default)]
struct Groups {
    seen: Vec<[u8; on_gpu::GROUP]>,
}

impl Groups {
    fn number(&mut self, rule: Rule) -> usize {
        let bytes = match rule {
            Rule::AdamW(p) => on_gpu::adamw_group(&p),
            Rule::Sgd(p) => on_gpu::sgd_group(&p),
        };
        let found = self.seen.iter().position(|seen| *seen == bytes);
        found.unwrap_or_else(|| {
            self.seen.push(bytes);
            self.seen.len() - 1
        })
    }
}

/// What a GPU found out about the gradients of a step, on its way.
#[derive(Debug)]
pub struct Coming {
    norm: Readback,
    max_norm: Option<f64>,
    /// Numbers of the updates that are lines of the table
    lines: Vec<usize>,
}

impl Coming {
    /// As [`Outcome::wait`].
    pub(super) fn wait(self) -> Result<Stepped> {
        let found = norm_of(self.norm)?;
        if let Some(line) = found.broken {
            return Ok(Stepped::NotFinite(self.lines[line]));
        }
        let norm = found.squares.sqrt();
        let clip = clip(norm, self.max_norm);
        Ok(Stepped::Done { norm, clip })
    }
}

fn norm_of(norm: Readback) -> Result<on_gpu::Norm> {
    let mut bytes = [0; on_gpu::NORM];
    bytes.copy_from_slice(&norm.bytes()?[..on_gpu::NORM]);
    Ok(on_gpu::Norm::from_bytes(bytes))
}

impl Tables {
    /// [`send`](super::optimizer::send) to the GPU of `m`.
    pub(super) fn send(
        &mut self,
        (m, on): (&Memory, OnGpu<'_>),
        updates: &mut [Update<'_>],
        max_norm: Option<f64>,
    ) -> Result<Outcome> {
        let (rule, dtype) = check(updates)?;
        let mut groups = Groups::default();
        let numbers: Vec<usize> = updates.iter().map(|u| groups.number(u.rule)).collect();
        room_in(&mut self.lines, m, updates.len() * on_gpu::LINE)?;
        room_in(&mut self.groups, m, groups.seen.len() * on_gpu::GROUP)?;
        let mut norm = room(m, on_gpu::NORM)?;
        let mut sums = room(m, on_gpu::NORM_WORKSPACE)?;
        let gradients: Vec<Cow<Tensor>> = updates
            .iter()
            .map(|u| u.gradient.contiguous(m))
            .collect::<Result<_>>()?;
        // Over a plan.
        let mut outcome = Outcome::Known(Stepped::Done {
            norm: 0.0,
            clip: clip(0.0, max_norm),
        });
        on.run(|gpu| {
            let mut table = on_gpu::Table::new(dtype.into())?;
            for ((update, gradient), &group) in updates.iter_mut().zip(&gradients).zip(&numbers) {
                let mut states = update.states.iter_mut();
                let mut next = || states.next().map(|state| state.device_mut()).transpose();
                let (first, second) = (next()?, next()?);
                let states = [first.as_ref(), second.as_ref()];
                let (weight, rounded) = update.weight.device_mut_with_rounded()?;
                table.push(&weight, rounded.as_ref(), gradient.device()?, states, group);
            }
            bring(gpu, table.bytes().to_vec(), &mut self.lines)?;
            bring(gpu, groups.seen.concat(), &mut self.groups)?;
            let (Some((_, lines)), Some((_, groups))) = (&self.lines, &self.groups) else {
                return Ok(());
            };
            let (lines, groups) = (lines.device()?, groups.device()?);
            let sums = sums.device_mut()?;
            on_gpu::global_norm(gpu, &table, lines, max_norm, sums, norm.device_mut()?)?;
            on_gpu::update(gpu, rule, &table, lines, groups, norm.device()?)?;
            let all = gradients.iter().enumerate();
            outcome = Outcome::Coming(Coming {
                norm: gpu.readback(norm.device()?)?,
                max_norm,
                lines: all.filter(|(_, g)| g.count() > 0).map(|(i, _)| i).collect(),
            });
            Ok(())
        })?;
        Ok(outcome)
    }
}

/// Checks updates for a GPU, which does all by one rule and in one type: those two.
fn check(updates: &[Update<'_>]) -> Result<(on_gpu::Rule, DType)> {
    let op = "optimizer";
    let of = |rule: Rule| match rule {
        Rule::AdamW(_) => on_gpu::Rule::AdamW,
        Rule::Sgd(_) => on_gpu::Rule::Sgd,
    };
    let (rule, dtype) = (of(updates[0].rule), updates[0].weight.dtype());
    for update in updates {
        let (shape, states) = (update.weight.shape(), update.states.len());
        if of(update.rule) != rule {
            return Err(Error::argument(op, "two rules in one step on a GPU"));
        }
        let enough = match update.rule {
            Rule::AdamW(_) => states == 2,
            Rule::Sgd(p) => states <= 1 && (states == 1 || p.momentum == 0.0),
        };
        if !enough {
            return Err(wrong_states(update.rule, states));
        }
        let states = update.states.iter().map(|state| &**state);
        for x in states.chain([&*update.weight, update.gradient]) {
            same_shape(op, "the gradient or a state", x, shape)?;
            same_dtype(op, "a weight, its gradient or a state", x, dtype)?;
        }
    }
    Ok((rule, dtype))
}

/// The sum of squares of a tensor on a GPU, which is not finite if an element is not.
pub(super) fn squares_on_gpu(m: &Memory, x: &Tensor) -> Result<f64> {
    let m = m.with(Category::Workspace);
    let mut line = room(&m, on_gpu::LINE)?;
    let mut norm = room(&m, on_gpu::NORM)?;
    let mut sums = room(&m, on_gpu::NORM_WORKSPACE)?;
    let mut squares = 0.0;
    if let Some(on) = m.gpu() {
        on.run(|gpu| {
            let mut table = on_gpu::Table::new(x.dtype().into())?;
            table.gradient(x.device()?);
            upload(gpu, table.bytes(), &mut line)?;
            let (line, sums) = (line.device()?, sums.device_mut()?);
            on_gpu::global_norm(gpu, &table, line, None, sums, norm.device_mut()?)?;
            squares = norm_of(gpu.readback(norm.device()?)?)?.squares;
            Ok(())
        })?;
    }
    Ok(squares)
}

/// One update on a GPU, with the factor of the gradient as the rule has it.
pub(super) fn single(
    m: &Memory,
    rule: Rule,
    weight: &mut Tensor,
    gradient: &Tensor,
    states: Vec<&mut Tensor>,
) -> Result<()> {
    let grad_scale = match rule {
        Rule::AdamW(p) => p.grad_scale,
        Rule::Sgd(p) => p.grad_scale,
    };
    let mut update = Update {
        rule,
        weight,
        gradient,
        states,
    };
    let m = m.with(Category::Workspace);
    let (rule, dtype) = check(std::slice::from_ref(&update))?;
    let mut groups = Groups::default();
    let group = groups.number(update.rule);
    let mut there = [on_gpu::LINE, on_gpu::GROUP, on_gpu::NORM]
        .into_iter()
        .map(|bytes| room(&m, bytes))
        .collect::<Result<Vec<_>>>()?;
    let Some(on) = m.gpu() else { return Ok(()) };
    on.run(|gpu| {
        let mut table = on_gpu::Table::new(dtype.into())?;
        let mut states = update.states.iter_mut();
        let mut next = || states.next().map(|state| state.device_mut()).transpose();
        let (first, second) = (next()?, next()?);
        let states = [first.as_ref(), second.as_ref()];
        let (weight, rounded) = update.weight.device_mut_with_rounded()?;
        let gradient = update.gradient.device()?;
        table.push(&weight, rounded.as_ref(), gradient, states, group);
        let norm = on_gpu::Norm {
            squares: 0.0,
            clip: grad_scale as f32,
            broken: None,
        };
        let bytes = [table.bytes(), &groups.seen[0], &norm.bytes()];
        for (bytes, room) in bytes.into_iter().zip(&mut there) {
            upload(gpu, bytes, room)?;
        }
        let (lines, groups, norm) = (there[0].device()?, there[1].device()?, there[2].device()?);
        Ok(on_gpu::update(gpu, rule, &table, lines, groups, norm)?)
    })
}
