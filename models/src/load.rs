//! Parameters from a checkpoint and back: every tensor accounted for.

use std::borrow::Cow;
use std::collections::HashMap;
use std::hash::{DefaultHasher, Hasher};
use std::path::Path;

use graft_nn::{ParamId, Parameters, TrainableSet};
use graft_tensor::{Category, DType, Tensor};

use crate::classifier::Classifier;
use crate::config::{DecoderConfig, ModelConfig, ProblemType};
use crate::decoder::{CLASSIFIER, LM_HEAD, SCORE};
use crate::encoder::{is_dispensable, modern};
use crate::error::{Error, Result};
use crate::safetensors::{Checkpoint, SafetensorsFile, TensorInfo, TensorView, pt_metadata, write};

/// What loading left out or had to make up.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LoadReport {
    /// Tensors of the checkpoint that the model has no use for
    pub unused: Vec<String>,
    /// Parameters that were initialised, because the task is new
    pub initialised: Vec<String>,
}

/// How a family's checkpoints name their tensors.
pub trait Stored {
    /// What stands in front of the base model's tensors where there is a head; a bare model has no prefix.
    fn prefix(&self) -> &'static str;

    /// The present name of a tensor that old checkpoints call otherwise.
    fn modern(&self, name: &str) -> String;

    /// The parameters of a classification head: no checkpoint of another task can hold them.
    fn is_task_specific(&self, name: &str) -> bool;

    /// Parameters that a checkpoint may lack: they are initialised where a head may be new.
    fn is_optional(&self, name: &str) -> bool;

    /// Tensors that a checkpoint may hold and that no model has a use for: buffers that can be computed, copies of
    /// others, heads of pretraining.
    fn is_dispensable(&self, name: &str) -> bool;

    /// The parameter that a dispensable tensor must equal, because the configuration ties the two.
    fn copy_of(&self, _name: &str) -> Option<String> {
        None
    }

    /// The head of another kind of model, in the way of nothing when this one's head is new.
    fn is_other_head(&self, name: &str) -> bool;
}

impl Stored for ModelConfig {
    fn prefix(&self) -> &'static str {
        self.family.names().prefix
    }

    fn modern(&self, name: &str) -> String {
        modern(name)
    }

    fn is_task_specific(&self, name: &str) -> bool {
        Classifier::is_task_specific(self, name)
    }

    fn is_optional(&self, name: &str) -> bool {
        Classifier::is_optional(self, name)
    }

    fn is_dispensable(&self, name: &str) -> bool {
        // No token is classified by the pooler, which stands behind the first one.
        let pooler = self.head.problem() == ProblemType::Tokens && name.contains("pooler.dense.");
        is_dispensable(name) || pooler
    }

    fn is_other_head(&self, name: &str) -> bool {
        name.starts_with("classifier.") || name.starts_with("pre_classifier.")
    }
}

impl Stored for DecoderConfig {
    fn prefix(&self) -> &'static str {
        self.family.names().prefix
    }

    fn modern(&self, name: &str) -> String {
        name.to_owned()
    }

    fn is_task_specific(&self, name: &str) -> bool {
        is_of(SCORE, name) || is_of(CLASSIFIER, name)
    }

    fn is_optional(&self, _: &str) -> bool {
        false
    }

    fn is_dispensable(&self, name: &str) -> bool {
        // A tied head is stored by some writers although it is the token embedding.
        self.family.is_buffer(name) || (self.tied && is_of(LM_HEAD, name))
    }

    fn copy_of(&self, name: &str) -> Option<String> {
        let names = self.family.names();
        let head = self.tied && is_of(LM_HEAD, name);
        head.then(|| format!("{}{}.weight", names.prefix, names.words))
    }

    fn is_other_head(&self, name: &str) -> bool {
        is_of(LM_HEAD, name) || self.is_task_specific(name)
    }
}

/// True for the tensors of a module.
fn is_of(module: &str, name: &str) -> bool {
    name.strip_prefix(module)
        .is_some_and(|rest| rest.starts_with('.'))
}

/// Fills `parameters` from `checkpoint`. With `new_head`, the parameters of the classification
/// head are initialised from that seed, whatever the checkpoint holds for them, and so are those that it may lack and
/// does.
///
/// # Errors
/// [`Error::Mismatch`], which lists missing, unexpected and wrongly shaped tensors together; [`Error::Untied`]; and
/// whatever reading the file refuses.
pub fn load_parameters(
    parameters: &mut Parameters,
    config: &impl Stored,
    checkpoint: &mut Checkpoint,
    new_head: Option<u64>,
) -> Result<LoadReport> {
    load_parameters_with(parameters, config, checkpoint, new_head, &mut |_, _| {})
}

