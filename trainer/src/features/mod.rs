//! What a frozen trunk makes of each text, computed once.
//!
//! Below the lowest trained parameter a text has the same hidden states in every epoch: dropout begins where training
//! does, and a packed batch computes each sequence as if it were alone. What the first trained layer reads is kept
//! here (for a head, a row for each text; for a layer, a row for each token), so that the layers below are run once
//! per text. Kept rows are those that would be computed again, bit for bit.
//!
//! They stay in memory up to a budget and go to a file beyond it (`file.rs`). With a directory for it, they outlive the
//! run: a file there belongs to one trunk, by the hashes of its tensors, and finds a text by its token ids, which are
//! all that the trunk sees of tokenizer, longest length and text.

mod file;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use graft_models::{Cut, Encoding};
use graft_nn::Forward;
use graft_tensor::{Category, Tensor};
use sha2::{Digest, Sha256};

use crate::certificate::{hex, sha256_hex};
use crate::config::{CacheKind, RunConfig};
use crate::encode::Encoded;
use crate::error::Result;
use crate::model::{Hashes, Model};
use crate::plan::read_all;
use crate::text_classifier::TextClassifier;
use file::{Entries, FILE_LIMIT, Place, write_all};

/// SHA-256 of a text's token ids and types.
type Key = [u8; 32];

/// How many bytes are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Kept {
    /// In memory
    pub memory: u64,
    /// In a file
    pub file: u64,
}

/// Where the rows of a text are.
#[derive(Debug)]
enum Slot {
    Memory(Box<[f32]>),
    /// In this run's file
    Spilled(Place),
    /// In the file of an earlier run
    Earlier(Place),
}

/// The rows that pass through a cut, by text, as far as they were asked for.
#[derive(Debug)]
pub struct Features {
    cut: Cut,
    hidden: usize,
    trunk: Key,
    slots: BTreeMap<Key, Slot>,
    /// Bytes in memory, and at most
    memory: (usize, usize),
    spill: Spill,
    earlier: Option<Entries>,
    /// Whether a text of the earlier file was computed again and compared
    probed: bool,
    keep_in: Option<PathBuf>,
    /// There is something that the earlier file lacks
    news: bool,
    notes: Vec<String>,
}

/// The file for what does not fit in memory.
#[derive(Debug)]
enum Spill {
    /// Not used, or no longer
    Off,
    /// To be created when it is needed
    At(PathBuf),
    Open(Entries),
}

impl Features {
    /// For `epochs` whose training begins at `cut`: nothing if it is not worth keeping. `dir` is where a file may be while
    /// the run goes on. What lies below the cut must still be what `hashes` says.
    pub fn new<N: TextClassifier>(
        config: &RunConfig,
        model: &Model<N>,
        hashes: &Hashes,
        (cut, epochs): (Option<Cut>, usize),
        dir: &Path,
    ) -> Option<Features> {
        let train = &config.train;
        // The embeddings alone are computed as fast as they are read.
        let cut = cut.filter(|&cut| cut != Cut::Layer(0))?;
        let again = epochs > 1 || train.cache_dir.is_some();
        if train.cache == CacheKind::Off || !again {
            return None;
        }
        let trunk = identity(model, hashes, cut);
        let mut features = Features {
            cut,
            hidden: N::hidden_size(&model.config),
            trunk,
            slots: BTreeMap::new(),
            memory: (0, train.cache_memory.unwrap_or(0).saturating_mul(1 << 20)),
            spill: match train.cache {
                CacheKind::File => Spill::At(dir.join(file::SPILL_FILE)),
                _ => Spill::Off,
            },
            earlier: None,
            probed: false,
            keep_in: None,
            news: false,
            notes: Vec::new(),
        };
        if let Some(dir) = &train.cache_dir {
            let name = format!("trunk-{}.features", &hex(&trunk)[..16]);
            features.open_earlier(dir.join(name));
        }
        Some(features)
    }

