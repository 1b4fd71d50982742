//! The named tensors of one model component, and the scopes through which a model reads them.
//!
//! A model asks for each tensor by its checkpoint name and shape; nothing is guessed, stretched or skipped. Files are
//! mapped, so that opening them costs nothing and a tensor is copied once, straight to its device.

use std::{
    cell::Cell,
    collections::BTreeMap,
    fmt,
    ops::Div,
    path::{Path, PathBuf},
};

use lora_core::{
    Backend, Cpu,
    format::{Component, Dtype, TensorFile},
};
use tch::{Kind, Tensor};

use crate::{Error, Result, Torch, backend::signed};

/// The tensors of one component, by name, with a note of which were read.
#[derive(Debug)]
pub struct Weights {
    component: Option<Component>,
    files: Vec<TensorFile>,
    entries: BTreeMap<String, Entry>,
    /// Tensors that nobody has are drawn.
    drawn: bool,
}

#[derive(Debug)]
struct Entry {
    source: Source,
    read: Cell<bool>,
}

#[derive(Debug)]
enum Source {
    /// The index of a file.
    File(usize),
    Tensor(Tensor),
}

impl Weights {
    /// The tensors of some files, which together hold every name once (a model may be cut into shards).
    ///
    /// # Errors
    /// If a file is not a sound safetensors file, or a name is in two of them.
    pub fn open(paths: &[PathBuf]) -> Result<Self> {
        let mut weights = Self { component: None, files: Vec::new(), entries: BTreeMap::new(), drawn: false };
        for path in paths {
            let file = TensorFile::open(path)?;
            let index = weights.files.len();
            for name in file.names() {
                let name = name.to_string();
                if let Some(Entry { source: Source::File(first), .. }) = weights.entries.get(&name) {
                    let first = weights.files[*first].path().to_path_buf();
                    return Err(Error::Duplicate { name, first, second: file.path().to_path_buf() });
                }
                weights.entries.insert(name, Entry::new(Source::File(index)));
            }
            weights.files.push(file);
        }
        Ok(weights)
    }

    /// Tensors that are there already; of two with one name the later counts.
    pub fn from_tensors(tensors: impl IntoIterator<Item = (String, Tensor)>) -> Self {
        let entries = tensors.into_iter().map(|(name, tensor)| (name, Entry::new(Source::Tensor(tensor)))).collect();
        Self { component: None, files: Vec::new(), entries, drawn: false }
    }

    /// Random weights of whatever names and shapes a model asks for, so that a bench needs no download.
    ///
    /// Matrices and kernels are normal with deviation `1/√fan-in`, so that activations keep their size; other weights are
    /// ones, biases zeros. They are drawn on the device by libtorch's own generator.
    pub fn drawn() -> Self {
        Self { component: None, files: Vec::new(), entries: BTreeMap::new(), drawn: true }
    }

    /// The same tensors, on their device in their kind: models that are then built for that place share them.
    ///
    /// # Errors
    /// If there is no memory for them.
    pub fn resident(self, on: &Torch) -> Result<Self> {
        let mut entries = BTreeMap::new();
        for name in self.entries.keys() {
            entries.insert(name.clone(), Entry::new(Source::Tensor(self.load(name, on)?)));
        }
        Ok(Self { entries, files: Vec::new(), ..self })
    }

    /// Puts a tensor in the place of the one of that name, or beside the others if there is none.
    pub fn replace(&mut self, name: impl Into<String>, tensor: Tensor) {
        self.entries.insert(name.into(), Entry::new(Source::Tensor(tensor)));
    }

    /// The same tensors as those of a pipeline's `component`, which every [`Projection`](crate::Projection) then knows.
    pub fn of(self, component: Component) -> Self {
        Self { component: Some(component), ..self }
    }

    /// All names, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// The names that nobody has read so far.
    pub fn unused(&self) -> Vec<&str> {
        self.entries.iter().filter(|(_, entry)| !entry.read.get()).map(|(name, _)| name.as_str()).collect()
    }

    /// The scope of all names; floating tensors that are read through it land on that device in that kind.
    pub fn root<'a>(&'a self, on: &Torch) -> Scope<'a> {
        Scope { weights: self, on: *on, path: String::new() }
    }

    /// The shape of a tensor.
    pub fn shape(&self, name: &str) -> Option<Vec<usize>> {
        match &self.entries.get(name)?.source {
            Source::File(index) => Some(self.files[*index].info(name)?.shape.clone()),
            Source::Tensor(tensor) => Some(Torch::CPU.shape(tensor)),
        }
    }

    /// The file that holds a tensor.
    pub fn file(&self, name: &str) -> Option<&Path> {
        match &self.entries.get(name)?.source {
            Source::File(index) => Some(self.files[*index].path()),
            Source::Tensor(_) => None,
        }
    }

    fn load(&self, name: &str, on: &Torch) -> Result<Tensor> {
        let missing = || Error::MissingTensor { name: name.to_owned() };
        let entry = self.entries.get(name).ok_or_else(missing)?;
        entry.read.set(true);
        let _no_grad = tch::no_grad_guard();
        let tensor = match &entry.source {
            Source::Tensor(tensor) => tensor.shallow_clone(),
            Source::File(index) => host_tensor(&self.files[*index], name)?.ok_or_else(missing)?,
        };
        let kind = if tensor.f_is_floating_point()? { on.kind } else { tensor.f_kind()? };
        Ok(tensor.f_to_device(on.device)?.f_to_kind(kind)?)
    }
}

impl Entry {
    fn new(source: Source) -> Self {
        Self { source, read: Cell::new(false) }
    }
}

