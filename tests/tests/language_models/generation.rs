//! Generation.

use graft_models::{CausalLm, TokenBatch};
use graft_nn::Forward;
use graft_tensor::Memory;
use graft_tests::runs::{FIRST_CHARACTER, characters, write_tokenizer};
use graft_trainer::generate::{Finish, Options, Sampling, encode, generate};
use graft_trainer::model::Model;
use serde_json::Value;

use crate::{Bench, TRAINER};

impl Bench {
    /// `generate` with the model or run of that name.
    fn generate(&self, model: &str, more: &[&str]) -> Vec<String> {
        let model = self.path(model);
        let arguments = ["generate", "--model", &model];
        let all = arguments.iter().chain(more);
        all.map(|s| (*s).to_owned()).collect()
    }

    /// What follows a prompt.
    fn continued(&self, model: &str, prompt: &str, more: &[&str]) -> String {
        let mut arguments = vec!["--prompt", prompt];
        arguments.extend(more);
        let said = TRAINER.succeeds(self.generate(model, &arguments)).out;
        said.strip_suffix('\n')
            .expect("a line feed ends it")
            .to_owned()
    }

    /// The objects that follow prompts.
    fn all_continued(&self, model: &str, prompts: &[&str], more: &[&str]) -> Vec<Value> {
        let rows = prompts
            .iter()
            .map(|p| serde_json::json!({"prompt": p}).to_string() + "\n");
        std::fs::write(self.path("prompts.jsonl"), rows.collect::<String>()).unwrap();
        let (prompts, out) = (self.path("prompts.jsonl"), self.path("out.jsonl"));
        let mut arguments = vec!["--prompts", &prompts, "--out", &out];
        arguments.extend(more);
        TRAINER.succeeds(self.generate(model, &arguments));
        let text = std::fs::read_to_string(&out).unwrap();
        text.lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }
}

/// Learns documents by heart.
fn learn(bench: &Bench, more: &[&str]) {
    let mut arguments = vec![
        "--epochs",
        "150",
        "--lr",
        "0.01",
        "--batch-size",
        "2",
        "--set",
        "optimizer.warmup=5",
    ];
    arguments.extend(more);
    TRAINER.succeeds(bench.train("run", &arguments));
}

const LEARNT: [&str; 3] = [
    "the mill turns with the river",
    "one bridge, two roads: nine fields",
    "rain\nand stones",
];

#[test]
fn what_was_learnt_by_heart_is_said_again() {
    for family in ["tiny-gpt2", "tiny-llama"] {
        let bench = Bench::new(family);
        bench.write("train.jsonl", &LEARNT);
        learn(&bench, &[]);
        let path = bench.path("train.jsonl");
        let said = TRAINER.succeeds([
            "eval",
            "--json",
            "--model",
            &bench.path("run"),
            "--data",
            &path,
        ]);
        let said: Value = serde_json::from_str(&said.out).unwrap();
        assert!(said["perplexity"].as_f64().unwrap() < 1.1, "{said}");
        for text in LEARNT {
            let (prompt, rest) = text.split_at(3);
            assert_eq!(bench.continued("run", prompt, &[]), rest);
        }
        // A stop text ends it, and is not said.
        assert_eq!(
            bench.continued("run", "rain", &["--stop", "\\nand", "--stop", "zz"]),
            ""
        );
        assert_eq!(
            bench.continued("run", "one", &["--stop", "roads"]),
            " bridge, two "
        );
        assert_eq!(
            bench.continued("run", "one", &["--max-new-tokens", "4"]),
            " bri"
        );
        let prompts = ["the", "one", "rain"];
        let all = bench.all_continued("run", &prompts, &["--stop", ": n"]);
        let finished: Vec<&str> = all.iter().map(|o| o["finish"].as_str().unwrap()).collect();
        assert_eq!(finished, ["end", "stop", "end"]);
        assert_eq!(all[0]["tokens"], LEARNT[0].len() - 3 + 1);
        assert_eq!(all[1]["text"], " bridge, two roads");
        assert_eq!(all[2]["prompt"], "rain");
    }
}