/// [`load_parameters`], and hands each parameter to `loaded` as soon as it has its value, by name.
///
/// # Errors
/// As there.
pub fn load_parameters_with(
    parameters: &mut Parameters,
    config: &impl Stored,
    checkpoint: &mut Checkpoint,
    new_head: Option<u64>,
    loaded: &mut dyn FnMut(&str, &Tensor),
) -> Result<LoadReport> {
    let file = checkpoint.name().to_owned();
    let prefix = config.prefix();
    // A bare encoder (BertModel) has no prefix in front of its tensors.
    let bare = !checkpoint.tensors().any(|t| t.name.starts_with(prefix));
    let find = |parameters: &Parameters, stored: &str| -> Option<ParamId> {
        let name = config.modern(stored);
        let direct = parameters.lookup(&name);
        direct.or_else(|| {
            let full = format!("{prefix}{name}");
            bare.then(|| parameters.lookup(&full)).flatten()
        })
    };
    let fresh = |name: &str| new_head.is_some() && config.is_task_specific(name);
    let may_lack = |name: &str| new_head.is_some() && config.is_optional(name);

    let mut report = LoadReport::default();
    let mut unexpected = Vec::new();
    let mut shapes = Vec::new();
    let mut found = vec![false; parameters.len()];
    let mut places: HashMap<String, ParamId> = HashMap::new();
    let mut copies: HashMap<String, ParamId> = HashMap::new();
    for tensor in checkpoint.tensors() {
        match find(parameters, &tensor.name) {
            Some(id) if fresh(parameters.get(id).name()) => {
                report.unused.push(tensor.name.clone());
            }
            Some(id) => {
                let expected = parameters.get(id).shape();
                let float = tensor.dtype.dtype().is_none_or(|dtype| dtype.is_float());
                let same = expected.len() == tensor.shape.len()
                    && expected
                        .iter()
                        .zip(&tensor.shape)
                        .all(|(&a, &b)| a as u64 == b);
                if std::mem::replace(&mut found[id.key()], true) {
                    unexpected.push(format!("{} (a second time)", tensor.name));
                } else if !float {
                    let (name, dtype) = (&tensor.name, tensor.dtype);
                    shapes.push(format!("{name}: {dtype}, expected floating-point numbers"));
                } else if same {
                    places.insert(tensor.name.clone(), id);
                } else {
                    let name = &tensor.name;
                    shapes.push(format!("{name}: {:?}, expected {expected}", tensor.shape));
                }
            }
            None if config.is_dispensable(&tensor.name) => {
                report.unused.push(tensor.name.clone());
                let original = config.copy_of(&tensor.name);
                if let Some(id) = original.and_then(|name| parameters.lookup(&name)) {
                    copies.insert(tensor.name.clone(), id);
                }
            }
            // The head of another kind of model for another task.
            None if new_head.is_some() && config.is_other_head(&tensor.name) => {
                report.unused.push(tensor.name.clone());
            }
            None => unexpected.push(tensor.name.clone()),
        }
    }
    let missing: Vec<String> = parameters
        .iter()
        .filter(|(id, p)| !found[id.key()] && !fresh(p.name()) && !may_lack(p.name()))
        .map(|(_, p)| p.name().to_owned())
        .collect();
    if !(missing.is_empty() && unexpected.is_empty() && shapes.is_empty()) {
        return Err(Error::Mismatch {
            file,
            missing,
            unexpected,
            shapes,
        });
    }

    // What the tensors hold that have copies, and these: type and number of the bytes, and a hash of them.
    let mut held: HashMap<String, _> = HashMap::new();
    let wanted = |name: &String| places.contains_key(name) || copies.contains_key(name);
    checkpoint.read_each(&mut |t| wanted(&t.name), &mut |t, bytes| {
        let place = places.get(&t.name).copied();
        if place.is_none_or(|id| copies.values().any(|&original| original == id)) {
            let mut hash = DefaultHasher::new();
            hash.write(bytes);
            held.insert(t.name.clone(), (t.dtype, bytes.len(), hash.finish()));
        }
        let Some(id) = place else { return Ok(()) };
        let dtype = t
            .dtype
            .dtype()
            .expect("read_each refuses types that it cannot read");
        let parameter = parameters.get(id);
        // What will be held otherwise is here for a moment.
        let memory = match parameter.held() {
            Some(_) => parameters.memory().with(Category::Workspace),
            None => parameters.memory().clone(),
        };
        let value = Tensor::from_bytes(&memory, dtype, parameter.shape(), bytes)?;
        parameters.set(id, value)?;
        loaded(parameters.get(id).name(), parameters.value(id)?);
        Ok(())
    })?;
    for (copy, id) in &copies {
        let original = places.iter().find(|(_, place)| *place == id);
        if let Some((original, _)) = original.filter(|(name, _)| held[*name] != held[copy]) {
            return Err(Error::Untied {
                file,
                copy: copy.clone(),
                original: original.clone(),
            });
        }
    }
    report.initialised = parameters
        .iter()
        .filter(|(_, p)| !p.has_value())
        .map(|(_, p)| p.name().to_owned())
        .collect();
    if let Some(seed) = new_head {
        parameters.initialise(seed)?;
        for name in &report.initialised {
            loaded(name, parameters.value(parameters.find(name)?)?);
        }
    }
    Ok(report)
}

