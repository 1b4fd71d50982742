//! Tensors out of a Python pickle (`.pt`, `.ckpt`, `.bin`) without running any of it.
//!
//! A pickle is a program for a small stack machine that may call any Python function. The machine here calls nothing: it
//! knows the few functions by which `torch.save` says "a tensor of this storage", and whatever else a file names is kept as
//! a name and reported. Functions that only an attack would call are refused. The numbers lie beside the pickle in a zip
//! archive without compression and are read from there by range. `torch.save` of before version 1.6 is not read.

mod machine;
mod zip;

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

use memmap2::Mmap;

use self::{
    machine::{Id, Machine, Node, StoredTensor},
    zip::Archive,
};
use super::{Dtype, Fault, FileKind, TensorData, TensorFile, mapping, write};
use crate::{Error, Result};

/// Most tensors of one file.
const TENSORS: usize = 1_000_000;

/// Most steps on the way to them, for every object that there is: a pickle can name one any number of times, and a nest of
/// lists that name each other twice has more ways through than anybody can walk.
const STEPS: usize = 4;

/// Deepest nesting that is followed.
const DEPTH: usize = 64;

/// Bytes of all names together: one long key above many short ones would be copied into each of them.
const NAMES: usize = 64 << 20;

/// How often the numbers of a file may be named: tied weights share a storage, an attack names one without end.
const SHARED: usize = 16;

/// Under what trainers put the weights beside other things, the likeliest first.
const WRAPPERS: [&str; 4] = ["state_dict", "model_state_dict", "model", "module"];

/// What programs put before every name: those that train on several devices, and `torch.compile`.
const PREFIXES: [&str; 2] = ["module.", "_orig_mod."];

/// A pickle of `torch.save`, opened.
#[derive(Debug)]
pub struct PickleFile {
    path: PathBuf,
    content: Content,
    archive: Archive,
    tensors: BTreeMap<String, StoredTensor>,
    unread: BTreeSet<String>,
    beside: BTreeMap<String, usize>,
}

#[derive(Debug)]
enum Content {
    Mapped(Mmap),
    Read(Vec<u8>),
}

impl Content {
    fn bytes(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Read(bytes) => bytes,
        }
    }
}

impl PickleFile {
    /// Whether a file begins as a pickle or as a zip archive with one.
    pub fn is_one(path: &Path) -> bool {
        use std::io::Read as _;
        let mut start = [0; 16];
        let read = std::fs::File::open(path).and_then(|mut file| file.read(&mut start));
        read.is_ok_and(|count| matches!(FileKind::of(&start[..count]), Some(FileKind::Zip | FileKind::Pickle)))
    }

    /// Opens a pickle; nothing in it is run.
    ///
    /// # Errors
    /// If it is no such file, is compressed or cut short, exceeds a limit, or calls what no model needs.
    pub fn open(path: &Path) -> Result<Self> {
        let read = |source| Error::Read { path: path.to_owned(), source };
        let file = std::fs::File::open(path).map_err(read)?;
        let map = match file.metadata().map_err(read)?.len() {
            0 => return Err(Error::file(path, refused("it is empty"))),
            _ => mapping::map(&file).map_err(read)?,
        };
        Self::of(path, Content::Mapped(map)).map_err(|fault| Error::file(path, fault))
    }

