//! What adapters begin with where that depends on the weights, or is more than random numbers.

use graft_tensor::ops::random::{self, Key};
use graft_tensor::{DType, Memory, Tensor, ops};

use super::merge::{changed_weight, row_lengths};
use super::{Adapter, AdapterSet, LowRank, LowRankInit, Method};
use crate::error::{Error, Result};
use crate::parameters::{ParamId, Parameters, Role, fnv1a};

/// Rounds of the power iteration; each divides what is left of the smaller singular vectors by the square of how much
/// smaller their values are.
const ROUNDS: usize = 12;
/// Vectors that are iterated beside those that are wanted.
const SPARE: usize = 8;

/// Ends the initialisation of an adapter, after [`Parameters::initialise`] and when the base has its weights.
///
/// A prompt begins as words of the vocabulary, chosen at random (B. Lester et al., 2021).
///
/// # Errors
/// A base without weights; PiSSA with a scale that is not above 0.
pub fn finish(p: &mut Parameters, name: &str, seed: u64) -> Result<()> {
    let Some(set) = p.adapters().sets().find(|set| set.name() == name) else {
        return Ok(());
    };
    if let Method::Prompt { tokens } = set.config().method {
        return some_words(p, name, tokens, seed);
    }
    let Method::LowRank(config) = &set.config().method else {
        return Ok(());
    };
    let init = config.init;
    let layers: Vec<(ParamId, LowRank)> = set
        .layers()
        .filter_map(|(weight, adapter)| match adapter {
            Adapter::LowRank(adapter) => Some((weight, adapter.clone())),
            _ => None,
        })
        .collect();
    for (weight, adapter) in layers {
        if !matches!(p.get(weight).role(), Role::Linear(_)) || p.value(weight)?.is_planned() {
            continue;
        }
        match init {
            LowRankInit::Kaiming | LowRankInit::Gaussian => {}
            LowRankInit::Orthogonal => orthogonal(p, &adapter, seed)?,
            LowRankInit::Pissa => {
                if let Some(dtype) = p.get(weight).held() {
                    let what = format!(
                        "PiSSA takes its part out of the weights, and {} is held in {dtype}, where what is left would be \
                         rounded again; hold the base in f32, or choose another init",
                        p.get(weight).name()
                    );
                    return Err(Error::Adapter { what });
                }
                principal(p, weight, &adapter, name, seed)?;
            }
        }
        if let Some(magnitude) = adapter.magnitude {
            let lengths = row_lengths(&changed_weight(p, weight, &adapter)?)?;
            p.set(magnitude, lengths)?;
        }
    }
    Ok(())
}

fn some_words(p: &mut Parameters, name: &str, tokens: usize, seed: u64) -> Result<()> {
    let Some((words, _)) = prompt(p, name) else {
        return Ok(());
    };
    let rows = p.get(words).shape()[0];
    let key = Key::new(seed, 1, fnv1a(&format!("{} prompt", p.get(words).name())));
    let random = random::uniform(p.memory(), key, &[tokens], 0.0, 1.0)?;
    if random.is_planned() {
        return Ok(());
    }
    let row = |x: f64| ((x * rows as f64) as i64).min(rows as i64 - 1);
    let ids: Vec<i64> = random.to_f64()?.into_iter().map(row).collect();
    begin_as(p, name, &ids)
}

/// The embedding beside which a prompt stands, and its rows.
fn prompt(p: &Parameters, name: &str) -> Option<(ParamId, ParamId)> {
    let set = p.adapters().sets().find(|set| set.name() == name)?;
    set.layers().find_map(|(words, adapter)| match adapter {
        Adapter::Prompt(rows) => Some((words, *rows)),
        _ => None,
    })
}

