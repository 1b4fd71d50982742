//! Finding a base, reading what it was trained on, and hashing it.

use std::path::PathBuf;

use lora_cli::{Failure, options::values};
use lora_core::{
    format::{BaseModel, Component},
    hub,
};
use lora_diffusion::{
    BaseFiles,
    data::{Cache, dataset::ContentHash},
    schedule::Prediction,
};
use lora_torch::nf4::Scheme;
use sha2::{Digest as _, Sha256};

use crate::failures::Explain as _;

/// Looks at a base, with what the network predicts, and how it will lie in memory, as the options say it.
pub(crate) fn find(
    base: &str,
    prediction: values::Prediction,
    quantize: values::Quantize,
) -> Result<BaseFiles, Failure> {
    let mut files = BaseFiles::find(&locate(base)?).explain()?;
    files.quantise = scheme(quantize);
    match prediction {
        values::Prediction::Auto => {}
        values::Prediction::Epsilon => files.schedule.prediction_type = Prediction::Epsilon,
        values::Prediction::V => files.schedule.prediction_type = Prediction::V,
    }
    Ok(files)
}

/// How matrices are quantised while they are loaded.
pub(crate) fn scheme(quantize: values::Quantize) -> Option<Scheme> {
    match quantize {
        values::Quantize::None => None,
        values::Quantize::Nf4 => Some(Scheme::Nf4),
        values::Quantize::Nf4Double => Some(Scheme::Nf4Double),
    }
}

/// Where a base is: a path, or a name in the local cache of the hub.
///
/// # Errors
/// If a name leads nowhere.
pub(crate) fn locate(base: &str) -> Result<PathBuf, Failure> {
    Ok(hub::locate(base)?)
}

/// The base as adapter files see it: names and shapes, from the headers alone.
pub(crate) fn names(files: &BaseFiles) -> Result<BaseModel, Failure> {
    BaseModel::open(&files.path).explain()
}

/// The side that pictures are trained and drawn at unless somebody says otherwise.
pub(crate) fn resolution(files: &BaseFiles, said: Option<u32>) -> u32 {
    said.unwrap_or_else(|| u32::try_from(files.resolution()).unwrap_or(512))
}

/// Hash of the weights of some components; files that were hashed before are not read again.
pub(crate) fn hash(files: &BaseFiles, components: &[Component], cache: &Cache) -> Result<ContentHash, Failure> {
    let mut paths: Vec<PathBuf> = Vec::new();
    for component in components {
        for path in files.weight_files(*component).explain()? {
            if !paths.contains(&path) {
                paths.push(path);
            }
        }
    }
    hash_files(&paths, cache)
}

/// Hash of some files; those that were hashed before are not read again.
pub(crate) fn hash_files(paths: &[PathBuf], cache: &Cache) -> Result<ContentHash, Failure> {
    let mut hash = Sha256::new();
    for path in paths {
        hash.update(cache.file_hash(path).explain()?);
    }
    Ok(hash.finalize().into())
}

/// Where latents and embeddings are kept between runs.
pub(crate) fn cache() -> Cache {
    let home = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache"));
    let folder =
        std::env::var_os("XDG_CACHE_HOME").filter(|folder| !folder.is_empty()).map(PathBuf::from).or_else(home);
    Cache::at(folder.unwrap_or_else(std::env::temp_dir).join("lora").join("data"))
}

/// `Stable Diffusion 1.x, 6.0 M parameters`.
pub(crate) fn describe(files: &BaseFiles, names: &BaseModel) -> String {
    let numbers: u64 = [Component::Unet, Component::TextEncoder, Component::TextEncoder2, Component::Vae]
        .into_iter()
        .flat_map(|component| {
            names.tensors(component).map(|(_, _, source)| source.shape.iter().product::<usize>() as u64)
        })
        .sum();
    let predicts = match files.prediction() {
        Prediction::V => ", predicts v",
        _ => "",
    };
    let quantised = if files.quantise.is_some() { ", linear layers of the UNet in 4 bits (NF4)" } else { "" };
    format!("{}, {} parameters{predicts}{quantised}", files.family, lora_cli::text::count(numbers))
}
