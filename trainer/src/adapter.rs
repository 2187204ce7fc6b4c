//! Adapters in a run: put beside a model before it is trained, saved in place of its weights, and found again by every
//! command that takes a model.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use graft_models::adapter::{ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, head_modules};
use graft_models::{
    Adaptable, Labels, ModelSource, SafetensorsFile, StoredAdapter, little_endian, load_adapter,
    save_adapter,
};
use graft_nn::adapters::{
    self, AdapterConfig, Bias, DEFAULT, LowRankConfig, LowRankInit, Method, Modules, Targets,
};
use graft_nn::{Parameters, TrainableSet};

use crate::certificate::{FoundTensor, TensorEntry, sha256_hex};
use crate::config::{
    AdapterKind, AdapterSettings, BOTTLENECK, Base, BiasSetting, FRONT, InitSetting, RANK,
    RunConfig, Settings, TargetSetting,
};
use crate::error::{Error, Result, list_names};
use crate::model::{Hashes, Model};
use crate::network::Network;
use crate::run_dir;

/// The adapter of some settings, for a model of this configuration.
fn describe(
    p: &Parameters,
    model: &impl Adaptable,
    kind: AdapterKind,
    s: &AdapterSettings,
) -> AdapterConfig {
    let owned = |list: &[&str]| {
        list.iter()
            .map(|s| (*s).to_owned())
            .collect::<Vec<String>>()
    };
    let front = model.front();
    let (words, keys) = ([front.words], [front.keys]);
    let (usual, feedforward) = match kind {
        AdapterKind::Ia3 => model.ia3_targets(),
        AdapterKind::Prompt => (&words[..], &[][..]),
        AdapterKind::Prefix => (&keys[..], &[][..]),
        AdapterKind::Bottleneck => (model.bottleneck_targets(), &[][..]),
        _ => (model.lora_targets(), &[][..]),
    };
    let rank = s.rank.unwrap_or(RANK);
    let method = match kind {
        AdapterKind::Ia3 => Method::Ia3 {
            feedforward: match (&s.feedforward, &s.targets) {
                (Some(list), _) => list.clone(),
                (None, None | Some(TargetSetting::AllLinear)) => owned(feedforward),
                (None, Some(TargetSetting::Names(names))) => {
                    let usual = |name: &&String| feedforward.contains(&name.as_str());
                    names.iter().filter(usual).cloned().collect()
                }
            },
        },
        AdapterKind::Bottleneck => Method::Bottleneck {
            size: s.size.unwrap_or(BOTTLENECK),
        },
        AdapterKind::Prompt => Method::Prompt {
            tokens: s.tokens.unwrap_or(FRONT),
        },
        AdapterKind::Prefix => Method::Prefix {
            tokens: s.tokens.unwrap_or(FRONT),
            width: front.key_width,
            projection: s.projection,
        },
        AdapterKind::Lora | AdapterKind::RsLora | AdapterKind::Dora => {
            Method::LowRank(LowRankConfig {
                rank,
                alpha: s.alpha.unwrap_or(2.0 * rank as f64),
                rank_stabilised: kind == AdapterKind::RsLora,
                magnitude: kind == AdapterKind::Dora,
                dropout: s.dropout.unwrap_or(0.0),
                rank_pattern: s
                    .rank_pattern
                    .iter()
                    .map(|p| (p.name.clone(), p.value))
                    .collect(),
                alpha_pattern: s
                    .alpha_pattern
                    .iter()
                    .map(|p| (p.name.clone(), p.value))
                    .collect(),
                init: match s.init {
                    None | Some(InitSetting::Kaiming) => LowRankInit::Kaiming,
                    Some(InitSetting::Gaussian) => LowRankInit::Gaussian,
                    Some(InitSetting::Orthogonal) => LowRankInit::Orthogonal,
                    Some(InitSetting::Pissa) => LowRankInit::Pissa,
                },
            })
        }
    };
    let mut modules_to_save = head_modules(p, model);
    for name in &s.modules_to_save {
        if !modules_to_save.contains(name) {
            modules_to_save.push(name.clone());
        }
    }
    AdapterConfig {
        method,
        targets: match &s.targets {
            None => Targets::Names(owned(usual)),
            Some(TargetSetting::AllLinear) => Targets::AllLinear,
            Some(TargetSetting::Names(names)) => Targets::Names(names.clone()),
        },
        exclude: Vec::new(),
        layers: s.layers.clone(),
        layers_pattern: Vec::new(),
        modules_to_save,
        bias: match s.bias {
            None | Some(BiasSetting::None) => Bias::None,
            Some(BiasSetting::Adapted) => Bias::Adapted,
            Some(BiasSetting::All) => Bias::All,
        },
    }
}

