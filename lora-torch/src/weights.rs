//! The named tensors of one model component, and the scopes through which a model reads them.
//!
//! A model asks for each tensor by its checkpoint name and shape; nothing is guessed, stretched or skipped. Files are
//! mapped, so that opening them costs nothing and a tensor is copied once, straight to its device. Matrices can be
//! quantised on that way, one by one.

mod packed;

use std::{
    cell::{Cell, OnceCell},
    collections::BTreeMap,
    fmt,
    ops::Div,
    path::{Path, PathBuf},
};

use lora_core::{
    Backend, Cpu,
    format::{Component, Dtype, TensorFile},
};
use tch::{Device, Kind, Tensor};

use crate::{
    BaseWeight, Error, Result, Torch,
    backend::signed,
    nf4::{Nf4, Scheme},
};

/// The tensors of one component, by name, with a note of which were read.
#[derive(Debug)]
pub struct Weights {
    component: Option<Component>,
    files: Vec<TensorFile>,
    entries: BTreeMap<String, Entry>,
    /// Tensors that nobody has are drawn.
    drawn: bool,
    /// How base weights that are matrices are quantised, if they are.
    scheme: Option<Scheme>,
    /// Whether matrices that are stored in 16 bits stay so where 32 are computed with.
    narrow: bool,
    /// Where tensors, once read, stay for the next reader.
    shared: Option<Torch>,
}

#[derive(Debug)]
struct Entry {
    source: Source,
    read: Cell<bool>,
    /// What became of it, where readers share it.
    held: OnceCell<BaseWeight>,
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
        let mut weights = Self::of_entries(BTreeMap::new());
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
        let entries = tensors.into_iter().map(|(name, tensor)| (name, Entry::new(Source::Tensor(tensor))));
        Self::of_entries(entries.collect())
    }

    fn of_entries(entries: BTreeMap<String, Entry>) -> Self {
        Self { component: None, files: Vec::new(), entries, drawn: false, scheme: None, narrow: false, shared: None }
    }

    /// Random weights of whatever names and shapes a model asks for, so that a bench needs no download.
    ///
    /// Matrices and kernels are normal with deviation `1/√fan-in`, so that activations keep their size; other weights are
    /// ones, biases zeros. They are drawn on the device by libtorch's own generator.
    pub fn drawn() -> Self {
        Self { drawn: true, ..Self::of_entries(BTreeMap::new()) }
    }

    /// The same tensors, each of which stays on its device in its kind once it was read: models that are built for that
    /// place share them.
    pub fn resident(self, on: &Torch) -> Self {
        Self { shared: Some(*on), ..self }
    }

    /// The same tensors, with base weights of linear layers quantised while they are read. What was quantised before stays
    /// as it is, whatever is said here.
    pub fn quantised(self, scheme: Option<Scheme>) -> Self {
        Self { scheme, ..self }
    }

    /// The same tensors, with base weights that are matrices in 16 bits left so on the CPU, where layers compute in 32: half
    /// the memory for a pass over each matrix and use, which pays where most uses are for one row.
    pub fn narrow(self) -> Self {
        Self { narrow: true, ..self }
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
        Scope { weights: self, on: *on, path: String::new(), scheme: self.scheme }
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

    /// A tensor on its device; numbers with a fraction in the kind that is asked for.
    fn load(&self, name: &str, on: &Torch) -> Result<Tensor> {
        let read = || {
            let tensor = self.stored(name)?;
            let kind = if tensor.f_is_floating_point()? { on.kind } else { tensor.f_kind()? };
            Ok(BaseWeight::Full(tensor.f_to_device(on.device)?.f_to_kind(kind)?))
        };
        match self.held(name, on, read)? {
            BaseWeight::Full(tensor) => Ok(tensor),
            quantised => quantised.full(on.kind),
        }
    }

    /// The base weight of a layer on its device.
    fn load_weight(&self, name: &str, on: &Torch, scheme: Option<Scheme>) -> Result<BaseWeight> {
        let read = || match scheme {
            // From the numbers as they are stored, not as the layer would compute with them.
            Some(scheme) => {
                let stored = self.stored(name)?.f_to_device(on.device)?;
                Ok(BaseWeight::Nf4(Nf4::quantise(&stored, scheme)?))
            }
            None => {
                let stored = self.stored(name)?;
                let is_narrow = matches!(stored.f_kind()?, Kind::BFloat16 | Kind::Half) && stored.dim() == 2;
                if self.narrow && is_narrow && (on.kind, on.device) == (Kind::Float, Device::Cpu) {
                    return Ok(BaseWeight::Narrow(stored.f_contiguous()?));
                }
                Ok(BaseWeight::Full(laid_out(stored.f_to_device(on.device)?.f_to_kind(on.kind)?)?))
            }
        };
        self.held(name, on, read).map_err(naming(name))
    }

    /// What `read` gives, or what it gave before where readers share it.
    fn held(&self, name: &str, on: &Torch, read: impl FnOnce() -> Result<BaseWeight>) -> Result<BaseWeight> {
        let _no_grad = tch::no_grad_guard();
        let entry = self.entry(name)?;
        entry.read.set(true);
        if self.shared != Some(*on) {
            return read();
        }
        if let Some(held) = entry.held.get() {
            return Ok(held.share());
        }
        let new = read()?;
        let _ = entry.held.set(new.share());
        Ok(new)
    }

    /// A tensor in its own kind where it is, for one of a file on the host.
    fn stored(&self, name: &str) -> Result<Tensor> {
        match &self.entry(name)?.source {
            Source::Tensor(tensor) => Ok(tensor.shallow_clone()),
            Source::File(index) => {
                host_tensor(&self.files[*index], name)?.ok_or_else(|| Error::MissingTensor { name: name.to_owned() })
            }
        }
    }

    fn entry(&self, name: &str) -> Result<&Entry> {
        self.entries.get(name).ok_or_else(|| Error::MissingTensor { name: name.to_owned() })
    }
}

