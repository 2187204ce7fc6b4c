//! What a frozen trunk makes of each example, computed once.
//!
//! When nothing below the head is trained, the encoder's output for an example is the same in every epoch: dropout
//! begins where training does, and a packed batch computes each sequence as if it were alone. The rows kept here are
//! therefore those that the encoder would compute again, bit for bit, and later epochs skip it.

use graft_nn::Forward;
use graft_tensor::Tensor;

use crate::encode::Encoded;
use crate::error::Result;
use crate::model::Model;

/// Bytes of features that are kept at most; larger data sets are computed anew.
const MOST_BYTES: usize = 512 << 20;

/// The first token's last hidden state of each example, as far as it was asked for.
#[derive(Debug)]
pub struct Features {
    hidden: usize,
    rows: Vec<Option<Box<[f32]>>>,
}

impl Features {
    /// Room for `examples` of them, or `None` if they would take too much memory.
    pub fn for_examples(model: &Model, examples: usize) -> Option<Features> {
        let hidden = model.config.hidden_size;
        let bytes = examples.saturating_mul(hidden * size_of::<f32>());
        (bytes <= MOST_BYTES).then(|| Features {
            hidden,
            rows: vec![None; examples],
        })
    }

    /// The rows of a batch, `[examples, hidden]`; those not seen before are computed.
    ///
    /// # Errors
    /// As the model's forward pass.
    pub fn rows(&mut self, model: &Model, data: &Encoded, batch: &[usize]) -> Result<Tensor> {
        let new: Vec<usize> = batch
            .iter()
            .copied()
            .filter(|&i| self.rows[i].is_none())
            .collect();
        if !new.is_empty() {
            let mut f = Forward::evaluate(&model.parameters);
            let first = model.classifier.first_tokens(&mut f, &data.pack(&new))?;
            let values = first.value().to_vec::<f32>()?;
            for (&i, row) in new.iter().zip(values.chunks(self.hidden)) {
                self.rows[i] = Some(row.into());
            }
        }
        let mut all = Vec::with_capacity(batch.len() * self.hidden);
        for &i in batch {
            all.extend_from_slice(self.rows[i].as_deref().unwrap_or_default());
        }
        let shape = [batch.len(), self.hidden];
        let memory = model
            .parameters
            .memory()
            .with(graft_tensor::Category::Activations);
        Ok(Tensor::from_vec(&memory, all, &shape)?)
    }
}
