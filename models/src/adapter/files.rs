//! The weights of an adapter, read and written.

use std::borrow::Cow;
use std::collections::HashMap;
use std::path::Path;

use graft_nn::adapters::{
    Adapter, AdapterConfig, AdapterSet, LowRankConfig, Method, Modules, Targets, attach,
    kept_parameters,
};
use graft_nn::{ParamId, Parameters, Role};
use graft_tensor::Tensor;
use graft_tensor::ops::{self, WeightLayout};

use super::{ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, Adaptable, StoredAdapter, head_modules};
use crate::error::{Error, Result};
use crate::load::little_endian;
use crate::safetensors::{SafetensorsFile, TensorView, pt_metadata, write};
use crate::source::ModelSource;

/// The rows of a prompt or a prefix.
const FRONT: &str = "prompt_embeddings";

/// The heads that PEFT keeps with an adapter for classification, whatever its configuration says.
const HEADS: [&str; 2] = ["classifier", "score"];

/// Loads the adapter in `dir` beside the model, under `name`, and takes it into use. What it keeps as a whole, a head
/// for example, takes the place of the base's while it is in use.
///
/// # Errors
/// Files that cannot be read, an adapter for another model: [`Error::Mismatch`] lists what does not fit.
pub fn load_adapter(
    p: &mut Parameters,
    model: &impl Adaptable,
    name: &str,
    dir: &Path,
) -> Result<StoredAdapter> {
    let source = ModelSource::directory(dir)?;
    let mut stored = StoredAdapter::load(&source)?;
    let path = dir.join(ADAPTER_WEIGHTS_FILE);
    let mut file = SafetensorsFile::open(&path)?;
    aim(&mut stored.config, model);
    if stored.classifies() {
        set_heads(p, &mut stored.config);
    }
    let find = |p: &Parameters, rest: &str| -> Option<ParamId> {
        let full = format!("{}{rest}", model.prefix());
        p.lookup(rest).or_else(|| p.lookup(&full))
    };
    // What the file has in place of the base's own parameters.
    let mut whole: HashMap<String, Vec<usize>> = HashMap::new();
    for info in file.infos() {
        let plain = stored.in_model(&info.name).map(without_wrapper);
        if let Some(id) = plain.and_then(|plain| find(p, &plain)) {
            let shape = info.shape.iter().map(|&n| n as usize).collect();
            whole.insert(p.get(id).name().to_owned(), shape);
        }
    }
    attach(
        p,
        name,
        &stored.config,
        Modules::Copies(&|n| whole.get(n).cloned()),
    )?;

    let mut places: HashMap<String, Place> = HashMap::new();
    let (mut unexpected, mut shapes) = (Vec::new(), Vec::new());
    let mut found = vec![false; p.len()];
    for info in file.infos() {
        let place = stored.in_model(&info.name).and_then(|rest| {
            // With `bias="all"`, PEFT writes the biases of kept modules three times: under their names, under those that
            // they have in memory, and the base's own.
            let again = rest
                .split_once(".modules_to_save.")
                .and_then(|(module, inner)| {
                    let (_, inner) = inner.split_once('.')?;
                    file.get(&format!("{}{module}.{inner}", stored.prefix()))
                });
            if rest.contains(".original_module.") || again.is_some() {
                return Some(Place::Nowhere);
            }
            let own = |id: &ParamId| p.adapters().anchor(*id) != *id;
            if let Some(id) = find(p, &with_name(rest, name)).filter(own) {
                return Some(Place::Parameter(id));
            }
            let id = find(p, &without_wrapper(rest))?;
            let copy = p.adapters().in_place_of(id);
            Some(match copy == id {
                true => Place::Same(id),
                false => Place::Parameter(copy),
            })
        });
        let Some(place) = place else {
            unexpected.push(info.name.clone());
            continue;
        };
        if let Place::Parameter(id) | Place::Same(id) = place {
            let expected = p.get(id).shape();
            let fits = expected
                .iter()
                .map(|&n| n as u64)
                .eq(info.shape.iter().copied());
            if !fits || info.dtype.dtype().is_some_and(|dtype| !dtype.is_float()) {
                let (name, dtype, shape) = (&info.name, info.dtype, &info.shape);
                shapes.push(format!(
                    "{name}: {dtype} {shape:?}, expected numbers {expected}"
                ));
            }
            if std::mem::replace(&mut found[id.key()], true) {
                unexpected.push(format!("{} (a second time)", info.name));
            }
        }
        places.insert(info.name.clone(), place);
    }
    let set = p.adapters().active();
    let missing: Vec<String> = set
        .map(|set| own_parameters(p, set))
        .unwrap_or_default()
        .into_iter()
        .filter(|id| !found[id.key()])
        .map(|id| p.get(id).name().to_owned())
        .chain(heads_that_lack(p, &stored.config, &whole))
        .collect();
    if !(missing.is_empty() && unexpected.is_empty() && shapes.is_empty()) {
        return Err(Error::Mismatch {
            file: path.display().to_string(),
            missing,
            unexpected,
            shapes,
        });
    }
    file.read_each(&mut |_| true, &mut |info, bytes| {
        let (Some(dtype), place) = (info.dtype.dtype(), places[&info.name]) else {
            return Ok(());
        };
        let shape: Vec<usize> = info.shape.iter().map(|&n| n as usize).collect();
        let value = || Tensor::from_bytes(p.memory(), dtype, &shape, bytes);
        match place {
            Place::Nowhere => {}
            Place::Parameter(id) => {
                let value = value()?;
                p.set(id, value)?;
            }
            Place::Same(id) => {
                // PEFT copies an embedding that has an adapter into the file.
                if p.value(id)?.to_f64()? != value()?.to_f64()? {
                    return Err(Error::Config {
                        file: path.display().to_string(),
                        key: info.name.clone(),
                        found: "other numbers than the base has".into(),
                        expected: "the base's own".into(),
                        help: "name the base that the adapter was trained on".into(),
                    });
                }
            }
        }
        Ok(())
    })?;
    Ok(stored)
}