    /// A pickle whose bytes are in memory already; `path` is what errors call it, and is not looked at.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn from_bytes(path: &Path, bytes: Vec<u8>) -> Result<Self> {
        Self::of(path, Content::Read(bytes)).map_err(|fault| Error::file(path, fault))
    }

    fn of(path: &Path, content: Content) -> Result<Self, Fault> {
        let file = content.bytes();
        if let Some(FileKind::Pickle) = FileKind::of(&file[..file.len().min(256)]) {
            return Err(refused(
                "it was written by `torch.save` of before version 1.6; load and save it anew in Python",
            ));
        }
        let archive = Archive::of(file)?;
        let (stem, pickle) = archive.pickle().ok_or_else(|| refused("the archive holds no data.pkl"))?;
        let (stem, pickle) = (stem.to_owned(), file.get(pickle).unwrap_or_default());
        if let Some(order) = archive.get(&format!("{stem}byteorder"))
            && file.get(order).is_some_and(|order| order != b"little")
        {
            return Err(refused("its numbers are big-endian"));
        }
        let machine = Machine::run(pickle)?;
        let mut walk = Walk::new(&machine);
        let (root, wrappers) = walk.weights();
        walk.visit(root, "", 0)?;
        let tensors = without_prefix(walk.tensors);
        let beside = beside(&machine, &wrappers);
        let mut named = 0_usize;
        for (name, tensor) in &tensors {
            let entry = archive.get(&format!("{stem}data/{}", tensor.key));
            let entry =
                entry.ok_or_else(|| refused(format!("the numbers of `{}` are missing", name.escape_debug())))?;
            // Axes that are stretched would take more memory than the file has bytes.
            let size = tensor.size().filter(|size| *size <= entry.len());
            let (Some(size), true) = (size, tensor.end().is_some_and(|end| end <= entry.len())) else {
                return Err(refused(format!("`{}` reaches beyond its storage", name.escape_debug())));
            };
            named = named.saturating_add(size);
        }
        if named > file.len().saturating_mul(SHARED) {
            return Err(refused(format!("its tensors name {named} bytes, the file has {}", file.len())));
        }
        let unread = machine.opaque.clone();
        let tensors = tensors
            .into_iter()
            .map(|(name, tensor)| {
                let key = format!("{stem}data/{}", tensor.key);
                (name, StoredTensor { key, ..tensor })
            })
            .collect();
        Ok(Self { path: path.to_owned(), content, archive, tensors, unread, beside })
    }

    /// Names of functions and types that the file mentions and that were left alone.
    pub fn unread(&self) -> impl Iterator<Item = &str> {
        self.unread.iter().map(String::as_str)
    }

    /// What lies beside the weights and was not taken, an optimizer's state or an average for instance: how many tensors
    /// by name.
    pub fn beside(&self) -> &BTreeMap<String, usize> {
        &self.beside
    }

    /// The tensors by name; those of a `state_dict` or the like if there is one, without what `DataParallel` puts before
    /// every name.
    ///
    /// # Errors
    /// If there are none.
    pub fn tensors(&self) -> Result<Vec<(String, TensorData<'_>)>> {
        if self.tensors.is_empty() {
            return Err(Error::file(&self.path, Fault::NoTensors));
        }
        let data = |tensor: &StoredTensor| {
            let entry =
                self.archive.get(&tensor.key).and_then(|range| self.content.bytes().get(range)).unwrap_or_default();
            TensorData::new(tensor.dtype, &*tensor.shape, tensor.gather(entry).unwrap_or_default())
        };
        self.tensors.iter().map(|(name, tensor)| Ok((name.clone(), data(tensor)?))).collect()
    }

    /// The same as a checked container in memory: for adapters.
    ///
    /// # Errors
    /// As [`tensors`](Self::tensors).
    pub fn to_tensor_file(&self) -> Result<TensorFile> {
        let tensors = self.tensors()?;
        let bytes = write::tensors_to_bytes(&self.path, &tensors, &BTreeMap::new())?;
        TensorFile::from_bytes(&self.path, bytes)
    }
}

/// A pickle that is not read, and why.
fn refused(reason: impl Into<String>) -> Fault {
    Fault::Pickle { reason: reason.into() }
}

/// On the way from the root of a pickle to its tensors.
struct Walk<'a> {
    machine: &'a Machine,
    tensors: BTreeMap<String, StoredTensor>,
    steps: usize,
    /// Bytes of the names so far.
    names: usize,
}

/// How many tensors lie beside those under the wrappers, by the name that they have in the innermost wrapper around both.
fn beside(machine: &Machine, wrappers: &[&str]) -> BTreeMap<String, usize> {
    let mut found = BTreeMap::new();
    let mut id = machine.root;
    for wrapper in wrappers {
        let Node::Dict(entries) = machine.node(id) else { break };
        for (key, value) in entries {
            let Node::Text(name) = machine.node(*key) else { continue };
            if name == wrapper {
                id = *value;
                continue;
            }
            let mut walk = Walk::new(machine);
            // What is nested without end is not taken anyway; as far as it was seen, it counts.
            let _ = walk.visit(*value, "", 0);
            if !walk.tensors.is_empty() {
                *found.entry(name.clone()).or_default() += walk.tensors.len();
            }
        }
    }
    found
}

/// Names without a prefix that all of them have.
fn without_prefix(tensors: BTreeMap<String, StoredTensor>) -> BTreeMap<String, StoredTensor> {
    match PREFIXES.into_iter().find(|prefix| tensors.keys().all(|name| name.starts_with(prefix))) {
        None => tensors,
        Some(prefix) => tensors.into_iter().map(|(name, tensor)| (name[prefix.len()..].to_owned(), tensor)).collect(),
    }
}

impl<'a> Walk<'a> {
    fn new(machine: &'a Machine) -> Self {
        Self { machine, tensors: BTreeMap::new(), steps: 0, names: 0 }
    }

