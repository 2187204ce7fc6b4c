//! Tests of reading and writing `adapter_config.json`.

use super::*;

const SIZES: FrontSizes = FrontSizes {
    words: "words",
    keys: "key",
    layers: 2,
    heads: 4,
    hidden: 40,
    key_heads: 2,
    key_width: 20,
};

fn parse(text: &str) -> Result<StoredAdapter> {
    StoredAdapter::parse("adapter_config.json", text.as_bytes())
}

#[test]
fn what_is_written_reads_as_itself() {
    let lora = AdapterConfig {
        method: Method::LowRank(LowRankConfig {
            rank: 4,
            alpha: 2.5,
            rank_stabilised: true,
            magnitude: true,
            dropout: 0.1,
            rank_pattern: vec![("layer.1.query".into(), 2)],
            alpha_pattern: vec![("value".into(), 3.0)],
            init: LowRankInit::Gaussian,
        }),
        targets: Targets::Names(vec!["query".into(), "value".into()]),
        exclude: vec!["layer.0.value".into()],
        layers: Some(vec![0, 1]),
        layers_pattern: vec!["layer".into()],
        modules_to_save: vec!["classifier".into()],
        bias: Bias::Adapted,
    };
    let ia3 = AdapterConfig {
        method: Method::Ia3 {
            feedforward: vec!["output.dense".into()],
        },
        targets: Targets::Names(vec!["key".into(), "output.dense".into()]),
        exclude: Vec::new(),
        layers: None,
        layers_pattern: Vec::new(),
        modules_to_save: Vec::new(),
        bias: Bias::None,
    };
    let bottleneck = AdapterConfig {
        method: Method::Bottleneck { size: 24 },
        targets: Targets::Names(vec!["output.dense".into()]),
        layers: Some(vec![1]),
        ..ia3.clone()
    };
    let regex = AdapterConfig {
        targets: Targets::Regex(r".*\.query".into()),
        ..lora.clone()
    };
    let front = |method: Method| AdapterConfig {
        method,
        targets: Targets::Names(Vec::new()),
        ..ia3.clone()
    };
    let prompt = front(Method::Prompt { tokens: 5 });
    let prefix = front(Method::Prefix {
        tokens: 3,
        width: 20,
        projection: None,
    });
    for config in [lora, ia3, bottleneck, regex, prompt, prefix] {
        let stored = StoredAdapter {
            config,
            base: Some("org/model".into()),
            task_type: Some("SEQ_CLS".into()),
        };
        let text = stored.to_json([&[], &[]], false, &SIZES);
        assert_eq!(parse(&text).unwrap(), stored, "{text}");
    }
}

#[test]
fn names_stand_for_all_linear_layers() {
    let stored = parse(
        r#"{"peft_type": "IA3", "target_modules": "all-linear", "feedforward_modules": ["b"]}"#,
    );
    let stored = stored.unwrap();
    assert_eq!(stored.config.targets, Targets::AllLinear);
    let full = ["m.a".to_owned(), "m.b".to_owned()];
    let text = stored.to_json([&full, &full[1..]], true, &SIZES);
    let again = parse(&text).unwrap();
    assert_eq!(again.config.targets, Targets::Names(full.to_vec()));
    let feedforward = full[1..].to_vec();
    assert_eq!(again.config.method, Method::Ia3 { feedforward });
    assert!(text.contains("\"fan_in_fan_out\": true"));
}

#[test]
fn what_would_compute_something_else_is_refused() {
    for (more, said) in [
        (
            r#""peft_type": "LOHA""#,
            "`peft_type`: found \"LOHA\", expected \"LORA\", \"IA3\", \"PROMPT_TUNING\" or \"PREFIX_TUNING\"",
        ),
        (
            r#""peft_type": "GRAFT_BOTTLENECK", "activation": "swish", "bottleneck_size": 4"#,
            "`activation`: found \"swish\", expected \"gelu\"",
        ),
        (
            r#""peft_type": "GRAFT_BOTTLENECK", "activation": "gelu""#,
            "`bottleneck_size`: found nothing",
        ),
        (
            r#""peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4"#,
            "`token_dim`: found nothing",
        ),
        (
            r#""peft_type": "PROMPT_TUNING""#,
            "`num_virtual_tokens`: found nothing",
        ),
        (
            r#""peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4, "num_transformer_submodules": 2"#,
            "`num_transformer_submodules`: found 2, expected 1",
        ),
        (
            r#""peft_type": "LORA", "use_qalora": true"#,
            "`use_qalora`: found true",
        ),
        (
            r#""peft_type": "LORA", "lora_bias": true"#,
            "`lora_bias`: found true",
        ),
        (
            r#""peft_type": "LORA", "tomorrow": {"a": 1}"#,
            "`tomorrow`: found an object",
        ),
        (
            r#""peft_type": "LORA", "r": -1"#,
            "`r`: found -1, expected a whole number",
        ),
        (
            r#""peft_type": "LORA", "bias": "some""#,
            "`bias`: found \"some\"",
        ),
        (
            r#""peft_type": "LORA", "init_lora_weights": "pissa""#,
            "such a beginning changes the base",
        ),
        (
            r#""peft_type": "LORA", "rank_pattern": {"q": 1.5}"#,
            "`rank_pattern`",
        ),
        (
            r#""peft_type": "LORA", "modules_to_save": "classifier""#,
            "expected a list of names",
        ),
        (
            r#""peft_type": "LORA", "exclude_modules": ".*""#,
            "expected a list of names",
        ),
    ] {
        let error = parse(&format!("{{\"target_modules\": [\"q\"], {more}}}")).unwrap_err();
        assert!(error.to_string().contains(said), "{error}");
    }
    let error = parse(r#"{"peft_type": "LORA"}"#).unwrap_err().to_string();
    assert!(error.contains("`target_modules`: found nothing"), "{error}");
    // Values that switch a feature off are no obstacle.
    let off = r#"{"peft_type": "LORA", "target_modules": ["q"], "x": null, "y": false, "z": {}, "w": []}"#;
    parse(off).unwrap();
}
