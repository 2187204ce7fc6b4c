//! config.json of decoders: read, refused by key, and written back.

use graft_models::config::{
    Config, DecoderDropout, DecoderFamily, LayerKind, Positions, RopeParameters, RopeScaling,
};
use graft_models::{DecoderConfig, Error, HiddenAct, Labels, ModelConfig, ProblemType};
use graft_tensor::DType;
use proptest::prelude::*;
use serde_json::{Map, Value, json};

/// GPT-2 as it lies on the hub since 2019.
const GPT2: &str = r#"{
  "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1, "bos_token_id": 50256,
  "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05,
  "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024,
  "resid_pdrop": 0.1, "summary_activation": null, "summary_first_dropout": 0.1, "summary_proj_to_labels": true,
  "summary_type": "cls_index", "summary_use_proj": true,
  "task_specific_params": {"text-generation": {"do_sample": true, "max_length": 50}}, "vocab_size": 50257
}"#;

/// The keys of Llama 3.1 8B, in the spelling of transformers 4.
const LLAMA: &str = r#"{
  "architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 128000,
  "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
  "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": false, "model_type": "llama",
  "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1,
  "rms_norm_eps": 1e-05, "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
  "original_max_position_embeddings": 8192, "rope_type": "llama3"}, "rope_theta": 500000.0,
  "tie_word_embeddings": false, "torch_dtype": "bfloat16", "use_cache": true, "vocab_size": 128256
}"#;

const MISTRAL: &str = r#"{
  "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
  "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768,
  "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
  "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": false,
  "torch_dtype": "bfloat16", "vocab_size": 32000
}"#;

const QWEN2: &str = r#"{
  "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151643,
  "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02, "intermediate_size": 4864,
  "max_position_embeddings": 32768, "max_window_layers": 21, "model_type": "qwen2", "num_attention_heads": 14,
  "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
  "sliding_window": 32768, "tie_word_embeddings": true, "torch_dtype": "bfloat16", "use_sliding_window": false,
  "vocab_size": 151936
}"#;

const GEMMA2: &str = r#"{
  "architectures": ["Gemma2ForCausalLM"], "attention_bias": false, "attn_logit_softcapping": 50.0, "bos_token_id": 2,
  "cache_implementation": "hybrid", "eos_token_id": 1, "final_logit_softcapping": 30.0, "head_dim": 256,
  "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2304,
  "intermediate_size": 9216, "max_position_embeddings": 8192, "model_type": "gemma2", "num_attention_heads": 8,
  "num_hidden_layers": 26, "num_key_value_heads": 4, "pad_token_id": 0, "query_pre_attn_scalar": 256,
  "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 4096, "torch_dtype": "float32", "vocab_size": 256000
}"#;

const GEMMA3: &str = r#"{
  "architectures": ["Gemma3ForCausalLM"], "attn_logit_softcapping": null, "bos_token_id": 2, "eos_token_id": 1,
  "final_logit_softcapping": null, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152,
  "intermediate_size": 6912, "max_position_embeddings": 32768, "model_type": "gemma3_text", "num_attention_heads": 4,
  "num_hidden_layers": 26, "num_key_value_heads": 1, "pad_token_id": 0, "query_pre_attn_scalar": 256,
  "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000, "rope_scaling": null, "rope_theta": 1000000,
  "sliding_window": 512, "sliding_window_pattern": 6, "torch_dtype": "bfloat16", "vocab_size": 262144
}"#;

const ALL: [&str; 6] = [GPT2, LLAMA, MISTRAL, QWEN2, GEMMA2, GEMMA3];

fn parse(text: &str) -> Result<DecoderConfig, Error> {
    DecoderConfig::parse("m/config.json", text.as_bytes())
}

fn object(text: &str) -> Map<String, Value> {
    serde_json::from_str(text).unwrap()
}

