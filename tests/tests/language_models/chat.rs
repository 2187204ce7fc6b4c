//! Chat tuning: conversations, answers, what is supervised.

use graft_models::{CausalLm, TokenBatch};
use graft_nn::Forward;
use graft_tensor::Memory;
use graft_tests::runs::{characters, records};
use graft_trainer::model::Model;
use serde_json::{Value, json};

use crate::{Bench, TRAINER};

/// What a message is written as: `u` or `a` or `s`, the words, and the end of the turn; the positions are few.
const TEMPLATE: &str = "{% for m in messages %}\
    {% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}\
    {{ m.role[0] }}{{ m.content }}{% if m.role == 'assistant' %}<|endoftext|>{% endif %}\n\
    {% endfor %}{% if add_generation_prompt %}a{% endif %}";

/// Conversations of very different lengths.
fn conversations() -> Vec<Value> {
    let said = |role: &str, content: &str| json!({"role": role, "content": content});
    [
        vec![said("user", "2+2"), said("assistant", "4")],
        vec![
            said("user", "who"),
            said("assistant", "the miller of the river"),
        ],
        vec![
            said("system", "short"),
            said("user", "hi"),
            said("assistant", "yo"),
        ],
        vec![
            said("user", "a"),
            said("assistant", "b"),
            said("user", "c"),
            said("assistant", "d"),
        ],
        vec![said("user", "sea"), said("assistant", "salt")],
        vec![said("user", "rain"), said("assistant", "wet hills")],
        vec![said("user", "nine"), said("assistant", "fields of it")],
        vec![said("user", "x"), said("assistant", "")],
        vec![said("user", "one"), said("assistant", "1")],
        vec![said("user", "q"), said("assistant", "no")],
    ]
    .into_iter()
    .map(|messages| json!({"messages": messages, "id": 7}))
    .collect()
}

impl Bench {
    /// A model with a template, and conversations in `chat.jsonl`.
    pub(crate) fn chat(family: &str) -> Bench {
        let bench = Bench::new(family);
        // A line feed in front of a tag would be the template's own.
        let template = TEMPLATE.replace('\n', "{{ '\\n' }}");
        std::fs::write(bench.path("model") + "/chat_template.jinja", template).unwrap();
        bench.write_chats("chat.jsonl", &conversations());
        bench
    }

    pub(crate) fn write_chats(&self, name: &str, rows: &[Value]) {
        let text: String = rows.iter().map(|row| format!("{row}\n")).collect();
        std::fs::write(self.path(name), text).unwrap();
    }

    /// A run on the conversations.
    pub(crate) fn tune(&self, out: &str, more: &[&str]) -> Vec<String> {
        let mut arguments = self.train(out, more);
        for (flag, value) in [
            ("--task", "chat".to_owned()),
            ("--train", self.path("chat.jsonl")),
        ] {
            let place = arguments.iter().position(|a| a == flag).unwrap();
            arguments[place + 1] = value;
        }
        arguments
    }
}

fn eval(bench: &Bench, more: &[&str]) -> Value {
    let data = bench.path("chat.jsonl");
    let arguments = ["eval", "--json", "--data", &data];
    let said = TRAINER.succeeds(arguments.iter().chain(more));
    serde_json::from_str(&said.out).unwrap()
}

#[test]
fn the_loss_is_over_the_assistants_tokens_alone() {
    let bench = Bench::chat("tiny-llama");
    let path = bench.path("model");
    let model = Model::<CausalLm>::causal(&path, &Memory::cpu()).unwrap();
    let vocabulary = model.config.vocab_size;
    let (mut sum, mut count) = (0.0, 0);
    for row in conversations() {
        // The tokens by hand: characters, the end of the turn behind each answer, and whether they are supervised.
        let (mut ids, mut supervised) = (Vec::new(), Vec::new());
        for message in row["messages"].as_array().unwrap() {
            let role = message["role"].as_str().unwrap();
            let content = characters(message["content"].as_str().unwrap());
            let answers = role == "assistant";
            // `characters` ends in the token that ends a text.
            let words = if answers {
                &content[..]
            } else {
                &content[..content.len() - 1]
            };
            ids.extend(&characters(&role[..1])[..1]);
            supervised.push(false);
            ids.extend(words);
            supervised.resize(ids.len(), answers);
            ids.extend(&characters("\n")[..1]);
            supervised.push(false);
        }
        let mut f = Forward::evaluate(&model.parameters);
        let logits = model
            .network
            .forward(&mut f, &TokenBatch::of_ids([ids.as_slice()]));
        let logits = logits.unwrap().value().to_f64().unwrap();
        for (i, row) in logits.chunks(vocabulary).enumerate() {
            if supervised.get(i + 1) == Some(&true) {
                let top = row.iter().copied().fold(f64::MIN, f64::max);
                let all: f64 = row.iter().map(|x| (x - top).exp()).sum();
                sum += all.ln() + top - row[ids[i + 1] as usize];
                count += 1;
            }
        }
    }
    let said = eval(&bench, &["--model", &path, "--task", "chat"]);
    assert_eq!(
        (&said["conversations"], &said["tokens"]),
        (&10.into(), &count.into())
    );
    let (loss, mean) = (said["loss"].as_f64().unwrap(), sum / f64::from(count));
    assert!((loss - mean).abs() < 1e-6, "{loss} {mean}");
}

