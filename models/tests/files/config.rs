//! config.json of both versions of transformers: read, refused, and written back.

use graft_models::config::{DropoutRates, Family, HiddenAct, Labels, ModelConfig, ProblemType};
use graft_models::{Error, ModelSource};
use graft_tensor::DType;
use proptest::prelude::*;
use serde_json::{Map, Value, json};

/// As transformers 4.46 writes a tiny BERT.
const BERT_4: &str = r#"{
  "architectures": ["BertForSequenceClassification"],
  "attention_probs_dropout_prob": 0.1, "classifier_dropout": 0.2, "hidden_act": "gelu", "hidden_dropout_prob": 0.1,
  "hidden_size": 16, "id2label": {"0": "neg", "1": "neu", "2": "pos"}, "initializer_range": 0.02,
  "intermediate_size": 32, "label2id": {"neg": 0, "neu": 1, "pos": 2}, "layer_norm_eps": 1e-12,
  "max_position_embeddings": 20, "model_type": "bert", "num_attention_heads": 4, "num_hidden_layers": 2,
  "pad_token_id": 0, "position_embedding_type": "absolute", "problem_type": "single_label_classification",
  "torch_dtype": "bfloat16", "transformers_version": "4.46.3", "type_vocab_size": 2, "use_cache": true, "vocab_size": 50
}"#;

/// The same model as transformers 5.23 writes it.
const BERT_5: &str = r#"{
  "add_cross_attention": false, "architectures": ["BertForSequenceClassification"],
  "attention_probs_dropout_prob": 0.1, "bos_token_id": null, "classifier_dropout": 0.2, "dtype": "bfloat16",
  "eos_token_id": null, "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "hidden_size": 16,
  "id2label": {"0": "neg", "1": "neu", "2": "pos"}, "initializer_range": 0.02, "intermediate_size": 32,
  "is_decoder": false, "label2id": {"neg": 0, "neu": 1, "pos": 2}, "layer_norm_eps": 1e-12,
  "max_position_embeddings": 20, "model_type": "bert", "num_attention_heads": 4, "num_hidden_layers": 2,
  "pad_token_id": 0, "problem_type": "single_label_classification", "tie_word_embeddings": true,
  "transformers_version": "5.23.0", "type_vocab_size": 2, "use_cache": true, "vocab_size": 50
}"#;

/// As transformers 5.23 writes a tiny RoBERTa for regression.
const ROBERTA: &str = r#"{
  "architectures": ["RobertaForSequenceClassification"], "attention_probs_dropout_prob": 0.1, "bos_token_id": 0,
  "classifier_dropout": null, "dtype": "float32", "eos_token_id": 2, "hidden_act": "gelu", "hidden_dropout_prob": 0.15,
  "hidden_size": 16, "id2label": {"0": "LABEL_0"}, "initializer_range": 0.02, "intermediate_size": 32,
  "label2id": {"LABEL_0": 0}, "layer_norm_eps": 1e-05, "max_position_embeddings": 22, "model_type": "roberta",
  "num_attention_heads": 4, "num_hidden_layers": 2, "pad_token_id": 1, "problem_type": "regression",
  "tie_word_embeddings": true, "type_vocab_size": 1, "vocab_size": 50
}"#;

/// As transformers 4.46 writes a tiny DistilBERT with its two default labels.
const DISTILBERT: &str = r#"{
  "activation": "gelu", "architectures": ["DistilBertForSequenceClassification"], "attention_dropout": 0.1, "dim": 16,
  "dropout": 0.1, "hidden_dim": 32, "initializer_range": 0.02, "max_position_embeddings": 20,
  "model_type": "distilbert", "n_heads": 4, "n_layers": 2, "pad_token_id": 0, "qa_dropout": 0.1,
  "seq_classif_dropout": 0.2, "sinusoidal_pos_embds": false, "torch_dtype": "float16",
  "transformers_version": "4.46.3", "vocab_size": 50
}"#;

fn parse(text: &str) -> Result<ModelConfig, Error> {
    ModelConfig::parse("m/config.json", text.as_bytes())
}

