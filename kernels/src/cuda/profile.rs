//! How long each kernel takes, for finding what a step's time goes to.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Launches and time of each kernel. Kept where the variable GRAFT_CUDA_PROFILE is set, and printed
/// to standard error when the device closes; every launch is then waited for, which makes small
/// kernels look slower than they are and lets nothing overlap.
#[derive(Default)]
pub(super) struct Profile {
    kernels: Mutex<HashMap<&'static str, (u64, Duration)>>,
}

impl Profile {
    /// One, if it is wanted.
    pub fn wanted() -> Option<Profile> {
        std::env::var_os("GRAFT_CUDA_PROFILE").map(|_| Profile::default())
    }

    /// Counts a launch.
    pub fn add(&self, name: &'static str, time: Duration) {
        let mut kernels = self.kernels.lock().unwrap_or_else(PoisonError::into_inner);
        let (launches, total) = kernels.entry(name).or_default();
        *launches += 1;
        *total += time;
    }

    /// A line for each kernel, the longest first.
    fn table(&self) -> String {
        let kernels = self.kernels.lock().unwrap_or_else(PoisonError::into_inner);
        let mut rows: Vec<_> = kernels.iter().collect();
        rows.sort_by_key(|(name, (_, total))| (std::cmp::Reverse(*total), **name));
        let all: Duration = rows.iter().map(|(_, (_, total))| *total).sum();
        let mut text = format!("{:.3} s in kernels\n", all.as_secs_f64());
        for (name, (launches, total)) in rows {
            // Writing to a String cannot fail.
            let _ = writeln!(
                text,
                "{:5.1} % {:10.3} ms {launches:7} x {:9.1} us  {name}",
                100.0 * total.as_secs_f64() / all.as_secs_f64().max(1e-12),
                1e3 * total.as_secs_f64(),
                1e6 * total.as_secs_f64() / *launches as f64,
            );
        }
        text
    }
}

impl Drop for Profile {
    fn drop(&mut self) {
        eprint!("{}", self.table());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_comes_first() {
        let profile = Profile::default();
        profile.add("short", Duration::from_millis(1));
        profile.add("long", Duration::from_millis(2));
        profile.add("long", Duration::from_millis(4));
        let table = profile.table();
        let lines: Vec<&str> = table.lines().collect();
        assert!(lines[0].starts_with("0.007 s"), "{table}");
        assert!(
            lines[1].ends_with("long") && lines[1].contains("2 x    3000.0 us"),
            "{table}"
        );
        assert!(lines[2].ends_with("short"), "{table}");
    }
}
