//! What is trained of a model with adapters, at what price, and what is refused.

use super::*;

fn two_layers(memory: &Memory, dtype: DType) -> (Parameters, [Linear; 2]) {
    let mut p = Parameters::new(memory, dtype);
    let layers = [
        Linear::new(&mut p, "trunk.query", 24, 24, 0.1).unwrap(),
        Linear::new(&mut p, "classifier", 24, 3, 0.1).unwrap(),
    ];
    (p, layers)
}

fn with_head(method: Method) -> AdapterConfig {
    AdapterConfig {
        modules_to_save: vec!["classifier".into()],
        ..config(method)
    }
}

fn trained(p: &Parameters) -> TrainableSet {
    let rules = rules(p, DEFAULT);
    FreezePolicy { rules }.resolve(p).unwrap()
}

#[test]
fn the_adapter_and_what_it_keeps_are_trained_and_nothing_else() {
    let names = |config: &AdapterConfig| {
        let (mut p, _) = two_layers(&Memory::cpu(), DType::F32);
        attach(&mut p, DEFAULT, config, Modules::InPlace).unwrap();
        let set = trained(&p);
        let names = set.ids().map(|id| p.get(id).name().to_owned());
        names.collect::<Vec<_>>()
    };
    let lora = with_head(Method::LowRank(low_rank(2)));
    let head = ["classifier.weight", "classifier.bias"];
    let matrices = [
        "trunk.query.lora_A.default.weight",
        "trunk.query.lora_B.default.weight",
    ];
    assert_eq!(names(&lora), [head, matrices].concat());
    let all = AdapterConfig {
        bias: Bias::All,
        ..lora.clone()
    };
    let bias = ["trunk.query.bias"];
    assert_eq!(names(&all), [&bias[..], &head, &matrices].concat());
    let adapted = AdapterConfig {
        bias: Bias::Adapted,
        ..lora
    };
    assert_eq!(names(&adapted), names(&all));
    let ia3 = with_head(Method::Ia3 {
        feedforward: vec![],
    });
    let vector = ["trunk.query.ia3_l.default"];
    assert_eq!(names(&ia3), [&head[..], &vector].concat());
    let small = ["down", "up"].map(|which| {
        ["weight", "bias"].map(|last| format!("trunk.query.adapter_{which}.default.{last}"))
    });
    let bottleneck = with_head(Method::Bottleneck { size: 3 });
    let expected = head.map(str::to_owned).into_iter();
    let expected = expected.chain(small.concat());
    assert_eq!(names(&bottleneck), expected.collect::<Vec<_>>());
}

/// Gradients and the optimizer's state exist for what is trained alone: 4 bytes of gradient and exactly 8 of AdamW's
/// state for each number.
#[test]
fn a_trained_number_costs_eight_bytes_of_state_and_a_frozen_one_nothing() {
    let usage = |memory: Memory| {
        let (mut p, [query, head]) = two_layers(&memory, DType::F32);
        let config = with_head(Method::LowRank(LowRankConfig {
            dropout: 0.1,
            ..low_rank(2)
        }));
        attach(&mut p, DEFAULT, &config, Modules::InPlace).unwrap();
        p.initialise(1).unwrap();
        finish(&mut p, DEFAULT, 1).unwrap();
        let set = trained(&p);
        let count = set.count(&p);
        assert_eq!(count, 2 * 24 + 24 * 2 + 3 * 24 + 3);
        let mut optimizer = Optimizer::new(Update::adamw(), 0.1, true).unwrap();
        for step in 0..2 {
            let mut f = Forward::train(&p, &set, 0, step);
            let x = f.input(Tensor::full(&memory, DType::F32, &[5, 24], 1.0).unwrap());
            let y = query.activated(&mut f, &x, Activation::Gelu).unwrap();
            let y = head.forward(&mut f, &y).unwrap();
            let loss = f.tape.sum_all(&y).unwrap();
            drop((x, y));
            let mut found = Gradients::new();
            f.backward(loss, &mut found).unwrap();
            assert_eq!(memory.usage().live(Category::Gradients), 4 * count);
            optimizer
                .step(&mut p, &set, &mut found, 0.1, Some(1.0))
                .unwrap();
            assert_eq!(optimizer.state_bytes(), 8 * count);
            assert_eq!(memory.usage().live(Category::Optimizer), 8 * count);
        }
        memory.usage()
    };
    assert_eq!(usage(Memory::cpu()), usage(Memory::planned()));
}

