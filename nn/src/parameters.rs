//! Named parameters: declared by layers with a shape and an initialisation, filled by a checkpoint
//! or by random numbers, updated by an optimizer.

use std::collections::HashMap;

use graft_tensor::ops::WeightLayout;
use graft_tensor::ops::random::{self, Key};
use graft_tensor::{Category, DType, Memory, Shape, Tensor, ops};

use crate::adapters::Adapters;
use crate::error::{Error, Result, nearest};

/// A parameter's number within its [`Parameters`].
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct ParamId(pub(crate) usize);

impl ParamId {
    /// The key under which the parameter's gradient is found.
    pub fn key(self) -> usize {
        self.0
    }
}

/// How a parameter starts when no checkpoint holds it.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Init {
    /// All zero: biases
    Zeros,
    /// All one: weights of norms
    Ones,
    /// Normal with mean 0 and this standard deviation
    Normal(f64),
    /// Uniform between this and its negative
    Uniform(f64),
}

/// What a parameter is to its layer, where an adapter may stand beside it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Role {
    /// The weight of a linear layer
    Linear(WeightLayout),
    /// The table of an embedding
    Embedding,
    /// Anything else
    Other,
}

/// One parameter.
#[derive(Debug)]
pub struct Parameter {
    name: String,
    shape: Shape,
    init: Init,
    role: Role,
    /// The type of the value, if it is not the parameters'
    held: Option<DType>,
    value: Option<Tensor>,
}

impl Parameter {
    /// The name, as Hugging Face spells it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The shape.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// What it is to its layer.
    pub fn role(&self) -> Role {
        self.role
    }

    /// The type that its value is held in, if that is not the parameters' own: then it must be frozen.
    pub fn held(&self) -> Option<DType> {
        self.held
    }

    /// True once it was loaded or initialised.
    pub fn has_value(&self) -> bool {
        self.value.is_some()
    }
}

/// Every parameter of a model, in the order of declaration.
#[derive(Debug)]
pub struct Parameters {
    list: Vec<Parameter>,
    by_name: HashMap<String, ParamId>,
    memory: Memory,
    dtype: DType,
    compute: DType,
    adapters: Adapters,
}

impl Parameters {
    /// No parameters yet; values will be of type `dtype`, and so will activations.
    pub fn new(memory: &Memory, dtype: DType) -> Parameters {
        Parameters {
            list: Vec::new(),
            by_name: HashMap::new(),
            memory: memory.with(Category::Weights),
            dtype,
            compute: dtype,
            adapters: Adapters::default(),
        }
    }

    /// The same parameters over an allocator that only counts, for a plan: no value is read or kept.
    ///
    /// # Errors
    /// None for parameters that could be declared.
    pub fn planned(&self) -> Result<Parameters> {
        let memory = Memory::planned_for(self.memory.device()).with(Category::Weights);
        let plan = |one: &Parameter| -> Result<Parameter> {
            let empty = |value: &Tensor| Tensor::empty(&memory, value.dtype(), value.shape());
            Ok(Parameter {
                name: one.name.clone(),
                shape: one.shape,
                init: one.init,
                role: one.role,
                held: one.held,
                value: one.value.as_ref().map(empty).transpose()?,
            })
        };
        Ok(Parameters {
            list: self.list.iter().map(plan).collect::<Result<_>>()?,
            by_name: self.by_name.clone(),
            memory,
            dtype: self.dtype,
            compute: self.compute,
            adapters: self.adapters.planned(),
        })
    }

    /// Activations of another type than the values: bf16 beside f32, the master weights, whose
    /// gradients and optimizer state stay f32.
    ///
    /// # Errors
    /// Another pair of types.
    pub fn compute_in(&mut self, dtype: DType) -> Result<()> {
        let mixed = (self.dtype, dtype) == (DType::F32, DType::Bf16);
        if dtype != self.dtype && !mixed {
            return Err(Error::Setting {
                name: "compute type",
                value: dtype.to_string(),
                expected: "the parameters' own, or bf16 beside f32",
            });
        }
        self.compute = dtype;
        Ok(())
    }

