//! What is kept of a frozen trunk: used, bounded, and trusted only after a check.

use std::path::{Path, PathBuf};

use graft_models::{Classifier, Cut};
use graft_tensor::{Memory, Tensor};
use graft_tests::fixture;
use graft_tests::runs::{Task, snapshot};
use graft_trainer::certificate::sha256_hex;
use graft_trainer::config::{Rule, RunConfig, Settings};
use graft_trainer::course::policy;
use graft_trainer::data::{Columns, Dataset, training_labels};
use graft_trainer::evaluate::Labelled;
use graft_trainer::features::Features;
use graft_trainer::model::{Changes, Hashes, Model};

/// Bytes in front of the first entry of a file, and of an entry in front of its numbers and behind them.
const HEADER: usize = 48;
const FRONT: usize = 40;
const CHECKSUM: usize = 32;

/// A tiny model and data for it.
struct Setting {
    task: Task,
    model: Model,
    hashes: Hashes,
    data: Labelled,
}

/// The numbers of every example, as the model computes or keeps them.
type Rows = Vec<Vec<u32>>;

impl Setting {
    fn new() -> Setting {
        let task = Task::new(24, 1);
        let data = Dataset::read(&task.path("train.jsonl"), &Columns::default()).unwrap();
        let loaded = Model::for_task_while(
            fixture("tiny-bert").to_str().unwrap(),
            training_labels(&data).unwrap(),
            Changes::default(),
            1,
            &Memory::cpu(),
            |config, tokenizer| Labelled::with::<Classifier>(config, tokenizer, &data, None),
        )
        .unwrap();
        Setting {
            task,
            model: loaded.model,
            hashes: loaded.hashes,
            data: loaded.meanwhile,
        }
    }

    fn config(&self, settings: &[&str]) -> RunConfig {
        let mut all = Settings::new();
        let tiny = fixture("tiny-bert");
        all.flag("model.path", "--model", tiny.to_str().unwrap());
        all.flag("data.train", "--train", self.task.text("train.jsonl"));
        all.flag("output.dir", "--out", self.task.text("run"));
        settings.iter().for_each(|s| all.set(s).unwrap());
        RunConfig::resolve(all).unwrap()
    }

    /// The features of a run whose files would be in the task's folder.
    fn features(&self, cut: Cut, settings: &[&str]) -> Option<Features> {
        self.features_in(cut, settings, &self.task.path(""))
    }

    fn features_in(&self, cut: Cut, settings: &[&str], dir: &Path) -> Option<Features> {
        let config = self.config(settings);
        let epochs = config.train.epochs;
        Features::new(&config, &self.model, &self.hashes, (Some(cut), epochs), dir)
    }

    /// Asks for every example, in batches of five.
    fn rows(&self, features: &mut Features) -> Rows {
        let examples: Vec<usize> = (0..self.data.targets.len()).collect();
        let mut all = Vec::new();
        for batch in examples.chunks(5) {
            let tensor = features
                .rows(&self.model, &self.data.encoded, batch)
                .unwrap();
            let values = tensor.to_vec::<f32>().unwrap();
            let hidden = self.model.config.hidden_size;
            let mut rest = values.as_slice();
            for &i in batch {
                let count = features.cut().rows(self.data.encoded.lengths[i]) * hidden;
                let (rows, more) = rest.split_at(count);
                all.push(rows.iter().map(|x| x.to_bits()).collect());
                rest = more;
            }
            assert!(rest.is_empty());
        }
        all
    }

    /// From here on, what is computed anew is something else.
    fn spoil(&mut self) {
        let id = self.model.parameters.find("bert.embeddings.LayerNorm.bias");
        let id = id.unwrap();
        let hidden = self.model.config.hidden_size;
        let ones = Tensor::from_vec(&Memory::cpu(), vec![1f32; hidden], &[hidden]).unwrap();
        self.model.parameters.set(id, ones).unwrap();
    }

