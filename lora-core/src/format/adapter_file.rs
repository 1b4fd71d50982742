//! Reading adapters of every dialect against a base model, with every key accounted for.
//!
//! The dialect is decided key by key, since one file can mix spellings and families. What cannot be applied is listed with
//! its reason; what would be applied wrongly is an error that names the key.

use std::{
    collections::BTreeMap,
    fmt,
    path::{Path, PathBuf},
};

use rayon::prelude::*;

use super::{
    BaseModel, Component, Dialect, Dtype, Fault, Quoted, Replacement, TensorFile, adapter_stream, names::Place,
    sorted_keys::SortedKeys,
};
use crate::{AnyAdapter, Array, Error, Result};

/// An adapter file, read against a base.
#[derive(Debug, Clone)]
pub struct AdapterFile {
    /// Where it was read.
    pub path: PathBuf,
    /// The spelling that most keys use.
    pub dialect: Dialect,
    /// The adapters, in the order of the file's keys.
    pub modules: Vec<AdaptedModule>,
    /// Tensors that the file brings whole.
    pub replacements: Vec<Replacement>,
    /// Keys of bundled textual inversions: no adapter, but known.
    pub embeddings: Vec<String>,
    /// Keys that were not applied, with the reason, sorted.
    pub unapplied: Vec<(String, Reason)>,
    /// What was applied and may surprise.
    pub warnings: Vec<Warning>,
    /// What the file says about itself.
    pub metadata: BTreeMap<String, String>,
    /// How many keys the file has.
    pub keys: usize,
}

/// An adapter and the module that it belongs to.
#[derive(Debug, Clone)]
pub struct AdaptedModule {
    /// The part of the model.
    pub component: Component,
    /// The module's path in the diffusers or transformers spelling; of text encoders with `text_model.`.
    pub path: String,
    /// The adapter, its factors widened to `f32`, for the weight as the base stores it.
    pub adapter: AnyAdapter<Array>,
    /// The shape of the base weight.
    pub weight: Vec<usize>,
    /// How the file stores the factors.
    pub dtype: Dtype,
    /// Whether the factors were turned over on reading: embeddings, and weights stored `[in, out]`.
    pub turned: bool,
}

/// Why a key was not applied.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Reason {
    /// The base has the component, but no module of that name.
    NoModule(Component),
    /// The base lacks the component.
    NoComponent(Component),
    /// The key belongs to another family of models.
    OtherFamily(&'static str),
    /// The module is there; what the tensor is for is unknown.
    UnknownSuffix,
    /// Neither the beginning nor the end of the key is known.
    UnknownKey,
}

/// Something that was applied as the file says and may surprise.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Warning {
    /// `alpha` is 0, so the module's adapter does nothing; some programs read 0 as "equal to the rank".
    AlphaIsZero(String),
    /// The adapter is on the embedding table that is also the head: merged, it changes both roles.
    TiedHead(String),
}

impl Warning {
    /// Whether it is about an alpha of 0.
    pub fn is_of_alpha(&self) -> bool {
        matches!(self, Self::AlphaIsZero(_))
    }
}

impl AdapterFile {
    /// Reads an adapter: a safetensors file, or a folder of peft or diffusers.
    ///
    /// # Errors
    /// If the file is broken or hostile (`docs/formats.md` §11), if a module's tensors do not make an adapter of the base's
    /// module, or if nothing in it belongs to the base. Keys that merely match nothing are listed in
    /// [`unapplied`](Self::unapplied).
    pub fn read(path: &Path, base: &BaseModel) -> Result<Self> {
        let path = adapter_path(path)?;
        Self::of(&TensorFile::read(&path)?, base)
    }

    /// [`read`](Self::read) for a file that is open already; a configuration is looked for beside it.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn of(file: &TensorFile, base: &BaseModel) -> Result<Self> {
        let (mut read, modules) = Self::of_each(file, base, &Ok)?;
        read.modules = modules;
        Ok(read)
    }

    /// [`of`](Self::of) for a file whose adapters need not all be in memory: each goes through `each` as soon as it is made,
    /// on all cores, and the results come in the order of the modules, which the rest of the answer does not hold.
    ///
    /// # Errors
    /// As [`of`](Self::of), and what `each` returns.
    pub fn of_each<T: Send>(
        file: &TensorFile,
        base: &BaseModel,
        each: &(dyn Fn(AdaptedModule) -> Result<T> + Sync),
    ) -> Result<(Self, Vec<T>)> {
        let sorted = SortedKeys::of(file, base)?;
        let mut read = sorted.found.clone();
        let places: Vec<_> = sorted.places().collect();
        let assemble = |place: &&Place| -> Result<(Self, Vec<T>)> {
            let mut one = adapter_stream::empty();
            sorted.assemble(file, base, place, &mut one)?;
            let results = std::mem::take(&mut one.modules).into_iter().map(each).collect::<Result<_>>()?;
            Ok((one, results))
        };
        // Widening a large file takes longer than reading it. The first error in the order of the modules is the one shown.
        let assembled: Vec<Result<(Self, Vec<T>)>> = places.par_iter().map(assemble).collect();
        let mut results = Vec::new();
        for one in assembled {
            let (one, of_one) = one?;
            read.replacements.extend(one.replacements);
            read.warnings.extend(one.warnings);
            results.extend(of_one);
        }
        Ok((read, results))
    }

    /// How many keys took part.
    pub fn applied(&self) -> usize {
        self.keys - self.unapplied.len() - self.embeddings.len()
    }
}

/// The file of an adapter inside a folder of peft or diffusers, or the path itself; a pickle if nothing else is there.
///
/// # Errors
/// If the folder has neither.
pub fn adapter_path(path: &Path) -> Result<PathBuf> {
    if !path.is_dir() {
        return Ok(path.to_owned());
    }
    let safe = ["adapter_model.safetensors", "pytorch_lora_weights.safetensors"];
    let file = safe
        .into_iter()
        .chain(["adapter_model.bin", "pytorch_lora_weights.bin"])
        .map(|name| path.join(name))
        .find(|file| file.is_file());
    file.ok_or_else(|| Error::file(path, Fault::NoAdapterFile))
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoModule(component) => write!(f, "the base's {component} has no such module"),
            Self::NoComponent(component) => write!(f, "the base has no {component}"),
            Self::OtherFamily(family) => write!(f, "it belongs to {family}"),
            Self::UnknownSuffix => f.write_str("what this tensor of the module is for is unknown"),
            Self::UnknownKey => f.write_str("no naming that is known"),
        }
    }
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AlphaIsZero(key) => write!(f, "{} is 0, so its module's adapter does nothing", Quoted(key)),
            Self::TiedHead(path) => {
                write!(
                    f,
                    "{} is also the head: merged, the adapter changes what goes in and what comes out",
                    Quoted(path)
                )
            }
        }
    }
}
