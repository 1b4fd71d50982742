//! Adapter files read without a base, by the names of the published models: what `lora convert` needs, and no more.
//!
//! Names decide which model it is, shapes where names fit several. A module whose tensors say how large its weight is has
//! that size, whatever the published model's; the others have the published one. Modules of language models come in every
//! size and are called what the file calls them.

use std::collections::BTreeMap;

use super::{
    AdapterFile, BaseModel, Component, Family, Fault, Key, Role, TensorFile,
    alone::{Shapes, weight_of},
    base::read_config,
    guess,
    names::{Found, Names, Place},
};
use crate::{Error, Result};

/// How many keys a message shows.
const SHOWN: usize = 3;

impl AdapterFile {
    /// Reads an adapter by its names alone; gives the family of its model as well.
    ///
    /// # Errors
    /// As [`of`](Self::of); if a key belongs to none of the published models, or an adapter depends on the numbers of the
    /// base (unconverted PiSSA).
    pub fn of_published(file: &TensorFile) -> Result<(Self, Family)> {
        if file.names().len() == 0 {
            return Err(Error::file(file.path(), Fault::NoTensors));
        }
        let base = published_base(file)?;
        let read = Self::of(file, &base)?;
        if !read.unapplied.is_empty() {
            return Err(unknown(file, read.unapplied.iter().map(|(key, _)| key.clone())));
        }
        Ok((read, base.family().clone()))
    }
}

fn unknown(file: &TensorFile, keys: impl Iterator<Item = String>) -> Error {
    let guess = guess::family(file).map(str::to_owned);
    Error::file(
        file.path(),
        Fault::NoModel { guess, is_foreign: guess::foreign_family(file).is_some(), keys: keys.take(SHOWN).collect() },
    )
}

/// The published model that the names of a file fit best, with the sizes that the file has.
fn published_base(file: &TensorFile) -> Result<BaseModel> {
    let mut modules: BTreeMap<&str, Shapes<'_>> = BTreeMap::new();
    for name in file.names().filter(|name| !name.starts_with("bundle_emb.")) {
        if let (Some(key), Some(info)) = (Key::parse(name), file.info(name)) {
            modules.entry(key.module).or_default().insert(key.role, &info.shape);
        }
    }
    let mut best: Option<(usize, BaseModel, BTreeMap<Place, Vec<usize>>)> = None;
    for family in candidates(file) {
        let Some(base) = BaseModel::standard(&family) else { continue };
        let names = Names::of(&base);
        let mut sizes = BTreeMap::new();
        let mut score = 0;
        for (name, shapes) in &modules {
            let Found::Module((component, path)) = names.find(name) else { continue };
            let Some(module) = base.module(component, &path) else { continue };
            let implied = weight_of(shapes);
            // Names count before shapes, of which a smaller model has none.
            score += 2 + usize::from(implied.as_ref() == Some(&module.weight));
            let size = implied.and_then(|implied| laid_as(implied, &module.weight));
            sizes.insert((component, path), size.unwrap_or_else(|| module.weight.clone()));
        }
        if score > best.as_ref().map_or(0, |(best, _, _)| *best) {
            best = Some((score, base, sizes));
        }
    }
    if let Some((_, base, sizes)) = best {
        return Ok(resized(&base, &sizes));
    }
    language_base(file, &modules)
}

/// The families, the likelier first: it wins a draw.
fn candidates(file: &TensorFile) -> Vec<Family> {
    let mut families = vec![Family::Sd1, Family::Sd2, Family::Sdxl];
    let said = file.metadata().get("ss_base_model_version").map_or("", String::as_str);
    let likely = match (guess::family(file), said) {
        (_, said) if said.starts_with("sdxl") => 2,
        (_, said) if said.starts_with("sd_v2") => 1,
        (Some("Stable Diffusion XL"), _) => 2,
        (Some("Stable Diffusion 2.x"), _) => 1,
        _ => 0,
    };
    families[..=likely].rotate_right(1);
    families
}

/// A size that the tensors imply, with the axes that the published weight has; `None` if they cannot be told.
fn laid_as(implied: Vec<usize>, published: &[usize]) -> Option<Vec<usize>> {
    match (&implied[..], published) {
        (implied_axes, published) if implied_axes.len() == published.len() => Some(implied),
        // Kernels are folded into the inputs.
        (&[out, inner], &[_, _, kh, kw]) => inner.is_multiple_of(kh * kw).then(|| vec![out, inner / (kh * kw), kh, kw]),
        (&[out, inner, 1, 1], [_, _]) => Some(vec![out, inner]),
        _ => None,
    }
}

fn resized(base: &BaseModel, sizes: &BTreeMap<Place, Vec<usize>>) -> BaseModel {
    let mut tensors = Vec::new();
    for component in base.components() {
        for (path, module) in base.modules(component) {
            let weight = sizes.get(&(component, path.to_owned())).unwrap_or(&module.weight);
            tensors.push((component, format!("{path}.weight"), weight.clone()));
            if module.bias {
                tensors.push((component, format!("{path}.bias"), weight[..1].to_vec()));
            }
        }
    }
    BaseModel::from_shapes(tensors)
}

/// A language model with the modules that a peft file names.
fn language_base(file: &TensorFile, modules: &BTreeMap<&str, Shapes<'_>>) -> Result<BaseModel> {
    let config = read_config(&file.path().with_file_name("adapter_config.json"))?;
    let turned = config["fan_in_fan_out"].as_bool().unwrap_or(false);
    let mut tensors = Vec::new();
    for (name, shapes) in modules {
        let Some(path) = name.strip_prefix("base_model.model.") else { continue };
        let Some(mut weight) = weight_of(shapes) else { continue };
        let is_table = shapes.contains_key(&Role::EmbeddingDown);
        if turned && weight.len() == 2 && !is_table {
            weight.reverse();
        }
        let bias = shapes.keys().any(|role| matches!(role, Role::Bias | Role::BaseBias));
        if let Some(rows) = weight.first().copied().filter(|_| bias) {
            tensors.push((Component::LanguageModel, format!("{path}.bias"), vec![rows]));
        }
        tensors.push((Component::LanguageModel, format!("{path}.weight"), weight));
    }
    match tensors.is_empty() {
        true => Err(unknown(file, file.names().map(str::to_owned))),
        false => Ok(BaseModel::from_shapes(tensors)),
    }
}