/// The config with some keys set, or removed by null.
fn with(text: &str, changes: Value) -> String {
    let mut map = object(text);
    for (key, value) in changes.as_object().unwrap() {
        match value {
            Value::Null => drop(map.remove(key)),
            value => drop(map.insert(key.clone(), value.clone())),
        }
    }
    Value::Object(map).to_string()
}

#[test]
fn gpt2_is_read() {
    let config = parse(GPT2).unwrap();
    assert_eq!(config.family, DecoderFamily::Gpt2);
    let sizes = (
        config.hidden_size,
        config.layers,
        config.heads,
        config.kv_heads,
    );
    assert_eq!(sizes, (768, 12, 12, 12));
    let more = (config.head_dim, config.intermediate_size, config.vocab_size);
    assert_eq!(
        more,
        (64, 3072, 50257),
        "the feed-forward layers are four times as wide"
    );
    assert_eq!((config.max_tokens(), config.tied), (1024, true));
    assert_eq!(config.hidden_act, HiddenAct::GeluTanh);
    let tenth = DecoderDropout {
        embedding: 0.1,
        attention: 0.1,
        residual: 0.1,
        classifier: 0.1,
    };
    assert_eq!((config.dropout, config.norm_eps), (tenth, 1e-5));
    assert_eq!(*config.positions(), Positions::Learned);
    assert_eq!(
        (config.bos_token_id, config.pad_token_id),
        (Some(50256), None)
    );
    assert_eq!(config.eos_token_ids, [50256]);
    // The general names mean the same, and both at once must agree.
    assert_eq!(
        parse(&with(GPT2, json!({"n_embd": null, "hidden_size": 768})))
            .unwrap()
            .hidden_size,
        768
    );
    let error = parse(&with(GPT2, json!({"hidden_size": 764})))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("`hidden_size`") && error.contains("`n_embd`"),
        "{error}"
    );
    assert_eq!(
        parse(&with(GPT2, json!({"n_inner": 100})))
            .unwrap()
            .intermediate_size,
        100
    );
}

#[test]
fn llama_is_read() {
    let config = parse(LLAMA).unwrap();
    let sizes = (config.heads, config.kv_heads, config.head_dim, config.tied);
    assert_eq!(sizes, (32, 8, 128, false));
    assert_eq!(config.eos_token_ids, [128001, 128008, 128009]);
    assert_eq!(config.dtype, Some(DType::Bf16));
    let rope = RopeParameters {
        theta: 5e5,
        scaling: RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_positions: 8192,
        },
    };
    let both = Positions::Rotary {
        full: rope,
        sliding: rope,
    };
    assert_eq!(*config.positions(), both);
    // As version 5 spells it.
    let mut parameters = object(LLAMA)["rope_scaling"].clone();
    parameters["rope_theta"] = json!(5e5);
    let five = with(
        LLAMA,
        json!({"rope_scaling": null, "rope_theta": null, "rope_parameters": parameters}),
    );
    assert_eq!(*parse(&five).unwrap().positions(), both);
    // Llama 2: one key head for each query head, and plain angles.
    let two = parse(&with(
        LLAMA,
        json!({"num_key_value_heads": null, "rope_scaling": null, "rope_theta": null}),
    ))
    .unwrap();
    let Positions::Rotary { full, .. } = two.positions() else {
        panic!("rotary");
    };
    assert_eq!(
        (two.kv_heads, full.theta, full.scaling),
        (32, 1e4, RopeScaling::None)
    );
}