/// A tensor of a file in its own kind on the host; kinds that libtorch computes nothing with are widened.
fn host_tensor(file: &TensorFile, name: &str) -> Result<Option<Tensor>> {
    let (Some(info), Some(bytes)) = (file.info(name), file.bytes(name)) else { return Ok(None) };
    let kind = match info.dtype {
        Dtype::F64 => Kind::Double,
        Dtype::F32 => Kind::Float,
        Dtype::F16 => Kind::Half,
        Dtype::Bf16 => Kind::BFloat16,
        Dtype::I64 => Kind::Int64,
        Dtype::I32 => Kind::Int,
        Dtype::U8 => Kind::Uint8,
        _ => {
            let array = file.array(name)?;
            return Ok(Some(Torch::CPU.tensor(&Cpu.values(&array)?, &info.shape)?));
        }
    };
    Ok(Some(Tensor::f_from_data_size(bytes, &signed(&info.shape), kind)?))
}

fn draw(name: &str, shape: &[usize], on: &Torch) -> Result<Tensor> {
    let _no_grad = tch::no_grad_guard();
    let size = signed(shape);
    let options = (on.kind, on.device);
    match shape {
        [_, inner @ ..] if !inner.is_empty() => {
            let fan_in = inner.iter().product::<usize>().max(1) as f64;
            Ok(Tensor::f_randn(&size, options)?.f_mul_scalar(fan_in.sqrt().recip())?)
        }
        _ if name.ends_with("bias") => Ok(Tensor::f_zeros(&size, options)?),
        _ => Ok(Tensor::f_ones(&size, options)?),
    }
}

/// A place in the tree of names: `&scope / "down_blocks" / 0` is the scope `down_blocks.0`.
#[derive(Clone)]
pub struct Scope<'a> {
    weights: &'a Weights,
    on: Torch,
    path: String,
}

impl<'a> Scope<'a> {
    /// The path from the root, with dots.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Where floating tensors land.
    pub fn backend(&self) -> Torch {
        self.on
    }

    /// The component that the tensors belong to, if that was said.
    pub fn component(&self) -> Option<Component> {
        self.weights.component
    }

    /// The same place, with tensors landing on another device or in another kind.
    pub fn on(&self, on: &Torch) -> Self {
        Self { on: *on, ..self.clone() }
    }

    /// The tensor `name` below this place; integers keep their kind.
    ///
    /// # Errors
    /// If it is not there, or has another shape.
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let name = self.name(name);
        if self.weights.drawn && !self.weights.entries.contains_key(&name) {
            return draw(&name, shape, &self.on);
        }
        let actual = self.weights.shape(&name).ok_or_else(|| Error::MissingTensor { name: name.clone() })?;
        if actual != shape {
            return Err(Error::Shape { name, expected: shape.to_vec(), actual });
        }
        self.weights.load(&name, &self.on)
    }

    /// Whether there is a tensor `name` below this place.
    pub fn has(&self, name: &str) -> bool {
        self.weights.entries.contains_key(&self.name(name))
    }

    /// The shape of the tensor `name` below this place.
    pub fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.weights.shape(&self.name(name))
    }

    fn name(&self, name: &str) -> String {
        if self.path.is_empty() { name.to_owned() } else { format!("{}.{name}", self.path) }
    }
}

impl fmt::Debug for Scope<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Scope").field("path", &self.path).field("on", &self.on).finish_non_exhaustive()
    }
}

impl<'a, S: fmt::Display> Div<S> for &Scope<'a> {
    type Output = Scope<'a>;

    fn div(self, segment: S) -> Scope<'a> {
        Scope { path: self.name(&segment.to_string()), weights: self.weights, on: self.on }
    }
}

impl<'a, S: fmt::Display> Div<S> for Scope<'a> {
    type Output = Scope<'a>;

    fn div(self, segment: S) -> Scope<'a> {
        &self / segment
    }
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    fn toy() -> Weights {
        let tensor = |shape: &[i64], kind| Tensor::f_ones(shape, (kind, Device::Cpu)).unwrap();
        Weights::from_tensors([
            ("blocks.0.proj.weight".to_owned(), tensor(&[2, 3], Kind::Half)),
            ("blocks.0.ids".to_owned(), tensor(&[4], Kind::Int64)),
        ])
    }

    #[test]
    fn a_scope_reads_by_checkpoint_name_in_the_asked_kind() {
        let weights = toy();
        let place = &weights.root(&Torch::CPU) / "blocks" / 0;
        assert_eq!(place.path(), "blocks.0");
        let tensor = (&place / "proj").tensor("weight", &[2, 3]).unwrap();
        assert_eq!((tensor.kind(), tensor.size()), (Kind::Float, vec![2, 3]));
        assert_eq!(weights.unused(), ["blocks.0.ids"]);
        assert_eq!(place.tensor("ids", &[4]).unwrap().kind(), Kind::Int64);
        assert!(weights.unused().is_empty());
    }

    #[test]
    fn a_wrong_shape_or_name_is_refused_with_the_full_name() {
        let weights = toy();
        let place = &weights.root(&Torch::CPU) / "blocks.0.proj";
        let error = place.tensor("weight", &[3, 2]).unwrap_err().to_string();
        assert_eq!(error, "`blocks.0.proj.weight` is [2, 3], expected [3, 2]");
        let error = place.tensor("bias", &[2]).unwrap_err().to_string();
        assert_eq!(error, "`blocks.0.proj.bias` is missing from the weights");
        assert_eq!(weights.unused().len(), 2);
    }
}
