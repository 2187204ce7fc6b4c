//! Dropout masks on AVX-512: Philox for 32 keys of a query at a time, straight to bits.
//!
//! The words are those of [`philox::block`](crate::philox::block) with counters `[j / 4, t, h, 1]`. Of the ten
//! rounds, the first two and half of the third see either the keys' counters or the query's token
//! and not both: they are computed once for a strip of queries, and once for a query.

use super::Scores;
use crate::attention::plan::{KEYS, STRIP};
use crate::philox::{self, MULTIPLIER_0, MULTIPLIER_1, ROUNDS, WEYL_0, WEYL_1};
use std::arch::x86_64::*;

/// Keys whose bits are drawn at once: 8 counters of 4 words.
const GROUP: usize = 32;
/// Queries that are computed side by side, because each round waits for the one before.
const SIDE: usize = 4;
/// Rounds that see keys and query.
const FULL: usize = ROUNDS - 3;

/// The bits of a row of weights, 16 columns in each word: set where a weight is kept.
pub(super) type Bits = [u16; KEYS / 16];

/// Halves of the product of two words.
fn halves(a: u32, b: u32) -> (u32, u32) {
    let product = u64::from(a) * u64::from(b);
    ((product >> 32) as u32, product as u32)
}

/// What the keys of a strip bring to the third round. Words lie in the lower halves of 64 bits,
/// the upper ones hold anything.
struct Columns {
    /// Word 2 short of the query's part.
    c2: __m512i,
    /// Word 1 and the key, which word 0 is to be mixed with.
    f: __m512i,
    /// Word 2 after the round short of the query's part, and word 3.
    g: __m512i,
    w: __m512i,
}

/// What is the same for all weights of a rectangle.
struct Keep {
    /// Keys of the rounds after the third.
    keys: [[__m512i; 2]; FULL],
    threshold: __m512i,
    m0: __m512i,
    m1: __m512i,
}

/// `a ^ b ^ c`
#[inline]
#[target_feature(enable = "avx512f")]
fn xor3(a: __m512i, b: __m512i, c: __m512i) -> __m512i {
    _mm512_ternarylogic_epi64::<0x96>(a, b, c)
}

/// The same word in all lanes.
#[inline]
#[target_feature(enable = "avx512f")]
fn all(x: u32) -> __m512i {
    _mm512_set1_epi64(i64::from(x))
}

/// The upper halves.
#[inline]
#[target_feature(enable = "avx512f")]
fn upper(x: __m512i) -> __m512i {
    _mm512_srli_epi64::<32>(x)
}

/// The masks of a rectangle of weights; those of rows and columns beyond it mean nothing.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) fn masks(scores: &Scores) -> [Bits; STRIP] {
    let key = |round: usize| {
        let [a, b] = scores.p.key.0;
        let round = round as u32;
        [
            a.wrapping_add(round.wrapping_mul(WEYL_0)),
            b.wrapping_add(round.wrapping_mul(WEYL_1)),
        ]
    };
    let mut keys = [[_mm512_setzero_si512(); 2]; FULL];
    for (round, keys) in keys.iter_mut().enumerate() {
        *keys = key(round + 3).map(|word| all(word));
    }
    // `word >> 8 >= keep`; where nothing is kept the weights are multiplied by 0 in any case.
    let threshold = philox::keep_from(scores.p.dropout) << 8;
    let keep = Keep {
        keys,
        threshold: _mm512_set1_epi32(threshold as i32),
        m0: all(MULTIPLIER_0),
        m1: all(MULTIPLIER_1),
    };
    // Unpacking 64-bit halves of two registers puts those of even lanes first.
    let order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
    let (high, low) = halves(scores.head as u32, MULTIPLIER_1);
    let mut bits = [[0; KEYS / 16]; STRIP];
    for (n, at) in (scores.from..scores.to).step_by(GROUP).enumerate() {
        // Counters of keys stay below 2^30.
        let counters = _mm512_add_epi64(order, all(((scores.first_key + at) / 4) as u32));
        let first = _mm512_mul_epu32(counters, keep.m0);
        let c2 = _mm512_xor_si512(upper(first), all(1 ^ key(0)[1]));
        let second = _mm512_mul_epu32(c2, keep.m1);
        let c0 = _mm512_xor_si512(upper(second), all(low ^ key(1)[0]));
        let third = _mm512_mul_epu32(c0, keep.m0);
        let columns = Columns {
            c2: _mm512_xor_si512(first, all(key(1)[1])),
            f: _mm512_xor_si512(second, all(key(2)[0])),
            g: _mm512_xor_si512(upper(third), all(key(2)[1])),
            w: third,
        };
        for (r, bits) in bits[..scores.queries.next_multiple_of(SIDE)]
            .as_chunks_mut::<SIDE>()
            .0
            .iter_mut()
            .enumerate()
        {
            let token = |i: usize| scores.token(SIDE * r + i) ^ high ^ key(0)[0];
            let found = keep.bits(&columns, std::array::from_fn(token));
            for (bits, found) in bits.iter_mut().zip(found) {
                bits[2 * n] = found as u16;
                bits[2 * n + 1] = (found >> 16) as u16;
            }
        }
    }
    bits
}

