//! A low-rank adapter out of two models: the leading singular triplets of what training changed.
//!
//! Both models may lie in any layout; weights are read, decomposed and dropped one at a time, on all cores. By default the
//! triplets come from a randomised search ([`Search::Randomised`]), which is as good as the whole decomposition to a
//! hundredth of its error and many times as fast. What an adapter file of low rank has no place for (norms,
//! biases, tables) is named with how much of it changed.

use std::sync::atomic::{AtomicUsize, Ordering};

use rayon::prelude::*;

use crate::{
    AnyAdapter, Array, Error, Result,
    format::{AdaptedModule, BaseModel, Component, Dtype, Family, Module, ModuleKind, TensorFile},
    resize::{Cut, Search, cut_difference},
};

/// Bytes of the models after which the memory that reading took is let go of: each time costs a walk through all of it.
const RELEASE: usize = 256 << 20;

/// How a difference becomes an adapter.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Extraction {
    /// How much is kept of linear layers and 1×1 convolutions.
    pub linear: Cut,
    /// How much is kept of larger convolutions.
    pub kernels: Cut,
    /// How triplets are found.
    pub search: Search,
}

/// What two models differ by.
#[derive(Debug, Clone, Default)]
pub struct Extracted {
    /// The modules that changed.
    pub modules: Vec<ExtractedModule>,
    /// How many linear layers and convolutions did not change.
    pub unchanged: usize,
    /// Tensors that changed and that a low-rank file has no place for, the most changed first.
    pub left_out: Vec<LeftOut>,
    /// Parts of the model that only one of the two has.
    pub missing: Vec<Component>,
}

/// A module that changed.
#[derive(Debug, Clone)]
pub struct ExtractedModule {
    /// Its adapter, a plain LoRA of scale 1.
    pub module: AdaptedModule,
    /// Share of the difference's `‖ΔW‖²` that the adapter keeps.
    pub energy: f64,
    /// `‖ΔW‖` over the norm of the base weight.
    pub relative: f64,
}

/// A tensor that changed and is in no adapter.
#[derive(Debug, Clone, PartialEq)]
pub struct LeftOut {
    /// The part of the model.
    pub component: Component,
    /// The tensor.
    pub tensor: String,
    /// Norm of its difference over that of the base.
    pub relative: f64,
}

/// Why nothing can be extracted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExtractError {
    /// The models are of different families.
    #[error("the base is {base}, the tuned model is {tuned}")]
    Families {
        /// Of the base.
        base: Family,
        /// Of the tuned model.
        tuned: Family,
    },
    /// A tensor has different shapes.
    #[error("{component}.{tensor} is {base:?} in the base and {tuned:?} in the tuned model")]
    Shapes {
        /// The part of the model.
        component: Component,
        /// The tensor.
        tensor: String,
        /// Its shape in the base.
        base: Vec<usize>,
        /// Its shape in the tuned model.
        tuned: Vec<usize>,
    },
    /// A tensor that one of the two lacks.
    #[error("{component}.{tensor} is in the {present} alone")]
    Missing {
        /// The part of the model.
        component: Component,
        /// The tensor.
        tensor: String,
        /// The model that has it.
        present: &'static str,
    },
    /// NaN or infinity in one of the two.
    #[error("{component}.{tensor} has values that are not finite")]
    NotFinite {
        /// The part of the model.
        component: Component,
        /// The tensor.
        tensor: String,
    },
    /// A difference without singular values.
    #[error("{component}.{tensor}: the difference cannot be decomposed: {reason}")]
    Indecomposable {
        /// The part of the model.
        component: Component,
        /// The tensor.
        tensor: String,
        /// Why.
        reason: String,
    },
    /// A file that could not be read.
    #[error(transparent)]
    Other(#[from] crate::Error),
}

/// Extracts the difference of two models; `progress` hears how many of how many tensors are done, from any thread.
///
/// A component that only one of them has is listed, not refused: tuned models are often stored as their UNet alone. The
/// VAE is looked at for what changed, but no adapter acts on it. Where the two store a weight in types of different width, a
/// difference that is no more than rounding to the narrower one is none.
///
/// # Errors
/// See [`ExtractError`].
pub fn extract(
    base: &BaseModel,
    tuned: &BaseModel,
    extraction: Extraction,
    progress: &(dyn Fn(usize, usize) + Sync),
) -> Result<Extracted, ExtractError> {
    if base.family() != tuned.family() {
        return Err(ExtractError::Families { base: base.family().clone(), tuned: tuned.family().clone() });
    }
    let mut extracted = Extracted::default();
    let mut tensors = Vec::new();
    for component in Component::ALL {
        match (base.has(component), tuned.has(component)) {
            (true, true) => {
                check(component, base, tuned)?;
                tensors.extend(base.tensors(component).map(|(name, _, _)| (component, name)));
            }
            (false, false) => {}
            _ => extracted.missing.push(component),
        }
    }
    let (done, read) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let changes: Vec<Result<Change, ExtractError>> = tensors
        .par_iter()
        .map(|(component, name)| {
            let change = change(base, tuned, *component, name, extraction);
            progress(done.fetch_add(1, Ordering::Relaxed) + 1, tensors.len());
            let stored = |model: &&BaseModel| {
                let (file, source) = model.locate(*component, name)?;
                source.bytes(file).map(<[u8]>::len)
            };
            let bytes: usize = [base, tuned].iter().filter_map(stored).sum();
            let before = read.fetch_add(bytes, Ordering::Relaxed);
            if before / RELEASE < (before + bytes) / RELEASE {
                [base, tuned].iter().flat_map(|model| model.files()).for_each(TensorFile::release);
            }
            change
        })
        .collect();
    for change in changes {
        match change? {
            Change::None { adaptable } => extracted.unchanged += usize::from(adaptable),
            Change::Module(module) => extracted.modules.push(*module),
            Change::LeftOut(left_out) => extracted.left_out.push(left_out),
        }
    }
    extracted.left_out.sort_by(|a, b| b.relative.total_cmp(&a.relative));
    Ok(extracted)
}