    fn open_earlier(&mut self, path: PathBuf) {
        match Entries::open(&path, &self.trunk) {
            Ok(None) => {}
            Ok(Some((entries, places, damage))) => {
                let places = places.into_iter();
                self.slots
                    .extend(places.map(|(key, place)| (key, Slot::Earlier(place))));
                self.earlier = Some(entries);
                self.notes.extend(damage);
            }
            Err(what) => self.notes.push(format!(
                "{}: {what}; what it keeps is computed anew",
                path.display()
            )),
        }
        self.keep_in = Some(path);
    }

    /// Where the trunk ends.
    pub fn cut(&self) -> Cut {
        self.cut
    }

    /// Bytes that the rows of a data set would take; those of texts that stand twice, twice.
    pub fn keeps(&self, data: &Encoded) -> u64 {
        let all: Vec<usize> = (0..data.lengths.len()).collect();
        4 * self.numbers(data, &all) as u64
    }

    /// What is kept now.
    pub fn kept(&self) -> Kept {
        Kept {
            memory: self.memory.0 as u64,
            file: [self.earlier.as_ref(), self.spill.entries()]
                .into_iter()
                .flatten()
                .map(Entries::bytes)
                .sum(),
        }
    }

    /// What the user should know, since the last call.
    pub fn take_notes(&mut self) -> Vec<String> {
        std::mem::take(&mut self.notes)
    }

    /// The rows of a batch, one text after the other, if all of them are kept.
    pub fn fetch(&mut self, data: &Encoded, batch: &[usize]) -> Option<Vec<f32>> {
        let mut all = Vec::with_capacity(self.numbers(data, batch));
        for &i in batch {
            let encoding = &data.encodings[i];
            let key = key(encoding);
            if !self.probed && matches!(self.slots.get(&key), Some(Slot::Earlier(_))) {
                return None;
            }
            if !self.read(&key, self.cut.rows(encoding.ids.len()), &mut all) {
                return None;
            }
        }
        Some(all)
    }

    /// The rows of a batch, `[rows, hidden]`; those that are not kept are computed.
    ///
    /// # Errors
    /// As the model's forward pass.
    pub fn rows<N: TextClassifier>(
        &mut self,
        model: &Model<N>,
        data: &Encoded,
        batch: &[usize],
    ) -> Result<Tensor> {
        self.probe(model, data, batch)?;
        if let Some(all) = self.fetch(data, batch) {
            return self.tensor(model, all);
        }
        // The rows of each text, as far as they are kept.
        let mut found: Vec<Option<Vec<f32>>> = Vec::with_capacity(batch.len());
        let mut new = Vec::new();
        for &i in batch {
            let encoding = &data.encodings[i];
            let mut rows = Vec::new();
            let kept = self.read(&key(encoding), self.cut.rows(encoding.ids.len()), &mut rows);
            if !kept {
                new.push(i);
            }
            found.push(kept.then_some(rows));
        }
        let values = self.compute(model, data, &new)?;
        let mut computed = values.as_slice();
        let mut all = Vec::with_capacity(self.numbers(data, batch));
        for (&i, found) in batch.iter().zip(found) {
            if let Some(rows) = found {
                all.extend_from_slice(&rows);
                continue;
            }
            let encoding = &data.encodings[i];
            let count = self.cut.rows(encoding.ids.len()) * self.hidden;
            let (rows, rest) = computed.split_at(count);
            computed = rest;
            self.keep(key(encoding), rows);
            all.extend_from_slice(rows);
        }
        self.tensor(model, all)
    }

    /// Rows as a tensor of the run's activations, `[rows, hidden]`.
    ///
    /// # Errors
    /// None for rows of this cut.
    pub fn tensor<N: TextClassifier>(&self, model: &Model<N>, rows: Vec<f32>) -> Result<Tensor> {
        let memory = model.parameters.memory().with(Category::Activations);
        let shape = [rows.len() / self.hidden, self.hidden];
        Ok(Tensor::from_vec(&memory, rows, &shape)?)
    }

    /// Writes what is to outlive the run; returns what the user should know. This run's own file goes.
    pub fn finish(mut self) -> Vec<String> {
        if let Some(path) = self.keep_in.take().filter(|_| self.news)
            && let Err(what) = self.write(&path)
        {
            self.notes.push(format!(
                "{}: {what}; the next run will compute it anew",
                path.display()
            ));
        }
        self.notes
    }

