//! What a run needs of memory, before its first step.
//!
//! The recipe is rehearsed over an allocator that only counts: the same code packs the same batches, runs forward,
//! backward and optimizer, and evaluates, on tensors without numbers. Only batches that could be the worst are taken: the
//! longest, those with the longest texts, and those with the most texts.

use std::fmt;
use std::path::Path;
use std::time::Instant;

use graft_models::Strategy as Part;
use graft_nn::Parameters;
use graft_tensor::{Category, Device, Item, Tensor, Usage};

use crate::batch::BatchSize;
use crate::config::{Base, CacheKind, Init, Precision, RunConfig, Strategy};
use crate::course::Course;
use crate::error::{Error, Result};
use crate::model::{Hashes, Model};
use crate::report::{Table, thousands};
use crate::steps::Loop;
use crate::task::Task;
use crate::train::plan_epochs;

/// Batches of each kind that are taken.
const WORST: usize = 4;

/// What a run needs.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    /// Bytes of tensors
    pub usage: Usage,
    /// Bytes of frozen outputs that are kept in memory
    pub kept: u64,
    /// Sequences and tokens of the longest batch
    pub longest: (usize, usize),
}

impl Plan {
    /// Bytes of all of it.
    pub fn total(&self) -> u64 {
        self.usage.held as u64 + self.kept
    }
}

fn mib(bytes: u64) -> String {
    let bytes = bytes as f64 / f64::from(1 << 20);
    format!("{} MiB", thousands_of(bytes))
}

/// A number with one digit behind the point.
fn thousands_of(x: f64) -> String {
    let tenths = (x * 10.0).round() as u64;
    format!("{}.{}", thousands(tenths / 10), tenths % 10)
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut table = Table::new();
        for category in Category::ALL {
            table.row(category.to_string(), mib(self.usage.peak(category) as u64));
        }
        table.row("at the worst moment", mib(self.usage.peak_total as u64));
        table.row("with gaps between tensors", mib(self.usage.held as u64));
        if self.kept > 0 {
            table.row("kept frozen outputs", mib(self.kept));
        }
        table.row("in all", mib(self.total()));
        let (sequences, tokens) = self.longest;
        table.row(
            "longest batch",
            format!("{} tokens in {sequences}", thousands(tokens as u64)),
        );
        write!(f, "{table}")
    }
}

/// The only element of a tensor; 0 of a planned one.
pub(crate) fn read_one(x: &Tensor) -> Result<f64> {
    Ok(read_one_later(x)?.wait()?)
}

/// [`read_one`] for whoever looks at it later.
pub(crate) fn read_one_later(x: &Tensor) -> Result<Item> {
    Ok(match x.is_planned() {
        true => Item::known(0.0),
        false => x.item_later()?,
    })
}

/// The elements of a tensor; zeros of a planned one.
pub(crate) fn read_all(x: &Tensor) -> Result<Vec<f32>> {
    Ok(match x.is_planned() {
        true => vec![0.0; x.count()],
        false => x.to_vec::<f32>()?,
    })
}

/// Rows of each example in the layers: its tokens, and virtual ones in front of each of its texts.
pub(crate) fn rows(
    lengths: &[usize],
    parameters: &Parameters,
    texts: impl Fn(usize) -> usize,
) -> Vec<usize> {
    let front = parameters.adapters().virtual_tokens();
    let all = lengths.iter().enumerate();
    all.map(|(i, tokens)| tokens + front * texts(i)).collect()
}

/// Of some batches, those that could need the most memory; all of them if no plan is made.
pub(crate) fn heaviest_if(
    planned: bool,
    batches: Vec<Vec<usize>>,
    lengths: &[usize],
) -> Vec<Vec<usize>> {
    if !planned {
        return batches;
    }
    let groups: Vec<&[Vec<usize>]> = batches.chunks(1).collect();
    heaviest(&groups, lengths)
        .into_iter()
        .flat_map(|i| batches[i..=i].to_vec())
        .collect()
}

/// How heavy a batch is, from the lengths of all examples.
type Measure = fn(&[usize], &[usize]) -> usize;

/// The numbers of the groups of batches that could need the most memory.
fn heaviest(groups: &[&[Vec<usize>]], lengths: &[usize]) -> Vec<usize> {
    // Activations grow with the tokens; what attention keeps grows with their products too, and what is kept for each
    // sequence with the sequences.
    let measures: [Measure; 4] = [
        |batch, lengths| batch.iter().map(|&i| lengths[i]).sum(),
        |batch, lengths| batch.iter().map(|&i| lengths[i] * lengths[i]).sum(),
        |batch, lengths| batch.iter().map(|&i| lengths[i]).max().unwrap_or(0),
        |batch, _| batch.len(),
    ];
    let mut chosen = Vec::new();
    for measure in measures {
        let worst = |i: &usize| groups[*i].iter().map(|b| measure(b, lengths)).max();
        let mut order: Vec<usize> = (0..groups.len()).collect();
        order.sort_by_key(|i| std::cmp::Reverse(worst(i)));
        chosen.extend(order.into_iter().take(WORST));
    }
    chosen.sort_unstable();
    chosen.dedup();
    chosen
}

