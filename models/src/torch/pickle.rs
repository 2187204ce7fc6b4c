//! Reads the pickle of a checkpoint as data: a machine with the opcodes that `torch.save` writes and no other.
//!
//! Pickle is a program for a stack machine. What makes it dangerous is that it can name any function of Python and
//! call it; here a name is one of [`Global`](super::value::Global)'s, and a call one of those
//! in [`call`](super::call), which build dictionaries and describe tensors. Nothing else can happen, whatever the bytes say.
//!
//! Values live in one list and refer to each other by number, so that what refers to itself or nests without end
//! costs no more than its bytes and is dropped without recursion. Sizes are bounded by [`MAX_PICKLE`],
//! [`MAX_VALUES`], [`MAX_STACK`] and [`MAX_MARKS`].
//!
//! The format is documented in Python's `pickletools`.

use std::collections::HashMap;

use super::opcode;
use super::refusal::{Refusal, Refused};
use super::value::{Id, Tensor, Value};

/// Longest pickle, in bytes. A tensor takes some 200.
pub(super) const MAX_PICKLE: u64 = 64 << 20;

/// Most values in a pickle.
const MAX_VALUES: usize = 4 << 20;

/// Most values on the stack. `torch.save` sets 1000 items of a dictionary at a time.
const MAX_STACK: usize = 1 << 16;

/// Most marks on the stack, one for each container that is being filled.
const MAX_MARKS: usize = 256;

/// A pickle that was read.
#[derive(Debug)]
pub(super) struct Pickle<'a> {
    values: Vec<Value<'a>>,
    root: Id,
    /// Bytes that it took.
    pub len: usize,
}

impl<'a> Pickle<'a> {
    /// Reads the pickle at the start of `bytes`, which lies at `base` in its file.
    pub(super) fn read(bytes: &'a [u8], base: u64) -> Refused<Pickle<'a>> {
        Machine {
            bytes,
            base,
            at: 0,
            opcode_at: 0,
            values: Vec::new(),
            stack: Vec::new(),
            marks: Vec::new(),
            memo: HashMap::new(),
        }
        .run()
    }

    /// What it stands for.
    pub(super) fn root(&self) -> &Value<'a> {
        self.get(self.root)
    }

    pub(super) fn get(&self, id: Id) -> &Value<'a> {
        &self.values[id as usize]
    }

    /// Every tensor that was described, used or not.
    pub(super) fn tensors(&self) -> impl Iterator<Item = &Tensor<'a>> {
        self.values.iter().filter_map(|value| match value {
            Value::Tensor(tensor) => Some(&**tensor),
            _ => None,
        })
    }
}

pub(super) struct Machine<'a> {
    pub(super) bytes: &'a [u8],
    base: u64,
    at: usize,
    pub(super) opcode_at: usize,
    values: Vec<Value<'a>>,
    stack: Vec<Id>,
    /// Heights of the stack where containers begin.
    marks: Vec<usize>,
    memo: HashMap<u32, Id>,
}