/// Writes all parameters to one safetensors file at `path`, under their own names: those of the model, without those of
/// adapters beside it.
///
/// # Errors
/// What the file system refuses.
pub fn save_parameters(parameters: &Parameters, path: &Path) -> Result<()> {
    save_some(parameters, path, |id| {
        parameters.adapters().anchor(id) == id
    })
}

/// Writes the parameters of `set` alone to one safetensors file at `path`; [`load_some`] reads them back.
///
/// # Errors
/// What the file system refuses.
pub fn save_trained(parameters: &Parameters, set: &TrainableSet, path: &Path) -> Result<()> {
    save_some(parameters, path, |id| set.contains(id))
}

fn save_some(parameters: &Parameters, path: &Path, wanted: impl Fn(ParamId) -> bool) -> Result<()> {
    let mut chosen = Vec::with_capacity(parameters.len());
    for (id, parameter) in parameters.iter().filter(|(id, _)| wanted(*id)) {
        let value = parameters.value(id)?;
        chosen.push((parameter, value.dtype(), little_endian(value)?));
    }
    let views = chosen.iter().map(|(parameter, dtype, data)| TensorView {
        name: parameter.name(),
        dtype: *dtype,
        shape: parameter.shape(),
        data,
    });
    write(path, &pt_metadata(), views)
}

/// Sets every parameter that the safetensors file at `path` holds under its name. Where this machine has a parameter as the
/// file has it, its bytes are read to where they lie.
///
/// # Errors
/// A file that cannot be read, a tensor that is no parameter or has another shape.
pub fn load_some(parameters: &mut Parameters, path: &Path) -> Result<()> {
    let mut file = SafetensorsFile::open(path)?;
    let tensors: Vec<TensorInfo> = file.tensors().cloned().collect();
    for info in &tensors {
        let id = parameters.find(&info.name)?;
        let value = parameters.value_mut(id).ok();
        if let Some(place) = value.and_then(|value| place_of(value, info)) {
            file.read_into(&info.name, place)?;
            continue;
        }
        let mut bytes = vec![0; info.byte_len() as usize];
        file.read_into(&info.name, &mut bytes)?;
        let dtype = info
            .dtype
            .dtype()
            .expect("read_into refuses types that it cannot read");
        let shape = *parameters.get(id).shape();
        let value = Tensor::from_bytes(parameters.memory(), dtype, &shape, &bytes)?;
        parameters.set(id, value)?;
    }
    Ok(())
}

/// Where the elements of a tensor lie that this machine has as a checkpoint does.
fn place_of<'a>(value: &'a mut Tensor, info: &TensorInfo) -> Option<&'a mut [u8]> {
    let sides = value.shape().iter().map(|&side| side as u64);
    let same = value.dtype() == DType::F32
        && info.dtype.dtype() == Some(DType::F32)
        && info.shape.iter().copied().eq(sides);
    if !same || cfg!(target_endian = "big") {
        return None;
    }
    // On a GPU, or shared: not to be written to here.
    Some(bytemuck::cast_slice_mut(value.slice_mut::<f32>().ok()?))
}

/// A tensor's bytes as a checkpoint holds them: those in memory, where this machine has them as little-endian `f32`
/// in order.
///
/// # Errors
/// A planned tensor.
pub fn little_endian(tensor: &Tensor) -> Result<Cow<'_, [u8]>> {
    let as_they_are =
        cfg!(target_endian = "little") && tensor.dtype() == DType::F32 && tensor.is_contiguous();
    if as_they_are && !tensor.is_on_device() {
        return Ok(Cow::Borrowed(bytemuck::cast_slice(tensor.slice::<f32>()?)));
    }
    Ok(Cow::Owned(tensor.to_bytes()?))
}
