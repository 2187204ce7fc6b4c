//! The opcodes that name and call: what a pickle may do beside building containers.

use super::opcode;
use super::pickle::Machine;
use super::refusal::{Refusal, Refused};
use super::value::{Global, Storage, Tensor, Value};
use crate::error::Shown;
use crate::safetensors::{FileDtype, MAX_RANK};

impl<'a> Machine<'a> {
    /// GLOBAL and STACK_GLOBAL: one of the known names.
    pub(super) fn global(&mut self, module: &str, name: &str) -> Refused<()> {
        match Global::find(module, name) {
            Some(global) => self.push(Value::Global(global)),
            None => {
                let opcode = opcode::name(self.bytes[self.opcode_at]);
                Err(Refusal {
                    offset: self.place(),
                    reason: format!(
                        "{opcode} asks for `{}.{}`, which weights do not need; nothing was run",
                        Shown(module),
                        Shown(name)
                    ),
                    help: "do not load this file elsewhere unless you trust who made it; ask for safetensors",
                    truncated: false,
                })
            }
        }
    }

    /// BINPERSID: `("storage", type, key, location, length)`; files before the zip format have a sixth entry, for
    /// views of storages, which is None in all but the oldest.
    pub(super) fn storage(&mut self) -> Refused<()> {
        let id = self.pop()?;
        let Value::Tuple(items) = self.value(id) else {
            let found = self.value(id).describe();
            return Err(self.hostile(format!(
                "expected a tuple that names a storage, found {found}"
            )));
        };
        let entries: Vec<&Value> = items.iter().map(|&id| self.value(id)).collect();
        let five = match entries.as_slice() {
            [five @ .., Value::None] => five,
            all => all,
        };
        let storage = match five {
            [
                Value::Str("storage"),
                Value::Global(kind),
                Value::Str(key),
                Value::Str(_),
                Value::Int(len),
            ] => {
                let dtype = match kind {
                    Global::Storage(dtype) => Some(*dtype),
                    Global::Bytes => None,
                    other => return Err(self.hostile(format!("{other:?} is no kind of storage"))),
                };
                match u64::try_from(*len) {
                    Ok(len) => Storage { key, dtype, len },
                    Err(_) => return Err(self.hostile(format!("a storage of {len} elements"))),
                }
            }
            [.., Value::Tuple(_)] if entries.len() == 6 => {
                return Err(Refusal::convert(
                    self.place(),
                    "BINPERSID: a view of a storage, which only PyTorch before 0.2 wrote",
                ));
            }
            _ => {
                let found: Vec<String> = entries.iter().take(8).map(|v| v.describe()).collect();
                return Err(self.hostile(format!(
                    "expected (\"storage\", type, key, location, length), found ({})",
                    found.join(", ")
                )));
            }
        };
        self.push(Value::Storage(Box::new(storage)))
    }

    /// REDUCE: the calls that are known, as descriptions of what they would make.
    pub(super) fn call(&mut self) -> Refused<()> {
        let arguments = self.pop()?;
        let callee = self.pop()?;
        let (&Value::Global(global), Value::Tuple(items)) =
            (self.value(callee), self.value(arguments))
        else {
            let (callee, arguments) = (
                self.value(callee).describe(),
                self.value(arguments).describe(),
            );
            return Err(self.hostile(format!(
                "expected a function and a tuple of arguments, found {callee} and {arguments}"
            )));
        };
        let entries: Vec<&Value> = items.iter().take(16).map(|&id| self.value(id)).collect();
        let unknown = || {
            let found: Vec<String> = entries.iter().map(|v| v.describe()).collect();
            self.hostile(format!("{global:?} called with ({})", found.join(", ")))
        };
        let made = match (global, entries.as_slice()) {
            (Global::OrderedDict, []) => Value::Dict(Vec::new()),
            // As Python 2 wrote it.
            (Global::OrderedDict, [Value::List(pairs)]) => {
                let mut dict = Vec::with_capacity(pairs.len());
                for &pair in pairs {
                    match self.value(pair) {
                        Value::List(pair) | Value::Tuple(pair) if pair.len() == 2 => {
                            dict.push((pair[0], pair[1]));
                        }
                        _ => return Err(unknown()),
                    }
                }
                Value::Dict(dict)
            }
            (Global::RebuildParameter, [Value::Tensor(_), Value::Bool(_), Value::Dict(_)]) => {
                let tensor = items[0];
                return self.push_id(tensor);
            }
            (
                Global::RebuildTensor,
                [
                    Value::Storage(storage),
                    Value::Int(offset),
                    shape,
                    strides,
                    Value::Bool(_),
                    Value::Dict(_),
                    rest @ ..,
                ],
            ) if rest.len() <= 1 => {
                let Some(dtype) = storage.dtype else {
                    return Err(unknown());
                };
                self.tensor(**storage, dtype, *offset, shape, strides)?
            }
            (
                Global::RebuildTensorOfBytes,
                [
                    Value::Storage(storage),
                    Value::Int(offset),
                    shape,
                    strides,
                    Value::Bool(_),
                    Value::Dict(_),
                    Value::Global(Global::Dtype(dtype)),
                    rest @ ..,
                ],
            ) if rest.len() <= 1 => self.tensor(**storage, *dtype, *offset, shape, strides)?,
            _ => return Err(unknown()),
        };
        self.push(made)
    }

    fn tensor(
        &self,
        storage: Storage<'a>,
        dtype: FileDtype,
        offset: i64,
        shape: &Value,
        strides: &Value,
    ) -> Refused<Value<'a>> {
        let sizes = |what: &str, value: &Value| {
            let Value::Tuple(items) = value else {
                return Err(self.hostile(format!(
                    "{what}: expected a tuple, found {}",
                    value.describe()
                )));
            };
            if items.len() > MAX_RANK {
                return Err(self.hostile(format!(
                    "{what}: {} dimensions, where {MAX_RANK} are the most",
                    items.len()
                )));
            }
            items
                .iter()
                .map(|&id| match self.value(id) {
                    Value::Int(size) if *size >= 0 => Ok(*size as u64),
                    other => Err(self.hostile(format!(
                        "{what}: expected sizes of 0 and more, found {}",
                        other.describe()
                    ))),
                })
                .collect::<Refused<Vec<u64>>>()
        };
        let Ok(offset) = u64::try_from(offset) else {
            return Err(self.hostile(format!("a tensor that begins at element {offset}")));
        };
        Ok(Value::Tensor(Box::new(Tensor {
            storage,
            dtype,
            offset,
            shape: sizes("shape", shape)?,
            strides: sizes("strides", strides)?,
            at: self.place(),
        })))
    }

    /// BUILD: attributes of an OrderedDict (`_metadata`, the versions of a module's layers), which say nothing about
    /// tensors.
    pub(super) fn build(&mut self) -> Refused<()> {
        let state = self.pop()?;
        let target = self.top()?;
        match (self.value(target), self.value(state)) {
            (Value::Dict(_), Value::Dict(_)) => Ok(()),
            (target, state) => {
                let (target, state) = (target.describe(), state.describe());
                Err(self.hostile(format!(
                    "expected attributes of a dictionary, found {state} for {target}"
                )))
            }
        }
    }
}