#[test]
fn greedy_text_is_that_of_full_passes_alone_and_in_a_batch() {
    let prompts = [
        "a",
        "the river",
        "it runs to the sea, and th",
        "nine",
        "x y z",
        "\n",
        "sea",
        "hill",
        "0",
        "mill and the sea: th",
    ];
    for family in ["tiny-gpt2", "tiny-mistral", "tiny-gemma3"] {
        let bench = Bench::new(family);
        let all = bench.all_continued("model", &prompts, &["--max-new-tokens", "12"]);
        let model = Model::<CausalLm>::causal(&bench.path("model"), &Memory::cpu()).unwrap();
        for (prompt, found) in prompts.iter().zip(&all) {
            let mut ids = characters(prompt);
            ids.pop();
            let first = ids.len();
            while ids.len() < first + 12 {
                let mut f = Forward::evaluate(&model.parameters);
                let batch = TokenBatch::of_ids([ids.as_slice()]);
                let logits = model.network.forward(&mut f, &batch).unwrap();
                let logits = logits.value().to_f64().unwrap();
                // The tokenizer has 99 of the model's 101 tokens.
                let last = &logits[logits.len() - 101..logits.len() - 2];
                let best = |a: usize, b: usize| if last[b] > last[a] { b } else { a };
                ids.push((0..last.len()).reduce(best).unwrap() as i64);
                if ids.last() == Some(&2) {
                    break;
                }
            }
            assert_eq!(found["tokens"], ids.len() - first, "{family} {prompt:?}");
            let text: String = ids[first..]
                .iter()
                .filter(|&&id| id >= FIRST_CHARACTER)
                .map(|&id| match (id - FIRST_CHARACTER) as u8 {
                    95 => '\n',
                    n => char::from(b' ' + n),
                })
                .collect();
            assert_eq!(found["text"], text, "{family} {prompt:?}");
            let alone = bench.continued("model", prompt, &["--max-new-tokens", "12"]);
            assert_eq!(alone, text, "{family} {prompt:?}");
        }
    }
}

#[test]
fn chance_follows_the_seed_and_not_the_neighbours() {
    let bench = Bench::new("tiny-gpt2");
    let hot = |seed: &str| {
        let more = [
            "--temperature",
            "1",
            "--max-new-tokens",
            "20",
            "--seed",
            seed,
        ];
        bench.continued("model", "the", &more)
    };
    assert_eq!(hot("1"), hot("1"));
    assert_ne!(hot("1"), hot("2"));
    let more = [
        "--temperature",
        "1",
        "--max-new-tokens",
        "20",
        "--seed",
        "1",
    ];
    let all = bench.all_continued("model", &["the"; 9], &more);
    assert_eq!(all[0]["text"], hot("1"));
    assert!(all[1..].iter().all(|o| o["text"] != all[0]["text"]));
    // A nucleus of one token is the most likely one.
    let greedy = bench.continued("model", "the", &[]);
    let one = ["--temperature", "2", "--top-k", "1"];
    assert_eq!(bench.continued("model", "the", &one), greedy);
    let one = ["--temperature", "2", "--top-p", "0.000001"];
    assert_eq!(bench.continued("model", "the", &one), greedy);
    assert_ne!(
        bench.continued("model", "the", &["--repetition-penalty", "1.5"]),
        greedy
    );
    // The positions end it: 40 tokens are read, and one more is known.
    let all = bench.all_continued("model", &["the"], &more_tokens());
    let said = (&all[0]["tokens"], &all[0]["finish"]);
    assert_eq!(said, (&38.into(), &"context".into()));
}

/// Without an end: the text runs to the last position.
fn more_tokens() -> [&'static str; 2] {
    ["--max-new-tokens", "1000"]
}