#[test]
fn windows_follow_each_familys_pattern() {
    use LayerKind::{Full, Sliding};
    let kinds = |text: &str| {
        let config = parse(text).unwrap();
        let (kinds, window) = config.layer_kinds();
        (kinds.to_vec(), window)
    };
    assert_eq!(kinds(LLAMA), (vec![Full; 32], None));
    assert_eq!(kinds(MISTRAL), (vec![Sliding; 32], Some(4096)));
    let open = MISTRAL.replace("\"sliding_window\": 4096", "\"sliding_window\": null");
    assert_eq!(kinds(&open), (vec![Full; 32], None));
    assert_eq!(
        kinds(QWEN2),
        (vec![Full; 24], None),
        "the window is switched off"
    );
    let (some, window) = kinds(&with(QWEN2, json!({"use_sliding_window": true})));
    assert_eq!(
        (&some[..21], &some[21..], window),
        (&[Full; 21][..], &[Sliding; 3][..], Some(32768))
    );
    let (some, window) = kinds(GEMMA2);
    assert_eq!(
        (&some[..4], window),
        (&[Sliding, Full, Sliding, Full][..], Some(4096))
    );
    let (some, window) = kinds(GEMMA3);
    assert_eq!(
        some[..6],
        [Sliding, Sliding, Sliding, Sliding, Sliding, Full]
    );
    assert_eq!((some[11], window), (Full, Some(512)));
    let stated =
        json!({"num_hidden_layers": 2, "layer_types": ["full_attention", "sliding_attention"]});
    assert_eq!(kinds(&with(GEMMA3, stated)).0, [Full, Sliding]);
}