    /// Keeps every example in the folder `kept`, and returns the file and the rows.
    fn kept(&self, cut: Cut) -> (PathBuf, String, Rows) {
        let setting = format!("train.cache_dir={}", self.task.text("kept"));
        let mut features = self.features(cut, &[&setting]).unwrap();
        let rows = self.rows(&mut features);
        assert_eq!(features.finish(), Vec::<String>::new());
        let files: Vec<String> = snapshot(&self.task.path("kept")).into_keys().collect();
        assert_eq!(files.len(), 1, "{files:?}");
        let path = self.task.path("kept").join(&files[0]);
        (path, setting, rows)
    }
}

const CUTS: [Cut; 2] = [Cut::Head, Cut::Layer(1)];

#[test]
fn each_text_is_computed_once() {
    for cut in CUTS {
        for settings in [&[][..], &["train.cache_memory=0"]] {
            let mut setting = Setting::new();
            let mut features = setting.features(cut, settings).unwrap();
            let examples: Vec<usize> = (0..5).collect();
            assert!(features.fetch(&setting.data.encoded, &examples).is_none());
            let first = setting.rows(&mut features);
            setting.spoil();
            assert!(setting.rows(&mut features) == first, "{cut:?} {settings:?}");
            assert!(features.fetch(&setting.data.encoded, &examples).is_some());
            let mut fresh = setting.features(cut, settings).unwrap();
            assert!(setting.rows(&mut fresh) != first);
        }
    }
}

#[test]
fn memory_keeps_to_its_budget_and_the_file_takes_the_rest() {
    let setting = Setting::new();
    let hidden = setting.model.config.hidden_size;
    let tokens: usize = setting.data.encoded.lengths.iter().sum();
    for (cut, rows) in [
        (Cut::Head, setting.data.targets.len()),
        (Cut::Layer(1), tokens),
    ] {
        let mut features = setting.features(cut, &[]).unwrap();
        let in_memory = setting.rows(&mut features);
        // Texts that stand in the data twice are kept once.
        let kept = features.kept();
        assert!(kept.memory > 0 && kept.memory <= (4 * rows * hidden) as u64);
        assert_eq!(kept.file, 0);

        let before = snapshot_names(&setting.task.path(""));
        let mut features = setting.features(cut, &["train.cache_memory=0"]).unwrap();
        assert!(setting.rows(&mut features) == in_memory);
        assert_eq!(features.kept().memory, 0);
        assert!(features.kept().file > kept.memory);
        if cfg!(unix) {
            // Nothing is left however the run ends.
            assert_eq!(snapshot_names(&setting.task.path("")), before);
        }
        assert_eq!(features.finish(), Vec::<String>::new());
        assert_eq!(snapshot_names(&setting.task.path("")), before);

        let settings = ["train.cache_memory=0", "train.cache=memory"];
        let mut features = setting.features(cut, &settings).unwrap();
        assert!(setting.rows(&mut features) == in_memory);
        assert_eq!(features.kept(), Default::default());
    }
}

fn snapshot_names(dir: &Path) -> Vec<std::ffi::OsString> {
    let entries = std::fs::read_dir(dir).unwrap();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    names
}

#[test]
fn nothing_is_kept_where_nothing_would_be_gained() {
    let setting = Setting::new();
    assert!(setting.features(Cut::Layer(0), &[]).is_none());
    assert!(setting.features(Cut::Head, &["train.cache=off"]).is_none());
    // No text comes a second time.
    assert!(setting.features(Cut::Head, &["train.epochs=1"]).is_none());
}

#[test]
fn what_outlives_a_run_serves_the_next() {
    for cut in CUTS {
        let mut setting = Setting::new();
        let (path, directory, rows) = setting.kept(cut);
        let bytes = std::fs::read(&path).unwrap();
        let mut features = setting
            .features(cut, &[&directory, "train.epochs=1"])
            .unwrap();
        // One text is computed and compared before any is used.
        assert!(features.fetch(&setting.data.encoded, &[0, 1]).is_none());
        features
            .rows(&setting.model, &setting.data.encoded, &[0, 1])
            .unwrap();
        setting.spoil();
        assert!(setting.rows(&mut features) == rows, "{cut:?}");
        assert_eq!(features.kept().memory, 0);
        assert_eq!(features.finish(), Vec::<String>::new());
        // Nothing was new.
        assert!(std::fs::read(&path).unwrap() == bytes);
    }
}