    fn write(&mut self, path: &Path) -> std::io::Result<()> {
        if let Some(dir) = path.parent() {
            std::fs::create_dir_all(dir)?;
        }
        let slots = std::mem::take(&mut self.slots);
        // What this run has used goes before what it has not, should the file become too large.
        let is_old = |slot: &Slot| matches!(slot, Slot::Earlier(_));
        let (mut old, new): (Vec<_>, Vec<_>) =
            slots.into_iter().partition(|(_, slot)| is_old(slot));
        if !self.probed {
            // Not known to be what this program would compute: not to be mixed with what it did compute.
            old.clear();
        }
        let (spill, earlier) = (&mut self.spill, &mut self.earlier);
        let entries = new.into_iter().chain(old).filter_map(|(key, slot)| {
            let rows = match slot {
                Slot::Memory(rows) => rows.into_vec(),
                Slot::Spilled(place) => spill.entries_mut()?.read(&key, place)?,
                Slot::Earlier(place) => earlier.as_mut()?.read(&key, place)?,
            };
            Some((key, rows))
        });
        write_all(path, &self.trunk, entries, FILE_LIMIT)
    }

    /// Numbers that pass the cut for a batch.
    fn numbers(&self, data: &Encoded, batch: &[usize]) -> usize {
        let rows = batch.iter().map(|&i| self.cut.rows(data.lengths[i]));
        rows.sum::<usize>() * self.hidden
    }

    /// Runs the trunk.
    fn compute<N: TextClassifier>(
        &self,
        model: &Model<N>,
        data: &Encoded,
        batch: &[usize],
    ) -> Result<Vec<f32>> {
        if batch.is_empty() {
            return Ok(Vec::new());
        }
        let mut f = Forward::evaluate(&model.parameters);
        let below = model.network.below(&mut f, self.cut, &data.pack(batch))?;
        read_all(below.value())
    }

    /// Appends the rows of a text to `to`, if they are kept; forgets them if they turn out damaged.
    fn read(&mut self, key: &Key, rows: usize, to: &mut Vec<f32>) -> bool {
        let count = rows * self.hidden;
        let (path, read) = match self.slots.get(key) {
            None => return false,
            Some(Slot::Memory(rows)) => {
                to.extend_from_slice(rows);
                return true;
            }
            Some(Slot::Spilled(place)) => (Spill::entries_mut(&mut self.spill), *place),
            Some(Slot::Earlier(place)) => (self.earlier.as_mut(), *place),
        };
        let Some(entries) = path else { return false };
        match entries.read(key, read).filter(|rows| rows.len() == count) {
            Some(rows) => {
                to.extend_from_slice(&rows);
                true
            }
            None => {
                if !std::mem::replace(&mut entries.damage_said, true) {
                    self.notes.push(format!(
                        "{}: damaged; what cannot be read is computed anew",
                        entries.path().display()
                    ));
                }
                self.slots.remove(key);
                false
            }
        }
    }

    /// Before anything of an earlier run is used, one of its texts is computed again: another version of this program
    /// or another processor may round otherwise, and this run's result must not depend on that.
    fn probe<N: TextClassifier>(
        &mut self,
        model: &Model<N>,
        data: &Encoded,
        batch: &[usize],
    ) -> Result<()> {
        if self.probed {
            return Ok(());
        }
        for &i in batch {
            let encoding = &data.encodings[i];
            let key = key(encoding);
            if !matches!(self.slots.get(&key), Some(Slot::Earlier(_))) {
                continue;
            }
            let mut kept = Vec::new();
            if !self.read(&key, self.cut.rows(encoding.ids.len()), &mut kept) {
                continue;
            }
            self.probed = true;
            let now = self.compute(model, data, &[i])?;
            if !now
                .iter()
                .map(|x| x.to_bits())
                .eq(kept.iter().map(|x| x.to_bits()))
            {
                self.slots
                    .retain(|_, slot| !matches!(slot, Slot::Earlier(_)));
                if let Some(entries) = self.earlier.take() {
                    self.notes.push(format!(
                        "{}: stale, it was computed by another version or on another processor; computed anew",
                        entries.path().display()
                    ));
                }
            }
            return Ok(());
        }
        Ok(())
    }