/// Says beside what virtual tokens stand, which their file does not.
fn aim(config: &mut AdapterConfig, model: &impl Adaptable) {
    let target = match &config.method {
        Method::Prompt { .. } => model.front().words,
        Method::Prefix { .. } => model.front().keys,
        Method::LowRank(_) | Method::Ia3 { .. } | Method::Bottleneck { .. } => return,
    };
    config.targets = Targets::Names(vec![target.to_owned()]);
}

impl StoredAdapter {
    /// In front of every tensor's name but that of virtual tokens.
    fn prefix(&self) -> &'static str {
        match self.config.method.virtual_tokens() {
            0 => "base_model.model.",
            // No module is wrapped.
            _ => "base_model.",
        }
    }

    /// A tensor's name without what stands in front of it in the file.
    fn in_model<'a>(&self, name: &'a str) -> Option<&'a str> {
        let front = (name == FRONT && self.config.method.virtual_tokens() > 0).then_some(name);
        name.strip_prefix(self.prefix()).or(front)
    }

    /// The name that a tensor of the adapter's file has in memory under the adapter's name `adapter`, beside a model whose
    /// names are the file's; of what the adapter keeps as a whole, the name of the base's.
    pub fn name_in_memory(&self, name: &str, adapter: &str) -> String {
        let rest = self.in_model(name).unwrap_or(name);
        let named = with_name(rest, adapter);
        match named == rest {
            true => without_wrapper(rest),
            false => named,
        }
    }
}

/// Where a tensor of the file belongs.
#[derive(Clone, Copy)]
enum Place {
    Parameter(ParamId),
    /// The base's, which must have the same numbers
    Same(ParamId),
    Nowhere,
}

/// Puts the classification head that the model has among what is kept: PEFT's lists name all heads that there could be.
fn set_heads(p: &Parameters, config: &mut AdapterConfig) {
    for head in HEADS {
        let there = p
            .iter()
            .any(|(_, q)| q.name().split('.').next() == Some(head));
        let listed = config.modules_to_save.iter().any(|m| m == head);
        match (there, listed) {
            (true, false) => config.modules_to_save.push(head.to_owned()),
            (false, true) => config.modules_to_save.retain(|m| m != head),
            _ => {}
        }
    }
}

/// Parameters of kept modules that the file does not have.
fn heads_that_lack(
    p: &Parameters,
    config: &AdapterConfig,
    whole: &HashMap<String, Vec<usize>>,
) -> Vec<String> {
    let layers = p
        .adapters()
        .active()
        .map(|set| kept_parameters(p, config, set));
    let names = layers.unwrap_or_default().into_iter();
    names
        .map(|id| p.get(id).name().to_owned())
        .filter(|name| !whole.contains_key(name))
        .collect()
}