/// What became of one tensor.
enum Change {
    None { adaptable: bool },
    Module(Box<ExtractedModule>),
    LeftOut(LeftOut),
}

/// Refuses models whose tensors are not the same, before any is read.
fn check(component: Component, base: &BaseModel, tuned: &BaseModel) -> Result<(), ExtractError> {
    for (name, _, source) in base.tensors(component) {
        let tensor = || name.to_owned();
        let Some(shape) = tuned.shape(component, name) else {
            return Err(ExtractError::Missing { component, tensor: tensor(), present: "base" });
        };
        if !same_shape(&source.shape, shape) {
            let (base, tuned) = (source.shape.clone(), shape.to_vec());
            return Err(ExtractError::Shapes { component, tensor: tensor(), base, tuned });
        }
    }
    match tuned.tensors(component).find(|(name, _, _)| base.shape(component, name).is_none()) {
        Some((name, _, _)) => Err(ExtractError::Missing { component, tensor: name.to_owned(), present: "tuned model" }),
        None => Ok(()),
    }
}

fn change(
    base: &BaseModel,
    tuned: &BaseModel,
    component: Component,
    name: &str,
    extraction: Extraction,
) -> Result<Change, ExtractError> {
    let module = name.strip_suffix(".weight").and_then(|path| Some((path, base.module(component, path)?)));
    let module = module.filter(|(_, module)| component != Component::Vae && is_adaptable(module));
    let none = Ok(Change::None { adaptable: module.is_some() });
    let Some((difference, relative)) = difference(base, tuned, component, name)? else { return none };
    let Some((path, Module { weight, .. })) = module else {
        return Ok(Change::LeftOut(LeftOut { component, tensor: name.to_owned(), relative }));
    };
    let is_kernel = matches!(weight[..], [_, _, kh, kw] if kh * kw > 1);
    let cut = if is_kernel { extraction.kernels } else { extraction.linear };
    let (lora, _, energy) = cut_difference(difference, cut, extraction.search).map_err(|error| match error {
        Error::Numeric { reason, .. } => ExtractError::Indecomposable { component, tensor: name.to_owned(), reason },
        other => other.into(),
    })?;
    let module = AdaptedModule {
        component,
        path: path.to_owned(),
        adapter: AnyAdapter::Lora(lora),
        weight: weight.clone(),
        dtype: tuned.dtype(component, name).filter(|dtype| is_plain(*dtype)).unwrap_or(Dtype::F16),
        turned: false,
    };
    Ok(Change::Module(Box::new(ExtractedModule { module, energy, relative })))
}

/// The tuned tensor minus the base's, in the layout of the base, and its norm over the base's; `None` if nothing changed.
fn difference(
    base: &BaseModel,
    tuned: &BaseModel,
    component: Component,
    name: &str,
) -> Result<Option<(Array, f64)>, ExtractError> {
    let (Some((file, source)), Some((tuned_file, tuned_source))) =
        (base.locate(component, name), tuned.locate(component, name))
    else {
        return Ok(None);
    };
    let types = [base, tuned].map(|model| model.dtype(component, name).unwrap_or(Dtype::F32));
    let stored = (source.bytes(file), tuned_source.bytes(tuned_file));
    if types[0] == types[1] && source.transform == tuned_source.transform && stored.0 == stored.1 {
        return Ok(None);
    }
    base.check_whole(component, name)?;
    tuned.check_whole(component, name)?;
    let (old, mut new) = (source.read(file)?, tuned_source.read(tuned_file)?);
    if rounds_to_the_same(&old, &new, types) {
        return Ok(None);
    }
    for (new, old) in new.values.iter_mut().zip(&old.values) {
        *new -= old;
    }
    let (off, size) = (new.norm(), old.norm());
    if !off.is_finite() {
        return Err(ExtractError::NotFinite { component, tensor: name.to_owned() });
    }
    if off == 0.0 {
        return Ok(None);
    }
    Ok(Some((Array::new(old.shape, new.values)?, if size > 0.0 { off / size } else { f64::INFINITY })))
}

/// Whether two tensors that are stored in types of different width are equal in the narrower one.
fn rounds_to_the_same(old: &Array, new: &Array, types: [Dtype; 2]) -> bool {
    let (wider, narrower, narrow) = match types[0].size().cmp(&types[1].size()) {
        std::cmp::Ordering::Greater => (old, new, types[1]),
        std::cmp::Ordering::Less => (new, old, types[0]),
        std::cmp::Ordering::Equal => return false,
    };
    let rounded = narrow.narrow(&wider.values).and_then(|bytes| narrow.widen(&bytes));
    rounded.is_some_and(|rounded| rounded == narrower.values)
}

fn is_adaptable(module: &Module) -> bool {
    matches!(module.kind, ModuleKind::Linear | ModuleKind::Conv)
}

/// Whether an adapter is usually stored in that type.
fn is_plain(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::F32 | Dtype::F16 | Dtype::Bf16)
}

/// Whether two shapes hold the same layer: one program's 1×1 convolution is the other's matrix.
fn same_shape(a: &[usize], b: &[usize]) -> bool {
    let long = |shape: &[usize]| shape.iter().copied().filter(|length| *length != 1).collect::<Vec<_>>();
    long(a) == long(b)
}