/// The adapter's gradients are those of the run that trains everything.
#[test]
fn a_frozen_base_leaves_the_adapter_s_gradients_as_they_are() {
    let memory = Memory::cpu();
    let (mut p, [query, head]) = two_layers(&memory, DType::F32);
    let method = LowRankConfig {
        dropout: 0.2,
        ..low_rank(2)
    };
    let config = with_head(Method::LowRank(method));
    attach(&mut p, DEFAULT, &config, Modules::InPlace).unwrap();
    let all: Vec<_> = p.iter().map(|(id, one)| (id, *one.shape())).collect();
    for (id, shape) in all {
        p.set(id, tensor(&values(id.key() as u64, &shape))).unwrap();
    }
    let run = |set: &TrainableSet| {
        let mut f = Forward::train(&p, set, 4, 2);
        let x = f.input(Tensor::full(&memory, DType::F32, &[5, 24], 0.7).unwrap());
        let y = query.activated(&mut f, &x, Activation::Gelu).unwrap();
        let y = head.forward(&mut f, &y).unwrap();
        let loss = f.tape.sum_all(&y).unwrap();
        let mut found = Gradients::new();
        f.backward(loss, &mut found).unwrap();
        found
    };
    let set = trained(&p);
    let (some, full) = (run(&set), run(&everything(&p)));
    assert_eq!((some.len(), full.len()), (set.len(), p.len()));
    for (key, gradient) in some.iter() {
        let same = full.get(key).unwrap().to_f64().unwrap();
        assert_eq!(gradient.to_f64().unwrap(), same);
    }
}

/// Dropout is in the adapter's path alone, in training, and where the adapter is trained.
#[test]
fn dropout_acts_on_what_the_adapter_sees() {
    let memory = Memory::cpu();
    let (mut p, [query, _]) = two_layers(&memory, DType::F64);
    let method = LowRankConfig {
        dropout: 0.5,
        ..low_rank(2)
    };
    let config = with_head(Method::LowRank(method));
    attach(&mut p, DEFAULT, &config, Modules::InPlace).unwrap();
    fill(&mut p, 3);
    let x = tensor(&values(1, &[6, 24]));
    let run = |mut f: Forward| {
        let x = f.input(x.clone());
        array(query.forward(&mut f, &x).unwrap().value())
    };
    let still = run(Forward::evaluate(&p));
    let set = trained(&p);
    let moving = run(Forward::train(&p, &set, 1, 1));
    assert_ne!(moving, still);
    assert_eq!(run(Forward::train(&p, &set, 1, 1)), moving);
    let head = FreezePolicy {
        rules: vec![Rule::freeze("*"), Rule::train("classifier.*")],
    };
    let head = head.resolve(&p).unwrap();
    assert_eq!(run(Forward::train(&p, &head, 1, 1)), still);
    // Without the adapter's own product nothing is dropped.
    let b = p.find("trunk.query.lora_B.default.weight").unwrap();
    p.set(b, tensor(&ArrayD::zeros(IxDyn(&[24, 2])))).unwrap();
    let run = |mut f: Forward| {
        let x = f.input(x.clone());
        array(query.forward(&mut f, &x).unwrap().value())
    };
    near(
        &run(Forward::train(&p, &set, 1, 1)),
        &run(Forward::evaluate(&p)),
        1e-12,
    );
}

#[test]
fn several_adapters_lie_beside_one_base() {
    let (mut p, [query, head]) = two_layers(&Memory::cpu(), DType::F64);
    let lora = with_head(Method::LowRank(low_rank(2)));
    let ia3 = with_head(Method::Ia3 {
        feedforward: vec![],
    });
    // The second one's head knows five labels.
    let shape = |labels: usize| {
        move |name: &str| match name {
            "classifier.weight" => Some(vec![labels, 24]),
            "classifier.bias" => Some(vec![labels]),
            _ => None,
        }
    };
    attach(&mut p, "one", &lora, Modules::Copies(&shape(3))).unwrap();
    attach(&mut p, "two", &ia3, Modules::Copies(&shape(5))).unwrap();
    fill(&mut p, 3);
    let x = tensor(&values(1, &[4, 24]));
    let run = |p: &Parameters| {
        let mut f = Forward::evaluate(p);
        let x = f.input(x.clone());
        let y = query.forward(&mut f, &x).unwrap();
        array(head.forward(&mut f, &y).unwrap().value())
    };
    assert_eq!(p.adapters().active().unwrap().name(), "two");
    let two = run(&p);
    assert_eq!(two.shape(), [4, 5]);
    p.adapters_mut().activate(Some("one")).unwrap();
    let one = run(&p);
    assert_eq!(one.shape(), [4, 3]);
    p.adapters_mut().activate(None).unwrap();
    let none = run(&p);
    assert_ne!(none, one);
    p.adapters_mut().activate(Some("two")).unwrap();
    assert_eq!(run(&p), two);
    let error = p.adapters_mut().activate(Some("tow")).unwrap_err();
    assert_eq!(
        error.to_string(),
        "no adapter is called tow; the nearest is two"
    );
    adapters::merge(&mut p).unwrap();
    near(&run(&p), &two, 1e-12);
    for (id, parameter) in p.iter() {
        let anchor = p.get(p.adapters().anchor(id)).name();
        assert!(
            parameter
                .name()
                .starts_with(anchor.rsplit_once('.').unwrap().0)
        );
    }
}