#[test]
fn another_trunk_has_another_file() {
    let mut setting = Setting::new();
    let (path, directory, rows) = setting.kept(Cut::Head);
    // As if the embeddings had been read from another checkpoint.
    setting.spoil();
    let name = "bert.embeddings.LayerNorm.bias";
    let id = setting.model.parameters.find(name).unwrap();
    let bytes = setting.model.parameters.value(id).unwrap().to_bytes();
    setting
        .hashes
        .insert(name.into(), sha256_hex(&bytes.unwrap()));
    let mut features = setting.features(Cut::Head, &[&directory]).unwrap();
    assert!(setting.rows(&mut features) != rows);
    assert_eq!(features.finish(), Vec::<String>::new());
    let files: Vec<String> = snapshot(&setting.task.path("kept")).into_keys().collect();
    assert_eq!(files.len(), 2);

    // Even if one is put into the place of the other.
    for file in &files {
        std::fs::copy(&path, setting.task.path("kept").join(file)).unwrap();
    }
    let mut features = setting.features(Cut::Head, &[&directory]).unwrap();
    assert!(setting.rows(&mut features) != rows);
    let notes = features.finish();
    assert!(
        notes.len() == 1 && notes[0].contains("not made with this trunk"),
        "{notes:?}"
    );
}

#[test]
fn what_another_processor_computed_is_stale() {
    for cut in CUTS {
        let setting = Setting::new();
        let (path, directory, rows) = setting.kept(cut);
        // The last bit of a number of each text, under a checksum that fits.
        let mut bytes = std::fs::read(&path).unwrap();
        let mut at = HEADER;
        while at < bytes.len() {
            let count = u64::from_le_bytes(bytes[at + 32..at + 40].try_into().unwrap()) as usize;
            let end = at + FRONT + 4 * count;
            bytes[at + FRONT + 4] ^= 1;
            let checksum = sha256_hex(&bytes[at..end]);
            for (i, digits) in checksum.as_bytes().chunks(2).enumerate() {
                let digits = std::str::from_utf8(digits).unwrap();
                bytes[end + i] = u8::from_str_radix(digits, 16).unwrap();
            }
            at = end + CHECKSUM;
        }
        std::fs::write(&path, &bytes).unwrap();
        let mut features = setting.features(cut, &[&directory]).unwrap();
        assert!(setting.rows(&mut features) == rows, "{cut:?}");
        let notes = features.finish();
        assert!(
            notes.len() == 1 && notes[0].contains("stale"),
            "{cut:?} {notes:?}"
        );
        // And was replaced.
        let mut features = setting.features(cut, &[&directory]).unwrap();
        assert!(setting.rows(&mut features) == rows);
        assert_eq!(features.finish(), Vec::<String>::new());
    }
}

#[test]
fn every_damage_is_noticed_said_and_repaired() {
    let setting = Setting::new();
    let (path, directory, rows) = setting.kept(Cut::Head);
    let whole = std::fs::read(&path).unwrap();
    let hidden = setting.model.config.hidden_size;
    let entry = FRONT + 4 * hidden + CHECKSUM;
    assert_eq!((whole.len() - HEADER) % entry, 0);
    let check = |bytes: &[u8], what: &str| {
        std::fs::write(&path, bytes).unwrap();
        let mut features = setting.features(Cut::Head, &[&directory]).unwrap();
        assert!(setting.rows(&mut features) == rows, "{what}");
        let notes = features.finish();
        assert!(
            notes.len() == 1 && notes[0].contains("damaged"),
            "{what}: {notes:?}"
        );
        let mut features = setting.features(Cut::Head, &[&directory]).unwrap();
        assert!(setting.rows(&mut features) == rows, "{what}: repaired");
        assert_eq!(features.finish(), Vec::<String>::new(), "{what}");
    };
    // A bit of the header, and of every part of an entry but its key: under another key, no text is found there.
    let places = [0, 20, 33].into_iter().chain((0..3).flat_map(|i| {
        [32, 39, FRONT, entry - CHECKSUM - 1, entry - 1].map(|at| HEADER + i * entry + at)
    }));
    for at in places {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x10;
        check(&bytes, &format!("byte {at}"));
    }
    for cut_off in [
        1,
        CHECKSUM,
        entry - 1,
        entry + 1,
        whole.len() - HEADER - 1,
        whole.len() - 3,
    ] {
        check(
            &whole[..whole.len() - cut_off],
            &format!("{cut_off} bytes short"),
        );
    }
    // A key that no text has: one text more to compute, and nothing wrong.
    let mut bytes = whole.clone();
    bytes[HEADER] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let mut features = setting.features(Cut::Head, &[&directory]).unwrap();
    assert!(setting.rows(&mut features) == rows);
}