/// Lets a prompt begin as the words of a text, again and again until each row has one. Anything but a prompt stays as it
/// is.
///
/// # Errors
/// No words, or one outside the vocabulary; a base without weights.
pub fn begin_as(p: &mut Parameters, name: &str, ids: &[i64]) -> Result<()> {
    let Some((words, rows)) = prompt(p, name) else {
        return Ok(());
    };
    if ids.is_empty() {
        let what = "a prompt cannot begin as a text without tokens; give it some words".into();
        return Err(Error::Adapter { what });
    }
    let memory = p.memory().clone();
    let count = p.get(rows).shape()[0];
    let ids: Vec<i64> = ids.iter().copied().cycle().take(count).collect();
    let ids = Tensor::from_vec(&memory, ids, &[count])?;
    let value = ops::gather_rows(&memory, p.value(words)?, &ids)?;
    p.set(rows, value)
}

impl AdapterSet {
    /// PiSSA: the `a` and `b` that were taken out of a weight.
    pub fn residual(&self, weight: ParamId) -> Option<&[Tensor; 2]> {
        self.residuals.get(&weight)
    }
}

fn normal(p: &Parameters, seed: u64, name: &str, count: usize) -> Result<Vec<f64>> {
    let key = Key::new(seed, 1, fnv1a(name));
    Ok(random::normal(p.memory(), key, &[count], 0.0, 1.0)?.to_f64()?)
}

/// Halves of a random orthogonal matrix, one for each side: `b·a` is then zero and both have a gradient. The deviation
/// of a tenth is PEFT's.
fn orthogonal(p: &mut Parameters, adapter: &LowRank, seed: u64) -> Result<()> {
    let rank = p.get(adapter.a).shape()[0];
    let half = rank / 2;
    let key = format!("{} orthogonal", p.get(adapter.a).name());
    let mut q = Rows::new(normal(p, seed, &key, rank * rank)?, rank);
    q.orthonormalise();
    for (id, first, transposed) in [(adapter.a, 0, true), (adapter.b, 1, false)] {
        let shape = *p.get(id).shape();
        let length = if transposed { shape[1] } else { shape[0] };
        let random = normal(p, seed, p.get(id).name(), length * half)?;
        let mut data = vec![0.0; length * rank];
        for i in 0..length {
            for k in 0..rank {
                let sum: f64 = (0..half)
                    .map(|j| random[i * half + j] * q.row(2 * j + first)[k])
                    .sum();
                let at = if transposed {
                    k * length + i
                } else {
                    i * rank + k
                };
                data[at] = sum / 10.0;
            }
        }
        let value = Tensor::from_vec(&p.memory().on_cpu(), data, &shape)?;
        p.set(id, value)?;
    }
    Ok(())
}

/// PiSSA: the adapter begins as the weight's largest singular values and vectors, and the weight as what is left.
fn principal(
    p: &mut Parameters,
    weight: ParamId,
    adapter: &LowRank,
    name: &str,
    seed: u64,
) -> Result<()> {
    if adapter.scale <= 0.0 {
        let what = format!(
            "PiSSA with a scale of {}: it must be above 0; give an alpha above 0",
            adapter.scale
        );
        return Err(Error::Adapter { what });
    }
    let rank = p.get(adapter.a).shape()[0];
    let w = out_by_in(p, weight)?;
    let key = format!("{} pissa", p.get(weight).name());
    let [rows, inner] = [w.shape()[0], w.shape()[1]];
    let count = (rank + SPARE).min(rows.min(inner));
    let start = normal(p, seed, &key, inner * count)?;
    let (left, values, right) = singular(&w, rank, Rows::new(start, inner))?;
    let (mut a, mut b) = (vec![0.0; rank * inner], vec![0.0; rows * rank]);
    for k in 0..rank {
        let root = (values[k] / adapter.scale).sqrt();
        for (i, x) in right.row(k).iter().enumerate() {
            a[k * inner + i] = root * x;
        }
        for (i, x) in left.row(k).iter().enumerate() {
            b[i * rank + k] = root * x;
        }
    }
    let memory = p.memory().clone();
    let host = memory.on_cpu();
    p.set(adapter.a, Tensor::from_vec(&host, a, &[rank, inner])?)?;
    p.set(adapter.b, Tensor::from_vec(&host, b, &[rows, rank])?)?;
    let kept = [
        p.value(adapter.a)?.copy(&memory)?,
        p.value(adapter.b)?.copy(&memory)?,
    ];
    let taken = LowRank {
        scale: -adapter.scale,
        magnitude: None,
        ..adapter.clone()
    };
    let rest = changed_weight(p, weight, &taken)?;
    set_out_by_in(p, weight, rest)?;
    if let Some(set) = p.adapters_mut().sets.iter_mut().find(|s| s.name == name) {
        set.residuals.insert(weight, kept);
    }
    Ok(())
}