impl Keep {
    /// Which of 32 keys each of some queries keeps; of a query there is word 0 after the first round.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn bits(&self, columns: &Columns, queries: [u32; SIDE]) -> [u32; SIDE] {
        let mut c0 = [columns.f; SIDE];
        let mut c1 = c0;
        let mut c2 = c0;
        let mut c3 = [columns.w; SIDE];
        for i in 0..SIDE {
            let (high, low) = halves(queries[i], MULTIPLIER_0);
            c1[i] = _mm512_mul_epu32(_mm512_xor_si512(columns.c2, all(high)), self.m1);
            c0[i] = _mm512_xor_si512(upper(c1[i]), columns.f);
            c2[i] = _mm512_xor_si512(columns.g, all(low));
        }
        for [key_0, key_1] in &self.keys[..FULL - 1] {
            for i in 0..SIDE {
                let product_0 = _mm512_mul_epu32(c0[i], self.m0);
                let product_1 = _mm512_mul_epu32(c2[i], self.m1);
                c0[i] = xor3(upper(product_1), c1[i], *key_0);
                c1[i] = product_1;
                c2[i] = xor3(upper(product_0), c3[i], *key_1);
                c3[i] = product_0;
            }
        }
        // The last round, with words 0 and 1, 2 and 3 side by side: the halves of a product change
        // places, and only the word that was the upper half is mixed.
        let [key_0, key_1] = self.keys[FULL - 1];
        let lower = 0x5555;
        let mut bits = [0; SIDE];
        for i in 0..SIDE {
            let product_0 = _mm512_ror_epi64::<32>(_mm512_mul_epu32(c0[i], self.m0));
            let product_1 = _mm512_ror_epi64::<32>(_mm512_mul_epu32(c2[i], self.m1));
            let first = _mm512_mask_ternarylogic_epi32::<0x96>(product_1, lower, c1[i], key_0);
            let second = _mm512_mask_ternarylogic_epi32::<0x96>(product_0, lower, c3[i], key_1);
            let low = _mm512_unpacklo_epi64(first, second);
            let high = _mm512_unpackhi_epi64(first, second);
            let low = _mm512_cmpge_epu32_mask(low, self.threshold);
            let high = _mm512_cmpge_epu32_mask(high, self.threshold);
            bits[i] = u32::from(low) | u32::from(high) << 16;
        }
        bits
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::Attention;
    use crate::philox::Key;
    use crate::simd::Isa;

    /// Bit for bit those of the definition, whatever the sizes of counters, tokens and heads.
    #[test]
    fn masks_are_those_of_single_words() {
        if !Isa::Avx512.is_available() {
            return;
        }
        for (dropout, first_key, from, head, start) in [
            (0.1, 0, 0, 0, 0),
            (0.5, 128, 16, 3, 77),
            (0.9, 1 << 20, 48, 40, u32::MAX as usize - 40),
            (1e-9, 12_345 * 16, 0, 11, 1 << 31),
        ] {
            let p = Attention {
                heads: 64,
                kv_heads: 64,
                head_dim: 1,
                causal: false,
                window: None,
                softcap: None,
                scale: 1.0,
                dropout,
                key: Key::new(start as u64, 5, head as u64),
            };
            let scores = Scores {
                p: &p,
                head,
                len: 1 << 30,
                start,
                first_query: 5,
                queries: 32,
                first_key,
                from,
                to: from + 80,
                stride: KEYS,
            };
            // SAFETY: the processor has the instructions.
            let found = unsafe { masks(&scores) };
            let least = philox::keep_from(dropout);
            for r in [0, 2, 31] {
                for i in 0..80 {
                    let j = first_key + from + i;
                    let counter = [(j / 4) as u32, scores.token(r), head as u32, 1];
                    let word = philox::block(p.key, counter)[j % 4];
                    let bit = found[r][i / 16] >> (i % 16) & 1 == 1;
                    assert_eq!(bit, word >> 8 >= least, "key {j}, query {r}, head {head}");
                }
            }
        }
    }
}
