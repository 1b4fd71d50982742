//! Writing adapters, one dialect a submodule: what a dialect cannot say is an error that names the module.
//!
//! | dialect | written for |
//! |---|---|
//! | `kohya` | sd-scripts, LyCORIS, A1111, ComfyUI |
//! | `comfy` | ComfyUI's own spelling |
//! | `diffusers` | `load_lora_weights`, with no key left over |
//! | `peft` | `PeftModel.from_pretrained`, a folder |

mod alone;
mod diffusers;
mod kohya;
mod peft;
mod peft_lokr;
mod peft_oft;
mod peft_whole;

use std::{borrow::Cow, collections::BTreeMap, path::Path};

pub use alone::{describe_network, write_alone};

use super::{
    AdaptedModule, AdapterFile, Component, Dialect, Dtype, Family, Fault, Replacement, TensorData,
    training_metadata::without_hashes, write_tensors,
};
use crate::{Adapter, AnyAdapter, Array, Backend, Cpu, Error, Result, adapter::Lora};

/// Tensors by key, and the metadata that belongs to them.
type Written = (Vec<(String, TensorData<'static>)>, BTreeMap<String, String>);

/// Writes adapters of a base of `family`; see [`write_atomically`](super::write_atomically) for what stands at `path`
/// afterwards.
///
/// `path` is a file; of peft the folder, which is made if it does not exist. `metadata` is kept, and what readers of the
/// dialect look for is added where it is missing. `dtype` is how factors are stored, `None` as each came; alphas are
/// always `F32`, so that no scale is rounded.
///
/// # Errors
/// If the dialect has no words for one of the adapters, a factor is not finite in that type, or the file cannot be written.
pub fn write_adapter(
    path: &Path,
    dialect: Dialect,
    family: &Family,
    modules: &[AdaptedModule],
    metadata: &BTreeMap<String, String>,
    dtype: Option<Dtype>,
) -> Result<()> {
    write(path, dialect, family, (modules, &[]), metadata, dtype)
}

/// Writes all that was read of an adapter file, in another dialect or the same: adapters, whole tensors and metadata.
///
/// # Errors
/// As [`write_adapter`]; and if the file brings whole tensors, which peft alone has words for, or embeddings, which are
/// not converted.
pub fn write_adapter_file(
    path: &Path,
    dialect: Dialect,
    family: &Family,
    file: &AdapterFile,
    dtype: Option<Dtype>,
) -> Result<()> {
    let refused = |module: &str, reason| {
        Err(Error::file(path, Fault::Unwritable { module: module.to_owned(), dialect, reason, other: None }))
    };
    match (file.replacements.first(), file.embeddings.first()) {
        (Some(new), _) if dialect != Dialect::Peft => {
            refused(&new.tensor, "it is a whole tensor of the model and no difference; merge it instead")
        }
        (_, Some(embedding)) => refused(embedding, "it is an embedding and no adapter; keep the original file for it"),
        _ => write(path, dialect, family, (&file.modules, &file.replacements), &file.metadata, dtype),
    }
}

fn write(
    path: &Path,
    dialect: Dialect,
    family: &Family,
    (modules, replacements): (&[AdaptedModule], &[Replacement]),
    metadata: &BTreeMap<String, String>,
    dtype: Option<Dtype>,
) -> Result<()> {
    let metadata = match dialect {
        // Its writer puts new ones in the place of the old.
        Dialect::Kohya => metadata,
        _ => &without_hashes(metadata),
    };
    let plain = without_starts(modules)?;
    let writer = Writer { path, dialect, family, modules: &plain, replacements, dtype };
    match dialect {
        Dialect::Kohya | Dialect::Comfy => {
            let (tensors, found) = writer.kohya(metadata)?;
            write_tensors(path, &tensors, &found)
        }
        Dialect::Diffusers => {
            let (tensors, found) = writer.diffusers(metadata)?;
            write_tensors(path, &tensors, &found)
        }
        Dialect::Peft => writer.peft(metadata),
    }
}

struct Writer<'a> {
    path: &'a Path,
    dialect: Dialect,
    family: &'a Family,
    modules: &'a [AdaptedModule],
    replacements: &'a [Replacement],
    dtype: Option<Dtype>,
}

impl Writer<'_> {
    /// A tensor in the wanted type; numbers that overflow it are refused.
    fn tensor(&self, module: &AdaptedModule, array: &Array) -> Result<TensorData<'static>> {
        self.stored(&module.component.with(&module.path), module.dtype, array)
    }

    fn stored(&self, name: &str, dtype: Dtype, array: &Array) -> Result<TensorData<'static>> {
        let dtype = self.dtype.unwrap_or(dtype);
        let data = TensorData::from_f32(dtype, &*array.shape, &array.values)?;
        if dtype.all_finite(data.bytes()) {
            return Ok(data);
        }
        let stored = dtype.widen(data.bytes()).unwrap_or_default();
        let value = stored.into_iter().find(|value| !value.is_finite()).unwrap_or(f32::NAN);
        let name = name.to_owned();
        Err(Error::file(
            self.path,
            match array.is_finite() {
                true => Fault::FactorOverflow { module: name, value, dtype },
                false => Fault::NotFinite { key: name, value: f64::from(value) },
            },
        ))
    }

    fn unwritable(&self, module: &AdaptedModule, reason: &'static str) -> Error {
        Error::file(self.path, unwritable(module.component.with(&module.path), self.dialect, self.family, reason))
    }
}

