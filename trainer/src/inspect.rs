//! What a model holds, and what a strategy would train of it.

use std::fmt::Write as _;

use graft_models::adapter::ADAPTER_WEIGHTS_FILE;
use graft_models::{
    CausalLm, Classifier, Config, DecoderClassifier, Labels, MaskedConfig, MaskedLm, ModelSource,
    ProblemType, SafetensorsFile,
};
use graft_nn::adapters::Method;
use graft_nn::{Parameters, Rates, TrainableSet};
use graft_tensor::{DType, Memory};

use crate::adapter::{self, AdapterDir};
use crate::config::{
    AdapterSettings, OptimizerConfig, OptimizerKind, Rule, Strategy, StrategyConfig,
};
use crate::course::{policy, rates};
use crate::error::{Error, Result};
use crate::network::Network;
use crate::report::{counted, thousands};
use crate::text_classifier::TextClassifier;

/// A table of a model's tensors: name, shape, elements, and whether `strategy` and `rules` would train it. With `head`
/// it is shown with a head for so many labels, of this meaning; without, as the classifier or language model that it is,
/// and an encoder that is neither as a classifier. Of a directory with an adapter, the adapter's own tensors. No weight is read.
///
/// # Errors
/// A model that cannot be used, a rule that matches nothing, a strategy for an adapter.
pub fn inspect(
    spec: &str,
    strategy: Option<Strategy>,
    rules: &[Rule],
    head: Option<(usize, ProblemType)>,
) -> Result<String> {
    if let Some(dir) = AdapterDir::at(spec)? {
        if let Some(strategy) = strategy {
            let what = format!("`{strategy}` trains parts of a model, and {spec} is an adapter");
            let help = "name the adapter's base, or leave the strategy out";
            return Err(Error::config("--strategy", what, help));
        }
        if head.is_some() {
            let what = format!("a model has a head, and {spec} is an adapter");
            let help = "name the adapter's base, or leave the labels out";
            return Err(Error::config("--labels", what, help));
        }
        return list_adapter(spec, &dir);
    }
    let source = ModelSource::resolve(spec)?;
    let stored = source.checkpoint()?.len();
    match Config::load(&source)? {
        Config::Encoder(mut config) => {
            if let Some((count, problem)) = head {
                config.set_classification(Labels::numbered(count), problem);
            }
            let fills_in = config.head.is(config.family.masked_architecture());
            let head = match fills_in {
                true => format!("vocabulary {}", config.vocab_size),
                false => counted(config.num_labels(), "label"),
            };
            let title = format!(
                "{spec}: {}, {} layers, hidden {}, {head}, up to {} tokens; {stored} tensors stored\n\n",
                config.family.model_type(),
                config.layers,
                config.hidden_size,
                config.max_tokens(),
            );
            match fills_in {
                true => list::<MaskedLm>(title, &MaskedConfig(*config), strategy, rules),
                false => list::<Classifier>(title, &config, strategy, rules),
            }
        }
        Config::Decoder(mut config) => {
            if let Some((count, problem)) = head {
                config.set_classification(Labels::numbered(count), problem)?;
            }
            let classifies = DecoderClassifier::classes(&config).is_classifier();
            let head = match classifies {
                true => counted(config.num_labels(), "label"),
                false => format!("vocabulary {}", config.vocab_size),
            };
            let title = format!(
                "{spec}: {}, {} layers, hidden {}, {head}, up to {} tokens; {stored} tensors stored\n\n",
                config.family,
                config.layers,
                config.hidden_size,
                config.max_tokens(),
            );
            match classifies {
                true => list::<DecoderClassifier>(title, &config, strategy, rules),
                false => list::<CausalLm>(title, &config, strategy, rules),
            }
        }
    }
}

