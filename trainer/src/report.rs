//! Numbers for people: tables, durations, memory.

use std::fmt;
use std::time::Duration;

use crate::features::Kept;

/// Two columns of text, the second aligned. `Display` writes a line per row.
#[derive(Debug, Clone, Default)]
pub struct Table {
    rows: Vec<(String, String)>,
}

impl Table {
    /// No rows yet.
    pub fn new() -> Table {
        Table::default()
    }

    /// Appends a row.
    pub fn row(&mut self, name: impl Into<String>, value: impl fmt::Display) -> &mut Table {
        self.rows.push((name.into(), value.to_string()));
        self
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self
            .rows
            .iter()
            .map(|(name, _)| name.chars().count())
            .max()
            .unwrap_or(0);
        for (name, value) in &self.rows {
            writeln!(f, "  {name:<width$}  {value}")?;
        }
        Ok(())
    }
}

/// What a training run says when it has ended.
#[derive(Debug, Clone)]
pub struct RunReport {
    /// As in the configuration: `last:2`.
    pub strategy: String,
    /// Parameters of the model.
    pub parameters: u64,
    /// Parameters that were trained.
    pub trainable: u64,
    /// Training examples.
    pub examples: usize,
    /// Training examples whose tokens were cut.
    pub truncated: usize,
    /// Passes over them.
    pub epochs: usize,
    /// Optimizer steps.
    pub steps: u64,
    /// Tokens trained on, all epochs together.
    pub tokens: u64,
    /// Duration of the training steps alone.
    pub training: Duration,
    /// Duration of the whole run.
    pub total: Duration,
    /// Until the first optimizer step had ended.
    pub startup: Duration,
    /// Batches of all epochs, and the most tokens that one may have, if that was set.
    pub batches: (u64, Option<usize>),
    /// Outputs of frozen layers that were kept, if any were.
    pub kept: Option<Kept>,
    /// The evaluation of the kept model, if there was one.
    pub best: Option<BestEvaluation>,
    /// Largest resident memory, in bytes, where the system tells.
    pub peak_rss: Option<u64>,
    /// The most bytes that the tensors of each category took.
    pub usage: Vec<(graft_tensor::Category, usize)>,
    /// The most bytes that they took together.
    pub peak_tensors: usize,
    /// The run directory.
    pub out: String,
}

/// The evaluation of the model that was kept.
#[derive(Debug, Clone)]
pub struct BestEvaluation {
    /// After this epoch, from 1.
    pub epoch: usize,
    /// What was measured, by name.
    pub measures: Vec<(&'static str, String)>,
}

impl fmt::Display for RunReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut table = Table::new();
        let share = 100.0 * self.trainable as f64 / self.parameters.max(1) as f64;
        table.row("strategy", &self.strategy).row(
            "trained",
            format!(
                "{} of {} parameters ({share:.2} %)",
                thousands(self.trainable),
                thousands(self.parameters)
            ),
        );
        let cut = match self.truncated {
            0 => String::new(),
            n => format!(
                ", {} of them cut to the longest length allowed",
                thousands(n as u64)
            ),
        };
        table.row(
            "examples",
            format!("{}{cut}", thousands(self.examples as u64)),
        );
        table.row(
            "epochs",
            format!("{}, {} steps", self.epochs, thousands(self.steps)),
        );
        let rate = self.tokens as f64 / self.training.as_secs_f64().max(1e-9);
        table.row(
            "tokens",
            format!(
                "{}, {} per second",
                thousands(self.tokens),
                thousands(rate as u64)
            ),
        );
        if let (batches, Some(budget)) = self.batches {
            let mean = self.tokens as f64 / batches.max(1) as f64;
            table.row(
                "batches",
                format!(
                    "{} tokens each, {:.1} % of {}",
                    thousands(mean.round() as u64),
                    100.0 * mean / budget as f64,
                    thousands(budget as u64)
                ),
            );
        }
        table.row(
            "time",
            format!(
                "{}, of it training {}; first step after {:.2}s",
                duration(self.total),
                duration(self.training),
                self.startup.as_secs_f64()
            ),
        );
        if let Some(best) = &self.best {
            table.row("best epoch", best.epoch);
            for (name, value) in &best.measures {
                table.row(*name, value);
            }
        }
        if let Some(bytes) = self.peak_rss {
            table.row(
                "peak memory",
                format!("{} MiB", thousands(bytes.div_ceil(1 << 20))),
            );
        }
        if !self.usage.is_empty() {
            let parts: Vec<String> = self
                .usage
                .iter()
                .map(|(category, bytes)| {
                    format!("{category} {:.1}", *bytes as f64 / f64::from(1 << 20))
                })
                .collect();
            let together = self.peak_tensors as f64 / f64::from(1 << 20);
            table.row(
                "of tensors, MiB",
                format!("{}; together {together:.1}", parts.join(", ")),
            );
        }
        if let Some(kept) = &self.kept {
            let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
            let file = match kept.file {
                0 => String::new(),
                bytes => format!(", {:.1} MiB in a file", mib(bytes)),
            };
            table.row(
                "frozen outputs",
                format!("{:.1} MiB in memory{file}", mib(kept.memory)),
            );
        }
        table.row("output", &self.out);
        write!(f, "{table}")
    }
}