/// A refusal that names the dialect to try instead: the one that language models have words in, or the one that takes most of
/// what Stable Diffusion has.
fn unwritable(module: String, dialect: Dialect, family: &Family, reason: &'static str) -> Fault {
    let widest = if matches!(family, Family::Language(_)) { Dialect::Peft } else { Dialect::Kohya };
    // What kohya's spelling has no words for, ComfyUI's has none for either: it differs in names alone.
    let is_as_wide = dialect == widest || (dialect == Dialect::Comfy && widest == Dialect::Kohya);
    Fault::Unwritable { module, dialect, reason, other: (!is_as_wide).then_some(widest) }
}

/// A single number, `F32`, without axes.
fn number(value: f64) -> Result<TensorData<'static>> {
    TensorData::from_f32(Dtype::F32, [], &[value as f32])
}

/// The numerator that gives `scale` at `rank`.
///
/// Forming the scale and taking it apart again may leave a last bit that the file's `f32` never had.
fn alpha(scale: f64, rank: usize) -> f64 {
    let alpha = scale * rank as f64;
    let single = f64::from(alpha as f32);
    if (single - alpha).abs() <= 1e-12 * alpha.abs() { single } else { alpha }
}

/// Factors of a start that is taken out of the update are joined to the others: no dialect has words for them.
fn without_starts(modules: &[AdaptedModule]) -> Result<Cow<'_, [AdaptedModule]>> {
    let has_start = |module: &AdaptedModule| matches!(&module.adapter, AnyAdapter::Lora(lora) if lora.start.is_some());
    if !modules.iter().any(has_start) {
        return Ok(Cow::Borrowed(modules));
    }
    let joined = modules.iter().map(|module| match &module.adapter {
        AnyAdapter::Lora(lora) if lora.start.is_some() => {
            Ok(AdaptedModule { adapter: AnyAdapter::Lora(lora.widened(&Cpu)?), ..module.clone() })
        }
        _ => Ok(module.clone()),
    });
    joined.collect::<Result<Vec<_>>>().map(Cow::Owned)
}

/// A pair with as many axes as the base weight has: peft and diffusers accept no others.
fn shaped_as_layer(module: &AdaptedModule, lora: &Lora<Array>) -> Result<(Array, Array)> {
    let rank = lora.down.shape.first().copied().unwrap_or(0);
    let &[out, ref inner @ ..] = &module.weight[..] else {
        return Err(Error::Shapes { operation: "adapter to be written", shapes: vec![module.weight.clone()] });
    };
    let down_shape: Vec<usize> = std::iter::once(rank).chain(inner.iter().copied()).collect();
    let mut up_shape = vec![1; module.weight.len()];
    up_shape[0] = out;
    if let Some(second) = up_shape.get_mut(1) {
        *second = rank;
    }
    Ok((Cpu.reshape(&lora.down, &down_shape)?, Cpu.reshape(&lora.up, &up_shape)?))
}

/// Metadata with what is missing filled in.
fn filled(
    metadata: &BTreeMap<String, String>,
    defaults: impl IntoIterator<Item = (&'static str, String)>,
) -> BTreeMap<String, String> {
    let mut filled = metadata.clone();
    // Scales under another dialect's rules: a copy of them would contradict what is written, and diffusers refuses a file
    // that has both them and alphas.
    filled.remove("lora_adapter_metadata");
    for (key, value) in defaults {
        filled.entry(key.to_owned()).or_insert(value);
    }
    filled
}

/// The width of an adapter and its scale, where it has both.
fn rank_and_scale(adapter: &AnyAdapter<Array>) -> Option<(usize, f64)> {
    Some((adapter.rank()?, Adapter::<Cpu>::scale(adapter)))
}

impl AnyAdapter<Array> {
    /// The rank, as the scale is divided by it; `None` for families without one, and for two whole Kronecker factors.
    pub fn rank(&self) -> Option<usize> {
        let rows = |array: &Array| array.shape.first().copied();
        match self {
            Self::Lora(lora) => rows(&lora.down),
            Self::Loha(loha) => rows(&loha.w1_b),
            Self::Lokr(lokr) => kohya::lokr_rank(lokr),
            Self::Dora(dora) => match &dora.direction {
                crate::adapter::Direction::Lora(lora) => rows(&lora.down),
                crate::adapter::Direction::Loha(loha) => rows(&loha.w1_b),
                crate::adapter::Direction::Lokr(lokr) => kohya::lokr_rank(lokr),
            },
            Self::Glora(glora) => match glora.order {
                crate::adapter::GloraOrder::Current => rows(&glora.a2),
                crate::adapter::GloraOrder::Older => rows(&glora.a1),
            },
            Self::Full(_) | Self::Ia3(_) | Self::Oft(_) | Self::Boft(_) => None,
        }
    }
}

/// The components that occur, in order.
fn components(modules: &[AdaptedModule]) -> Vec<Component> {
    let mut components: Vec<Component> = modules.iter().map(|module| module.component).collect();
    components.sort_unstable();
    components.dedup();
    components
}
