//! Which examples go into which batch.
//!
//! An epoch is a list of batches, each a list of example numbers, in which every example stands exactly once.

use std::collections::{BTreeMap, VecDeque};

use serde::Serialize;

/// How large a batch may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum BatchSize {
    /// This many examples, the last batch of an epoch perhaps fewer.
    #[serde(rename = "batch_size")]
    Examples(usize),
    /// At most this many tokens, special tokens included; an example longer than that stands alone.
    #[serde(rename = "max_tokens")]
    Tokens(usize),
}

/// The batches of one epoch.
///
/// `lengths[i]` is the number of tokens of example `i`. `shuffle` reorders what it is given; called first with the
/// examples. With `group_window`, examples are then taken by length within windows of that many (so that a batch
/// holds examples of like length) and `shuffle` is called once more to reorder the batches. A budget of tokens is
/// then also filled, with what fits of other lengths. A size of 0 is treated as 1.
///
/// Every example is in exactly one batch and no batch is empty.
pub fn epoch_batches(
    lengths: &[usize],
    size: BatchSize,
    group_window: Option<usize>,
    mut shuffle: impl FnMut(&mut [usize]),
) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    shuffle(&mut order);
    let Some(window) = group_window else {
        return cut(&order, lengths, size);
    };
    let mut batches = match size {
        BatchSize::Examples(_) => {
            for part in order.chunks_mut(window.max(1)) {
                // Stable: equal lengths keep their shuffled order.
                part.sort_by_key(|&example| lengths[example]);
            }
            cut(&order, lengths, size)
        }
        BatchSize::Tokens(budget) => fill(&order, lengths, budget, window),
    };
    let mut places: Vec<usize> = (0..batches.len()).collect();
    shuffle(&mut places);
    places
        .into_iter()
        .map(|place| std::mem::take(&mut batches[place]))
        .collect()
}

/// The batches of an evaluation: all examples in their order.
pub fn in_order(lengths: &[usize], size: BatchSize) -> Vec<Vec<usize>> {
    epoch_batches(lengths, size, None, |_| {})
}

/// Cuts an order into batches, each as large as `size` allows.
fn cut(order: &[usize], lengths: &[usize], size: BatchSize) -> Vec<Vec<usize>> {
    match size {
        BatchSize::Examples(count) => order.chunks(count.max(1)).map(<[usize]>::to_vec).collect(),
        BatchSize::Tokens(budget) => {
            let mut batches: Vec<Vec<usize>> = Vec::new();
            let mut tokens = 0usize;
            for &example in order {
                let more = lengths[example];
                match batches.last_mut() {
                    Some(batch) if tokens.saturating_add(more) <= budget => {
                        batch.push(example);
                        tokens += more;
                    }
                    _ => {
                        batches.push(vec![example]);
                        tokens = more;
                    }
                }
            }
            batches
        }
    }
}

/// A batch that is at least this full is not worth waiting for more.
const FULL: f64 = 0.95;

/// Fills batches up to `budget` tokens: each begins with the longest example that is waiting and takes, again and
/// again, the longest that still fits (first-fit decreasing, one bin at a time; Johnson 1973, "Near-optimal bin packing
/// algorithms"). Without padding a batch of mixed lengths costs no more than one of like lengths, so a gap is better
/// filled than left. What is left of a window in a batch that is not full waits for the next window.
fn fill(order: &[usize], lengths: &[usize], budget: usize, window: usize) -> Vec<Vec<usize>> {
    let mut batches = Vec::new();
    // By length; of one length, in their shuffled order.
    let mut waiting: BTreeMap<usize, VecDeque<usize>> = BTreeMap::new();
    let mut windows = order.chunks(window.max(1)).peekable();
    while let Some(examples) = windows.next() {
        for &example in examples {
            let like = waiting.entry(lengths[example]).or_default();
            like.push_back(example);
        }
        loop {
            let (batch, tokens) = take(&mut waiting, budget);
            if batch.is_empty() {
                break;
            }
            let full = tokens as f64 >= FULL * budget as f64;
            if waiting.is_empty() && !full && windows.peek().is_some() {
                for example in batch {
                    let like = waiting.entry(lengths[example]).or_default();
                    like.push_back(example);
                }
                break;
            }
            batches.push(batch);
        }
    }
    batches
}