/// Rehearses a run. The model is as it was when this returns.
///
/// # Errors
/// As the run itself, as far as it does not depend on numbers.
pub(crate) fn rehearse<T: Task>(
    config: &RunConfig,
    task: &mut T,
    model: &mut Model<T::Network>,
    before: &Hashes,
) -> Result<Plan> {
    let mut planned = model.parameters.planned()?;
    planned.compute_in(config.train.precision.dtype())?;
    std::mem::swap(&mut model.parameters, &mut planned);
    let plan = run(config, task, model, before);
    std::mem::swap(&mut model.parameters, &mut planned);
    plan
}

fn run<T: Task>(
    config: &RunConfig,
    task: &mut T,
    model: &mut Model<T::Network>,
    before: &Hashes,
) -> Result<Plan> {
    let course = Course::new(config, &model.network, &model.parameters)?;
    // Frozen layers are run as they are the first time; what they give is counted and not kept.
    let mut rehearsal = config.clone();
    rehearsal.train.audit = false;
    rehearsal.train.cache_dir = None;
    rehearsal.train.cache_memory = None;
    if rehearsal.train.cache == CacheKind::File {
        rehearsal.train.cache = CacheKind::Memory;
    }
    let lengths = task.lengths().to_vec();
    let rows = rows(&lengths, &model.parameters, |i| task.texts(i));
    let epochs = plan_epochs(config, &lengths);
    let accumulate = config.train.accumulate;
    let steps = epochs.iter().map(|e| e.len().div_ceil(accumulate) as u64);
    let mut trainer = Loop::new(
        &rehearsal,
        course.rates.clone(),
        steps.sum(),
        Instant::now(),
    )?;
    let (mut kept, mut longest) = (0, (0, 0));
    for i in 0..epochs.len() {
        if !course.begins(i) {
            continue;
        }
        let count = course.stretch(i);
        let set = course.set(i);
        let again = count.max(1 + usize::from(config.train.cache_dir.is_some()));
        task.begin(&rehearsal, model, before, (set, again), Path::new(""));
        trainer.begin(model, set)?;
        let room = (config.train.cache_memory.unwrap_or(0) as u64).saturating_mul(1 << 20);
        kept = kept.max(task.keeps().min(room));
        let groups: Vec<&[Vec<usize>]> = epochs[i..i + count]
            .iter()
            .flat_map(|epoch| epoch.chunks(accumulate))
            .collect();
        for group in heaviest(&groups, &rows) {
            let batches = groups[group];
            for batch in batches {
                let tokens = batch.iter().map(|&i| lengths[i]).sum();
                longest = longest.max((tokens, batch.len()));
            }
            let targets = batches.iter().flatten().map(|&i| task.targets(i)).sum();
            let prepared: Vec<T::Batch> = batches.iter().map(|b| task.prepare(1, b)).collect();
            let mut prepared = prepared.into_iter();
            let sent = trainer.send(&mut prepared, (targets, 0), model, (&*task, set))?;
            trainer.settle(model, set, sent)?;
        }
        task.evaluate(model, 0)?;
    }
    let (tokens, sequences) = longest;
    Ok(Plan {
        usage: model.parameters.memory().usage(),
        kept,
        longest: (sequences, tokens),
    })
}

/// Refuses a run that needs more memory than there is, or than it is allowed.
///
/// # Errors
/// The plan, and what would fit.
pub(crate) fn check<T: Task>(
    config: &RunConfig,
    task: &mut T,
    model: &mut Model<T::Network>,
    before: &Hashes,
) -> Result<()> {
    let limit = match config.train.memory_limit {
        Some(0) => return Ok(()),
        Some(mib) => (mib as u64).saturating_mul(1 << 20),
        None => match model.parameters.memory().room()? {
            Some(room) => room,
            None if model.parameters.memory().device() != Device::Cpu => return Ok(()),
            None => match available() {
                // What the weights take is part of the plan.
                Some(free) => free + model.parameters.memory().usage().held as u64,
                None => return Ok(()),
            },
        },
    };
    let plan = rehearse(config, task, model, before)?;
    if plan.total() <= limit {
        return Ok(());
    }
    let fitting = fitting(config, task, model, before, limit);
    let help = match fitting.is_empty() {
        true => "no smaller batch, precision or strategy fits: take a smaller model or another machine; \
                 train.memory_limit=0 tries all the same"
            .to_owned(),
        false => format!(
            "what fits: {}; train.memory_limit=0 tries all the same",
            fitting.join("; or ")
        ),
    };
    let what = format!(
        "the run needs {}, and {} {}\n{plan}",
        mib(plan.total()),
        mib(limit),
        match config.train.memory_limit {
            Some(_) => "are allowed",
            None => "are free",
        },
    );
    let place = match config.train.memory_limit {
        Some(_) => "train.memory_limit",
        None => "memory",
    };
    Err(Error::config(place, what.trim_end(), help))
}