/// Puts an adapter beside a model, to be trained in place. Its parameters have no values yet.
///
/// # Errors
/// Targets that the model does not have, settings that do not fit it, or that nothing of it answers to.
pub fn put(
    p: &mut Parameters,
    model: &impl Adaptable,
    kind: AdapterKind,
    settings: &AdapterSettings,
) -> Result<()> {
    let config = describe(p, model, kind, settings);
    adapters::refuse_unused(p, &config)?;
    Ok(adapters::attach(p, DEFAULT, &config, Modules::InPlace)?)
}

/// The hashes of weights that an adapter's beginning has changed (PiSSA takes its part out of them), by name.
pub(crate) type Changed = Hashes;

/// Puts the adapter of a run beside its model, with the values to begin with, whose hashes are added to `before`.
///
/// # Errors
/// As [`put`].
pub(crate) fn begin<N: Network>(
    config: &RunConfig,
    model: &mut Model<N>,
    before: &mut Hashes,
) -> Result<Changed> {
    let mut changed = Changed::new();
    let (Some(kind), Some(settings)) = (config.strategy.name.adapter, &config.adapter) else {
        return Ok(changed);
    };
    let p = &mut model.parameters;
    put(p, &model.config, kind, settings)?;
    p.initialise(config.train.seed)?;
    adapters::finish(p, DEFAULT, config.train.seed)?;
    if let Some(text) = settings.text.as_ref().filter(|_| !p.memory().is_planned()) {
        let most = settings.tokens.unwrap_or(FRONT).max(text.len());
        let ids = model.tokenizer.encode(text, None, most)?.ids;
        let ids: Vec<i64> = ids.into_iter().map(i64::from).collect();
        adapters::begin_as(p, DEFAULT, &ids)?;
    }
    if !p.memory().is_planned() {
        adapters::project(p)?;
    }
    let p = &model.parameters;
    for (id, parameter) in p.iter() {
        let own = p.adapters().anchor(id) != id;
        let residual = p
            .adapters()
            .active()
            .is_some_and(|set| set.residual(id).is_some());
        if own || residual {
            let hash = match p.value(id)?.is_planned() {
                true => String::new(),
                false => sha256_hex(&little_endian(p.value(id)?)?),
            };
            let to = if own { &mut *before } else { &mut changed };
            to.insert(parameter.name().to_owned(), hash);
        }
    }
    Ok(changed)
}

/// Checks that an adapter's file can hold all that is trained, and all that is `new` because no checkpoint had it, before
/// anything is trained.
///
/// # Errors
/// A rule that trains a parameter of a layer with an adapter; new parameters that are frozen.
pub(crate) fn check(p: &mut Parameters, set: &TrainableSet, new: &[String]) -> Result<()> {
    adapters::keep_trained(p, set)?;
    if p.adapters().active().is_none() {
        return Ok(());
    }
    let lost: Vec<&String> = new
        .iter()
        .filter(|name| p.lookup(name).is_some_and(|id| !set.contains(id)))
        .collect();
    if lost.is_empty() {
        return Ok(());
    }
    let what = format!(
        "the checkpoint lacks {}, and an adapter's file keeps of them what is trained alone",
        list_names(&lost, 4)
    );
    let help =
        "train them beside the adapter (`lora+head`, or a rule), or name a model that has them";
    Err(Error::config("strategy.name", what, help))
}