fn object(text: &str) -> Map<String, Value> {
    serde_json::from_str(text).unwrap()
}

/// The config with one key set (or removed, by `Null` under `!key`).
fn with(text: &str, key: &str, value: Value) -> String {
    let mut map = object(text);
    match key.strip_prefix('!') {
        Some(key) => drop(map.remove(key)),
        None => drop(map.insert(key.to_string(), value)),
    }
    Value::Object(map).to_string()
}

#[test]
fn both_spellings_give_the_same_model() {
    let four = parse(BERT_4).unwrap();
    let five = parse(BERT_5).unwrap();
    assert_eq!(
        ModelConfig {
            raw: Map::new(),
            ..four.clone()
        },
        ModelConfig {
            raw: Map::new(),
            ..five
        }
    );
    assert_eq!(four.family, Family::Bert);
    assert_eq!(
        (
            four.hidden_size,
            four.layers,
            four.heads,
            four.intermediate_size
        ),
        (16, 2, 4, 32)
    );
    assert_eq!(
        (four.vocab_size, four.max_positions, four.type_vocab_size),
        (50, 20, 2)
    );
    assert_eq!(
        (four.head_size(), four.first_position(), four.max_tokens()),
        (4, 0, 20)
    );
    assert_eq!(
        four.dropout,
        DropoutRates {
            hidden: 0.1,
            attention: 0.1,
            classifier: 0.2
        }
    );
    assert_eq!(
        (four.layer_norm_eps, four.hidden_act, four.pad_token_id),
        (1e-12, HiddenAct::Gelu, Some(0))
    );
    assert_eq!(four.head.labels.names(), ["neg", "neu", "pos"]);
    assert_eq!(
        (
            four.num_labels(),
            four.head.labels.id("pos"),
            four.head.labels.id("x")
        ),
        (3, Some(2), None)
    );
    assert_eq!(
        (four.head.problem_type, four.dtype),
        (Some(ProblemType::SingleLabel), Some(DType::Bf16))
    );
}

#[test]
fn roberta_counts_positions_from_its_padding() {
    let config = parse(ROBERTA).unwrap();
    assert_eq!((config.first_position(), config.max_tokens()), (2, 20));
    assert_eq!((config.type_vocab_size, config.layer_norm_eps), (1, 1e-5));
    assert_eq!(
        config.dropout.classifier, 0.15,
        "null stands for the hidden rate"
    );
    assert_eq!(
        (config.num_labels(), config.head.problem_type),
        (1, Some(ProblemType::Regression))
    );
}

#[test]
fn distilbert_has_names_of_its_own() {
    let config = parse(DISTILBERT).unwrap();
    assert_eq!(
        (
            config.hidden_size,
            config.layers,
            config.heads,
            config.intermediate_size
        ),
        (16, 2, 4, 32)
    );
    assert_eq!((config.type_vocab_size, config.layer_norm_eps), (0, 1e-12));
    assert_eq!(
        config.dropout,
        DropoutRates {
            hidden: 0.1,
            attention: 0.1,
            classifier: 0.2
        }
    );
    assert_eq!(config.head.labels, Labels::numbered(2));
    assert_eq!(config.dtype, Some(DType::F16));
    // The general names mean the same, and both at once must agree.
    let general = DISTILBERT
        .replace("\"dim\"", "\"hidden_size\"")
        .replace("\"n_heads\"", "\"num_attention_heads\"")
        .replace("\"n_layers\"", "\"num_hidden_layers\"");
    assert_eq!(parse(&general).unwrap().hidden_size, 16);
    assert!(parse(&with(DISTILBERT, "hidden_size", json!(16))).is_ok());
    let error = parse(&with(DISTILBERT, "hidden_size", json!(32)))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("`hidden_size`") && error.contains("`dim`"),
        "{error}"
    );
    // Sinusoidal positions are stored in the checkpoint like learned ones.
    assert!(parse(&with(DISTILBERT, "sinusoidal_pos_embds", json!(true))).is_ok());
}

