//! Writing adapters that were read without a base: every module under the name that its file gave it.
//!
//! kohya's and ComfyUI's spelling, and the old ones of diffusers, keep their keys, with `alpha` beside the factors. Where
//! the scale stands in a configuration (peft, diffusers of today) the dialect's own writer is asked, since the dotted names
//! in such files are the modules' own.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use rayon::prelude::*;
use serde_json::{Map, Value};

use super::{Writer, write, write_tensors};
use crate::{
    Result,
    format::{
        AdaptedModule, AdapterFile, Component, Dialect, Dtype, Family, Fault, Key, Replacement, Role, TensorData,
        TensorFile, alone, training_metadata,
    },
};

/// Writes adapters that were read by [`AdapterFile::of_alone`], in the spelling of the file that they come from.
///
/// `like` are the files that gave the modules their names, the one whose spelling counts first. `file` is what is written:
/// modules, whole tensors and metadata. `kept` are keys of the first file that are copied as they are; only dialects that
/// keep their keys can hold them. `path` is a file, or for peft a folder. `dtype` as in
/// [`write_adapter`](super::write_adapter).
///
/// # Errors
/// As [`write_adapter`](super::write_adapter), and if a kept key has no place in the dialect.
pub fn write_alone(
    path: &Path,
    like: &[&TensorFile],
    file: &AdapterFile,
    kept: &BTreeSet<&str>,
    dtype: Option<Dtype>,
) -> Result<()> {
    let Some(first) = like.first() else { return Ok(()) };
    let family = alone::family(first);
    let refused = |key: &str, reason| {
        let (module, dialect) = (key.to_owned(), file.dialect);
        crate::Error::file(path, Fault::Unwritable { module, dialect, reason, other: None })
    };
    if scales_are_configured(file.dialect, first) {
        if let Some(key) = kept.first() {
            return Err(refused(key, "it belongs to no adapter that is known; this dialect cannot carry it along"));
        }
        let modules: Vec<AdaptedModule> = file.modules.iter().map(bare_module).collect();
        let replacements: Vec<Replacement> = file.replacements.iter().map(bare_replacement).collect();
        return write(path, file.dialect, &family, (&modules, &replacements), &file.metadata, dtype);
    }
    if let Some(new) = file.replacements.first() {
        return Err(refused(&new.tensor, "it is a whole tensor of the model and no difference; merge it instead"));
    }
    let plain = super::without_starts(&file.modules)?;
    let dialect = file.dialect;
    let writer = Writer { path, dialect, family: &family, modules: &plain, replacements: &[], dtype };
    let (tensors, metadata) = writer.under_own_names(like, kept, &file.metadata)?;
    write_tensors(path, &tensors, &metadata)
}

impl Writer<'_> {
    fn under_own_names(
        &self,
        like: &[&TensorFile],
        kept: &BTreeSet<&str>,
        metadata: &BTreeMap<String, String>,
    ) -> Result<super::Written> {
        let mut spelt: BTreeMap<(&str, Role), &str> = BTreeMap::new();
        for key in like.iter().flat_map(|file| file.names()) {
            if let Some(parsed) = Key::parse(key) {
                spelt.entry((parsed.module, parsed.role)).or_insert(key);
            }
        }
        let rounded = |module: &AdaptedModule| {
            let mut tensors = Vec::new();
            self.module(module, &module.path, &mut tensors)?;
            Ok(tensors)
        };
        // The first error in the order of the modules is the one shown.
        let rounded: Vec<Result<Vec<_>>> = self.modules.par_iter().map(rounded).collect();
        let mut tensors: Vec<(String, TensorData<'static>)> = Vec::new();
        for of_module in rounded {
            tensors.extend(of_module?);
        }
        for (name, _) in &mut tensors {
            let own = Key::parse(name).and_then(|key| spelt.get(&(key.module, key.role)));
            if let Some(own) = own {
                *name = (*own).to_owned();
            }
        }
        for (key, file) in kept.iter().filter_map(|key| Some((*key, like.first()?))) {
            if let (Some(info), Some(bytes)) = (file.info(key), file.bytes(key)) {
                tensors.push((key.to_owned(), TensorData::new(info.dtype, &*info.shape, bytes.to_vec())?));
            }
        }
        let mut metadata = metadata.clone();
        metadata.remove("lora_adapter_metadata");
        if metadata.keys().any(|key| key.starts_with("sshs_")) {
            training_metadata::add_hashes(self.path, &tensors, &mut metadata)?;
        }
        Ok((tensors, metadata))
    }
}

/// Whether the scale of a file's modules stands outside its tensors.
fn scales_are_configured(dialect: Dialect, file: &TensorFile) -> bool {
    let modern = |key: &str| {
        key.ends_with(".lora_A.weight") && ["unet.", "text_encoder"].iter().any(|start| key.starts_with(start))
    };
    match dialect {
        Dialect::Peft => true,
        Dialect::Diffusers => file.names().any(modern) && !file.names().any(|key| key.ends_with(".alpha")),
        Dialect::Kohya | Dialect::Comfy => false,
    }
}

/// A name without the prefix that the dialect's writer puts before it.
fn bare(component: Component, name: &str) -> &str {
    let name = name.strip_prefix("base_model.model.").unwrap_or(name);
    name.strip_prefix(component.name()).and_then(|name| name.strip_prefix('.')).unwrap_or(name)
}

fn bare_module(module: &AdaptedModule) -> AdaptedModule {
    AdaptedModule { path: bare(module.component, &module.path).to_owned(), ..module.clone() }
}

fn bare_replacement(new: &Replacement) -> Replacement {
    Replacement { tensor: bare(new.component, &new.tensor).to_owned(), ..new.clone() }
}

/// Puts what kohya's readers look for about rank and alpha on the state of `modules`: `ss_network_module`, `ss_network_dim`,
/// `ss_network_alpha` and `ss_network_args`, with `Dynamic` where modules differ.
///
/// Only where the metadata speaks of training at all: a lone `ss_network_dim` would make some readers take the file for one
/// of Stable Diffusion 1. Hashes of what the file was are taken out.
pub fn describe_network(metadata: &mut BTreeMap<String, String>, modules: &[AdaptedModule]) {
    metadata.retain(|key, _| key != "modelspec.hash_sha256");
    if !metadata.keys().any(|key| key.starts_with("ss_")) {
        return;
    }
    let (path, dialect, family) = (Path::new(""), Dialect::Kohya, &Family::Sd1);
    let writer = Writer { path, dialect, family, modules, replacements: &[], dtype: None };
    let mut found: BTreeMap<_, _> = training_metadata::defaults(&Family::Sd1, &writer.summary()).into_iter().collect();
    for key in ["ss_network_module", "ss_network_dim", "ss_network_alpha"] {
        metadata.extend(found.remove(key).map(|value| (key.to_owned(), value)));
    }
    let arguments = |text: Option<&String>| -> Map<String, Value> {
        text.and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default()
    };
    let mut said = arguments(metadata.get("ss_network_args"));
    // What described the old factors.
    said.retain(|key, _| {
        !["algo", "conv_dim", "conv_alpha", "use_tucker", "use_cp", "factor", "rs_lora"].contains(&&**key)
    });
    said.extend(arguments(found.get("ss_network_args")));
    metadata.insert("ss_network_args".to_owned(), Value::Object(said).to_string());
}