#[test]
fn adapters_that_cannot_be_are_refused() {
    let refused = |config: &AdapterConfig, name: &str| {
        let (mut p, _) = two_layers(&Memory::cpu(), DType::F32);
        Embedding::new(&mut p, "words", 7, 24, 0.1).unwrap();
        graft_nn::layers::LayerNorm::new(&mut p, "trunk.norm", 24, 1e-5).unwrap();
        let before = p.len();
        let error = attach(&mut p, name, config, Modules::InPlace).unwrap_err();
        assert_eq!(p.adapters().sets().count(), 0);
        assert!(p.len() <= before + 2);
        error.to_string()
    };
    let names = |list: &[&str], method: Method| AdapterConfig {
        targets: Targets::Names(list.iter().map(|s| (*s).to_owned()).collect()),
        ..config(method)
    };
    let lora = |change: fn(&mut LowRankConfig)| {
        let mut c = low_rank(2);
        change(&mut c);
        Method::LowRank(c)
    };
    let plain = |_: &mut LowRankConfig| {};
    for (config, said) in [
        (
            names(&["qeury"], lora(plain)),
            "no layer's name ends in the target qeury; the nearest name is trunk.query",
        ),
        (
            names(&["norm"], lora(plain)),
            "trunk.norm cannot have an adapter: it is neither a linear layer nor an embedding",
        ),
        (
            names(&["words"], lora(|c| c.magnitude = true)),
            "words cannot have an adapter: it is an embedding, and DoRA is for linear layers",
        ),
        (
            names(
                &["words"],
                Method::Ia3 {
                    feedforward: vec![],
                },
            ),
            "words cannot have an adapter: it is an embedding, and IA3 scales linear layers",
        ),
        (
            names(&["query"], lora(|c| c.rank = 0)),
            "trunk.query: a rank of 0; it must be 1 to 1048576",
        ),
        (
            names(&["query"], lora(|c| c.dropout = 1.0)),
            "trunk.query: a dropout of 1; it must be in [0, 1)",
        ),
        (
            names(
                &["query"],
                lora(|c| {
                    c.rank = 3;
                    c.init = LowRankInit::Orthogonal;
                }),
            ),
            "trunk.query: an odd rank of 3; orthogonal matrices need an even one",
        ),
        (
            names(
                &["classifier"],
                lora(|c| {
                    c.rank = 4;
                    c.init = LowRankInit::Pissa;
                }),
            ),
            "classifier: a rank of 4, but it has 3 singular vectors; take a smaller rank",
        ),
        (
            AdapterConfig {
                targets: Targets::Regex("nothing".into()),
                ..config(lora(plain))
            },
            "no layer is a target of the adapter; name targets that the model has",
        ),
        (
            AdapterConfig {
                modules_to_save: vec!["score".into()],
                ..config(lora(plain))
            },
            "no module's name ends in score, which is to be kept; the nearest name is",
        ),
    ] {
        let found = refused(&config, DEFAULT);
        assert!(found.starts_with(said), "{found}");
    }
    let dotted = refused(&config(lora(plain)), "a.b");
    assert!(
        dotted.starts_with("an adapter cannot be called \"a.b\""),
        "{dotted}"
    );
    let (mut p, _) = two_layers(&Memory::cpu(), DType::F32);
    let config = config(lora(plain));
    attach(&mut p, "one", &config, Modules::InPlace).unwrap();
    let error = attach(&mut p, "one", &config, Modules::InPlace).unwrap_err();
    assert!(error.to_string().starts_with("two adapters are called one"));
    let adapter = p.adapters().of(p.find("trunk.query.weight").unwrap());
    assert!(matches!(adapter, Some(Adapter::LowRank(_))));
}