/// The parameters that an adapter's file has to fill.
fn own_parameters(p: &Parameters, set: &AdapterSet) -> Vec<ParamId> {
    let mut own: Vec<ParamId> = set.copies().map(|(_, copy)| copy).collect();
    for (_, adapter) in set.layers() {
        own.extend(adapter.parameters());
    }
    own.sort_by_key(|id| id.key());
    // Those of a prefix are beside each layer.
    own.dedup();
    debug_assert!(own.iter().all(|id| id.key() < p.len()));
    own
}

/// A base parameter's name without what PEFT wraps its module in.
fn without_wrapper(name: &str) -> String {
    name.replace(".base_layer.", ".")
        .replace(".modules_to_save.", ".")
}

/// The name that an adapter's tensor has in memory, where the adapter's own name stands in it.
fn with_name(stored: &str, name: &str) -> String {
    if stored == FRONT {
        return format!("{FRONT}.{name}");
    }
    for (end, last) in [
        (".lora_A.weight", ".weight"),
        (".lora_B.weight", ".weight"),
        (".lora_magnitude_vector.weight", ".weight"),
        (".lora_embedding_A", ""),
        (".lora_embedding_B", ""),
        (".ia3_l", ""),
        (".adapter_down.weight", ".weight"),
        (".adapter_down.bias", ".bias"),
        (".adapter_up.weight", ".weight"),
        (".adapter_up.bias", ".bias"),
    ] {
        if stored.ends_with(end) {
            let module = &stored[..stored.len() - last.len()];
            return format!("{module}.{name}{last}");
        }
    }
    match stored.strip_suffix(".lora_magnitude_vector") {
        Some(_) => format!("{stored}.{name}.weight"),
        None => stored.to_owned(),
    }
}

/// The name in the file of an adapter's parameter: [`with_name`] the other way round.
fn without_name(inner: &str, name: &str) -> String {
    let magnitude = format!(".lora_magnitude_vector.{name}.weight");
    if let Some(module) = inner.strip_suffix(&magnitude) {
        return format!("{module}.lora_magnitude_vector");
    }
    for last in [".weight", ".bias", ""] {
        if let Some(module) = inner.strip_suffix(&format!(".{name}{last}")) {
            return format!("{module}{last}");
        }
    }
    inner.to_owned()
}