impl<'a> Machine<'a> {
    fn run(mut self) -> Refused<Pickle<'a>> {
        loop {
            self.opcode_at = self.at;
            let opcode = self.byte()?;
            match opcode {
                // The protocol says which opcodes may follow; each is judged by itself.
                0x80 => drop(self.byte()?),
                0x95 => drop(self.take(8)?),
                b'N' => self.push(Value::None)?,
                0x88 => self.push(Value::Bool(true))?,
                0x89 => self.push(Value::Bool(false))?,
                b'J' => {
                    let value = i32::from_le_bytes(self.array()?);
                    self.push(Value::Int(value.into()))?;
                }
                b'K' => {
                    let value = self.byte()?;
                    self.push(Value::Int(value.into()))?;
                }
                b'M' => {
                    let value = u16::from_le_bytes(self.array()?);
                    self.push(Value::Int(value.into()))?;
                }
                0x8a => {
                    let len = self.byte()?;
                    self.long(len.into())?;
                }
                0x8b => {
                    let len = u32::from_le_bytes(self.array()?);
                    self.long(len.into())?;
                }
                b'G' => {
                    self.take(8)?;
                    self.push(Value::Float)?;
                }
                b'U' | 0x8c => {
                    let len = self.byte()?;
                    self.text(len.into())?;
                }
                b'T' | b'X' => {
                    let len = u32::from_le_bytes(self.array()?);
                    self.text(len.into())?;
                }
                0x8d => {
                    let len = u64::from_le_bytes(self.array()?);
                    self.text(len)?;
                }
                b'C' => {
                    let len = self.byte()?;
                    self.take(len.into())?;
                    self.push(Value::Bytes)?;
                }
                b'B' => {
                    let len = u32::from_le_bytes(self.array()?);
                    self.take(len.into())?;
                    self.push(Value::Bytes)?;
                }
                b']' => self.push(Value::List(Vec::new()))?,
                b')' => self.push(Value::Tuple(Vec::new()))?,
                b'}' => self.push(Value::Dict(Vec::new()))?,
                b'(' => {
                    if self.marks.len() == MAX_MARKS {
                        return Err(
                            self.hostile(format!("more than {MAX_MARKS} nested containers"))
                        );
                    }
                    self.marks.push(self.stack.len());
                }
                b't' => {
                    let items = self.since_mark()?;
                    self.push(Value::Tuple(items))?;
                }
                0x85..=0x87 => {
                    let count = usize::from(opcode - 0x84);
                    let low = self.floor();
                    let Some(start) = self.stack.len().checked_sub(count).filter(|&s| s >= low)
                    else {
                        return Err(self.hostile("the stack holds too little for it"));
                    };
                    let items = self.stack.split_off(start);
                    self.push(Value::Tuple(items))?;
                }
                b'a' => {
                    let item = self.pop()?;
                    self.append(vec![item])?;
                }
                b'e' => {
                    let items = self.since_mark()?;
                    self.append(items)?;
                }
                b's' => {
                    let value = self.pop()?;
                    let key = self.pop()?;
                    self.set_items(vec![key, value])?;
                }
                b'u' => {
                    let items = self.since_mark()?;
                    self.set_items(items)?;
                }
                b'q' => {
                    let slot = self.byte()?;
                    self.memoize(slot.into())?;
                }
                b'r' => {
                    let slot = u32::from_le_bytes(self.array()?);
                    self.memoize(slot)?;
                }
                0x94 => self.memoize(self.memo.len() as u32)?,
                b'h' => {
                    let slot = self.byte()?;
                    self.recall(slot.into())?;
                }
                b'j' => {
                    let slot = u32::from_le_bytes(self.array()?);
                    self.recall(slot)?;
                }
                b'c' => {
                    let module = self.line()?;
                    let name = self.line()?;
                    self.global(module, name)?;
                }
                0x93 => {
                    let name = self.pop()?;
                    let module = self.pop()?;
                    let (&Value::Str(module), &Value::Str(name)) =
                        (self.value(module), self.value(name))
                    else {
                        return Err(self.hostile("it takes two strings"));
                    };
                    self.global(module, name)?;
                }
                b'Q' => self.storage()?,
                b'R' => self.call()?,
                b'b' => self.build()?,
                b'.' => {
                    let root = self.pop()?;
                    if !self.stack.is_empty() || !self.marks.is_empty() {
                        return Err(self.hostile("values are left on the stack"));
                    }
                    return Ok(Pickle {
                        values: self.values,
                        root,
                        len: self.at,
                    });
                }
                _ => {
                    let name = opcode::name(opcode);
                    let reason = format!(
                        "the pickle opcode {name} ({opcode:#04x}), which torch.save does not write for weights"
                    );
                    return Err(Refusal::convert(self.place(), reason));
                }
            }
        }
    }

    /// The file offset of the current opcode.
    pub(super) fn place(&self) -> u64 {
        self.base + self.opcode_at as u64
    }

    /// A refusal of the current opcode.
    pub(super) fn hostile(&self, reason: impl AsRef<str>) -> Refusal {
        let name = opcode::name(self.bytes[self.opcode_at]);
        Refusal::damaged(self.place(), format!("{name}: {}", reason.as_ref()))
    }

    fn take(&mut self, len: u64) -> Refused<&'a [u8]> {
        let rest = &self.bytes[self.at..];
        if len > rest.len() as u64 {
            let name = self
                .bytes
                .get(self.opcode_at)
                .map_or("an opcode", |&b| opcode::name(b));
            let reason = format!(
                "the pickle ends within {name}, which needs {len} bytes, with {} left",
                rest.len()
            );
            return Err(Refusal::truncated(self.place(), reason));
        }
        self.at += len as usize;
        Ok(&rest[..len as usize])
    }

    fn byte(&mut self) -> Refused<u8> {
        Ok(self.take(1)?[0])
    }

    fn array<const N: usize>(&mut self) -> Refused<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N as u64)?);
        Ok(array)
    }

    /// Text up to a line break, which is consumed.
    fn line(&mut self) -> Refused<&'a str> {
        const LONGEST: usize = 512;
        let rest = &self.bytes[self.at..];
        let Some(len) = rest.iter().take(LONGEST).position(|&b| b == b'\n') else {
            return Err(match rest.len() < LONGEST {
                true => Refusal::truncated(self.place(), "the pickle ends within a GLOBAL's name"),
                false => self.hostile(format!("a name of more than {LONGEST} bytes")),
            });
        };
        self.at += len + 1;
        std::str::from_utf8(&rest[..len]).map_err(|_| self.hostile("a name that is not UTF-8"))
    }

    fn text(&mut self, len: u64) -> Refused<()> {
        let bytes = self.take(len)?;
        match std::str::from_utf8(bytes) {
            Ok(text) => self.push(Value::Str(text)),
            Err(_) => Err(self.hostile("a string that is not UTF-8")),
        }
    }

    /// A whole number of `len` bytes, two's complement.
    fn long(&mut self, len: u64) -> Refused<()> {
        if len > 8 {
            return Err(self.hostile(format!(
                "a whole number of {len} bytes, where 8 are the most"
            )));
        }
        let bytes = self.take(len)?;
        let negative = bytes.last().is_some_and(|b| b & 0x80 != 0);
        let mut wide = [if negative { 0xff } else { 0 }; 8];
        wide[..bytes.len()].copy_from_slice(bytes);
        self.push(Value::Int(i64::from_le_bytes(wide)))
    }

    pub(super) fn value(&self, id: Id) -> &Value<'a> {
        &self.values[id as usize]
    }

    pub(super) fn push(&mut self, value: Value<'a>) -> Refused<()> {
        if self.values.len() == MAX_VALUES {
            return Err(self.hostile(format!("more than {MAX_VALUES} values")));
        }
        self.values.push(value);
        self.push_id((self.values.len() - 1) as Id)
    }

    pub(super) fn push_id(&mut self, id: Id) -> Refused<()> {
        if self.stack.len() == MAX_STACK {
            return Err(self.hostile(format!("more than {MAX_STACK} values on the stack")));
        }
        self.stack.push(id);
        Ok(())
    }

    /// The height below which the open container's opcodes may not reach.
    fn floor(&self) -> usize {
        self.marks.last().copied().unwrap_or(0)
    }

    pub(super) fn pop(&mut self) -> Refused<Id> {
        match self.stack.len() > self.floor() {
            true => Ok(self.stack.pop().unwrap_or_default()),
            false => Err(self.hostile("the stack holds too little for it")),
        }
    }

    /// The value that stays on the stack.
    pub(super) fn top(&self) -> Refused<Id> {
        match self.stack.last() {
            Some(&id) if self.stack.len() > self.floor() => Ok(id),
            _ => Err(self.hostile("the stack holds too little for it")),
        }
    }

    fn since_mark(&mut self) -> Refused<Vec<Id>> {
        match self.marks.pop() {
            Some(mark) => Ok(self.stack.split_off(mark)),
            None => Err(self.hostile("there is no mark on the stack")),
        }
    }

    fn memoize(&mut self, slot: u32) -> Refused<()> {
        let id = self.top()?;
        if self.memo.len() == MAX_VALUES {
            return Err(self.hostile(format!("more than {MAX_VALUES} values are remembered")));
        }
        self.memo.insert(slot, id);
        Ok(())
    }

    fn recall(&mut self, slot: u32) -> Refused<()> {
        match self.memo.get(&slot) {
            Some(&id) => self.push_id(id),
            None => Err(self.hostile(format!("nothing was remembered under {slot}"))),
        }
    }

    fn append(&mut self, items: Vec<Id>) -> Refused<()> {
        let list = self.top()?;
        match &mut self.values[list as usize] {
            Value::List(list) => list.extend(items),
            other => {
                let found = other.describe();
                return Err(self.hostile(format!("it appends to a list, found {found}")));
            }
        }
        Ok(())
    }

    fn set_items(&mut self, items: Vec<Id>) -> Refused<()> {
        let dict = self.top()?;
        if !items.len().is_multiple_of(2) {
            return Err(self.hostile("a key without a value"));
        }
        match &mut self.values[dict as usize] {
            Value::Dict(dict) => dict.extend(items.chunks_exact(2).map(|pair| (pair[0], pair[1]))),
            other => {
                let found = other.describe();
                return Err(self.hostile(format!("it sets items of a dictionary, found {found}")));
            }
        }
        Ok(())
    }
}