/// Changes of a configuration under which the run needs at most `limit` bytes, each with what it needs.
fn fitting<T: Task>(
    config: &RunConfig,
    task: &mut T,
    model: &mut Model<T::Network>,
    before: &Hashes,
    limit: u64,
) -> Vec<String> {
    let mut fits = |config: &RunConfig, what: String| -> Option<String> {
        let plan = rehearse(config, task, model, before).ok()?;
        (plan.total() <= limit).then(|| format!("{what} ({})", mib(plan.total())))
    };
    let mut found = Vec::new();
    let mut smaller = config.clone();
    loop {
        let (BatchSize::Examples(size) | BatchSize::Tokens(size)) = &mut smaller.train.batch;
        if *size < 2 {
            break;
        }
        *size /= 2;
        smaller.train.accumulate *= 2;
        let accumulate = smaller.train.accumulate;
        let what = match smaller.train.batch {
            BatchSize::Examples(n) => format!("train.batch_size={n} train.accumulate={accumulate}"),
            BatchSize::Tokens(n) => format!("train.max_tokens={n} train.accumulate={accumulate}"),
        };
        if let Some(line) = fits(&smaller, what) {
            found.push(line);
            break;
        }
    }
    if config.train.precision == Precision::F32 {
        let mut short = config.clone();
        short.train.precision = Precision::Bf16;
        found.extend(fits(&short, "train.precision=bf16".to_owned()));
    }
    for part in [Part::Last(2), Part::Head] {
        // Random weights are not for freezing, and what is held in short types goes with an adapter.
        let freezes = config.model.init == Init::Pretrained && config.model.base == Base::F32;
        if freezes && config.strategy.name.parts != [part] {
            let mut less = config.clone();
            less.strategy.name = Strategy::of(part);
            less.strategy.rules.clear();
            let what = format!("strategy.name={}", less.strategy.name);
            if let Some(line) = fits(&less, what) {
                found.push(line);
                break;
            }
        }
    }
    found
}

/// Bytes that this process could still get: what the machine has free or can free, within what its control group may
/// take. None where the system does not tell.
pub fn available() -> Option<u64> {
    let read = |path: &str| std::fs::read_to_string(path).ok();
    let machine = kib(&read("/proc/meminfo")?, "MemAvailable:")?;
    let group = || -> Option<u64> {
        let number = |path: &str| read(path)?.trim().parse::<u64>().ok();
        let most = number("/sys/fs/cgroup/memory.max")?;
        let used = number("/sys/fs/cgroup/memory.current")?;
        // Pages of files go when others need the room.
        let stat = read("/sys/fs/cgroup/memory.stat")?;
        let files = stat.lines().find_map(|line| line.strip_prefix("file "));
        let files: u64 = files?.trim().parse().ok()?;
        Some(most.saturating_sub(used.saturating_sub(files)))
    };
    Some(group().map_or(machine, |group| group.min(machine)))
}

/// The line `NAME 123 kB` of a text, in bytes.
fn kib(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_heaviest_are_chosen_by_each_measure() {
        let lengths = [10, 10, 10, 10, 25, 1, 1, 1, 1, 1, 1, 2];
        let batches: Vec<Vec<usize>> = vec![
            vec![0, 1, 2, 3],
            vec![4],
            vec![5, 6, 7, 8, 9, 10],
            vec![11],
            vec![5],
            vec![6],
            vec![7],
            vec![8],
        ];
        let chosen = heaviest_if(true, batches.clone(), &lengths);
        for worst in [0, 1, 2] {
            assert!(chosen.contains(&batches[worst]), "{chosen:?}");
        }
        assert!(chosen.len() < batches.len());
        assert_eq!(heaviest_if(false, batches.clone(), &lengths), batches);
    }

    #[test]
    fn what_is_free_is_read_from_the_system() {
        let text = "MemTotal:  9 kB\nMemAvailable:    2048 kB\n";
        assert_eq!(kib(text, "MemAvailable:"), Some(2 << 20));
        assert_eq!(kib("MemAvailable: lots\n", "MemAvailable:"), None);
        if cfg!(target_os = "linux") {
            let free = available().unwrap();
            assert!((1 << 20..1 << 50).contains(&free), "{free}");
        }
    }

    #[test]
    fn sizes_have_a_digit() {
        assert_eq!(mib(0), "0.0 MiB");
        assert_eq!(mib(1234 << 20), "1,234.0 MiB");
        assert_eq!(mib(3 << 19), "1.5 MiB");
    }
}