#[test]
fn defaults_are_those_of_transformers() {
    let minimal = r#"{"model_type": "bert", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 16, "vocab_size": 10, "max_position_embeddings": 12}"#;
    let config = parse(minimal).unwrap();
    assert_eq!(
        (
            config.type_vocab_size,
            config.layer_norm_eps,
            config.pad_token_id
        ),
        (2, 1e-12, Some(0))
    );
    assert_eq!(
        config.dropout,
        DropoutRates {
            hidden: 0.1,
            attention: 0.1,
            classifier: 0.1
        }
    );
    assert_eq!(
        (config.hidden_act, config.initializer_range),
        (HiddenAct::Gelu, 0.02)
    );
    assert_eq!(
        (
            config.head.labels.count(),
            config.head.problem_type,
            config.dtype
        ),
        (2, None, None)
    );
    assert!(config.head.architectures.is_empty());
    assert_eq!(
        parse(&minimal.replace("bert", "roberta"))
            .unwrap()
            .pad_token_id,
        Some(1)
    );
}

#[test]
fn what_is_read_is_written_back() {
    for text in [BERT_4, BERT_5, ROBERTA] {
        let config = parse(text).unwrap();
        assert_eq!(object(&config.to_json()), object(text));
        assert_eq!(parse(&config.to_json()).unwrap(), config);
    }
    // A classifier's labels are stated even when they are the default ones.
    let mut expected = object(DISTILBERT);
    expected.insert(
        "id2label".to_string(),
        json!({"0": "LABEL_0", "1": "LABEL_1"}),
    );
    expected.insert("label2id".to_string(), json!({"LABEL_0": 0, "LABEL_1": 1}));
    assert_eq!(object(&parse(DISTILBERT).unwrap().to_json()), expected);
    // Keys of others survive, in their order.
    let text = with(BERT_4, "my_key", json!({"b": [1, 2.50, "é"], "a": null}));
    let saved = parse(&text).unwrap().to_json();
    assert_eq!(
        object(&saved)["my_key"],
        json!({"b": [1, 2.50, "é"], "a": null})
    );
    assert_eq!(
        object(&saved).keys().collect::<Vec<_>>(),
        object(&text).keys().collect::<Vec<_>>()
    );
}

#[test]
fn a_base_model_becomes_a_classifier() {
    let base = r#"{"_name_or_path": "x", "architectures": ["BertModel"], "model_type": "bert", "hidden_size": 8,
        "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 10,
        "max_position_embeddings": 12, "pad_token_id": 0}"#;
    let mut config = parse(base).unwrap();
    assert!(!object(&config.to_json()).contains_key("id2label"));
    let labels = Labels::new(vec![
        "spam".to_string(),
        "ham".to_string(),
        "eggs".to_string(),
    ])
    .unwrap();
    config.set_classification(labels, ProblemType::MultiLabel);
    config.dtype = Some(DType::F32);
    let saved = object(&config.to_json());
    assert_eq!(
        saved["architectures"],
        json!(["BertForSequenceClassification"])
    );
    assert_eq!(
        saved["id2label"],
        json!({"0": "spam", "1": "ham", "2": "eggs"})
    );
    assert_eq!(saved["label2id"], json!({"spam": 0, "ham": 1, "eggs": 2}));
    assert_eq!(saved["problem_type"], "multi_label_classification");
    assert_eq!(saved["torch_dtype"], "float32");
    let again = parse(&config.to_json()).unwrap();
    assert_eq!(
        ModelConfig {
            raw: Map::new(),
            ..again
        },
        ModelConfig {
            raw: Map::new(),
            ..config
        }
    );
}

#[test]
fn a_head_over_tokens_is_known_by_its_class() {
    for (base, class) in [
        (BERT_5, "BertForTokenClassification"),
        (ROBERTA, "RobertaForTokenClassification"),
        (DISTILBERT, "DistilBertForTokenClassification"),
    ] {
        let mut config = parse(base).unwrap();
        assert_ne!(config.head.problem(), ProblemType::Tokens);
        let labels = Labels::new(vec!["O".to_string(), "B-a".to_string()]).unwrap();
        config.set_classification(labels, ProblemType::Tokens);
        let saved = object(&config.to_json());
        assert_eq!(saved["architectures"], json!([class]));
        assert_eq!(saved["id2label"], json!({"0": "O", "1": "B-a"}));
        // transformers knows no such problem.
        assert!(!saved.contains_key("problem_type"));
        let again = parse(&config.to_json()).unwrap();
        assert_eq!(again.head, config.head);
        assert_eq!(again.head.problem(), ProblemType::Tokens);
        // One output of a head over texts would be a number.
        let one = Labels::numbered(1);
        assert_eq!(again.head.problem_with(&one), ProblemType::Tokens);
    }
}

