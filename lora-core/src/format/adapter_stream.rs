//! An adapter file whose factors are read module by module, whenever they are asked for.
//!
//! Opening it checks everything that [`AdapterFile::read`] checks, so that nothing is found wrong half-way through a merge,
//! but keeps none of the numbers: a file of hundreds of megabytes takes the memory of its largest module.

use std::{collections::BTreeMap, path::Path};

use rayon::prelude::*;

use super::{
    AdaptedModule, AdapterFile, BaseModel, Replacement, TensorFile,
    adapter_file::adapter_path,
    merge::{does_something, touches_weight},
    names::Place,
    sorted_keys::SortedKeys,
};
use crate::{Adapter, Cpu, Result};

/// Modules that are looked at before the memory that it took is let go of.
const AT_ONCE: usize = 32;

/// An adapter file, read against a base as it goes.
#[derive(Debug)]
pub struct AdapterStream {
    file: TensorFile,
    keys: SortedKeys,
    touched: BTreeMap<Place, Vec<Touched>>,
    modules: usize,
}

/// A tensor of the base that an adapter file changes.
#[derive(Debug, Clone)]
pub(super) struct Touched {
    pub tensor: String,
    /// Its new shape, where it is replaced as a whole.
    pub shape: Option<Vec<usize>>,
    /// Whether a head that is this table stays behind with the numbers of the base.
    pub splits_head: bool,
}

impl AdapterStream {
    /// Opens an adapter: a safetensors file, or a folder of peft or diffusers.
    ///
    /// The file is mapped; see [`TensorFile::open`].
    ///
    /// # Errors
    /// As [`AdapterFile::read`].
    pub fn open(path: &Path, base: &BaseModel) -> Result<Self> {
        let file = TensorFile::open(&adapter_path(path)?)?;
        let keys = SortedKeys::of(&file, base)?;
        let mut stream = Self { file, keys, touched: BTreeMap::new(), modules: 0 };
        let mut warnings = Vec::new();
        let places: Vec<Place> = stream.keys.places().cloned().collect();
        for places in places.chunks(AT_ONCE) {
            let assemble = |place: &Place| {
                let mut read = empty();
                stream.keys.assemble(&stream.file, base, place, &mut read)?;
                let joined = stream.keys.ties_head(base);
                let mut touched = touched(&read, base)?;
                touched.iter_mut().for_each(|tensor| tensor.splits_head &= !joined);
                Ok((read.modules.len(), touched, read.warnings))
            };
            let assembled: Vec<Result<_>> = places.par_iter().map(assemble).collect();
            for (place, assembled) in places.iter().zip(assembled) {
                let (modules, touched, mut of_module) = assembled?;
                stream.modules += modules;
                stream.touched.insert(place.clone(), touched);
                warnings.append(&mut of_module);
            }
            stream.release(base);
        }
        stream.keys.found.warnings = warnings;
        Ok(stream)
    }

    /// What is known of the file: keys, warnings, metadata, but no modules and no whole tensors.
    pub fn summary(&self) -> &AdapterFile {
        &self.keys.found
    }

    /// How many adapters it holds.
    pub fn modules(&self) -> usize {
        self.modules
    }

    /// The modules of the base that the file has keys for, with the tensors that change at a strength other than 0.
    pub(super) fn touched(&self) -> impl Iterator<Item = (&Place, &[Touched])> {
        self.touched.iter().map(|(place, tensors)| (place, tensors.as_slice()))
    }

    /// The adapters and whole tensors of one module; empty if the file has none for it.
    pub(super) fn module(&self, base: &BaseModel, place: &Place) -> Result<(Vec<AdaptedModule>, Vec<Replacement>)> {
        let mut read = empty();
        self.keys.assemble(&self.file, base, place, &mut read)?;
        Ok((read.modules, read.replacements))
    }

    /// Lets go of what reading took.
    pub(super) fn release(&self, base: &BaseModel) {
        self.file.release();
        base.files().iter().for_each(TensorFile::release);
    }
}

/// The tensors that the adapters of one module change.
fn touched(read: &AdapterFile, base: &BaseModel) -> Result<Vec<Touched>> {
    let mut touched = Vec::new();
    for new in &read.replacements {
        let shape = new.rows.is_none().then(|| new.value.shape.clone());
        let splits_head = base.has_tied_head() && new.splits_head(base);
        touched.push(Touched { tensor: new.tensor.clone(), shape, splits_head });
    }
    let mut touch = |tensor| touched.push(Touched { tensor, shape: None, splits_head: false });
    for module in read.modules.iter().filter(|module| does_something(&module.adapter)) {
        if touches_weight(&module.adapter) {
            touch(format!("{}.weight", module.path));
        }
        let name = format!("{}.bias", module.path);
        let bias = base.read(module.component, &name)?;
        if Adapter::<Cpu>::bias_change(&module.adapter, &Cpu, bias.as_ref(), 1.0)?.is_some() {
            touch(name);
        }
    }
    Ok(touched)
}

pub(super) fn empty() -> AdapterFile {
    AdapterFile {
        path: Default::default(),
        dialect: super::Dialect::Kohya,
        modules: Vec::new(),
        replacements: Vec::new(),
        embeddings: Vec::new(),
        unapplied: Vec::new(),
        warnings: Vec::new(),
        metadata: BTreeMap::new(),
        keys: 0,
    }
}