/// The tensors of an adapter, as its file names them.
fn list_adapter(spec: &str, dir: &AdapterDir) -> Result<String> {
    let file = SafetensorsFile::open(dir.path().join(ADAPTER_WEIGHTS_FILE))?;
    let what = match dir.method() {
        Method::LowRank(c) => {
            let name = match (c.magnitude, c.rank_stabilised) {
                (true, _) => "dora",
                (false, true) => "rslora",
                (false, false) => "lora",
            };
            format!("{name} of rank {} and alpha {}", c.rank, c.alpha)
        }
        Method::Ia3 { .. } => "ia3".to_owned(),
        Method::Bottleneck { size } => format!("adapter of size {size}"),
        Method::Prompt { tokens } => format!("prompt of {tokens} tokens"),
        Method::Prefix { tokens, .. } => format!("prefix of {tokens} tokens"),
    };
    let mut text = format!("{spec}: {what}, beside {}\n\n", dir.base()?);
    let mut tensors: Vec<_> = file.tensors().collect();
    tensors.sort_by(|a, b| a.name.cmp(&b.name));
    let width = tensors.iter().map(|tensor| tensor.name.len()).max();
    let width = width.unwrap_or(0);
    let mut total = 0;
    for tensor in &tensors {
        let count: u64 = tensor.shape.iter().product();
        total += count;
        // Writing to a String cannot fail.
        let _ = writeln!(
            text,
            "{:<width$}  {:<14}  {:>12}",
            tensor.name,
            format!("{:?}", tensor.shape),
            thousands(count)
        );
    }
    let (stored, total) = (tensors.len(), thousands(total));
    let _ = writeln!(text, "\n{stored} tensors, {total} parameters");
    Ok(text)
}

/// The learning rate of a run that says none.
fn peak(strategy: &StrategyConfig) -> f64 {
    let adamw = OptimizerKind::AdamW {
        betas: [0.9, 0.999],
        eps: 1e-8,
    };
    OptimizerConfig::default_lr(&adamw, &strategy.name)
}

/// A number to three digits.
fn significant(x: f64) -> String {
    let digits = 2 - x.abs().log10().floor() as i32;
    let text = format!("{x:.*}", digits.max(0) as usize);
    match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text,
    }
}

/// The table below its title, and sums.
fn list<N: Network>(
    title: String,
    config: &N::Config,
    strategy: Option<Strategy>,
    rules: &[Rule],
) -> Result<String> {
    let mut parameters = Parameters::new(&Memory::planned(), DType::F32);
    let network = N::declare(&mut parameters, config)?;
    let strategy = strategy.map(|name| StrategyConfig {
        name,
        rules: rules.to_vec(),
        dropout: None,
    });
    let set = match &strategy {
        Some(strategy) => {
            if let Some(kind) = strategy.name.adapter {
                adapter::put(&mut parameters, config, kind, &AdapterSettings::usual(kind))?;
                parameters.initialise(0)?;
            }
            let policy = policy(&network, &strategy.name, rules, &parameters)?;
            let set = policy.resolve(&parameters)?;
            let lr = (peak(strategy), None);
            let rates = rates(&network, strategy, lr, &parameters, &set)?;
            Some((set, rates))
        }
        None => None,
    };
    let mut text = title;
    // Writing to a String cannot fail.
    let _ = table(&mut text, &parameters, set.as_ref());
    let total = parameters.count();
    let _ = writeln!(
        text,
        "\n{} tensors, {} parameters",
        parameters.len(),
        thousands(total as u64)
    );
    if let (Some(strategy), Some((set, _))) = (strategy, &set) {
        let count = set.count(&parameters);
        let _ = writeln!(
            text,
            "{} trains {} tensors, {} parameters ({:.2} %); AdamW's state for them takes {} bytes",
            strategy.name,
            set.len(),
            thousands(count as u64),
            100.0 * count as f64 / total as f64,
            thousands(8 * count as u64),
        );
    }
    Ok(text)
}

fn table(
    text: &mut String,
    parameters: &Parameters,
    set: Option<&(TrainableSet, Rates)>,
) -> std::fmt::Result {
    let names = parameters.iter().map(|(_, p)| p.name().len());
    let width = names.max().unwrap_or(0);
    for (id, p) in parameters.iter() {
        let mark = match set {
            Some((set, rates)) if set.contains(id) => {
                let rate = rates.get(id);
                let mut mark = "  train".to_owned();
                if rate.lr != 1.0 {
                    mark += &format!("  lr x{}", significant(rate.lr));
                }
                if let Some(decay) = rate.decay {
                    mark += &format!("  decay {decay}");
                }
                mark
            }
            Some(_) => "  freeze".to_owned(),
            None => String::new(),
        };
        let shape = p.shape().to_string();
        let count = thousands(p.shape().count() as u64);
        writeln!(text, "{:<width$}  {shape:<14}  {count:>12}{mark}", p.name())?;
    }
    Ok(())
}