/// Writes the adapter of a run into `dir`.
///
/// # Errors
/// What the file system refuses.
pub(crate) fn save<N: Network>(model: &mut Model<N>, base: &str, dir: &Path) -> Result<()> {
    adapters::project(&mut model.parameters)?;
    Ok(save_adapter(&model.parameters, &model.config, base, dir)?)
}

/// The tensors of a directory's adapter, by the names that they have in memory; what an adapter keeps as a whole, by the
/// name of the base's.
///
/// # Errors
/// A file that cannot be read.
fn tensors_of(dir: &Path) -> Result<BTreeMap<String, FoundTensor>> {
    let stored = StoredAdapter::load(&ModelSource::directory(dir)?)?;
    let mut found = BTreeMap::new();
    let mut file = SafetensorsFile::open(dir.join(ADAPTER_WEIGHTS_FILE))?;
    file.read_each(&mut |_| true, &mut |info, bytes| {
        let tensor = FoundTensor {
            dtype: info.dtype.to_string(),
            shape: info.shape.clone(),
            sha256: sha256_hex(bytes),
        };
        found.insert(stored.name_in_memory(&info.name, DEFAULT), tensor);
        Ok(())
    })?;
    Ok(found)
}

/// A parameter of the base as a model file would hold it, or as it is held in memory.
fn found(p: &Parameters, name: &str, sha256: String) -> Option<FoundTensor> {
    let id = p.lookup(name)?;
    let shape = p.get(id).shape().iter().map(|&n| n as u64).collect();
    Some(FoundTensor {
        dtype: match p.get(id).held() {
            Some(dtype) => dtype.to_string().to_uppercase(),
            None => "F32".to_owned(),
        },
        shape,
        sha256,
    })
}

/// What a run with an adapter has made of each tensor: those of the base, which must be what they were, and those in
/// `dir`.
///
/// # Errors
/// A frozen tensor that moved, or a trained one that was not written.
pub(crate) fn entries<N: Network>(
    model: &Model<N>,
    set: &TrainableSet,
    (before, changed): (&Hashes, &Changed),
    dir: &Path,
    moved: &dyn Fn(&str, &str) -> Error,
) -> Result<Vec<TensorEntry>> {
    let p = &model.parameters;
    let mut written = tensors_of(dir)?;
    let mut entries = Vec::with_capacity(before.len());
    for (id, parameter) in p.iter() {
        let name = parameter.name();
        let active = p.adapters().active();
        if active.is_some_and(|adapter| adapter.is_projection(id)) {
            // What is kept in its place moves with it.
            continue;
        }
        let product = active.is_some_and(|adapter| adapter.is_product(id));
        let trainable = set.contains(id) || product;
        let own = p.adapters().anchor(id) != id;
        let tensor = match written.remove(name) {
            Some(tensor) => tensor,
            None if trainable || own => return Err(moved(name, "was not written")),
            None => {
                let now = sha256_hex(&little_endian(p.value(id)?)?);
                if now != *changed.get(name).unwrap_or(&before[name]) {
                    return Err(moved(name, "is frozen and changed"));
                }
                // As the base has it: what a beginning took out of it is in the adapter's file.
                let hash = before[name].clone();
                found(p, name, hash).ok_or_else(|| moved(name, "was not written"))?
            }
        };
        if !trainable && !own && tensor.sha256 != before[name] {
            return Err(moved(name, "is frozen and changed"));
        }
        entries.push(TensorEntry {
            name: name.to_owned(),
            dtype: tensor.dtype,
            shape: tensor.shape,
            trainable,
            before: before[name].clone(),
            after: tensor.sha256,
        });
    }
    Ok(entries)
}

/// A directory with an adapter in it.
#[derive(Debug, Clone)]
pub struct AdapterDir {
    dir: PathBuf,
    stored: StoredAdapter,
}