/// A parameter in f64, in this machine's memory: GPUs compute in f32.
pub(super) fn in_f64(p: &Parameters, id: ParamId) -> Result<Tensor> {
    let host = p.memory().on_cpu();
    let value = p.value(id)?;
    let value = match value.memory().device() == host.device() {
        true => value.clone(),
        false => value.to_memory(&host)?,
    };
    Ok(ops::cast(&host, &value, DType::F64)?)
}

/// A linear layer's weight as `[out, in]`, f64, in this machine's memory.
pub(super) fn out_by_in(p: &Parameters, weight: ParamId) -> Result<Tensor> {
    let w = in_f64(p, weight)?;
    Ok(match p.get(weight).role() {
        Role::Linear(ops::WeightLayout::InOut) => w.t()?,
        _ => w,
    })
}

/// Gives a linear layer the weight `[out, in]`.
pub(super) fn set_out_by_in(p: &mut Parameters, weight: ParamId, w: Tensor) -> Result<()> {
    let w = match p.get(weight).role() {
        Role::Linear(ops::WeightLayout::InOut) => w.t()?,
        _ => w,
    };
    p.set(weight, w)
}

/// Vectors of one length.
struct Rows {
    data: Vec<f64>,
    length: usize,
}

impl Rows {
    fn new(data: Vec<f64>, length: usize) -> Rows {
        Rows { data, length }
    }

    fn count(&self) -> usize {
        self.data.len() / self.length.max(1)
    }

    fn row(&self, i: usize) -> &[f64] {
        &self.data[i * self.length..][..self.length]
    }

    /// As a tensor `[length, count]`.
    fn columns(&self, m: &Memory) -> Result<Tensor> {
        Ok(Tensor::from_slice(m, &self.data, &[self.count(), self.length])?.t()?)
    }

    fn of_columns(m: &Memory, x: &Tensor) -> Result<Rows> {
        let length = x.shape()[0];
        let data = x.t()?.contiguous(m)?.to_f64()?;
        Ok(Rows { data, length })
    }

    /// Gram and Schmidt, twice over each vector, which is enough (L. Giraud et al., 2005). A vector that the ones
    /// before it span becomes zero.
    fn orthonormalise(&mut self) {
        let n = self.length;
        for i in 0..self.count() {
            let (before, rest) = self.data.split_at_mut(i * n);
            let x = &mut rest[..n];
            let size = dot(x, x).sqrt();
            for _ in 0..2 {
                for y in before.chunks(n) {
                    let along = dot(x, y);
                    for (x, y) in x.iter_mut().zip(y) {
                        *x -= along * y;
                    }
                }
            }
            let left = dot(x, x).sqrt();
            let factor = if left > 1e-13 * size { 1.0 / left } else { 0.0 };
            x.iter_mut().for_each(|x| *x *= factor);
        }
    }
}

fn dot(x: &[f64], y: &[f64]) -> f64 {
    x.iter().zip(y).map(|(x, y)| x * y).sum()
}

