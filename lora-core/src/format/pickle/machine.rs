//! The stack machine of pickle, as far as `torch.save` uses it, without a single call.
//!
//! Objects lie in one list and name each other by index, so that no nesting can exhaust the stack of this program, and an
//! object that is named a million times is there once.

use std::collections::{BTreeMap, BTreeSet};

use super::{refused, storage_dtype};
use crate::format::{Dtype, Fault};

/// Most instructions.
const INSTRUCTIONS: usize = 1_000_000;

/// Longest name of a function or a storage, and most arguments of a call that are looked at.
const NAME: usize = 256;
const ARGUMENTS: usize = 16;

/// What no model calls and every attack does: modules, and functions of Python itself.
const ATTACKS: [&str; 24] = [
    "os.",
    "posix.",
    "nt.",
    "subprocess.",
    "sys.",
    "shutil.",
    "socket.",
    "importlib.",
    "runpy.",
    "pty.",
    "ctypes.",
    "webbrowser.",
    "urllib.",
    "requests.",
    "builtins.eval",
    "builtins.exec",
    "builtins.compile",
    "builtins.open",
    "builtins.getattr",
    "builtins.__import__",
    "__builtin__.eval",
    "__builtin__.exec",
    "__builtin__.getattr",
    "__builtin__.__import__",
];

/// An object by its place in the list.
pub(super) type Id = usize;

/// A tensor as the pickle describes it.
#[derive(Debug, Clone)]
pub(super) struct StoredTensor {
    /// The name of its storage.
    pub key: String,
    pub dtype: Dtype,
    /// Numbers of the storage.
    pub elements: usize,
    /// First number.
    pub offset: usize,
    pub shape: Vec<usize>,
    /// Numbers between two neighbours of each axis.
    pub strides: Vec<usize>,
}

#[derive(Debug, Clone)]
pub(super) enum Node {
    Nothing,
    Int(i64),
    Text(String),
    Tuple(Vec<Id>),
    List(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    /// A function or a type, by name.
    Global(String),
    Storage(String, Dtype, usize),
    Tensor(StoredTensor),
    /// What came of a call that was not made.
    Opaque,
}

/// The objects that a pickle describes.
pub(super) struct Machine {
    nodes: Vec<Node>,
    pub root: Id,
    /// Names that were mentioned and mean nothing here.
    pub opaque: BTreeSet<String>,
}

impl Machine {
    pub(super) fn run(pickle: &[u8]) -> Result<Self, Fault> {
        let mut run = Run {
            machine: Self { nodes: Vec::new(), root: 0, opaque: BTreeSet::new() },
            stack: Vec::new(),
            marks: Vec::new(),
            memo: BTreeMap::new(),
            left: pickle,
        };
        for _ in 0..INSTRUCTIONS {
            let instruction = run.take(1)?[0];
            if instruction == b'.' {
                run.machine.root = run.pop()?;
                return Ok(run.machine);
            }
            run.step(instruction)?;
        }
        Err(refused(format!("it has more than {INSTRUCTIONS} instructions")))
    }

    /// How many objects there are.
    pub(super) fn len(&self) -> usize {
        self.nodes.len()
    }

    pub(super) fn node(&self, id: Id) -> &Node {
        self.nodes.get(id).unwrap_or(&Node::Nothing)
    }
}

struct Run<'a> {
    machine: Machine,
    stack: Vec<Id>,
    /// Heights of the stack.
    marks: Vec<usize>,
    memo: BTreeMap<u64, Id>,
    left: &'a [u8],
}

