//! Decoding with a cache of keys and values: the same tokens as without, for every family.

use graft_models::{CausalLm, Checkpoint, DecoderConfig, Error, KvCache, ModelSource, TokenBatch};
use graft_models::{load_adapter, load_parameters};
use graft_nn::{Forward, FreezePolicy, Parameters};
use graft_tensor::{DType, Memory};
use graft_tests::{DECODERS, fixture, max_distance};

struct Model {
    config: DecoderConfig,
    parameters: Parameters,
    lm: CausalLm,
}

fn load(name: &str) -> Model {
    let dir = fixture(name);
    let config = DecoderConfig::load(&ModelSource::directory(&dir).unwrap()).unwrap();
    let mut parameters = Parameters::new(&Memory::cpu(), DType::F32);
    let lm = CausalLm::new(&mut parameters, &config).unwrap();
    let mut checkpoint = Checkpoint::open(&dir).unwrap();
    load_parameters(&mut parameters, &config, &mut checkpoint, None).unwrap();
    Model {
        config,
        parameters,
        lm,
    }
}

impl Model {
    fn cache(&self, sequences: usize, capacity: usize) -> KvCache {
        KvCache::new(&self.parameters, &self.config, sequences, capacity).unwrap()
    }

    /// The logits behind the last token of each text, by a full pass.
    fn full(&self, texts: &[Vec<i64>]) -> Vec<Vec<f64>> {
        let batch = TokenBatch::of_ids(texts.iter().map(Vec::as_slice));
        let mut f = Forward::evaluate(&self.parameters);
        let logits = self.lm.forward(&mut f, &batch).unwrap();
        let logits = logits.value().to_f64().unwrap();
        let rows: Vec<&[f64]> = logits.chunks(self.config.vocab_size).collect();
        let last = |end: &i64| rows[*end as usize - 1].to_vec();
        batch.offsets[1..].iter().map(last).collect()
    }

    /// The same from new tokens and a cache.
    fn advance(&self, new: &[&[i64]], cache: &mut KvCache) -> Result<Vec<Vec<f64>>, Error> {
        let batch = TokenBatch::of_ids(new.iter().copied());
        let mut f = Forward::evaluate(&self.parameters);
        let logits = self.lm.advance(&mut f, &batch, cache)?;
        let logits = logits.value().to_f64().unwrap();
        Ok(logits
            .chunks(self.config.vocab_size)
            .map(<[f64]>::to_vec)
            .collect())
    }
}

/// Prompts of these lengths.
fn prompts(lengths: &[usize]) -> Vec<Vec<i64>> {
    let id = |s: usize, i: usize| ((s * 31 + i * 17 + i * i) % 100 + 1) as i64;
    let text = |(s, &n): (usize, &usize)| (0..n).map(|i| id(s, i)).collect();
    lengths.iter().enumerate().map(text).collect()
}

fn greedy(logits: &[f64]) -> i64 {
    let best = |a: usize, b: usize| if logits[b] > logits[a] { b } else { a };
    (0..logits.len()).reduce(best).unwrap() as i64
}

#[test]
fn greedy_tokens_are_the_same_with_and_without_a_cache() {
    for name in DECODERS {
        let model = load(name);
        let mut texts = prompts(&[3, 17, 1, 9]);
        let mut cache = model.cache(4, 40);
        let mut new: Vec<Vec<i64>> = texts.clone();
        for step in 0..20 {
            let parts: Vec<&[i64]> = new.iter().map(Vec::as_slice).collect();
            let found = model.advance(&parts, &mut cache).unwrap();
            let exact = model.full(&texts);
            new.clear();
            for (s, (found, exact)) in found.iter().zip(&exact).enumerate() {
                let error = max_distance(found, exact);
                assert!(error < 1e-5, "{name} step {step} text {s}: {error:e}");
                assert_eq!(greedy(found), greedy(exact), "{name} step {step} text {s}");
                new.push(vec![greedy(found)]);
            }
            for (text, new) in texts.iter_mut().zip(&new) {
                text.extend(new);
            }
        }
        assert_eq!(cache.lengths(), [22, 36, 20, 28]);
    }
}