    /// Holds the values of matrices in the type of activations, for evaluation alone: products and look-ups round them to
    /// it anyway, so that results keep their bits and half as much is read. GPT-2's matrices come to lie as all others do, a
    /// row of memory for each output: what a product of few rows reads fastest. Where an adapter is in use, which may read
    /// a weight for itself, nothing changes.
    ///
    /// # Errors
    /// As [`Parameters::set`].
    pub fn hold_as_computed(&mut self) -> Result<()> {
        if self.compute == self.dtype || self.adapters.active().is_some() {
            return Ok(());
        }
        for i in 0..self.list.len() {
            let parameter = &mut self.list[i];
            if parameter.shape.rank() == 2 && parameter.held.is_none() {
                parameter.held = Some(self.compute);
                let inputs_first = parameter.role == Role::Linear(WeightLayout::InOut);
                if let Some(value) = parameter.value.take() {
                    self.set(ParamId(i), value)?;
                }
                if let Some(value) = self.list[i].value.take_if(|_| inputs_first) {
                    let turned = value.t()?;
                    let turned = turned.contiguous(&self.memory)?.into_owned();
                    self.list[i].value = Some(turned.recount(Category::Weights)?.t()?);
                }
            }
        }
        Ok(())
    }

    /// The type of activations.
    pub fn compute(&self) -> DType {
        self.compute
    }

    /// The allocator of the values.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// The type of the values.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Declares a parameter.
    ///
    /// # Errors
    /// A name that is taken, a shape that is refused.
    pub fn declare(&mut self, name: &str, shape: &[usize], init: Init) -> Result<ParamId> {
        if self.by_name.contains_key(name) {
            return Err(Error::Duplicate { name: name.into() });
        }
        let shape = Shape::new(shape)?;
        let id = ParamId(self.list.len());
        self.by_name.insert(name.to_owned(), id);
        self.list.push(Parameter {
            name: name.to_owned(),
            shape,
            init,
            role: Role::Other,
            held: None,
            value: None,
        });
        Ok(id)
    }

    /// Says in what type the value of a linear layer's weight is held, from the next value on: bf16, nf4 or int8 for one
    /// that stays frozen, or the parameters' own.
    ///
    /// Codes are those of the weight as `[out, in]`, whichever way it lies in files.
    ///
    /// # Errors
    /// Another type, another kind of parameter.
    pub fn hold(&mut self, id: ParamId, dtype: DType) -> Result<()> {
        let parameter = &mut self.list[id.0];
        let known = matches!(dtype, DType::Bf16 | DType::Nf4 | DType::Int8);
        if dtype == self.dtype {
            parameter.held = None;
        } else if known && self.dtype == DType::F32 && matches!(parameter.role, Role::Linear(_)) {
            parameter.held = Some(dtype);
        } else {
            return Err(Error::Setting {
                name: "type of a frozen weight",
                value: format!("{dtype} for {}", parameter.name),
                expected: "bf16, nf4 or int8 for the weight of a linear layer, among parameters in f32",
            });
        }
        Ok(())
    }

    /// A value as a parameter is to hold it.
    fn as_held(&self, parameter: &Parameter, value: &Tensor) -> Result<Tensor> {
        let m = &self.memory;
        let Some(dtype) = parameter.held else {
            let value = ops::cast(m, value, self.dtype)?;
            return Ok(value.contiguous(m)?.into_owned());
        };
        if !dtype.is_quantised() || value.dtype() == dtype {
            return Ok(ops::cast(m, value, dtype)?);
        }
        let codes = match parameter.role {
            Role::Linear(WeightLayout::InOut) => {
                let turned = value.t()?;
                ops::quantise(m, &turned, dtype).and_then(|codes| codes.t())
            }
            _ => ops::quantise(m, value, dtype),
        };
        codes.map_err(|source| Error::Held {
            name: parameter.name.clone(),
            dtype,
            source: Box::new(source),
        })
    }

    /// Says what a parameter is to its layer: only those of which it was said can have an adapter.
    pub fn set_role(&mut self, id: ParamId, role: Role) {
        self.list[id.0].role = role;
    }

    /// The adapters beside the layers.
    pub fn adapters(&self) -> &Adapters {
        &self.adapters
    }

    /// The adapters beside the layers, to take another one into use.
    pub fn adapters_mut(&mut self) -> &mut Adapters {
        &mut self.adapters
    }

    /// Number of parameters (tensors).
    pub fn len(&self) -> usize {
        self.list.len()
    }

    /// True if nothing was declared.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// Number of elements of all parameters.
    pub fn count(&self) -> usize {
        self.list.iter().map(|p| p.shape.count()).sum()
    }

    /// Numbers and parameters, in order.
    pub fn iter(&self) -> impl Iterator<Item = (ParamId, &Parameter)> {
        self.list.iter().enumerate().map(|(i, p)| (ParamId(i), p))
    }