/// Writes the adapter in use into `dir`: configuration and weights. `base` is the name of
/// the model that it belongs to. An adapter that began as PiSSA is written as the change of that model as it was, at
/// twice the rank.
///
/// # Errors
/// No adapter in use; what the file system refuses.
pub fn save_adapter(p: &Parameters, model: &impl Adaptable, base: &str, dir: &Path) -> Result<()> {
    let Some(set) = p.adapters().active() else {
        let what = "there is no adapter to save; attach one first".into();
        return Err(graft_nn::Error::Adapter { what }.into());
    };
    let stored = StoredAdapter {
        config: as_stored(set),
        base: Some(base.to_owned()),
        task_type: model
            .task_type(!head_modules(p, model).is_empty())
            .map(str::to_owned),
    };
    let prefix = stored.prefix();
    let mut tensors: Vec<(String, Tensor)> = Vec::new();
    let mut put = |id: ParamId, value: Tensor| {
        let name = without_name(p.get(id).name(), set.name());
        let prefix = if name == FRONT { "" } else { prefix };
        tensors.push((format!("{prefix}{name}"), value));
    };
    let (mut full, mut inputs, mut transposed) = (Vec::new(), Vec::new(), false);
    for (weight, adapter) in set.layers() {
        let name = p.get(weight).name();
        let module = name.strip_suffix(".weight").unwrap_or(name);
        if adapter.wraps() {
            full.push(module.to_owned());
        }
        transposed |= p.get(weight).role() == Role::Linear(WeightLayout::InOut);
        match adapter {
            Adapter::LowRank(l) => {
                let (mut a, mut b) = (p.value(l.a)?.clone(), p.value(l.b)?.clone());
                if let Some([a0, b0]) = set.residual(weight) {
                    let m = p.memory();
                    let b0 = ops::affine(m, b0, -1.0, 0.0)?;
                    a = ops::concat(m, &[&a, a0], 0)?;
                    b = ops::concat(m, &[&b, &b0], 1)?;
                }
                put(l.a, a);
                put(l.b, b);
                if let Some(magnitude) = l.magnitude {
                    put(magnitude, p.value(magnitude)?.clone());
                }
            }
            Adapter::Scaling(s) => {
                if s.input {
                    inputs.push(module.to_owned());
                }
                put(s.factors, p.value(s.factors)?.clone());
            }
            Adapter::Prompt(rows) => put(*rows, p.value(*rows)?.clone()),
            // The first layer's stands for all.
            Adapter::Prefix(prefix) if prefix.layer > 0 => {}
            Adapter::Prefix(prefix) => put(prefix.rows, p.value(prefix.rows)?.clone()),
            Adapter::Bottleneck(_) => {
                for id in adapter.parameters() {
                    put(id, p.value(id)?.clone());
                }
            }
        }
    }
    for id in kept_parameters(p, set.config(), set) {
        let name = p.get(id).name();
        let (module, last) = name.rsplit_once('.').unwrap_or(("", name));
        let adapted = full.iter().any(|adapted| adapted == module);
        let name = match adapted {
            true => format!("{prefix}{module}.base_layer.{last}"),
            false => format!("{prefix}{name}"),
        };
        let value = p.value(p.adapters().in_place_of(id))?;
        tensors.push((name, value.clone()));
    }
    let data: Vec<Cow<[u8]>> = tensors
        .iter()
        .map(|(_, value)| little_endian(value))
        .collect::<Result<_>>()?;
    let views = tensors
        .iter()
        .zip(&data)
        .map(|((name, value), data)| TensorView {
            name,
            dtype: value.dtype(),
            shape: value.shape(),
            data,
        });
    write(dir.join(ADAPTER_WEIGHTS_FILE), &pt_metadata(), views)?;
    let path = dir.join(ADAPTER_CONFIG_FILE);
    let text = stored.to_json([&full, &inputs], transposed, &model.front());
    std::fs::write(&path, text).map_err(|e| Error::io("write", &path, e))
}

/// An adapter's configuration as it belongs to what is written: with a residual, ranks are doubled, and alphas so that
/// the scale stays.
fn as_stored(set: &AdapterSet) -> AdapterConfig {
    let mut config = set.config().clone();
    let doubled = set
        .layers()
        .any(|(weight, _)| set.residual(weight).is_some());
    if let Method::LowRank(l) = &mut config.method
        && doubled
    {
        let factor = match l.rank_stabilised {
            true => 2f64.sqrt(),
            false => 2.0,
        };
        *l = LowRankConfig {
            rank: 2 * l.rank,
            alpha: factor * l.alpha,
            rank_pattern: l
                .rank_pattern
                .iter()
                .map(|(k, r)| (k.clone(), 2 * r))
                .collect(),
            alpha_pattern: l
                .alpha_pattern
                .iter()
                .map(|(k, a)| (k.clone(), factor * a))
                .collect(),
            ..l.clone()
        };
    }
    config
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_in_memory_and_in_files() {
        for (stored, inner) in [
            ("m.query.lora_A.weight", "m.query.lora_A.one.weight"),
            ("m.query.lora_B.weight", "m.query.lora_B.one.weight"),
            (
                "m.query.lora_magnitude_vector",
                "m.query.lora_magnitude_vector.one.weight",
            ),
            ("m.words.lora_embedding_A", "m.words.lora_embedding_A.one"),
            ("m.key.ia3_l", "m.key.ia3_l.one"),
            ("prompt_embeddings", "prompt_embeddings.one"),
            ("m.out.adapter_down.weight", "m.out.adapter_down.one.weight"),
            ("m.out.adapter_up.bias", "m.out.adapter_up.one.bias"),
            ("classifier.weight", "classifier.weight"),
        ] {
            assert_eq!(with_name(stored, "one"), inner);
            assert_eq!(without_name(inner, "one"), stored);
        }
        let old = "m.query.lora_magnitude_vector.weight";
        assert_eq!(
            with_name(old, "one"),
            "m.query.lora_magnitude_vector.one.weight"
        );
        assert_eq!(without_wrapper("m.query.base_layer.bias"), "m.query.bias");
        assert_eq!(
            without_wrapper("classifier.modules_to_save.weight"),
            "classifier.weight"
        );
    }
}