/// Rounding a matrix once is what rounding it in each product and each look-up comes to.
#[test]
fn matrices_held_in_bf16_give_the_bits_of_f32_ones() {
    for name in DECODERS {
        let mut model = load(name);
        model.parameters.compute_in(DType::Bf16).unwrap();
        let texts = prompts(&[3, 17, 1]);
        let run = |model: &Model| {
            let mut cache = model.cache(3, 20);
            let new: Vec<&[i64]> = texts.iter().map(Vec::as_slice).collect();
            let first = model.advance(&new, &mut cache).unwrap();
            let next: Vec<[i64; 1]> = first.iter().map(|row| [greedy(row)]).collect();
            let next: Vec<&[i64]> = next.iter().map(|id| &id[..]).collect();
            (first, model.advance(&next, &mut cache).unwrap())
        };
        let (exact, before) = (run(&model), held(&model));
        model.parameters.hold_as_computed().unwrap();
        assert_eq!(run(&model), exact, "{name}");
        let saved = before - held(&model);
        assert!(
            saved > before * 2 / 5,
            "{name}: {saved} of {before} bytes saved"
        );
    }
}

/// Bytes of all values.
fn held(model: &Model) -> usize {
    let value = |(id, _)| model.parameters.value(id).unwrap();
    let bytes = model.parameters.iter().map(value);
    bytes.map(|x| x.shape().count() * x.dtype().size()).sum()
}

/// Root of the mean square distance of all logits, relative to theirs.
fn off(found: &[Vec<f64>], exact: &[Vec<f64>]) -> f64 {
    let pairs = found.iter().flatten().zip(exact.iter().flatten());
    let (error, size) = pairs.fold((0.0, 0.0), |(e, s), (a, b)| {
        (e + (a - b).powi(2), s + b * b)
    });
    (error / size).sqrt()
}

#[test]
fn a_cache_in_bf16_is_as_near_to_f32_as_full_passes_in_bf16_and_knows_no_neighbours() {
    for name in DECODERS {
        let exact = load(name);
        let mut model = load(name);
        model.parameters.compute_in(DType::Bf16).unwrap();
        let mut texts = prompts(&[3, 17, 1, 9]);
        let mut cache = model.cache(4, 40);
        let mut alone = model.cache(1, 40);
        let mut new: Vec<Vec<i64>> = texts.clone();
        let [mut cached, mut full] = [0.0f64; 2];
        for _ in 0..20 {
            let parts: Vec<&[i64]> = new.iter().map(Vec::as_slice).collect();
            let found = model.advance(&parts, &mut cache).unwrap();
            let second = model.advance(&parts[1..2], &mut alone).unwrap();
            assert_eq!(second[0], found[1], "{name}");
            let reference = exact.full(&texts);
            cached = cached.max(off(&found, &reference));
            full = full.max(off(&model.full(&texts), &reference));
            new = reference.iter().map(|row| vec![greedy(row)]).collect();
            for (text, new) in texts.iter_mut().zip(&new) {
                text.extend(new);
            }
        }
        assert_eq!(cache.lengths(), [22, 36, 20, 28]);
        // bf16 has 8 bits: neither is exact, and the cache adds nothing to speak of.
        assert!(full > 1e-4 && cached > 1e-4, "{name}: {cached:e} {full:e}");
        assert!(
            cached < 1.5 * full && cached < 0.03,
            "{name}: {cached:e} {full:e}"
        );
    }
}

#[test]
fn texts_go_on_by_pieces_and_leave_when_they_are_finished() {
    for name in DECODERS {
        let model = load(name);
        let texts = prompts(&[30, 12, 25]);
        let mut cache = model.cache(3, 30);
        let piece = |s: usize, from: usize, to: usize| &texts[s][from..to];
        model
            .advance(
                &[piece(0, 0, 5), piece(1, 0, 11), piece(2, 0, 1)],
                &mut cache,
            )
            .unwrap();
        let found = model
            .advance(
                &[piece(0, 5, 17), piece(1, 11, 12), piece(2, 1, 9)],
                &mut cache,
            )
            .unwrap();
        let cut = [
            texts[0][..17].to_vec(),
            texts[1].clone(),
            texts[2][..9].to_vec(),
        ];
        for (found, exact) in found.iter().zip(model.full(&cut)) {
            assert!(max_distance(found, &exact) < 1e-5, "{name}");
        }
        // The second is finished, and the others change places.
        cache.keep(&[2, 0]);
        assert_eq!(cache.lengths(), [9, 17]);
        let found = model
            .advance(&[piece(2, 9, 25), piece(0, 17, 30)], &mut cache)
            .unwrap();
        for (found, exact) in found
            .iter()
            .zip(model.full(&[texts[2].clone(), texts[0].clone()]))
        {
            assert!(max_distance(found, &exact) < 1e-5, "{name}");
        }
    }
}

