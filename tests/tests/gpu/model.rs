//! The fixtures' models on any device, and steps of them.

use graft_autograd::Gradients;
use graft_models::{
    Adaptable, CausalLm, Checkpoint, Classifier, DecoderConfig, ModelConfig, ModelSource, Strategy,
    TokenBatch, load_parameters,
};
use graft_nn::adapters::{DEFAULT, finish, rules};
use graft_nn::optimizer::{Rule, SentStep};
use graft_nn::{Forward, FreezePolicy, Optimizer, Parameters, TrainableSet, losses};
use graft_tensor::ops::loss::IGNORE;
use graft_tensor::{DType, Device, Item, Memory, Tensor};
use graft_tests::{ENCODERS, batch, decoder_batch, fixture, tensors};
use graft_trainer::adapter::put;
use graft_trainer::config::{AdapterKind, AdapterSettings};

/// The GPU, opened for one test alone.
pub fn gpu() -> Memory {
    Memory::of(Device::Cuda(0)).expect("these tests need a GPU")
}

pub enum Network {
    Encoder(Classifier),
    Decoder(CausalLm),
}

/// What of a model is trained.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Trained {
    Full,
    /// The last layer, and the head
    Last,
    Lora,
}

pub struct Model {
    pub parameters: Parameters,
    pub network: Network,
    pub set: TrainableSet,
    batch: TokenBatch,
    targets: Vec<i64>,
}

pub fn load(name: &'static str, memory: &Memory, compute: DType, trained: Trained) -> Model {
    load_dropping(name, memory, compute, trained, 0.0)
}

/// The same with dropout everywhere, of which the fixtures themselves have none.
pub fn load_dropping(
    name: &'static str,
    memory: &Memory,
    compute: DType,
    trained: Trained,
    dropout: f64,
) -> Model {
    let dir = fixture(name);
    let expected = tensors(&dir.join("expected.safetensors"));
    let source = ModelSource::directory(&dir).unwrap();
    let mut parameters = Parameters::new(memory, DType::F32);
    let mut checkpoint = Checkpoint::open(&dir).unwrap();
    let p = &mut parameters;
    let (network, set, (batch, targets)) = if ENCODERS.contains(&name) {
        let mut config = ModelConfig::load(&source).unwrap();
        config.dropout.hidden = dropout;
        config.dropout.attention = dropout;
        let classifier = Classifier::new(p, &config).unwrap();
        load_parameters(p, &config, &mut checkpoint, None).unwrap();
        let set = resolve(p, &config, trained, |s| classifier.policy(s).unwrap());
        (Network::Encoder(classifier), set, batch(&expected))
    } else {
        let mut config = DecoderConfig::load(&source).unwrap();
        config.dropout.embedding = dropout;
        config.dropout.residual = dropout;
        config.dropout.attention = dropout;
        let lm = CausalLm::new(p, &config).unwrap();
        load_parameters(p, &config, &mut checkpoint, None).unwrap();
        let set = resolve(p, &config, trained, |s| lm.policy(s).unwrap());
        (Network::Decoder(lm), set, decoder_batch(&expected))
    };
    parameters.compute_in(compute).unwrap();
    Model {
        parameters,
        network,
        set,
        batch,
        targets,
    }
}

fn resolve(
    p: &mut Parameters,
    config: &impl Adaptable,
    trained: Trained,
    policy: impl Fn(Strategy) -> FreezePolicy,
) -> TrainableSet {
    let policy = match trained {
        Trained::Full => FreezePolicy::default(),
        Trained::Last => policy(Strategy::Last(1)),
        Trained::Lora => {
            let kind = AdapterKind::Lora;
            put(p, config, kind, &AdapterSettings::usual(kind)).unwrap();
            p.initialise(0).unwrap();
            finish(p, DEFAULT, 0).unwrap();
            let rules = rules(p, DEFAULT);
            FreezePolicy { rules }
        }
    };
    policy.resolve(p).unwrap()
}

