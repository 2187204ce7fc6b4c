//! The embedding table.

use graft_autograd::Var;

use crate::error::Result;
use crate::forward::Forward;
use crate::parameters::{Init, ParamId, Parameters, Role};

/// A row of a table for each id: `i64 [tokens]` to `[tokens, width]`.
#[derive(Clone, Debug)]
pub struct Embedding {
    weight: ParamId,
}

impl Embedding {
    /// Declares `NAME.weight [rows, width]`, normal with standard deviation `std`.
    ///
    /// # Errors
    /// A name that is taken.
    pub fn new(
        p: &mut Parameters,
        name: &str,
        rows: usize,
        width: usize,
        std: f64,
    ) -> Result<Embedding> {
        let weight = p.declare(&format!("{name}.weight"), &[rows, width], Init::Normal(std))?;
        p.set_role(weight, Role::Embedding);
        Ok(Embedding { weight })
    }

    /// The table's number.
    pub fn weight(&self) -> ParamId {
        self.weight
    }

    /// The rows of the prompt in use that stands beside this table, `[tokens, width]`, in the parameters' type.
    ///
    /// # Errors
    /// A parameter without a value.
    pub fn prompt(&self, f: &mut Forward) -> Result<Option<Var>> {
        match f.adapter(self.weight) {
            Some(adapter) => adapter.prompt(f),
            None => Ok(None),
        }
    }

    /// The rows of `ids`, in the type of activations.
    ///
    /// # Errors
    /// An id outside the table.
    pub fn forward(&self, f: &mut Forward, ids: &Var) -> Result<Var> {
        let table = f.parameter(self.weight)?;
        let rows = match f.adapter(self.weight) {
            Some(adapter) => adapter.embedding(f, &table, ids)?,
            None => f.tape.gather_rows(&table, ids)?,
        };
        f.enter(&rows)
    }
}