/// 1234567 as `1,234,567`.
pub fn thousands(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (place, digit) in digits.char_indices() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// `1 document`, `1,234 documents`.
pub fn counted(number: usize, noun: &str) -> String {
    let plural = if number == 1 { "" } else { "s" };
    format!("{} {noun}{plural}", thousands(number as u64))
}

/// A duration in its two largest units: `0.8s`, `42s`, `3m 07s`, `2h 05m`.
pub fn duration(time: Duration) -> String {
    let seconds = time.as_secs();
    match seconds {
        0..10 => format!("{:.1}s", time.as_secs_f64()),
        10..60 => format!("{seconds}s"),
        60..3600 => format!("{}m {:02}s", seconds / 60, seconds % 60),
        _ => format!("{}h {:02}m", seconds / 3600, seconds % 3600 / 60),
    }
}

/// The largest resident memory this process ever had, in bytes: `VmHWM` of `/proc/self/status`. None where there is
/// no such file.
pub fn peak_rss() -> Option<u64> {
    high_water_mark(&std::fs::read_to_string("/proc/self/status").ok()?)
}

fn high_water_mark(status: &str) -> Option<u64> {
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_durations() {
        for (number, want) in [
            (0, "0"),
            (999, "999"),
            (1000, "1,000"),
            (66955010, "66,955,010"),
        ] {
            assert_eq!(thousands(number), want);
        }
        for (millis, want) in [
            (0, "0.0s"),
            (840, "0.8s"),
            (42_900, "42s"),
            (187_000, "3m 07s"),
            (7_530_000, "2h 05m"),
        ] {
            assert_eq!(duration(Duration::from_millis(millis)), want);
        }
    }

    #[test]
    fn memory_is_read_from_the_status() {
        assert_eq!(
            high_water_mark("VmPeak:\t  9 kB\nVmHWM:\t    2048 kB\nVmRSS: 1 kB\n"),
            Some(2 << 20)
        );
        assert_eq!(high_water_mark("VmPeak:\t  9 kB\n"), None);
        assert_eq!(high_water_mark("VmHWM:\t lots\n"), None);
        if cfg!(target_os = "linux") {
            // A test binary is larger than a page and smaller than a terabyte.
            let peak = peak_rss().unwrap();
            assert!((4096..1 << 40).contains(&peak), "{peak}");
        }
    }

    #[test]
    fn the_report_of_a_run() {
        let report = RunReport {
            strategy: "head".into(),
            parameters: 1_000_000,
            trainable: 1_538,
            examples: 1200,
            truncated: 3,
            epochs: 2,
            steps: 150,
            tokens: 50_000,
            training: Duration::from_secs(10),
            total: Duration::from_secs(75),
            startup: Duration::from_millis(420),
            batches: (50, Some(1024)),
            kept: Some(Kept {
                memory: 3 << 19,
                file: 7 << 20,
            }),
            best: Some(BestEvaluation {
                epoch: 2,
                measures: vec![
                    ("accuracy", "0.9000 (majority class: 0.5000)".into()),
                    ("macro-F1", "0.8500 (majority class: 0.3333)".into()),
                ],
            }),
            peak_rss: Some(3 << 20),
            usage: vec![],
            peak_tensors: 0,
            out: "runs/a".into(),
        };
        let want = "  strategy        head
  trained         1,538 of 1,000,000 parameters (0.15 %)
  examples        1,200, 3 of them cut to the longest length allowed
  epochs          2, 150 steps
  tokens          50,000, 5,000 per second
  batches         1,000 tokens each, 97.7 % of 1,024
  time            1m 15s, of it training 10s; first step after 0.42s
  best epoch      2
  accuracy        0.9000 (majority class: 0.5000)
  macro-F1        0.8500 (majority class: 0.3333)
  peak memory     3 MiB
  frozen outputs  1.5 MiB in memory, 7.0 MiB in a file
  output          runs/a
";
        assert_eq!(report.to_string(), want);
    }
}