/// One batch out of what is waiting, and its tokens.
fn take(waiting: &mut BTreeMap<usize, VecDeque<usize>>, budget: usize) -> (Vec<usize>, usize) {
    let (mut batch, mut tokens) = (Vec::new(), 0usize);
    loop {
        // The first may be longer than the budget: it stands alone.
        let most = match batch.is_empty() {
            true => usize::MAX,
            false => match budget.checked_sub(tokens) {
                Some(room) => room,
                None => break,
            },
        };
        let Some((&length, _)) = waiting.range(..=most).next_back() else {
            break;
        };
        let like = waiting.entry(length).or_default();
        batch.extend(like.pop_front());
        tokens = tokens.saturating_add(length);
        if like.is_empty() {
            waiting.remove(&length);
        }
    }
    (batch, tokens)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A fixed scrambling: not random, but no order either.
    fn scramble(items: &mut [usize]) {
        let n = items.len();
        for i in 0..n {
            items.swap(i, (i * 7 + 3) % n);
        }
    }

    fn lengths(n: usize) -> Vec<usize> {
        (0..n).map(|i| 1 + (i * 37) % 23).collect()
    }

    fn assert_partition(batches: &[Vec<usize>], n: usize) {
        let mut all: Vec<usize> = batches.concat();
        all.sort_unstable();
        assert_eq!(all, (0..n).collect::<Vec<_>>());
        assert!(batches.iter().all(|batch| !batch.is_empty()));
    }

    #[test]
    fn every_example_once_and_no_batch_empty() {
        for n in [0, 1, 2, 17, 64] {
            let lengths = lengths(n);
            for size in [1, 3, 16, 1000] {
                for size in [BatchSize::Examples(size), BatchSize::Tokens(size)] {
                    for window in [None, Some(1), Some(10), Some(1000)] {
                        assert_partition(&epoch_batches(&lengths, size, window, scramble), n);
                    }
                }
            }
        }
    }

    #[test]
    fn counts_are_full_but_for_the_last() {
        let sizes: Vec<usize> = epoch_batches(&lengths(10), BatchSize::Examples(4), None, scramble)
            .iter()
            .map(Vec::len)
            .collect();
        assert_eq!(sizes, [4, 4, 2]);
    }

    #[test]
    fn budgets_hold_and_are_used() {
        let lengths = lengths(50);
        let batches = epoch_batches(&lengths, BatchSize::Tokens(40), None, scramble);
        let tokens = |batch: &[usize]| batch.iter().map(|&i| lengths[i]).sum::<usize>();
        for pair in batches.windows(2) {
            assert!(tokens(&pair[0]) <= 40);
            // The next example did not fit.
            assert!(tokens(&pair[0]) + lengths[pair[1][0]] > 40);
        }
    }

    #[test]
    fn an_overlong_example_stands_alone() {
        let batches = in_order(&[2, 2, 99, 2, 2], BatchSize::Tokens(8));
        assert_eq!(batches, [vec![0, 1], vec![2], vec![3, 4]]);
    }

    #[test]
    fn grouping_brings_like_lengths_together_and_shuffles_the_batches() {
        let lengths = lengths(60);
        let spread = |batches: &[Vec<usize>]| -> usize {
            batches
                .iter()
                .map(|b| {
                    let of = || b.iter().map(|&i| lengths[i]);
                    of().max().unwrap() - of().min().unwrap()
                })
                .sum()
        };
        let plain = epoch_batches(&lengths, BatchSize::Examples(5), None, scramble);
        let grouped = epoch_batches(&lengths, BatchSize::Examples(5), Some(30), scramble);
        assert!(spread(&grouped) < spread(&plain) / 2);
        // The second call reorders the batches, and nothing else.
        let mut calls = 0;
        let mut reversed = epoch_batches(&lengths, BatchSize::Examples(5), Some(30), |items| {
            calls += 1;
            if calls == 1 {
                scramble(items)
            } else {
                items.reverse()
            }
        });
        reversed.reverse();
        calls = 0;
        let kept = epoch_batches(&lengths, BatchSize::Examples(5), Some(30), |items| {
            calls += 1;
            if calls == 1 {
                scramble(items);
            }
        });
        assert_eq!(reversed, kept);
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn grouped_batches_are_full(
            lengths in prop::collection::vec(1usize..400, 300..900),
            budget in 800usize..4000,
            window in 100usize..1200,
        ) {
            let size = BatchSize::Tokens(budget);
            let batches = epoch_batches(&lengths, size, Some(window), scramble);
            assert_partition(&batches, lengths.len());
            let tokens: Vec<usize> = batches
                .iter()
                .map(|batch| batch.iter().map(|&i| lengths[i]).sum())
                .collect();
            prop_assert!(tokens.iter().all(|&tokens| tokens <= budget));
            // One batch of the epoch holds what was left over; the others are full, all together.
            let least = tokens.iter().min().copied().unwrap_or(0);
            let others: usize = tokens.iter().sum::<usize>() - least;
            let room = budget * (batches.len() - 1);
            prop_assert!(
                others as f64 >= 0.97 * room as f64,
                "{others} of {room} in {} batches", batches.len()
            );
            // The same again, and no batch depends on anything else.
            prop_assert_eq!(batches, epoch_batches(&lengths, size, Some(window), scramble));
        }
    }

    #[test]
    fn grouping_fills_what_a_plain_cut_leaves() {
        // 20 to 339 tokens, from Knuth's MMIX congruence.
        let mut random = 1u64;
        let mut next = || {
            random = random
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            20 + (random >> 33) as usize % 320
        };
        let lengths: Vec<usize> = (0..600).map(|_| next()).collect();
        let size = BatchSize::Tokens(1000);
        let plain = epoch_batches(&lengths, size, None, scramble).len();
        let grouped = epoch_batches(&lengths, size, Some(1024), scramble).len();
        let least = lengths.iter().sum::<usize>().div_ceil(1000);
        assert!(plain as f64 > 1.1 * least as f64, "{plain} {least}");
        assert!(grouped <= least + 1, "{grouped} {least}");
    }
}