    /// The object that holds the weights, and the names that lead to it: a dictionary with no tensor right in it may have
    /// them under a name that trainers use.
    fn weights(&self) -> (Id, Vec<&'static str>) {
        let (mut id, mut names) = (self.machine.root, Vec::new());
        while let Node::Dict(entries) = self.machine.node(id)
            && names.len() < WRAPPERS.len()
            && !entries.iter().any(|(_, value)| matches!(self.machine.node(*value), Node::Tensor(_)))
        {
            let under = |wrapper: &'static str| {
                let mut values = entries.iter().filter_map(|(key, value)| {
                    let is_it = matches!(self.machine.node(*key), Node::Text(text) if text == wrapper);
                    (is_it && matches!(self.machine.node(*value), Node::Dict(_))).then_some(*value)
                });
                values.next().map(|value| (value, wrapper))
            };
            let Some((inner, wrapper)) = WRAPPERS.into_iter().find_map(under) else { break };
            id = inner;
            names.push(wrapper);
        }
        (id, names)
    }

    fn visit(&mut self, id: Id, name: &str, depth: usize) -> Result<(), Fault> {
        self.steps += 1;
        self.names += name.len();
        if self.steps > STEPS * self.machine.len() + 1000 || depth > DEPTH || self.names > NAMES {
            return Err(refused(format!("its objects are nested more than {DEPTH} deep or repeated without end")));
        }
        let machine = self.machine;
        let below = |key: &str| if name.is_empty() { key.to_owned() } else { format!("{name}.{key}") };
        match machine.node(id) {
            Node::Dict(entries) => entries.iter().try_for_each(|(key, value)| match machine.node(*key) {
                Node::Text(key) => self.visit(*value, &below(key), depth + 1),
                Node::Int(key) => self.visit(*value, &below(&key.to_string()), depth + 1),
                _ => Ok(()),
            }),
            Node::List(items) | Node::Tuple(items) => items
                .iter()
                .enumerate()
                .try_for_each(|(index, item)| self.visit(*item, &below(&index.to_string()), depth + 1)),
            Node::Tensor(tensor) => {
                if self.tensors.len() >= TENSORS {
                    return Err(refused(format!("it holds more than {TENSORS} tensors")));
                }
                self.tensors.insert(name.to_owned(), tensor.clone());
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

impl StoredTensor {
    /// Bytes of its storage that it reaches; `None` if that overflows.
    fn end(&self) -> Option<usize> {
        if self.shape.contains(&0) {
            return Some(0);
        }
        let mut axes = self.shape.iter().zip(&self.strides);
        let last =
            axes.try_fold(self.offset, |last, (length, stride)| last.checked_add((length - 1).checked_mul(*stride)?))?;
        last.checked_add(1)?.checked_mul(self.dtype.size())
    }

    /// Bytes of its numbers, one after the other; `None` if that overflows, or exceeds what its storage is said to hold.
    fn size(&self) -> Option<usize> {
        let count = match self.shape.contains(&0) {
            true => 0,
            false => self.shape.iter().try_fold(1_usize, |count, length| count.checked_mul(*length))?,
        };
        (count <= self.elements).then_some(count)?.checked_mul(self.dtype.size())
    }

    /// The numbers in row-major order.
    fn gather<'a>(&self, storage: &'a [u8]) -> Option<Cow<'a, [u8]>> {
        // Beside an axis of no length the others may be of any.
        if self.shape.contains(&0) {
            return Some(Cow::Borrowed(&[]));
        }
        let size = self.dtype.size();
        let count: usize = self.shape.iter().product();
        let mut dense = 1;
        let contiguous = self.shape.iter().zip(&self.strides).rev().all(|(length, stride)| {
            let fits = *length == 1 || *stride == dense;
            dense *= length;
            fits
        });
        if contiguous {
            return storage.get(self.offset * size..(self.offset + count) * size).map(Cow::Borrowed);
        }
        let mut bytes = Vec::with_capacity(count * size);
        let mut index = vec![0; self.shape.len()];
        for _ in 0..count {
            let at: usize = self.offset + index.iter().zip(&self.strides).map(|(i, stride)| i * stride).sum::<usize>();
            bytes.extend_from_slice(storage.get(at * size..(at + 1) * size)?);
            for axis in (0..index.len()).rev() {
                index[axis] += 1;
                if index[axis] < self.shape[axis] {
                    break;
                }
                index[axis] = 0;
            }
        }
        Some(Cow::Owned(bytes))
    }
}

/// The type of a storage class of torch.
fn storage_dtype(class: &str) -> Option<Dtype> {
    Some(match class.strip_prefix("torch.")? {
        "DoubleStorage" => Dtype::F64,
        "FloatStorage" => Dtype::F32,
        "HalfStorage" => Dtype::F16,
        "BFloat16Storage" => Dtype::Bf16,
        "LongStorage" => Dtype::I64,
        "IntStorage" => Dtype::I32,
        "ShortStorage" => Dtype::I16,
        "CharStorage" => Dtype::I8,
        "ByteStorage" => Dtype::U8,
        "BoolStorage" => Dtype::Bool,
        _ => return None,
    })
}