#[test]
fn gemma_3_has_two_bases() {
    let bases = |text: &str| match parse(text).unwrap().positions() {
        Positions::Rotary { full, sliding } => (*full, *sliding),
        Positions::Learned => panic!("rotary"),
    };
    let plain = |theta| RopeParameters {
        theta,
        scaling: RopeScaling::None,
    };
    assert_eq!(bases(GEMMA3), (plain(1e6), plain(1e4)));
    // Scaling is that of the layers that see everything.
    let scaled = json!({"rope_scaling": {"rope_type": "linear", "factor": 8.0}});
    let (full, sliding) = bases(&with(GEMMA3, scaled));
    assert_eq!(
        (full.scaling, sliding),
        (RopeScaling::Linear { factor: 8.0 }, plain(1e4))
    );
    let five = json!({"rope_theta": null, "rope_local_base_freq": null, "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 2e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 3e4}}});
    assert_eq!(bases(&with(GEMMA3, five)), (plain(2e6), plain(3e4)));
}

#[test]
fn what_is_not_implemented_is_refused_by_key() {
    let cases = [
        (
            GPT2,
            json!({"add_cross_attention": true}),
            "`add_cross_attention`",
        ),
        (
            GPT2,
            json!({"n_head": 7}),
            "`n_head`: found 7 heads for a width of 768",
        ),
        (
            GPT2,
            json!({"activation_function": "mish"}),
            "`activation_function`",
        ),
        (
            LLAMA,
            json!({"hidden_act": "relu"}),
            "`hidden_act`: found \"relu\"",
        ),
        (
            LLAMA,
            json!({"num_key_value_heads": 5}),
            "a divisor of the 32 query heads",
        ),
        (
            LLAMA,
            json!({"head_dim": 7}),
            "`head_dim`: found 7, expected an even number",
        ),
        (
            LLAMA,
            json!({"partial_rotary_factor": 0.5}),
            "`partial_rotary_factor`: found 0.5",
        ),
        (
            LLAMA,
            json!({"quantization_config": {"bits": 4}}),
            "`quantization_config`",
        ),
        (
            LLAMA,
            json!({"rope_scaling": {"rope_type": "longrope"}}),
            "`rope_scaling.rope_type`: found \"longrope\", expected one of default, linear, dynamic, llama3, yarn",
        ),
        (
            LLAMA,
            json!({"rope_scaling": {"type": "linear"}}),
            "`rope_scaling.factor`: found nothing",
        ),
        (
            LLAMA,
            json!({"rope_scaling": {"type": "linear", "factor": -1}}),
            "`rope_scaling.factor`: found -1",
        ),
        (
            LLAMA,
            json!({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}}),
            "`rope_scaling.low_freq_factor`: found 4",
        ),
        (
            LLAMA,
            json!({"rope_parameters": {"rope_type": "default"}}),
            "`rope_scaling`: found an object of 5 keys, expected nothing beside `rope_parameters`",
        ),
        (
            LLAMA,
            json!({"rope_theta": 1.0}),
            "`rope_theta`: found 1.0, expected a number above 1",
        ),
        (
            LLAMA,
            json!({"layer_types": vec!["sliding_attention"; 32]}),
            "`layer_types`",
        ),
        (
            MISTRAL,
            json!({"layer_types": vec!["full_attention"; 32]}),
            "mistral has no other",
        ),
        (
            QWEN2,
            json!({"layer_types": vec!["sliding_attention"; 24]}),
            "`sliding_window`: found no window",
        ),
        (
            QWEN2,
            json!({"layer_types": ["full_attention"]}),
            "`layer_types`: found 1 entries, expected 24 entries",
        ),
        (
            QWEN2,
            json!({"layer_types": vec!["linear_attention"; 24]}),
            "`layer_types`: found \"linear_attention\"",
        ),
        (
            GEMMA2,
            json!({"use_bidirectional_attention": true}),
            "`use_bidirectional_attention`",
        ),
        (
            GEMMA3,
            json!({"attn_logit_softcapping": 50.0}),
            "`attn_logit_softcapping`",
        ),
        (
            GEMMA3,
            json!({"rope_parameters": {"sliding_attention": {"rope_type": "su"}}}),
            "`rope_parameters.sliding_attention.rope_type`: found \"su\"",
        ),
        (
            GEMMA3,
            json!({"intermediate_size": null}),
            "`intermediate_size`: found nothing",
        ),
        (
            GEMMA3,
            json!({"eos_token_id": [1, "x"]}),
            "`eos_token_id`: found \"x\"",
        ),
    ];
    for (text, change, expected) in cases {
        let error = parse(&with(text, change.clone())).unwrap_err();
        let shown = error.to_string();
        assert!(
            shown.starts_with("m/config.json: `") && shown.contains(expected),
            "{change}: {shown}"
        );
    }
}

#[test]
fn unsupported_architectures_are_named_beside_the_supported() {
    let text = r#"{"model_type": "mamba", "hidden_size": 8}"#;
    let error = Config::parse("config.json", text.as_bytes())
        .unwrap_err()
        .to_string();
    assert_eq!(
        error,
        "config.json: `model_type`: found \"mamba\", expected one of bert, roberta, distilbert, gpt2, llama, mistral, \
         qwen2, qwen3, gemma2, gemma3_text; use a model of one of these families"
    );
    let mamba = parse(text).unwrap_err().to_string();
    assert!(
        mamba.contains("found \"mamba\", expected one of gpt2, llama, "),
        "{mamba}"
    );
    let error = ModelConfig::parse("config.json", GPT2.as_bytes())
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("found \"gpt2\", expected an encoder, one of bert"),
        "{error}"
    );
    let bert = with(GPT2, json!({"model_type": "bert"}));
    let error = parse(&bert).unwrap_err().to_string();
    assert!(
        error.contains("found \"bert\", expected a decoder, one of gpt2"),
        "{error}"
    );
}

#[test]
fn what_is_read_is_written_back() {
    for text in ALL {
        let config = parse(text).unwrap();
        assert_eq!(object(&config.to_json()), object(text));
        assert_eq!(parse(&config.to_json()).unwrap(), config);
    }
}