    /// Keeps the rows of a text where there is room.
    fn keep(&mut self, key: Key, rows: &[f32]) {
        if self.slots.contains_key(&key) {
            // The same text stands twice in the batch.
            return;
        }
        let bytes = size_of_val(rows);
        if self.memory.0 + bytes <= self.memory.1 {
            self.memory.0 += bytes;
            self.news = true;
            self.slots.insert(key, Slot::Memory(rows.into()));
            return;
        }
        match self.spill.append(&self.trunk, &key, rows) {
            Ok(None) => {}
            Ok(Some(place)) => {
                self.news = true;
                self.slots.insert(key, Slot::Spilled(place));
            }
            Err((path, what)) => {
                self.slots
                    .retain(|_, slot| !matches!(slot, Slot::Spilled(_)));
                self.notes.push(format!(
                    "{}: cannot write: {what}; what does not fit in memory is computed anew in every epoch",
                    path.display()
                ));
            }
        }
    }
}

impl Spill {
    fn entries(&self) -> Option<&Entries> {
        match self {
            Spill::Open(entries) => Some(entries),
            _ => None,
        }
    }

    fn entries_mut(&mut self) -> Option<&mut Entries> {
        match self {
            Spill::Open(entries) => Some(entries),
            _ => None,
        }
    }

    /// Appends the rows of a text, unless there is no file or it has reached its limit. After an error the file is
    /// gone, and with it what it took of the disk.
    fn append(
        &mut self,
        trunk: &Key,
        key: &Key,
        rows: &[f32],
    ) -> Result<Option<Place>, (PathBuf, std::io::Error)> {
        if let Spill::At(path) = self {
            match Entries::create(path, trunk) {
                Ok(entries) => *self = Spill::Open(entries),
                Err(e) => {
                    let path = std::mem::take(path);
                    *self = Spill::Off;
                    return Err((path, e));
                }
            }
        }
        let Spill::Open(entries) = self else {
            return Ok(None);
        };
        if entries.bytes() >= FILE_LIMIT {
            return Ok(None);
        }
        let appended = entries.append(key, rows);
        let path = entries.path().to_path_buf();
        appended.map(Some).map_err(|e| {
            *self = Spill::Off;
            (path, e)
        })
    }
}

/// What a text is to the trunk.
fn key(encoding: &Encoding) -> Key {
    let mut hash = Sha256::new();
    hash.update((encoding.ids.len() as u64).to_le_bytes());
    for id in encoding.ids.iter().chain(&encoding.type_ids) {
        hash.update(id.to_le_bytes());
    }
    hash.finalize().into()
}

/// All that decides what the trunk makes of token ids: its tensors, how the configuration arranges them, and the type
/// they are computed in.
fn identity<N: TextClassifier>(model: &Model<N>, hashes: &Hashes, cut: Cut) -> Key {
    let mut text = format!(
        "{} {cut:?} {} in {}\n",
        env!("CARGO_PKG_VERSION"),
        N::arrangement(&model.config),
        model.parameters.compute(),
    );
    for (id, parameter) in model.parameters.iter() {
        let beside = model.parameters.adapters().anchor(id);
        if model.network.is_below(cut, beside) {
            let name = parameter.name();
            text += &format!("{} {:?} {name}\n", hashes[name], parameter.shape());
        }
    }
    Sha256::digest(sha256_hex(text.as_bytes())).into()
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_ends_the_file_and_not_the_run() {
        let trunk = [7; 32];
        // A device that is always full.
        let mut spill = Spill::Open(Entries::full().unwrap());
        let (path, error) = spill.append(&trunk, &[1; 32], &[1.0; 8]).unwrap_err();
        assert_eq!(path, Path::new("/dev/full"));
        assert_eq!(error.kind(), std::io::ErrorKind::StorageFull);
        assert!(spill.entries().is_none());
        // From then on nothing is tried, and nothing fails.
        assert!(matches!(
            spill.append(&trunk, &[2; 32], &[1.0; 8]),
            Ok(None)
        ));
    }
}
