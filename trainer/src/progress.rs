//! How far a run is: a bar on a terminal, else a line at every tenth.

use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

use crate::report::{duration, thousands};

/// Weight of the past in the smoothed loss and step time.
const MEMORY: f64 = 0.95;

/// Shows steps, loss, tokens per second and the time left. Times are those the caller measured, so that evaluations
/// between steps do not count.
pub struct Progress {
    total: u64,
    done: u64,
    loss: Smooth,
    step_seconds: Smooth,
    tokens: u64,
    elapsed: Duration,
    sink: Sink,
}

enum Sink {
    Bar(ProgressBar),
    Lines(Box<dyn Write + Send>),
}

/// An exponential average, corrected for its start as Adam's are.
#[derive(Default)]
struct Smooth {
    sum: f64,
    weight: f64,
}

impl Smooth {
    fn add(&mut self, value: f64) {
        self.sum = MEMORY * self.sum + (1.0 - MEMORY) * value;
        self.weight = MEMORY * self.weight + (1.0 - MEMORY);
    }

    fn value(&self) -> f64 {
        if self.weight == 0.0 {
            0.0
        } else {
            self.sum / self.weight
        }
    }
}

impl Progress {
    /// For `total` steps, on standard error: a bar where that is a terminal, else lines.
    pub fn stderr(total: u64) -> Progress {
        if !io::stderr().is_terminal() {
            return Progress::lines(total, Box::new(io::stderr()));
        }
        let bar = ProgressBar::new(total);
        // The template is ours; should indicatif refuse it, its default bar serves.
        if let Ok(style) = ProgressStyle::with_template("{bar:32} {pos}/{len}  {msg}") {
            bar.set_style(style);
        }
        Progress::on(total, Sink::Bar(bar))
    }

    /// For `total` steps, as lines to `out`: one at every tenth of the steps. Failures to write are ignored.
    pub fn lines(total: u64, out: Box<dyn Write + Send>) -> Progress {
        Progress::on(total, Sink::Lines(out))
    }

    fn on(total: u64, sink: Sink) -> Progress {
        Progress {
            total,
            done: 0,
            loss: Smooth::default(),
            step_seconds: Smooth::default(),
            tokens: 0,
            elapsed: Duration::ZERO,
            sink,
        }
    }

    /// So many steps were done before.
    pub fn skip(&mut self, done: u64) {
        self.done = done;
        if let Sink::Bar(bar) = &self.sink {
            bar.set_position(done);
        }
    }

    /// One more step is done, with its loss, its tokens and the time it took.
    pub fn step(&mut self, loss: f64, tokens: u64, took: Duration) {
        self.done += 1;
        self.loss.add(loss);
        self.step_seconds.add(took.as_secs_f64());
        self.tokens += tokens;
        self.elapsed += took;
        let state = self.state();
        let tenth = |done: u64| done * 10 / self.total.max(1);
        match &mut self.sink {
            Sink::Bar(bar) => {
                bar.set_position(self.done);
                bar.set_message(state);
            }
            Sink::Lines(out) => {
                if tenth(self.done) > tenth(self.done - 1) {
                    let percent = self.done * 100 / self.total.max(1);
                    let _ = writeln!(
                        out,
                        "step {}/{} ({percent} %)  {state}",
                        self.done, self.total
                    );
                }
            }
        }
    }

    /// Writes a line of its own, such as an epoch's evaluation.
    pub fn say(&mut self, line: &str) {
        match &mut self.sink {
            Sink::Bar(bar) => bar.suspend(|| {
                let _ = writeln!(io::stderr(), "{line}");
            }),
            Sink::Lines(out) => {
                let _ = writeln!(out, "{line}");
            }
        }
    }

    /// Leaves the bar as it stands and the cursor below it.
    pub fn finish(&mut self) {
        if let Sink::Bar(bar) = &self.sink {
            bar.abandon();
        }
    }

    /// `loss 0.6931  12,345 tokens/s  1m 20s left`
    fn state(&self) -> String {
        let rate = self.tokens as f64 / self.elapsed.as_secs_f64().max(1e-9);
        let left = self.total.saturating_sub(self.done) as f64 * self.step_seconds.value();
        // Beyond what a duration holds only if the step time was absurd.
        let left = Duration::try_from_secs_f64(left).unwrap_or(Duration::MAX);
        format!(
            "loss {:.4}  {} tokens/s  {} left",
            self.loss.value(),
            thousands(rate.round() as u64),
            duration(left)
        )
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    /// A writer whose text can be read while a progress owns it.
    #[derive(Clone, Default)]
    struct Shared(Arc<Mutex<Vec<u8>>>);

    impl Write for Shared {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn lines_of(total: u64) -> Vec<String> {
        let out = Shared::default();
        let mut progress = Progress::lines(total, Box::new(out.clone()));
        for _ in 0..total {
            progress.step(0.5, 300, Duration::from_millis(100));
        }
        progress.finish();
        String::from_utf8(out.0.lock().unwrap().clone())
            .unwrap()
            .lines()
            .map(str::to_owned)
            .collect()
    }

    #[test]
    fn a_line_at_every_tenth() {
        let lines = lines_of(40);
        assert_eq!(lines.len(), 10);
        assert_eq!(
            lines[0],
            "step 4/40 (10 %)  loss 0.5000  3,000 tokens/s  3.6s left"
        );
        assert_eq!(
            lines[9],
            "step 40/40 (100 %)  loss 0.5000  3,000 tokens/s  0.0s left"
        );
        assert_eq!(lines_of(3).len(), 3);
        assert_eq!(lines_of(1).len(), 1);
    }

    #[test]
    fn other_lines_stand_between() {
        let out = Shared::default();
        let mut progress = Progress::lines(2, Box::new(out.clone()));
        progress.say("epoch 1: accuracy 0.9");
        progress.step(f64::NAN, 1, Duration::ZERO);
        let text = String::from_utf8(out.0.lock().unwrap().clone()).unwrap();
        assert!(
            text.starts_with("epoch 1: accuracy 0.9\nstep 1/2 (50 %)  loss NaN"),
            "{text}"
        );
    }

    #[test]
    fn the_loss_is_smoothed_without_a_bias_to_zero() {
        let mut smooth = Smooth::default();
        assert_eq!(smooth.value(), 0.0);
        smooth.add(2.0);
        assert!((smooth.value() - 2.0).abs() < 1e-12);
        smooth.add(1.0);
        // 0.95 * 0.05 * 2 + 0.05 * 1 over 0.95 * 0.05 + 0.05.
        assert!((smooth.value() - 0.145 / 0.0975).abs() < 1e-12);
    }
}