#[test]
fn text_in_bf16_knows_no_neighbours_and_no_threads() {
    for family in ["tiny-llama", "tiny-gemma2"] {
        let bench = Bench::new(family);
        let bf16 = ["--precision", "bf16", "--max-new-tokens", "15"];
        let prompts = ["the river", "a", "nine fields"];
        let all = bench.all_continued("model", &prompts, &bf16);
        for (prompt, together) in prompts.iter().zip(&all) {
            for threads in ["1", "2"] {
                let more = [&bf16[..], &["--threads", threads]].concat();
                assert_eq!(together["text"], bench.continued("model", prompt, &more));
            }
        }
        let more = ["--prompt", "a", "--precision", "f16"];
        let said = TRAINER.run(bench.generate("model", &more));
        assert!(said.code == Some(2) && said.err.contains("[possible values: f32, bf16]"));
    }
}

#[test]
fn pieces_are_whole_characters() {
    let bench = Bench::new("tiny-gpt2");
    let dir = bench.dir.path().join("model");
    write_tokenizer(&dir, 0..=255);
    let path = dir.join("config.json");
    let config = std::fs::read_to_string(&path).unwrap();
    let large = config.replace("\"vocab_size\": 101", "\"vocab_size\": 300");
    std::fs::write(&path, large).unwrap();
    let text = "größe: 日本語 und 🦀🦀!";
    bench.write("train.jsonl", &[text]);
    learn(&bench, &["--init", "random"]);
    let model = Model::<CausalLm>::causal(&bench.path("run"), &Memory::cpu()).unwrap();
    let options = Options {
        sampling: Sampling::GREEDY,
        max_new_tokens: 100,
        stop: vec!["🦀!".into()],
        end: vec![],
        seed: 0,
    };
    let mut pieces = Vec::new();
    let done = generate(
        &model,
        &[encode(&model, "gr").unwrap()],
        0,
        &options,
        &mut |number, piece| {
            assert_eq!(number, 0);
            pieces.push(piece.to_owned());
            Ok(())
        },
    )
    .unwrap();
    let expected = "öße: 日本語 und 🦀";
    assert_eq!(pieces.concat(), expected);
    assert!(pieces.iter().all(|p| p.chars().count() == 1), "{pieces:?}");
    assert_eq!(
        (done[0].text.as_str(), done[0].finish),
        (expected, Finish::Stop)
    );
    // A model that has learnt nothing says bytes that are no text; what comes out is text.
    std::fs::remove_file(bench.path("model") + "/model.safetensors").unwrap();
    std::fs::copy(
        bench.path("run") + "/model.safetensors",
        dir.join("model.safetensors"),
    )
    .unwrap();
    let wild = ["--temperature", "50", "--max-new-tokens", "30"];
    assert!(bench.continued("model", "gr", &wild).contains('\u{fffd}'));
}

#[test]
fn what_cannot_be_generated_is_refused() {
    let bench = Bench::new("tiny-gpt2");
    let refuse = |more: &[&str], wanted: &[&str]| {
        let said = TRAINER.refuses(bench.generate("model", more));
        for wanted in wanted {
            assert!(said.contains(wanted), "{wanted} in {said}");
        }
    };
    let long = "x".repeat(41);
    refuse(&["--prompt", &long], &["41 tokens", "40 positions"]);
    for (flag, value, wanted) in [
        ("--temperature", "-1", "0 or more"),
        ("--temperature", "NaN", "0 or more"),
        ("--top-p", "0", "above 0"),
        ("--top-p", "1.5", "1 at most"),
        ("--top-k", "0", "1 or more"),
        ("--top-k", "5", "no effect at temperature 0"),
        ("--max-new-tokens", "0", "1 or more"),
        ("--threads", "0", "1 or more"),
        ("--threads", "100000", "1024 at most"),
        ("--repetition-penalty", "0", "above 0"),
        ("--stop", "", "some text"),
    ] {
        refuse(&["--prompt", "a", flag, value], &[flag, wanted]);
    }
    let data = bench.path("train.jsonl");
    refuse(&["--prompts", &data], &["train.jsonl:1", "`prompt`"]);
    refuse(
        &["--prompts", &data],
        &["name the column with --text-column"],
    );
    let folder = bench.path("model");
    refuse(&["--prompts", &folder], &["it is a directory"]);
    let prompts = bench.path("long.jsonl");
    std::fs::write(
        &prompts,
        format!("{{\"prompt\": \"a\"}}\n{{\"prompt\": \"{long}\"}}\n"),
    )
    .unwrap();
    refuse(&["--prompts", &prompts], &["long.jsonl:2", "41 tokens"]);
    let nowhere = bench.path("nowhere/out.jsonl");
    refuse(
        &["--prompts", &prompts, "--out", &nowhere],
        &["--out: there is no directory"],
    );
    let encoder = graft_tests::fixture("tiny-bert");
    let said = TRAINER.refuses([
        "generate",
        "--prompt",
        "a",
        "--model",
        encoder.to_str().unwrap(),
    ]);
    assert!(said.contains("family bert"), "{said}");
    // Nothing at all begins with the token that begins a text.
    bench.continued("model", "", &["--max-new-tokens", "3"]);
}