/// Texts behind virtual tokens: by pieces, beside others that begin later, as by a full pass.
#[test]
fn virtual_tokens_stand_in_front_of_each_text_in_a_cache() {
    for (base, adapter) in [
        ("tiny-gpt2", "gpt2-prompt"),
        ("tiny-gpt2", "gpt2-prefix"),
        ("tiny-llama", "llama-prompt"),
        ("tiny-llama", "llama-prefix"),
        ("tiny-mistral", "mistral-prefix"),
        ("tiny-qwen3", "qwen3-prefix"),
        ("tiny-gemma2", "gemma2-prompt"),
        ("tiny-gemma3", "gemma3-prefix"),
    ] {
        let mut model = load(base);
        let plain = model.full(&prompts(&[5]));
        let dir = fixture("adapters").join(adapter);
        load_adapter(&mut model.parameters, &model.config, "one", &dir).unwrap();
        let texts = prompts(&[20, 12, 9]);
        assert!(max_distance(&model.full(&prompts(&[5]))[0], &plain[0]) > 0.01);
        let mut cache = model.cache(3, 20);
        let piece = |s: usize, from: usize, to: usize| &texts[s][from..to];
        let first = [piece(0, 0, 5), piece(1, 0, 11), &[]];
        // A text without a token yet has no logits to give.
        let batch = TokenBatch::of_ids(first);
        let mut f = Forward::evaluate(&model.parameters);
        let decoder = model.lm.decoder();
        decoder.advance(&mut f, &batch, &mut cache).unwrap();
        drop(f);
        let rest = [piece(0, 5, 20), piece(1, 11, 12), piece(2, 0, 9)];
        let found = model.advance(&rest, &mut cache).unwrap();
        for (found, exact) in found.iter().zip(model.full(&texts)) {
            let error = max_distance(found, &exact);
            assert!(error < 1e-5, "{adapter}: off by {error:e}");
        }
        assert_eq!(cache.lengths(), [20, 12, 9]);
        // The model's 40 positions, less the virtual tokens.
        let error = KvCache::new(&model.parameters, &model.config, 1, 38).unwrap_err();
        let Error::TooLong {
            tokens: 38,
            limit: 37,
        } = error
        else {
            panic!("{error}");
        };
        let batch = prompts(&[38]);
        let batch = TokenBatch::of_ids(batch.iter().map(Vec::as_slice));
        let mut f = Forward::evaluate(&model.parameters);
        let error = model.lm.forward(&mut f, &batch).unwrap_err();
        assert!(
            matches!(
                error,
                Error::TooLong {
                    tokens: 38,
                    limit: 37
                }
            ),
            "{error}"
        );
        // A cache belongs to the adapter that it was made for.
        model.parameters.adapters_mut().activate(None).unwrap();
        let error = model.advance(&[&[1], &[1], &[1]], &mut cache).unwrap_err();
        assert!(
            matches!(
                error,
                Error::CacheFront {
                    adapter: 0,
                    cache: 3
                }
            ),
            "{error}"
        );
    }
}

#[test]
fn mistakes_are_refused_and_leave_the_cache_as_it_was() {
    let model = load("tiny-llama");
    let mut cache = model.cache(2, 6);
    let error =
        |new: &[&[i64]], cache: &mut KvCache| model.advance(new, cache).unwrap_err().to_string();
    assert_eq!(
        error(&[&[1]], &mut cache),
        "a batch of 1 sequences cannot go on from a cache of 2; give new tokens for each of these"
    );
    let before = model.advance(&[&[1, 2, 3], &[4]], &mut cache).unwrap();
    assert_eq!(
        error(&[&[1, 2, 3, 4], &[5]], &mut cache),
        "a sequence would have 7 tokens, and the cache has room for 6; make a larger cache, or stop"
    );
    assert!(error(&[&[1], &[101]], &mut cache).contains("index 101 at position 1"));
    assert_eq!(cache.lengths(), [3, 1]);
    let after = model.advance(&[&[7], &[8]], &mut cache).unwrap();
    let exact = model.full(&[vec![1, 2, 3, 7], vec![4, 8]]);
    for (found, exact) in after.iter().zip(&exact) {
        assert!(max_distance(found, exact) < 1e-5);
    }
    assert!(before != after);
    let error = KvCache::new(&model.parameters, &model.config, 1, 41).unwrap_err();
    assert!(matches!(
        error,
        Error::TooLong {
            tokens: 41,
            limit: 40
        }
    ));
    // No gradient flows through a cache.
    let set = FreezePolicy::default().resolve(&model.parameters).unwrap();
    let mut f = Forward::train(&model.parameters, &set, 0, 0);
    let batch = TokenBatch::of_ids([&[1i64][..], &[2]]);
    let error = model.lm.advance(&mut f, &batch, &mut cache).unwrap_err();
    assert!(matches!(error, Error::CacheInTraining));
}