    /// The parameter of a number.
    pub fn get(&self, id: ParamId) -> &Parameter {
        &self.list[id.0]
    }

    /// The number of a name, if there is such a parameter: unlike [`Parameters::find`], without a search for the
    /// nearest name.
    pub fn lookup(&self, name: &str) -> Option<ParamId> {
        self.by_name.get(name).copied()
    }

    /// The number of a name.
    ///
    /// # Errors
    /// [`Error::Unknown`] with the nearest name.
    pub fn find(&self, name: &str) -> Result<ParamId> {
        self.lookup(name).ok_or_else(|| Error::Unknown {
            name: name.into(),
            nearest: nearest(name, self.list.iter().map(|p| p.name.as_str())),
        })
    }

    /// A parameter's value.
    ///
    /// # Errors
    /// [`Error::NoValue`] before it was loaded or initialised.
    pub fn value(&self, id: ParamId) -> Result<&Tensor> {
        let parameter = &self.list[id.0];
        parameter.value.as_ref().ok_or_else(|| Error::NoValue {
            name: parameter.name.clone(),
        })
    }

    /// A parameter's value, to update in place.
    ///
    /// # Errors
    /// As [`Parameters::value`].
    pub fn value_mut(&mut self, id: ParamId) -> Result<&mut Tensor> {
        let parameter = &mut self.list[id.0];
        parameter.value.as_mut().ok_or_else(|| Error::NoValue {
            name: parameter.name.clone(),
        })
    }

    /// The values of all parameters that have one, in order, to update in place.
    pub fn values_mut(&mut self) -> impl Iterator<Item = (ParamId, &mut Tensor)> {
        let values = self.list.iter_mut().enumerate();
        values.filter_map(|(i, p)| Some((ParamId(i), p.value.as_mut()?)))
    }

    /// Gives a parameter its value, in the parameters' type or the one that it is [held](Parameters::hold) in, counted
    /// as weights.
    ///
    /// # Errors
    /// A tensor of another shape; numbers for which there is no code.
    pub fn set(&mut self, id: ParamId, value: Tensor) -> Result<()> {
        let parameter = &self.list[id.0];
        if *value.shape() != parameter.shape {
            return Err(Error::ParameterShape {
                name: parameter.name.clone(),
                expected: parameter.shape.to_string(),
                found: value.shape().to_string(),
            });
        }
        let value = match value.memory().device() == self.memory.device() {
            true => value,
            // In the type that it is wanted in: GPUs do not know every other.
            false => ops::cast(value.memory(), &value, self.dtype)?.to_memory(&self.memory)?,
        };
        let value = self.as_held(parameter, &value)?;
        self.list[id.0].value = Some(value.recount(Category::Weights)?);
        Ok(())
    }

    /// [`Parameters::set`] with the shape that the value has: a head for other labels.
    ///
    /// # Errors
    /// A type that is no float.
    pub fn replace(&mut self, id: ParamId, value: Tensor) -> Result<()> {
        self.list[id.0].shape = *value.shape();
        self.set(id, value)
    }

    /// Initialises every parameter that has no value. The numbers depend on the seed and the
    /// parameter's name alone, not on which others there are.
    ///
    /// # Errors
    /// None for shapes that could be declared.
    pub fn initialise(&mut self, seed: u64) -> Result<()> {
        for i in 0..self.list.len() {
            let parameter = &self.list[i];
            if parameter.value.is_some() {
                continue;
            }
            let (memory, shape) = (&self.memory, parameter.shape);
            let value = match parameter.init {
                Init::Zeros => Tensor::zeros(memory, self.dtype, &shape)?,
                Init::Ones => Tensor::full(memory, self.dtype, &shape, 1.0)?,
                Init::Normal(std) => {
                    let key = Key::new(seed, 0, fnv1a(&parameter.name));
                    random::normal(memory, key, &shape, 0.0, std as f32)?
                }
                Init::Uniform(bound) => {
                    let (key, bound) = (Key::new(seed, 0, fnv1a(&parameter.name)), bound as f32);
                    random::uniform(memory, key, &shape, -bound, bound)?
                }
            };
            self.set(ParamId(i), value)?;
        }
        Ok(())
    }
}

/// FNV-1a (Fowler, Noll, Vo), 64 bits.
pub(crate) fn fnv1a(text: &str) -> u64 {
    text.bytes().fold(0xCBF2_9CE4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01B3)
    })
}