impl Model {
    pub fn logits(&self) -> Vec<f64> {
        let mut f = Forward::evaluate(&self.parameters);
        let logits = match &self.network {
            Network::Encoder(classifier) => classifier.forward(&mut f, &self.batch).unwrap(),
            Network::Decoder(lm) => lm.forward(&mut f, &self.batch).unwrap(),
        };
        logits.value().to_f64().unwrap()
    }

    /// Loss and gradients; the loss of a plan is 0.
    pub fn gradients(&self, number: u64) -> (f64, Gradients) {
        self.gradients_of(&self.set, number)
    }

    pub fn gradients_of(&self, set: &TrainableSet, number: u64) -> (f64, Gradients) {
        let mut gradients = Gradients::new();
        let loss = self.add_gradients(set, number, &mut gradients);
        (loss, gradients)
    }

    /// Adds those of another pass to gradients.
    pub fn add_gradients(&self, set: &TrainableSet, number: u64, gradients: &mut Gradients) -> f64 {
        let loss = self.pass(set, number, gradients);
        match loss.is_planned() {
            true => 0.0,
            false => loss.item().unwrap(),
        }
    }

    /// The same; the loss is not looked at.
    fn pass(&self, set: &TrainableSet, number: u64, gradients: &mut Gradients) -> Tensor {
        let mut f = Forward::train(&self.parameters, set, 0, number);
        let loss = match &self.network {
            Network::Encoder(classifier) => {
                let logits = classifier.forward(&mut f, &self.batch).unwrap();
                let rows = self.targets.len();
                let targets = Tensor::from_slice(f.memory(), &self.targets, &[rows]).unwrap();
                let targets = f.input(targets);
                losses::cross_entropy(&mut f, &logits, &targets, 0.0, rows as f64).unwrap()
            }
            Network::Decoder(lm) => {
                let sum = lm.loss(&mut f, &self.batch, &self.targets).unwrap();
                let supervised = self.targets.iter().filter(|t| **t != IGNORE).count();
                f.tape.scale(&sum, 1.0 / supervised as f64).unwrap()
            }
        };
        let value = loss.value().clone();
        f.backward(loss, gradients).unwrap();
        value
    }

    /// One step of AdamW; the loss before it, and the norm of its gradients.
    pub fn step(&mut self, optimizer: &mut Optimizer, lr: f64, number: u64) -> (f64, f64) {
        let (loss, mut gradients) = self.gradients(number);
        let (p, set) = (&mut self.parameters, &self.set);
        let done = optimizer.step(p, set, &mut gradients, lr, None).unwrap();
        (loss, done.gradient_norm)
    }

    /// The same without waiting for it, as the trainer sends steps.
    pub fn send(&mut self, optimizer: &mut Optimizer, lr: f64, number: u64) -> (Item, SentStep) {
        let mut gradients = Gradients::new();
        let loss = self.pass(&self.set, number, &mut gradients);
        let loss = loss.item_later().unwrap();
        let (p, set) = (&mut self.parameters, &self.set);
        let sent = optimizer.send(p, set, &mut gradients, lr, None).unwrap();
        p.memory().submit().unwrap();
        (loss, sent)
    }

    /// What [`Model::step`] gives of a step that was sent.
    pub fn settle(&self, optimizer: &mut Optimizer, (loss, sent): (Item, SentStep)) -> (f64, f64) {
        let loss = loss.wait().unwrap();
        let done = optimizer.settle(&self.parameters, &self.set, sent).unwrap();
        (loss, done.gradient_norm)
    }

    /// Ten steps of AdamW; loss and gradient norm before each.
    pub fn train(
        &mut self,
        lr: f64,
        decay: f64,
        number: impl Fn(u64) -> u64,
    ) -> (Vec<f64>, Vec<f64>) {
        let mut optimizer = Optimizer::new(Rule::adamw(), decay, true).unwrap();
        (0..10)
            .map(|step| self.step(&mut optimizer, lr, number(step)))
            .unzip()
    }
}
