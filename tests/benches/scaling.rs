//! How the cost of a training step grows: with its tokens, with the length of its sequences, with
//! the layers that are trained, with the threads. MiniLM's sizes, f32.
//!
//! ```text
//! cargo bench -p graft-tests --bench scaling [-- tokens length layers threads] [FOLDER]
//! ```
//! Prints a line for each point (best of several steps, since other programs may be running, and
//! the most bytes of tensors at one time) and draws each series to `FOLDER/NAME.svg`; FOLDER is
//! `bench/plots`.

use std::error::Error;
use std::path::{Path, PathBuf};

use graft_models::Strategy;
use graft_tensor::DType;
use graft_tests::steps::{Workload, batch};
use plotters::prelude::*;

/// One measured step.
struct Point {
    /// What the axis shows
    x: f64,
    seconds: f64,
    /// Peak of the tensors, MiB
    memory: f64,
}

/// The best of `repeats` steps after a first one.
fn measure(x: usize, strategy: Strategy, sequences: usize, tokens: usize, repeats: usize) -> Point {
    // On a thread of those that compute, as the trainer runs.
    rayon::scope(|_| point(x, strategy, sequences, tokens, repeats))
}

fn point(x: usize, strategy: Strategy, sequences: usize, tokens: usize, repeats: usize) -> Point {
    let mut work = Workload::minilm(strategy, DType::F32, tokens);
    let batch = batch(sequences, tokens);
    work.step(&batch);
    let times = (0..repeats).map(|_| work.step(&batch));
    Point {
        x: x as f64,
        seconds: times.fold(f64::INFINITY, f64::min),
        memory: work.memory.usage().peak_total as f64 / f64::from(1 << 20),
    }
}

/// Measures a series.
type Measurement = fn() -> Series;

/// What is drawn.
struct Series {
    name: &'static str,
    title: &'static str,
    axis: &'static str,
    points: Vec<Point>,
}

fn tokens() -> Series {
    let points = [1, 2, 4, 8, 16, 32, 64]
        .map(|n| measure(n * 128, Strategy::Full, n, 128, 4))
        .into();
    Series {
        name: "tokens",
        title: "Full step against its tokens (sequences of 128)",
        axis: "tokens of a step",
        points,
    }
}

fn length() -> Series {
    let points = [64, 128, 256, 512, 1024, 2048, 4096]
        .map(|n| measure(n, Strategy::Full, 4096 / n, n, 3))
        .into();
    Series {
        name: "length",
        title: "Full step of 4096 tokens against the length of its sequences",
        axis: "tokens of a sequence",
        points,
    }
}

fn layers() -> Series {
    let of = |layers| match layers {
        0 => Strategy::Head,
        7 => Strategy::Full,
        k => Strategy::Last(k),
    };
    let points = (0..8)
        .map(|n| measure(n, of(n), 32, 128, 4))
        .collect::<Vec<_>>();
    Series {
        name: "layers",
        title: "Step of 32 x 128 tokens against the layers trained (0: the head, 7: embeddings too)",
        axis: "layers trained",
        points,
    }
}

fn threads() -> Series {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let counts = (0..).map(|i| 1 << i).take_while(|&n| n < cores);
    let points = counts
        .chain([cores])
        .map(|n| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(n).build();
            pool.expect("threads start")
                .install(|| measure(n, Strategy::Full, 32, 128, 4))
        })
        .collect();
    Series {
        name: "threads",
        title: "Full step of 32 x 128 tokens against threads",
        axis: "threads",
        points,
    }
}

fn draw(series: &Series, folder: &Path) -> Result<(), Box<dyn Error>> {
    let path = folder.join(series.name).with_extension("svg");
    let last = series.points.last().ok_or("no points")?.x;
    let top = |of: fn(&Point) -> f64| series.points.iter().map(of).fold(0.0, f64::max) * 1.1;
    let (slowest, largest) = (top(|p| p.seconds), top(|p| p.memory));
    let area = SVGBackend::new(&path, (720, 420)).into_drawing_area();
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&area)
        .caption(series.title, ("sans-serif", 16))
        .margin(12)
        .x_label_area_size(44)
        .y_label_area_size(60)
        .right_y_label_area_size(64)
        .build_cartesian_2d(0.0..last * 1.03, 0.0..slowest)?
        .set_secondary_coord(0.0..last * 1.03, 0.0..largest);
    chart
        .configure_mesh()
        .light_line_style(WHITE)
        .x_desc(series.axis)
        .y_desc("seconds of a step")
        .draw()?;
    chart
        .configure_secondary_axes()
        .y_desc("peak of the tensors, MiB")
        .draw()?;
    let time = || series.points.iter().map(|p| (p.x, p.seconds));
    let memory = || series.points.iter().map(|p| (p.x, p.memory));
    chart
        .draw_series(LineSeries::new(time(), &BLUE))?
        .label("seconds")
        .legend(|(x, y)| PathElement::new(vec![(x, y), (x + 18, y)], BLUE));
    chart.draw_series(time().map(|at| Circle::new(at, 3, BLUE.filled())))?;
    chart
        .draw_secondary_series(LineSeries::new(memory(), &RED))?
        .label("memory")
        .legend(|(x, y)| PathElement::new(vec![(x, y), (x + 18, y)], RED));
    chart.draw_secondary_series(memory().map(|at| Circle::new(at, 3, RED.filled())))?;
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::LowerRight)
        .border_style(BLACK)
        .background_style(WHITE)
        .draw()?;
    area.present()?;
    Ok(())
}

fn main() -> Result<(), Box<dyn Error>> {
    let all: [(&str, Measurement); 4] = [
        ("tokens", tokens),
        ("length", length),
        ("layers", layers),
        ("threads", threads),
    ];
    let is_name = |word: &String| all.iter().any(|(name, _)| name == word);
    let words = std::env::args().skip(1).filter(|x| !x.starts_with("--"));
    let (names, folders): (Vec<String>, Vec<String>) = words.partition(is_name);
    let plots = Path::new(env!("CARGO_MANIFEST_DIR")).join("../bench/plots");
    let folder = folders.first().map_or(plots, PathBuf::from);
    std::fs::create_dir_all(&folder)?;
    for (name, series) in all {
        if !names.is_empty() && !names.iter().any(|wanted| wanted == name) {
            continue;
        }
        let series = series();
        for p in &series.points {
            println!("{name} {:>6} {:.3} s {:>6.0} MiB", p.x, p.seconds, p.memory);
        }
        draw(&series, &folder)?;
    }
    Ok(())
}