impl Entry {
    fn new(source: Source) -> Self {
        Self { source, read: Cell::new(false), held: OnceCell::new() }
    }
}

/// What is wrong with 4 bits is wrong with the tensor of this name.
fn naming(name: &str) -> impl Fn(Error) -> Error {
    move |error| match error {
        Error::Config { reason, .. } => Error::Quantised { name: name.to_owned(), reason },
        error => error,
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

/// On CUDA a kernel's channels lie innermost, which makes cuDNN compute in that order and leave its own transposes out
/// (4 of 23 ms in a step of Stable Diffusion 1.5). On the CPU it brings nothing.
fn laid_out(weight: Tensor) -> Result<Tensor> {
    if weight.dim() != 4 || !matches!(weight.device(), Device::Cuda(_)) {
        return Ok(weight);
    }
    Ok(weight.f_permute([0, 2, 3, 1])?.f_contiguous()?.f_permute([0, 3, 1, 2])?)
}

/// A place in the tree of names: `&scope / "down_blocks" / 0` is the scope `down_blocks.0`.
#[derive(Clone)]
pub struct Scope<'a> {
    weights: &'a Weights,
    on: Torch,
    path: String,
    scheme: Option<Scheme>,
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

    /// The same place, where nothing is quantised to 4 bits.
    pub fn in_full(&self) -> Self {
        Self { scheme: None, ..self.clone() }
    }

    /// The tensor `name` below this place; integers keep their kind.
    ///
    /// # Errors
    /// If it is not there, or has another shape.
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let name = self.name(name);
        if self.is_drawn(&name) {
            return draw(&name, shape, &self.on);
        }
        self.check(&name, self.weights.shape(&name), shape)?;
        self.weights.load(&name, &self.on)
    }

    /// The base weight of the layer at this place, its tensor `weight`: `[out, in]` or `[out, in, kh, kw]`.
    ///
    /// A matrix is in 4 bits if it is stored so, or if the weights are to be [quantised](Weights::quantised).
    ///
    /// # Errors
    /// If it is not there, has another shape, or is quantised in a way that cannot be read.
    pub fn weight(&self, shape: &[usize]) -> Result<BaseWeight> {
        let name = self.name("weight");
        let scheme = self.scheme.filter(|_| shape.len() == 2);
        if self.is_drawn(&name) {
            let drawn = draw(&name, shape, &self.on)?;
            return Ok(match scheme {
                Some(scheme) => BaseWeight::Nf4(Nf4::quantise(&drawn, scheme).map_err(naming(&name))?),
                None => BaseWeight::Full(laid_out(drawn)?),
            });
        }
        if let Some(state) = self.weights.quant_state(&name)? {
            self.check(&name, Some(state.shape.clone()), shape)?;
            return self.weights.load_packed(&name, &self.on, &state);
        }
        self.check(&name, self.weights.shape(&name), shape)?;
        self.weights.load_weight(&name, &self.on, scheme)
    }

    fn is_drawn(&self, name: &str) -> bool {
        self.weights.drawn && !self.weights.entries.contains_key(name)
    }

    fn check(&self, name: &str, actual: Option<Vec<usize>>, expected: &[usize]) -> Result<()> {
        let name = name.to_owned();
        match actual {
            Some(actual) if actual == expected => Ok(()),
            Some(actual) => Err(Error::Shape { name, expected: expected.to_vec(), actual }),
            None => Err(Error::MissingTensor { name }),
        }
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
        Scope { path: self.name(&segment.to_string()), ..self.clone() }
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

    #[test]
    fn resident_tensors_are_the_same_memory_for_every_reader() {
        let tensor = |shape: &[i64]| Tensor::f_ones(shape, (Kind::Half, Device::Cpu)).unwrap();
        let named = [("a.weight", tensor(&[4, 64])), ("a.bias", tensor(&[4]))];
        let weights = Weights::from_tensors(named.map(|(name, tensor)| (name.to_owned(), tensor)));
        let weights = weights.resident(&Torch::CPU).quantised(Some(Scheme::Nf4));
        let place = weights.root(&Torch::CPU) / "a";
        let biases = [(); 2].map(|()| place.tensor("bias", &[4]).unwrap().data_ptr());
        assert_eq!(biases[0], biases[1]);
        let packed = [(); 2].map(|()| match place.weight(&[4, 64]).unwrap() {
            BaseWeight::Nf4(nf4) => nf4.packed().data_ptr(),
            BaseWeight::Full(_) | BaseWeight::Narrow(_) => panic!("not quantised"),
        });
        assert_eq!(packed[0], packed[1]);
        let other = weights.root(&Torch::CPU.with_kind(Kind::Double)).tensor("a.bias", &[4]).unwrap();
        assert_eq!(other.kind(), Kind::Double);
    }

    #[test]
    fn matrices_of_layers_are_quantised_and_nothing_else() {
        let tensor = |shape: &[i64]| Tensor::f_ones(shape, (Kind::Float, Device::Cpu)).unwrap();
        let named = [("a.weight", tensor(&[4, 64])), ("b.weight", tensor(&[4, 16, 1, 1]))];
        let weights = Weights::from_tensors(named.map(|(name, tensor)| (name.to_owned(), tensor)));
        let weights = weights.quantised(Some(Scheme::Nf4));
        let root = weights.root(&Torch::CPU);
        assert!((&root / "a").weight(&[4, 64]).unwrap().is_quantised());
        assert!(!(&root / "a").in_full().weight(&[4, 64]).unwrap().is_quantised());
        assert!(!(&root / "b").weight(&[4, 16, 1, 1]).unwrap().is_quantised());
        assert_eq!((&root / "a").tensor("weight", &[4, 64]).unwrap().size(), [4, 64]);
    }
}
