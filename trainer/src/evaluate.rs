//! What a model gives for the texts of a data set.

use std::path::Path;

use graft_models::{ProblemType, Tokenizer};
use graft_nn::Forward;

use crate::batch::{BatchSize, in_order};
use crate::data::{Columns, Dataset, encode_labels};
use crate::encode::{Encoded, longest_text};
use crate::error::{Error, Result};
use crate::features::Features;
use crate::model::Model;
use crate::plan::{heaviest_if, read_all, rows};
use crate::targets::Targets;
use crate::text_classifier::TextClassifier;

/// Tokens of one batch of an evaluation: enough to keep every core busy, few enough to need less memory than a
/// training step.
const EVALUATION_BATCH: BatchSize = BatchSize::Tokens(2048);

/// The outputs of every example, in their order: a row of `labels` numbers each, or for each token of each. With
/// `features`, the trunk is only run for examples that are not in there yet.
///
/// # Errors
/// As the model's forward pass.
pub fn logits<N: TextClassifier>(
    model: &Model<N>,
    data: &Encoded,
    mut features: Option<&mut Features>,
) -> Result<Vec<Vec<f32>>> {
    let labels = N::labels(&model.config).count();
    let mut all = Vec::with_capacity(data.encodings.len());
    let planned = model.parameters.memory().is_planned();
    let batches = in_order(&data.lengths, EVALUATION_BATCH);
    let rows = rows(&data.lengths, &model.parameters, |_| 1);
    for batch in heaviest_if(planned, batches, &rows) {
        let mut f = Forward::evaluate(&model.parameters);
        let packed = data.pack(&batch);
        let logits = match &mut features {
            Some(features) => {
                let rows = features.rows(model, data, &batch)?;
                let cut = features.cut();
                model.network.above(&mut f, cut, rows, &packed.offsets)?
            }
            None => model.network.forward(&mut f, &packed)?,
        };
        let values = read_all(logits.value())?;
        all.extend(values.chunks(labels).map(<[f32]>::to_vec));
    }
    if planned {
        let rows = match N::problem(&model.config) {
            ProblemType::Tokens => data.lengths.iter().sum(),
            _ => data.encodings.len(),
        };
        all.resize(rows, vec![0.0; labels]);
    }
    Ok(all)
}

/// [`logits`] of a model that is there to be used, all of them numbers.
///
/// # Errors
/// As there; a logit that is none; several numbers to be predicted at once.
pub(crate) fn sound_logits<N: TextClassifier>(
    model: &Model<N>,
    data: &Encoded,
) -> Result<Vec<Vec<f32>>> {
    let outputs = N::labels(&model.config).count();
    if N::problem(&model.config) == ProblemType::Regression && outputs > 1 {
        let what = format!("the model predicts {outputs} numbers for each text, expected one");
        let help = "train a model for each of them, with `trainer train --task regression`";
        return Err(Error::config("problem_type", what, help));
    }
    let all = logits(model, data, None)?;
    match all.iter().flatten().all(|x| x.is_finite()) {
        true => Ok(all),
        false => Err(Error::not_numbers()),
    }
}

/// Labelled examples, ready to be evaluated on.
#[derive(Debug)]
pub struct Labelled {
    /// The tokens
    pub encoded: Encoded,
    /// What is right for each example
    pub targets: Targets,
    /// Examples without any text
    pub empty: usize,
    /// What the user should know of the file
    pub notes: Vec<String>,
}

impl Labelled {
    /// Reads and tokenizes a file whose labels the model knows.
    ///
    /// # Errors
    /// A file that cannot be used, a label that the model does not know.
    pub fn read<N: TextClassifier>(
        model: &Model<N>,
        path: &Path,
        columns: &Columns,
        max_length: Option<usize>,
    ) -> Result<Labelled> {
        let data = Dataset::read(path, columns)?;
        Labelled::new(model, &data, max_length)
    }

    /// Tokenizes a data set whose labels the model knows.
    ///
    /// # Errors
    /// A label that the model does not know.
    pub fn new<N: TextClassifier>(
        model: &Model<N>,
        data: &Dataset,
        max_length: Option<usize>,
    ) -> Result<Labelled> {
        Labelled::with::<N>(&model.config, &model.tokenizer, data, max_length)
    }

    /// [`Labelled::new`] for a model of which only these two are there yet.
    ///
    /// # Errors
    /// A label that the model does not know.
    pub fn with<N: TextClassifier>(
        config: &N::Config,
        tokenizer: &Tokenizer,
        data: &Dataset,
        max_length: Option<usize>,
    ) -> Result<Labelled> {
        let limit = longest_text::<N>(config, max_length)?;
        let encoded = Encoded::with(limit, tokenizer, data)?;
        Ok(Labelled {
            targets: encode_labels(N::labels(config), data, &encoded)?,
            encoded,
            empty: data.empty_texts(),
            notes: data.notes.clone(),
        })
    }
}