#[test]
fn a_run_goes_on_without_a_file_that_cannot_be_written() {
    let setting = Setting::new();
    let mut features = setting.features(Cut::Head, &[]).unwrap();
    let rows = setting.rows(&mut features);
    let nowhere = setting.task.path("no/such/folder");
    let mut features = setting
        .features_in(Cut::Head, &["train.cache_memory=0"], &nowhere)
        .unwrap();
    assert!(setting.rows(&mut features) == rows);
    assert!(setting.rows(&mut features) == rows);
    let notes = features.finish();
    assert!(
        notes.len() == 1 && notes[0].contains("cannot write"),
        "{notes:?}"
    );

    // A file where the directory should be.
    let directory = format!("train.cache_dir={}", setting.task.text("train.jsonl"));
    let mut features = setting.features(Cut::Head, &[&directory]).unwrap();
    assert!(setting.rows(&mut features) == rows);
    let notes = features.finish();
    assert!(!notes.is_empty(), "{notes:?}");
    assert!(
        notes.iter().all(|note| note.contains("comput")),
        "{notes:?}"
    );
}

#[test]
fn training_begins_at_the_lowest_trained_parameter_whatever_the_rules_are_called() {
    let cases: [(&str, &[&str], Option<Cut>); 8] = [
        ("head", &[], Some(Cut::Head)),
        ("last:1", &[], Some(Cut::Layer(1))),
        ("last:2", &[], Some(Cut::Layer(0))),
        ("full", &[], None),
        ("head", &["train *layer.1.*bias"], Some(Cut::Layer(1))),
        ("last:1", &["freeze *layer.1.*"], Some(Cut::Head)),
        ("full", &["freeze *embeddings*"], Some(Cut::Layer(0))),
        ("head", &["train *word_embeddings*"], None),
    ];
    let task = Task::new(6, 1);
    let data = Dataset::read(&task.path("train.jsonl"), &Columns::default()).unwrap();
    for family in ["tiny-bert", "tiny-roberta", "tiny-distilbert"] {
        let labels = training_labels(&data).unwrap();
        let spec = fixture(family);
        let (model, _) =
            Model::<Classifier>::for_task(spec.to_str().unwrap(), labels, None, 1, &Memory::cpu())
                .unwrap();
        for (strategy, rules, expected) in cases {
            let rules: Vec<Rule> = rules.iter().map(|rule| rule.parse().unwrap()).collect();
            let strategy = strategy.parse().unwrap();
            let policy = policy(&model.network, &strategy, &rules, &model.parameters).unwrap();
            let set = policy.resolve(&model.parameters).unwrap();
            let cut = model.network.cut(&model.parameters, &set);
            assert_eq!(cut, expected, "{family} {strategy} {rules:?}");
            let Some(cut) = cut else { continue };
            for (id, parameter) in model.parameters.iter() {
                let name = parameter.name();
                let below = name.contains("embeddings")
                    || name.contains("layer.0.") && cut > Cut::Layer(0)
                    || name.contains("layer.1.") && cut > Cut::Layer(1);
                assert_eq!(model.network.is_below(cut, id), below, "{cut:?} {name}");
                assert!(!(below && set.contains(id)), "{cut:?} {name}");
            }
        }
    }
}