#[test]
fn weights_that_are_no_numbers_are_refused_by_all_that_uses_them() {
    let bench = Bench::new("tiny-gpt2");
    let path = bench.path("model/model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    // The end of the token embedding, which is the matrix of the logits.
    let end = bytes.len();
    bytes[end - 4096..].fill(0xff);
    std::fs::write(&path, bytes).unwrap();
    let (model, data) = (bench.path("model"), bench.path("train.jsonl"));
    for json in [&[][..], &["--json"]] {
        let arguments = [&["eval", "--model", &model, "--data", &data], json].concat();
        let said = TRAINER.refuses(arguments);
        assert!(said.contains("its logits are not numbers"), "{said}");
    }
    let said = TRAINER.refuses(bench.generate("model", &["--prompt", "the"]));
    assert!(said.contains("its logits are not numbers"), "{said}");
    let said = TRAINER.refuses(bench.train("run", &[]));
    let wanted = ["step 1: the loss is NaN", "check the model's weights"];
    assert!(wanted.iter().all(|part| said.contains(part)), "{said}");
    assert!(!bench.dir.path().join("run").exists());
}

#[test]
fn text_and_perplexity_are_those_of_transformers() {
    let expected = graft_tests::json(&graft_tests::fixture("generation.json"));
    let families = expected.as_object().unwrap();
    assert_eq!(families.len(), 7);
    for (family, expected) in families {
        let bench = Bench::new(family);
        let new_tokens = expected["new_tokens"].to_string();
        let cases = expected["cases"].as_array().unwrap();
        assert_eq!(cases.len(), 50);
        for penalty in [1.0, 1.3] {
            let text = |case: &'_ Value, key: &str| case[key].as_str().unwrap().to_owned();
            let cases: Vec<_> = cases.iter().filter(|c| c["penalty"] == penalty).collect();
            let prompts: Vec<String> = cases.iter().map(|c| text(c, "prompt")).collect();
            let prompts: Vec<&str> = prompts.iter().map(String::as_str).collect();
            let penalty = penalty.to_string();
            let more = [
                "--max-new-tokens",
                &new_tokens,
                "--repetition-penalty",
                &penalty,
            ];
            let found = bench.all_continued("model", &prompts, &more);
            assert_eq!(found.len(), 25);
            for (found, case) in found.iter().zip(&cases) {
                assert_eq!(found["text"], case["text"], "{family}: {case}");
            }
        }
        let documents = expected["documents"].as_array().unwrap();
        let documents: Vec<&str> = documents.iter().map(|d| d.as_str().unwrap()).collect();
        bench.write("eval.jsonl", &documents);
        let (model, data) = (bench.path("model"), bench.path("eval.jsonl"));
        let said = TRAINER
            .succeeds(["eval", "--json", "--model", &model, "--data", &data])
            .out;
        let said: Value = serde_json::from_str(&said).unwrap();
        assert_eq!(said["tokens"], expected["tokens"], "{family}");
        let loss = |value: &Value| value["loss"].as_f64().unwrap();
        assert!(
            (loss(&said) - loss(expected)).abs() < 1e-5,
            "{family}: {said}"
        );
        let perplexity = said["perplexity"].as_f64().unwrap();
        assert!(
            (perplexity / loss(expected).exp() - 1.0).abs() < 1e-5,
            "{family}: {said}"
        );
    }
}