impl<'a> Run<'a> {
    fn step(&mut self, instruction: u8) -> Result<(), Fault> {
        match instruction {
            0x80 => drop(self.take(1)?), // PROTO
            0x95 => drop(self.take(8)?), // FRAME
            b'(' => self.marks.push(self.stack.len()),
            b'0' => drop(self.pop()?),
            b'N' => self.push(Node::Nothing),
            0x88 | 0x89 => self.push(Node::Int(i64::from(instruction == 0x88))),
            b'K' => {
                let value = self.take(1)?[0];
                self.push(Node::Int(value.into()));
            }
            b'M' => {
                let value = self.number(2)?;
                self.push(Node::Int(value as i64));
            }
            b'J' => {
                let value = self.number(4)? as u32 as i32;
                self.push(Node::Int(value.into()));
            }
            0x8A => self.long()?,
            b'G' => {
                self.take(8)?;
                self.push(Node::Nothing); // A float means nothing on the way to a tensor.
            }
            b'X' | b'T' | b'B' => self.text(4)?,
            0x8C | b'U' | b'C' => self.text(1)?,
            0x8D | 0x8E => self.text(8)?,
            b'}' => self.push(Node::Dict(Vec::new())),
            b']' => self.push(Node::List(Vec::new())),
            b')' => self.push(Node::Tuple(Vec::new())),
            0x85..=0x87 => {
                let count = usize::from(instruction - 0x84);
                let items = self.stack.split_off(self.floor(count)?);
                self.push(Node::Tuple(items));
            }
            b't' => {
                let items = self.since_mark()?;
                self.push(Node::Tuple(items));
            }
            b'l' => {
                let items = self.since_mark()?;
                self.push(Node::List(items));
            }
            b'd' => {
                let items = self.since_mark()?;
                self.push(Node::Dict(pairs(&items)));
            }
            b'a' => {
                let item = self.pop()?;
                self.extend(vec![item])?;
            }
            b'e' => {
                let items = self.since_mark()?;
                self.extend(items)?;
            }
            b's' => {
                let items = self.stack.split_off(self.floor(2)?);
                self.set(&items)?;
            }
            b'u' => {
                let items = self.since_mark()?;
                self.set(&items)?;
            }
            b'q' => self.remember(1)?,
            b'r' => self.remember(4)?,
            0x94 => {
                let key = self.memo.len() as u64;
                self.memo.insert(key, self.top()?);
            }
            b'h' => self.recall(1)?,
            b'j' => self.recall(4)?,
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                self.global(&module, &name)?;
            }
            0x93 => {
                let (name, module) = (self.pop()?, self.pop()?);
                let short = |id| match self.machine.node(id) {
                    Node::Text(text) if text.len() <= NAME => Some(text.clone()),
                    _ => None,
                };
                match (short(module), short(name)) {
                    (Some(module), Some(name)) => self.global(&module, &name)?,
                    _ => return Err(refused("it names a function by something that is no name")),
                }
            }
            b'Q' => self.persistent()?,
            b'R' | 0x81 => self.call()?,
            b'b' => {
                // State for an object: only opaque ones take any, and an ordered dictionary's attributes mean nothing.
                self.pop()?;
            }
            other => return Err(refused(format!("instruction {other:#04x} is none that torch writes"))),
        }
        Ok(())
    }

    /// A function is never called: what its result stands for is known, or it is opaque.
    fn call(&mut self) -> Result<(), Fault> {
        let (arguments, function) = (self.pop()?, self.pop()?);
        let Node::Global(name) = self.machine.node(function).clone() else {
            self.push(Node::Opaque);
            return Ok(());
        };
        let Node::Tuple(arguments) = self.machine.node(arguments) else {
            return Err(refused(format!("{} is called without a tuple of arguments", name.escape_debug())));
        };
        let arguments: Vec<Id> = arguments.iter().copied().take(ARGUMENTS).collect();
        match name.as_str() {
            "collections.OrderedDict" if arguments.is_empty() => self.push(Node::Dict(Vec::new())),
            "torch.Size" | "torch._utils._rebuild_parameter" => match arguments.first() {
                Some(first) => self.stack.push(*first),
                None => return Err(refused(format!("{name} has no argument"))),
            },
            "torch._utils._rebuild_tensor_v2" => {
                let tensor =
                    self.tensor(&arguments).ok_or_else(|| refused("a tensor is described in an unknown way"))?;
                self.push(Node::Tensor(tensor));
            }
            _ => {
                self.machine.opaque.insert(name);
                self.push(Node::Opaque);
            }
        }
        Ok(())
    }

    fn tensor(&self, arguments: &[Id]) -> Option<StoredTensor> {
        let [storage, offset, shape, strides, ..] = *arguments else { return None };
        let node = |id| self.machine.node(id);
        let Node::Storage(key, dtype, elements) = node(storage) else { return None };
        let length = |id: &Id| match node(*id) {
            Node::Int(value) => usize::try_from(*value).ok(),
            _ => None,
        };
        let lengths = |id| match node(id) {
            Node::Tuple(items) => items.iter().map(length).collect::<Option<Vec<_>>>(),
            _ => None,
        };
        let (shape, strides) = (lengths(shape)?, lengths(strides)?);
        let offset = length(&offset)?;
        (shape.len() == strides.len() && shape.len() <= 64).then(|| StoredTensor {
            key: key.clone(),
            dtype: *dtype,
            elements: *elements,
            offset,
            shape,
            strides,
        })
    }

    /// `('storage', torch.FloatStorage, '0', 'cpu', 12)`.
    fn persistent(&mut self) -> Result<(), Fault> {
        let id = self.pop()?;
        let node = |id: Id| self.machine.node(id);
        let storage = match node(id) {
            Node::Tuple(items) => match items[..] {
                [_, class, key, _, count] => match (node(class), node(key), node(count)) {
                    (Node::Global(class), Node::Text(key), Node::Int(count)) if key.len() <= NAME => {
                        let dtype = storage_dtype(class)
                            .ok_or_else(|| refused(format!("numbers of type {} are not read", class.escape_debug())))?;
                        usize::try_from(*count).ok().map(|count| Node::Storage(key.clone(), dtype, count))
                    }
                    _ => None,
                },
                _ => None,
            },
            _ => None,
        };
        self.push(storage.ok_or_else(|| refused("a storage is described in an unknown way"))?);
        Ok(())
    }

    fn global(&mut self, module: &str, name: &str) -> Result<(), Fault> {
        if module.len().max(name.len()) > NAME {
            return Err(refused("it names a function by something that is no name"));
        }
        let name = format!("{module}.{name}");
        if ATTACKS.iter().any(|attack| name.starts_with(attack)) {
            return Err(refused(format!("it calls {}: this is a program and no model", name.escape_debug())));
        }
        self.push(Node::Global(name));
        Ok(())
    }

    fn extend(&mut self, items: Vec<Id>) -> Result<(), Fault> {
        let list = self.top()?;
        match self.machine.nodes.get_mut(list) {
            Some(Node::List(list)) => list.extend(items),
            Some(Node::Opaque) => {}
            _ => return Err(refused("it appends to something that is no list")),
        }
        Ok(())
    }

    fn set(&mut self, items: &[Id]) -> Result<(), Fault> {
        let dict = self.top()?;
        match self.machine.nodes.get_mut(dict) {
            Some(Node::Dict(dict)) => dict.extend(pairs(items)),
            Some(Node::Opaque) => {}
            _ => return Err(refused("it sets an entry of something that is no dictionary")),
        }
        Ok(())
    }

    fn remember(&mut self, width: usize) -> Result<(), Fault> {
        let key = self.number(width)?;
        let top = self.top()?;
        self.memo.insert(key, top);
        Ok(())
    }

    fn recall(&mut self, width: usize) -> Result<(), Fault> {
        let key = self.number(width)?;
        let id = self.memo.get(&key).copied().ok_or_else(|| refused("it recalls what it never kept"))?;
        self.stack.push(id);
        Ok(())
    }

    fn push(&mut self, node: Node) {
        self.stack.push(self.machine.nodes.len());
        self.machine.nodes.push(node);
    }

    fn top(&self) -> Result<Id, Fault> {
        self.stack.last().copied().ok_or_else(|| refused("its stack runs empty"))
    }

    fn pop(&mut self) -> Result<Id, Fault> {
        self.stack.pop().ok_or_else(|| refused("its stack runs empty"))
    }

    /// The height of the stack below `count` objects.
    fn floor(&self, count: usize) -> Result<usize, Fault> {
        self.stack.len().checked_sub(count).ok_or_else(|| refused("its stack runs empty"))
    }

    fn since_mark(&mut self) -> Result<Vec<Id>, Fault> {
        let mark = self.marks.pop().filter(|mark| *mark <= self.stack.len());
        mark.map(|mark| self.stack.split_off(mark)).ok_or_else(|| refused("a mark is missing"))
    }

    fn take(&mut self, count: usize) -> Result<&'a [u8], Fault> {
        let (taken, left) = self.left.split_at_checked(count).ok_or_else(|| refused("the pickle is cut short"))?;
        self.left = left;
        Ok(taken)
    }

    /// A little-endian number of at most 8 bytes.
    fn number(&mut self, width: usize) -> Result<u64, Fault> {
        Ok(self.take(width)?.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte)))
    }

    fn long(&mut self) -> Result<(), Fault> {
        let width = usize::from(self.take(1)?[0]);
        let bytes = self.take(width)?;
        if width > 8 {
            return Err(refused("it holds a number of more than 64 bits"));
        }
        // Two's complement: the highest bit is the sign.
        let fill = if bytes.last().is_some_and(|byte| byte & 0x80 != 0) { 0xFF } else { 0 };
        let mut raw = [fill; 8];
        raw[..width].copy_from_slice(bytes);
        self.push(Node::Int(i64::from_le_bytes(raw)));
        Ok(())
    }

    fn text(&mut self, width: usize) -> Result<(), Fault> {
        let length = usize::try_from(self.number(width)?).unwrap_or(usize::MAX);
        let text = String::from_utf8_lossy(self.take(length)?).into_owned();
        self.push(Node::Text(text));
        Ok(())
    }

    fn line(&mut self) -> Result<String, Fault> {
        let end = self.left.iter().position(|byte| *byte == b'\n').ok_or_else(|| refused("the pickle is cut short"))?;
        let line = String::from_utf8_lossy(self.take(end)?).into_owned();
        self.take(1)?;
        Ok(line)
    }
}

fn pairs(items: &[Id]) -> Vec<(Id, Id)> {
    items.as_chunks::<2>().0.iter().map(|[key, value]| (*key, *value)).collect()
}