#[test]
fn changed_values_are_written_in_the_spelling_read() {
    let mut config = parse(DISTILBERT).unwrap();
    config.dropout = DropoutRates {
        hidden: 0.0,
        attention: 0.3,
        classifier: 0.4,
    };
    config.hidden_act = HiddenAct::GeluTanh;
    config.pad_token_id = None;
    let saved = object(&config.to_json());
    assert_eq!(
        (&saved["dropout"], &saved["attention_dropout"]),
        (&json!(0.0), &json!(0.3))
    );
    assert_eq!(
        (&saved["seq_classif_dropout"], &saved["activation"]),
        (&json!(0.4), &json!("gelu_new"))
    );
    assert_eq!(saved["pad_token_id"], Value::Null);
    let mut config = parse(BERT_5).unwrap();
    config.dtype = Some(DType::F32);
    let saved = object(&config.to_json());
    assert_eq!(saved["dtype"], "float32");
    assert!(!saved.contains_key("torch_dtype"));
    let mut config = parse(ROBERTA).unwrap();
    config.dropout.classifier = 0.5;
    config.head.problem_type = None;
    let saved = object(&config.to_json());
    assert_eq!(saved["classifier_dropout"], 0.5);
    assert!(!saved.contains_key("problem_type"));
}

#[test]
fn wrong_values_are_named() {
    let many = (0..3)
        .map(|i| (i.to_string(), json!("same")))
        .collect::<Map<_, _>>();
    let cases = [
        ("model_type", json!("gpt2"), "bert, roberta, distilbert"),
        ("!model_type", Value::Null, "found nothing"),
        ("hidden_act", json!("mish"), "gelu_new"),
        ("hidden_act", json!(3), "gelu"),
        (
            "position_embedding_type",
            json!("relative_key"),
            "\"absolute\"",
        ),
        ("is_decoder", json!(true), "only encoders"),
        ("add_cross_attention", json!(true), "only encoders"),
        ("pruned_heads", json!({"0": [1]}), "pruned"),
        ("quantization_config", json!({"bits": 4}), "full precision"),
        ("num_attention_heads", json!(5), "5 heads for a width of 16"),
        ("num_attention_heads", json!(0), "from 1"),
        ("hidden_size", json!(0), "from 1 to 65536"),
        ("hidden_size", json!(1u64 << 40), "from 1 to 65536"),
        ("hidden_size", json!(-16), "found -16"),
        ("hidden_size", json!(16.0), "found 16.0"),
        ("hidden_size", json!("16"), "found \"16\""),
        ("!hidden_size", Value::Null, "found nothing"),
        ("num_hidden_layers", json!(1_000_000), "from 1 to 1024"),
        ("vocab_size", json!(0), "from 1"),
        ("!max_position_embeddings", Value::Null, "found nothing"),
        ("type_vocab_size", json!(0), "from 1"),
        ("layer_norm_eps", json!(0), "above 0"),
        ("layer_norm_eps", json!("1e-12"), "above 0"),
        ("hidden_dropout_prob", json!(1.0), "below 1"),
        ("classifier_dropout", json!(-0.1), "from 0"),
        ("pad_token_id", json!(50), "from 0 to 49"),
        ("id2label", json!({"0": "a", "2": "b"}), "from 0 to 1"),
        ("id2label", json!({"0": "a", "00": "b"}), "from 0 to 1"),
        ("id2label", json!({"0": 1}), "a string"),
        ("id2label", json!(["a"]), "a list of 1"),
        ("id2label", json!({}), "0 labels"),
        ("id2label", Value::Object(many), "\"same\" twice"),
        ("label2id", json!({"neg": 1, "neu": 0, "pos": 2}), "inverse"),
        ("label2id", json!({"neg": 0}), "1 labels"),
        ("label2id", json!([]), "a list of 0"),
        ("num_labels", json!(4), "number of labels"),
        ("problem_type", json!("ranking"), "regression"),
        ("architectures", json!("BertModel"), "a list"),
        ("architectures", json!([1]), "a list"),
        ("torch_dtype", json!("int8"), "bfloat16"),
        ("dtype", json!("float32"), "as `dtype`"),
    ];
    for (key, value, expected) in cases {
        let error = parse(&with(BERT_4, key, value)).unwrap_err();
        let Error::Config { key: named, .. } = &error else {
            panic!("{key}: {error}")
        };
        let key = key.trim_start_matches('!');
        assert!(
            named == key || key == "dtype" && named == "torch_dtype",
            "{named}: {error}"
        );
        let text = error.to_string();
        assert!(
            text.starts_with("m/config.json: ") && text.contains(expected),
            "{key}: {text}"
        );
    }
    let error = parse(&with(ROBERTA, "pad_token_id", Value::Null))
        .unwrap_err()
        .to_string();
    assert!(error.contains("counts positions"), "{error}");
    assert!(parse(&with(ROBERTA, "max_position_embeddings", json!(2))).is_err());
    assert!(parse(&with(ROBERTA, "max_position_embeddings", json!(3))).is_ok());
    assert!(
        parse(&BERT_4.replace("\"vocab_size\"", "\"hidden_size\": 16, \"vocab_size\"")).is_err()
    );
}

