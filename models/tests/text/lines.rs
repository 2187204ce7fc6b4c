//! The 10,000 lines of `tests/fixtures/make_bpe.py`, drawn from the same pool by the same rules.

use std::fs;
use std::path::{Path, PathBuf};

use serde::Deserialize;

pub const COUNT: usize = 10_000;

pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../tests/fixtures/bpe")
        .join(name)
}

#[derive(Deserialize)]
struct Pool {
    words: Vec<String>,
    scripts: Vec<String>,
    emoji: Vec<String>,
    spaces: Vec<String>,
    controls: Vec<String>,
    specials: Vec<String>,
    blocks: Vec<(u32, u32)>,
    letters: String,
}

/// SplitMix64 (Steele, Lea and Flood 2014).
struct Draw(u64);

impl Draw {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn upto(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    fn of<'p, T>(&mut self, pool: &'p [T]) -> &'p T {
        &pool[self.upto(pool.len())]
    }
}

pub fn lines() -> Vec<String> {
    let pool: Pool = serde_json::from_slice(&fs::read(fixture("pool.json")).unwrap()).unwrap();
    let letters: Vec<char> = pool.letters.chars().collect();
    (0..COUNT)
        .map(|number| line(number, &pool, &letters))
        .collect()
}

fn line(number: usize, pool: &Pool, letters: &[char]) -> String {
    let mut rng = Draw(number as u64);
    let mut text = String::new();
    let count = 1 + rng.upto(10);
    for i in 0..count {
        match number % 8 {
            0 => {
                text += rng.of(&pool.words).as_str();
                text += if i + 1 < count { " " } else { "" };
            }
            1 => {
                text += rng.of(&pool.words).as_str();
                text += rng.of(&pool.spaces).as_str();
            }
            2 => {
                text += rng.of(&pool.scripts).as_str();
                text += rng.of(&pool.spaces).as_str();
                if rng.upto(3) == 0 {
                    text += rng.of(&pool.emoji).as_str();
                }
            }
            3 => {
                text += rng.of(&pool.words).as_str();
                text += rng.of(&pool.controls).as_str();
            }
            4 => {
                for _ in 0..1 + rng.upto(12) {
                    text.push(*rng.of(letters));
                }
                text += " ";
            }
            5 => {
                let (first, last) = *rng.of(&pool.blocks);
                for _ in 0..1 + rng.upto(6) {
                    let code = first + rng.upto((last - first + 1) as usize) as u32;
                    text.push(char::from_u32(code).unwrap());
                }
            }
            6 => {
                text += rng.of(&pool.specials).as_str();
                text += rng.of(&pool.spaces).as_str();
                text += rng.of(&pool.words).as_str();
            }
            _ => {
                let emoji = rng.of(&pool.emoji);
                text += &emoji.repeat(1 + rng.upto(3));
                text += rng.of(&pool.scripts).as_str();
                text += rng.of(&pool.controls).as_str();
                text += rng.of(&pool.specials).as_str();
            }
        }
    }
    text
}