impl AdapterDir {
    /// The adapter that `spec` names, if it is a directory with one.
    ///
    /// # Errors
    /// A configuration of an adapter that cannot be used.
    pub fn at(spec: &str) -> Result<Option<AdapterDir>> {
        let dir = Path::new(spec);
        if !dir.exists() {
            // The replacement of this directory may have been interrupted half way.
            graft_models::atomic::recover(dir)?;
        }
        match dir.join(ADAPTER_CONFIG_FILE).is_file() {
            true => AdapterDir::open(dir).map(Some),
            false => Ok(None),
        }
    }

    /// The adapter in a directory.
    ///
    /// # Errors
    /// As [`AdapterDir::at`], and a directory without one.
    pub fn open(dir: &Path) -> Result<AdapterDir> {
        Ok(AdapterDir {
            stored: StoredAdapter::load(&ModelSource::directory(dir)?)?,
            dir: dir.to_path_buf(),
        })
    }

    /// What the base was held in when it was trained, if a run of this program left it.
    pub fn trained_on(&self) -> Option<Base> {
        let run = Settings::from_file(&self.dir.join(run_dir::CONFIG_FILE));
        run.ok()?.base()
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// What it is made of.
    pub fn method(&self) -> &Method {
        &self.stored.config.method
    }

    /// The model that it belongs to, as its configuration names it.
    ///
    /// # Errors
    /// It names none.
    pub fn base(&self) -> Result<&str> {
        self.stored.base.as_deref().ok_or_else(|| {
            Error::config(
                self.dir.join(ADAPTER_CONFIG_FILE).display(),
                "`base_model_name_or_path` names no model",
                "give the base as --model, and this directory as --adapter",
            )
        })
    }

    /// Where its config.json is, if it has one: a run writes one, with the labels.
    pub fn description(&self) -> Result<Option<ModelSource>> {
        let source = ModelSource::directory(&self.dir)?;
        Ok(Some(source).filter(|s| s.has_file(graft_models::config::CONFIG_FILE)))
    }

    /// Virtual tokens that it puts in front of each text.
    pub fn virtual_tokens(&self) -> usize {
        self.stored.config.method.virtual_tokens()
    }

    /// Whether it was trained to label tokens, as PEFT states it.
    pub fn classifies_tokens(&self) -> bool {
        self.stored.classifies_tokens()
    }

    /// The number of labels that its classification head tells apart, if it has one.
    pub fn labels(&self) -> Result<Option<Labels>> {
        let file = SafetensorsFile::open(self.dir.join(ADAPTER_WEIGHTS_FILE))?;
        let ends = [
            "classifier.weight",
            "classifier.out_proj.weight",
            "score.weight",
        ];
        let head = file.tensors().find(|info| {
            let name = self.stored.name_in_memory(&info.name, DEFAULT);
            ends.contains(&name.as_str())
        });
        let rows = head.and_then(|info| info.shape.first().copied());
        Ok(rows.map(|rows| Labels::numbered(rows as usize)))
    }

    /// Puts it beside the model that it belongs to, under a name, and takes it into use.
    ///
    /// # Errors
    /// An adapter of another model.
    pub fn beside<N: Network>(&self, model: &mut Model<N>, name: &str) -> Result<()> {
        load_adapter(&mut model.parameters, &model.config, name, &self.dir)?;
        Ok(())
    }

    /// The hash of every tensor of base and adapter, by name, from a model with the adapter beside it and the hashes of
    /// the base as it was read.
    ///
    /// # Errors
    /// A file that cannot be read.
    pub fn hashes(&self, p: &Parameters, base: Hashes) -> Result<BTreeMap<String, FoundTensor>> {
        let mut all: BTreeMap<String, FoundTensor> = base
            .into_iter()
            .filter_map(|(name, hash)| Some((name.clone(), found(p, &name, hash)?)))
            .collect();
        all.extend(tensors_of(&self.dir)?);
        Ok(all)
    }
}