#[test]
fn harmless_oddities_are_accepted() {
    assert_eq!(
        parse(&with(BERT_4, "pad_token_id", json!(-1)))
            .unwrap()
            .pad_token_id,
        None
    );
    assert_eq!(
        parse(&with(BERT_4, "num_labels", json!(3)))
            .unwrap()
            .num_labels(),
        3
    );
    assert_eq!(
        parse(&with(BERT_4, "torch_dtype", json!("torch.float16")))
            .unwrap()
            .dtype,
        Some(DType::F16)
    );
    assert_eq!(
        parse(&with(BERT_4, "hidden_act", json!("swish")))
            .unwrap()
            .hidden_act,
        HiddenAct::Silu
    );
    let counted = with(
        &with(
            &with(BERT_4, "!id2label", Value::Null),
            "!label2id",
            Value::Null,
        ),
        "_num_labels",
        json!(5),
    );
    let config = parse(&counted).unwrap();
    assert_eq!(config.head.labels, Labels::numbered(5));
    let saved = object(&config.to_json());
    assert!(!saved.contains_key("_num_labels") && saved["id2label"]["4"] == "LABEL_4");
}

#[test]
fn a_directory_without_config_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let error = ModelConfig::load(&ModelSource::directory(dir.path()).unwrap()).unwrap_err();
    assert!(
        matches!(&error, Error::MissingFile { name, .. } if name == "config.json"),
        "{error}"
    );
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn arbitrary_values_never_panic(
        which in 0usize..4,
        key in any::<prop::sample::Index>(),
        value in prop::sample::select(vec![
            "null", "true", "-1", "0", "1", "3", "1.5", "1e300", "18446744073709551615", "\"x\"", "[]", "{}",
            "[1]", "{\"0\":\"a\"}", "{\"a\":0}", "\"relu\"", "\"\"",
        ]),
    ) {
        let text = [BERT_4, BERT_5, ROBERTA, DISTILBERT][which];
        let map = object(text);
        let key = map.keys().nth(key.index(map.len())).unwrap().clone();
        if let Ok(config) = parse(&with(text, &key, serde_json::from_str(value).unwrap())) {
            // What was accepted can be saved and read again.
            let again = parse(&config.to_json()).unwrap();
            prop_assert_eq!(ModelConfig { raw: Map::new(), ..again }, ModelConfig { raw: Map::new(), ..config });
        }
    }

    #[test]
    fn random_text_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
        prop_assert!(ModelConfig::parse("c", &bytes).is_err());
    }
}