#[test]
fn answers_that_were_learnt_are_given_and_the_turn_is_ended() {
    let bench = Bench::chat("tiny-gpt2");
    let data = bench.path("chat.jsonl");
    let more = [
        "--eval",
        &data,
        "--epochs",
        "150",
        "--lr",
        "0.01",
        "--set",
        "optimizer.warmup=5",
    ];
    let said = TRAINER.succeeds(bench.tune("run", &more));
    assert!(
        said.err.contains("chat.jsonl: 10 conversations"),
        "{}",
        said.err
    );
    TRAINER.succeeds(["verify", &bench.path("run")]);
    // A run says itself what it was trained for.
    let run = bench.path("run");
    let result = eval(&bench, &["--model", &run]);
    assert!(result["perplexity"].as_f64().unwrap() < 1.1, "{result}");
    let evals = records(&bench.dir.path().join("run"), "eval");
    let best = evals.iter().rfind(|e| e["best"] == true).unwrap();
    assert!((best["loss"].as_f64().unwrap() - result["loss"].as_f64().unwrap()).abs() < 1e-9);
    assert_eq!(best["tokens"], result["tokens"]);
    let table = TRAINER.succeeds(["compare", &run]).out;
    assert!(
        table.contains("perplexity") && !table.contains("accuracy"),
        "{table}"
    );

    let ask = |more: &[&str]| {
        let arguments = ["generate", "--chat", "--model", &run];
        TRAINER.succeeds(arguments.iter().chain(more)).out
    };
    assert_eq!(ask(&["--prompt", "2+2"]), "4\n");
    assert_eq!(ask(&["--prompt", "who"]), "the miller of the river\n");
    assert_eq!(ask(&["--prompt", "hi", "--system", "short"]), "yo\n");
    bench.write_chats(
        "ask.jsonl",
        &[
            json!({"messages": [{"role": "user", "content": "rain"}]}),
            json!({"messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b"},
                {"role": "user", "content": "c"},
            ]}),
        ],
    );
    let all = ask(&["--prompts", &bench.path("ask.jsonl")]);
    let all: Vec<Value> = all
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(
        (&all[0]["text"], &all[0]["finish"]),
        (&"wet hills".into(), &"end".into())
    );
    assert_eq!(
        (&all[1]["text"], &all[1]["messages"][1]["content"]),
        (&"d".into(), &"b".into())
    );
}

#[test]
fn a_turn_ends_where_its_template_says_even_if_the_configuration_does_not() {
    let bench = Bench::chat("tiny-gpt2");
    let more = [
        "--epochs",
        "150",
        "--lr",
        "0.01",
        "--set",
        "optimizer.warmup=5",
    ];
    TRAINER.succeeds(bench.tune("run", &more));
    let run = bench.path("run");
    let path = run.clone() + "/config.json";
    let config = std::fs::read_to_string(&path).unwrap();
    assert!(config.contains("\"eos_token_id\": 2"));
    let other = config.replace("\"eos_token_id\": 2", "\"eos_token_id\": 1");
    std::fs::write(&path, other).unwrap();
    bench.write_chats(
        "ask.jsonl",
        &[json!({"messages": [{"role": "user", "content": "2+2"}]})],
    );
    bench.write_chats("plain.jsonl", &[json!({"prompt": "u2+2\na"})]);
    let finish = |prompts: &str, more: &[&str]| -> Value {
        let prompts = bench.path(prompts);
        let arguments = [
            "generate",
            "--model",
            &run,
            "--prompts",
            &prompts,
            "--max-new-tokens",
            "9",
        ];
        let said = TRAINER.succeeds(arguments.iter().chain(more)).out;
        serde_json::from_str::<Value>(&said).unwrap()["finish"].clone()
    };
    assert_eq!(finish("ask.jsonl", &["--chat"]), "end");
    // Without the template, nothing ends it.
    assert_eq!(finish("plain.jsonl", &[]), "length");
    // generation_config.json may say it.
    let generation = run.clone() + "/generation_config.json";
    std::fs::write(&generation, "{\"eos_token_id\": [1, 2]}").unwrap();
    assert_eq!(finish("plain.jsonl", &[]), "end");
    std::fs::write(&generation, "{\"eos_token_id\": 101}").unwrap();
    let said = TRAINER.refuses(["generate", "--model", &run, "--prompt", "a"]);
    assert!(
        said.contains("generation_config.json: `eos_token_id`"),
        "{said}"
    );
}