#[test]
fn what_is_changed_is_written() {
    let mut config = parse(GPT2).unwrap();
    config
        .set_classification(Labels::numbered(3), ProblemType::SingleLabel)
        .unwrap();
    config.dropout.residual = 0.25;
    config.pad_token_id = Some(50256);
    config.vocab_size = 50258;
    config.intermediate_size = 1000;
    config.dtype = Some(DType::F32);
    let saved = object(&config.to_json());
    assert_eq!(
        saved["architectures"],
        json!(["GPT2ForSequenceClassification"])
    );
    assert_eq!(saved["id2label"]["2"], "LABEL_2");
    assert_eq!(saved["problem_type"], "single_label_classification");
    let numbers = (
        &saved["resid_pdrop"],
        &saved["embd_pdrop"],
        &saved["pad_token_id"],
    );
    assert_eq!(numbers, (&json!(0.25), &json!(0.1), &json!(50256)));
    assert_eq!(
        (&saved["vocab_size"], &saved["n_inner"]),
        (&json!(50258), &json!(1000))
    );
    assert_eq!(saved["torch_dtype"], "float32");
    assert_eq!(
        saved["task_specific_params"],
        object(GPT2)["task_specific_params"]
    );
    let mut again = parse(&config.to_json()).unwrap();
    again.raw = config.raw.clone();
    assert_eq!(again, config);
    // And back to a language model.
    config.set_causal();
    let saved = object(&config.to_json());
    assert_eq!(saved["architectures"], json!(["GPT2LMHeadModel"]));
    assert!(!saved.contains_key("id2label") && !saved.contains_key("problem_type"));
}

#[test]
fn decoders_label_tokens_where_transformers_has_a_class_for_it() {
    let mut config = parse(GPT2).unwrap();
    let labels = || Labels::numbered(3);
    config
        .set_classification(labels(), ProblemType::Tokens)
        .unwrap();
    let saved = object(&config.to_json());
    assert_eq!(
        saved["architectures"],
        json!(["GPT2ForTokenClassification"])
    );
    let again = parse(&config.to_json()).unwrap();
    assert_eq!(again.head.problem(), ProblemType::Tokens);
    let dropout = with(GPT2, json!({"classifier_dropout": 0.3}));
    assert_eq!(parse(&dropout).unwrap().dropout.classifier, 0.3);
    let mut gemma = parse(GEMMA3).unwrap();
    let error = gemma
        .set_classification(labels(), ProblemType::Tokens)
        .unwrap_err()
        .to_string();
    assert!(error.contains("gemma3_text"), "{error}");
    let other = with(LLAMA, json!({"token_classification_bias": false}));
    let error = parse(&other).unwrap_err().to_string();
    assert!(error.contains("token_classification_bias"), "{error}");
}

#[test]
fn a_config_that_names_no_class_stays_as_it_is() {
    for value in [json!(null), json!([])] {
        let mut map = object(LLAMA);
        map.insert("architectures".into(), value.clone());
        let config = parse(&Value::Object(map).to_string()).unwrap();
        assert_eq!(object(&config.to_json())["architectures"], value);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn arbitrary_values_never_panic(
        which in 0..ALL.len(),
        key in any::<prop::sample::Index>(),
        value in prop::sample::select(vec![
            "null", "true", "-1", "0", "1", "3", "1.5", "1e300", "18446744073709551615", "\"x\"", "[]", "{}", "[1]",
            "{\"0\":\"a\"}", "\"relu\"", "{\"rope_type\":\"yarn\"}", "{\"rope_type\":\"yarn\",\"factor\":1e11}",
            "{\"type\":\"linear\",\"factor\":1e-300}", "{\"full_attention\":3}", "[\"full_attention\"]",
        ]),
    ) {
        let mut map = object(ALL[which]);
        let mut keys: Vec<String> = map.keys().cloned().collect();
        let more = ["rope_parameters", "rope_scaling", "layer_types", "head_dim", "n_inner", "original_max_position_embeddings"];
        keys.extend(more.map(str::to_owned));
        map.insert(keys[key.index(keys.len())].clone(), serde_json::from_str(value).unwrap());
        if let Ok(config) = parse(&Value::Object(map).to_string()) {
            // What was accepted can be used, saved and read again.
            if let Positions::Rotary { full, sliding } = config.positions() {
                for rope in [full, sliding] {
                    prop_assert_eq!(rope.frequencies(config.head_dim).len(), config.head_dim / 2);
                }
            }
            prop_assert!(config.max_tokens() > 0);
            prop_assert_eq!(parse(&config.to_json()).unwrap(), config);
        }
    }
}