/// The `rank` largest singular values of `w [rows, columns]`, f64, and their vectors on either side, by iterating a
/// subspace from `start` (N. Halko, P. Martinsson, J. Tropp, "Finding Structure with Randomness", 2011).
fn singular(w: &Tensor, rank: usize, start: Rows) -> Result<(Rows, Vec<f64>, Rows)> {
    let m = w.memory().clone();
    let mut right = start;
    let mut left = Rows::new(Vec::new(), w.shape()[0]);
    for _ in 0..ROUNDS {
        right.orthonormalise();
        left = Rows::of_columns(&m, &ops::matmul(&m, w, &right.columns(&m)?)?)?;
        left.orthonormalise();
        right = Rows::of_columns(&m, &ops::matmul(&m, &w.t()?, &left.columns(&m)?)?)?;
    }
    // Within the subspace, wᵀ·left has rows `right`: the singular values of that small matrix are those of w.
    let count = left.count();
    let gram: Vec<f64> = (0..count * count)
        .map(|at| dot(right.row(at / count), right.row(at % count)))
        .collect();
    let (values, vectors) = eigen(gram, count);
    let mut order: Vec<usize> = (0..count).collect();
    order.sort_by(|&i, &j| values[j].total_cmp(&values[i]));
    let combine = |rows: &Rows, k: usize, factor: f64| -> Vec<f64> {
        let mut sum = vec![0.0; rows.length];
        for j in 0..count {
            let c = vectors[j * count + k] * factor;
            for (sum, x) in sum.iter_mut().zip(rows.row(j)) {
                *sum += c * x;
            }
        }
        sum
    };
    let mut result = (Vec::new(), Vec::new(), Vec::new());
    for &k in order.iter().take(rank) {
        let value = values[k].max(0.0).sqrt();
        let inverse = if value > 0.0 { 1.0 / value } else { 0.0 };
        result.0.extend(combine(&left, k, 1.0));
        result.1.push(value);
        result.2.extend(combine(&right, k, inverse));
    }
    Ok((
        Rows::new(result.0, left.length),
        result.1,
        Rows::new(result.2, right.length),
    ))
}

/// Eigenvalues, and eigenvectors as columns, of a symmetric matrix `[n, n]`: Jacobi's rotations.
fn eigen(mut a: Vec<f64>, n: usize) -> (Vec<f64>, Vec<f64>) {
    let mut v = vec![0.0; n * n];
    for i in 0..n {
        v[i * n + i] = 1.0;
    }
    let size = dot(&a, &a).sqrt();
    // Converges quadratically: a dozen sweeps are more than were ever needed.
    for _ in 0..40 {
        let mut off = 0.0;
        for i in 0..n {
            for j in 0..i {
                off += a[i * n + j] * a[i * n + j];
            }
        }
        if off.sqrt() <= 1e-16 * size {
            break;
        }
        for p in 0..n {
            for q in p + 1..n {
                let apq = a[p * n + q];
                if apq == 0.0 {
                    continue;
                }
                let theta = (a[q * n + q] - a[p * n + p]) / (2.0 * apq);
                let t = theta.signum() / (theta.abs() + (theta * theta + 1.0).sqrt());
                let c = 1.0 / (t * t + 1.0).sqrt();
                let s = t * c;
                for k in 0..n {
                    let (x, y) = (a[k * n + p], a[k * n + q]);
                    a[k * n + p] = c * x - s * y;
                    a[k * n + q] = s * x + c * y;
                }
                for k in 0..n {
                    let (x, y) = (a[p * n + k], a[q * n + k]);
                    a[p * n + k] = c * x - s * y;
                    a[q * n + k] = s * x + c * y;
                    let (x, y) = (v[k * n + p], v[k * n + q]);
                    v[k * n + p] = c * x - s * y;
                    v[k * n + q] = s * x + c * y;
                }
            }
        }
    }
    ((0..n).map(|i| a[i * n + i]).collect(), v)
}