#[test]
fn a_row_is_shown_with_what_is_supervised() {
    let bench = Bench::chat("tiny-llama");
    let (data, model) = (bench.path("chat.jsonl"), bench.path("model"));
    let show = |more: &[&str]| {
        let arguments = ["data", "show", &data, "--model", &model];
        TRAINER.succeeds(arguments.iter().chain(more)).out
    };
    let row = show(&["--row", "4"]);
    let expected = "  ua↵\n  a\n> b<|endoftext|>\n  ↵\n  uc↵\n  a\n> d<|endoftext|>\n  ↵\n";
    let count = format!("{data}:4: 14 tokens, 4 of them supervised\n");
    assert_eq!(row, format!("{expected}{count}"));
    let coloured = show(&["--row", "4", "--color", "always"]);
    assert!(
        coloured.contains("\u{1b}[32m> b<|endoftext|>\u{1b}[0m\n"),
        "{coloured}"
    );
    // What a run would cut is not there.
    let cut = show(&["--row", "4", "--max-length", "6"]);
    let count = format!("{data}:4: 6 tokens, 2 of them supervised\n");
    assert_eq!(cut, format!("  ua↵\n  a\n> b<|endoftext|>\n{count}"));
    let documents = bench.path("train.jsonl");
    let arguments = [
        "data", "show", &documents, "--model", &model, "--task", "clm",
    ];
    let said = TRAINER.succeeds(arguments).out;
    assert!(said.starts_with("  t\n> he river<|endoftext|>\n"), "{said}");
    let said = TRAINER.refuses(["data", "show", &data, "--model", &model, "--row", "11"]);
    assert!(
        said.contains("there is no row 11, the file has 10"),
        "{said}"
    );
    let said = TRAINER.refuses([
        "data", "show", &data, "--model", &model, "--task", "classify",
    ]);
    assert!(said.contains("name chat, clm, mlm or ner"), "{said}");
}

#[test]
fn what_cannot_be_learnt_is_refused_with_its_line() {
    let bench = Bench::chat("tiny-llama");
    let refuse = |more: &[&str], wanted: &[&str]| {
        let said = TRAINER.refuses(bench.tune("out", more));
        for wanted in wanted {
            assert!(said.contains(wanted), "{wanted} in {said}");
        }
        assert!(!bench.dir.path().join("out").exists());
    };
    let good = json!({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]});
    let long = "x".repeat(60);
    for (bad, wanted) in [
        (
            json!({"messages": [{"role": "user", "content": "a"}]}),
            "no token of the conversation is the assistant's",
        ),
        (
            json!({"messages": [{"role": "user", "content": long}, {"role": "assistant", "content": "b"}]}),
            "none of the first 40 tokens of the conversation's 66 is the assistant's",
        ),
        (
            json!({"messages": [{"content": "a"}]}),
            "message 0: `role` is nothing",
        ),
        (
            json!({"messages": [{"role": "tool", "content": "a"}]}),
            "the template refuses the conversation: no tools",
        ),
        (json!({"text": "a"}), "the column `messages` is missing"),
    ] {
        bench.write_chats("chat.jsonl", &[good.clone(), bad, good.clone()]);
        refuse(&[], &["chat.jsonl:2: ", wanted]);
    }
    bench.write_chats("chat.jsonl", &[good]);
    refuse(&["--init", "random"], &["--init", "\"clm\" or \"mlm\""]);
    refuse(
        &["--label-column", "x"],
        &["--label-column", "`task.kind` is \"chat\""],
    );
    refuse(&["--text-column", "turns"], &["chat.jsonl:1", "`turns`"]);
    refuse(&["--max-length", "41"], &["40 positions"]);
    std::fs::remove_file(bench.path("model") + "/chat_template.jinja").unwrap();
    refuse(
        &[],
        &["the model has no chat template", "chat_template.jinja"],
    );
}
