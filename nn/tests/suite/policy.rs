use graft_nn::{Error, FreezePolicy, Init, Parameters, Rule, TrainableSet};
use graft_tensor::{DType, Memory};

/// The parameters of a BERT with twelve layers and a classification head, small but for the names.
fn bert() -> Parameters {
    let mut p = Parameters::new(&Memory::cpu(), DType::F32);
    let mut declare = |name: String, shape: &[usize]| {
        p.declare(&name, shape, Init::Zeros).unwrap();
    };
    for table in ["word", "position", "token_type"] {
        declare(
            format!("bert.embeddings.{table}_embeddings.weight"),
            &[9, 4],
        );
    }
    let norm =
        |at: &str| ["weight", "bias"].map(|kind| (format!("{at}.LayerNorm.{kind}"), vec![4]));
    for (name, shape) in norm("bert.embeddings") {
        declare(name, &shape);
    }
    for layer in 0..12 {
        let at = format!("bert.encoder.layer.{layer}");
        let linears = [
            ("attention.self.query", [4, 4]),
            ("attention.self.key", [4, 4]),
            ("attention.self.value", [4, 4]),
            ("attention.output.dense", [4, 4]),
            ("intermediate.dense", [8, 4]),
            ("output.dense", [4, 8]),
        ];
        for (name, shape) in linears {
            declare(format!("{at}.{name}.weight"), &shape);
            declare(format!("{at}.{name}.bias"), &shape[..1]);
        }
        for part in ["attention.output", "output"] {
            for (name, shape) in norm(&format!("{at}.{part}")) {
                declare(name, &shape);
            }
        }
    }
    declare("bert.pooler.dense.weight".into(), &[4, 4]);
    declare("bert.pooler.dense.bias".into(), &[4]);
    declare("classifier.weight".into(), &[3, 4]);
    declare("classifier.bias".into(), &[3]);
    p
}

fn policy(rules: &[&str]) -> FreezePolicy {
    let rules = rules.iter().map(|rule| rule.parse().unwrap()).collect();
    FreezePolicy { rules }
}

/// Names that a policy leaves trainable.
fn trained(p: &Parameters, rules: &[&str]) -> Vec<String> {
    let set = policy(rules).resolve(p).unwrap();
    let names: Vec<String> = set.ids().map(|id| p.get(id).name().to_owned()).collect();
    assert_eq!(set.len(), names.len());
    for (id, one) in p.iter() {
        assert_eq!(
            set.contains(id),
            names.iter().any(|name| name == one.name())
        );
    }
    names
}

#[test]
fn everything_without_rules() {
    let p = bert();
    assert_eq!(p.len(), 5 + 12 * 16 + 4);
    assert_eq!(trained(&p, &[]).len(), p.len());
    let set = policy(&[]).resolve(&p).unwrap();
    assert_eq!(set.count(&p), p.count());
    let none = TrainableSet::none(&p);
    assert!(none.is_empty() && none.count(&p) == 0);
}

#[test]
fn the_head_alone() {
    let p = bert();
    let head = ["classifier.weight", "classifier.bias"];
    assert_eq!(trained(&p, &["freeze bert.*"]), head);
    assert_eq!(trained(&p, &["freeze *", "train classifier.*"]), head);
    assert_eq!(
        policy(&["freeze bert.*"]).resolve(&p).unwrap().count(&p),
        15
    );
}

#[test]
fn the_last_layers() {
    let p = bert();
    let names = trained(
        &p,
        &[
            "freeze bert.*",
            "train bert.encoder.layer.1?.*",
            "train bert.pooler.*",
        ],
    );
    assert_eq!(names.len(), 2 * 16 + 4);
    let allowed = [
        "bert.encoder.layer.10.",
        "bert.encoder.layer.11.",
        "bert.pooler.",
        "classifier.",
    ];
    assert!(
        names
            .iter()
            .all(|name| allowed.iter().any(|a| name.starts_with(a))),
        "{names:?}"
    );
    let one = trained(&p, &["freeze *", "train bert.encoder.layer.1.*"]);
    assert_eq!(one.len(), 16, "layer 1 is neither 10 nor 11");
}

#[test]
fn biases_norms_and_exceptions() {
    let p = bert();
    // BitFit: 6 linears and 2 norms of each layer, one norm before, pooler and head.
    let biases = trained(&p, &["freeze *", "train *.bias"]);
    assert_eq!(biases.len(), 12 * 8 + 1 + 2);
    assert!(biases.iter().all(|name| name.ends_with(".bias")));
    let norms = trained(&p, &["freeze *", "train *LayerNorm*"]);
    assert_eq!(norms.len(), 2 * (1 + 12 * 2));
    let rules = [
        "freeze bert.embeddings.*",
        "train *LayerNorm.weight",
        "freeze *.layer.0.*",
    ];
    let names = trained(&p, &rules);
    assert_eq!(names.len(), p.len() - 5 + 1 - 16, "in this order");
    assert!(names.contains(&"bert.embeddings.LayerNorm.weight".to_owned()));
}

#[test]
fn rules_without_effect_are_mistakes() {
    let p = bert();
    assert_eq!(
        policy(&["freeze bert.encoder.layer.12.*"])
            .resolve(&p)
            .unwrap_err()
            .to_string(),
        "the rule \"freeze bert.encoder.layer.12.*\" matches no parameter; the nearest name is \
         bert.encoder.layer.1.attention.self.query.weight; `trainer inspect` lists their names"
    );
    assert_eq!(
        policy(&["freeze *"]).resolve(&p).unwrap_err(),
        Error::NothingTrainable
    );
    for text in ["", "freeze", "train a b", "Freeze *", "melt *"] {
        let error = text.parse::<Rule>().unwrap_err().to_string();
        let want = "is not understood; write \"freeze GLOB\" or \"train GLOB\"";
        assert_eq!(error, format!("the rule \"{text}\" {want}"));
    }
    let rule: Rule = "  train   *.bias ".parse().unwrap();
    assert_eq!(
        (rule.to_string().as_str(), &rule),
        ("train *.bias", &Rule::train("*.bias"))
    );
}
