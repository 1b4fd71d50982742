//! What a file is, judged by its header, its keys and a look at its numbers; no base model is needed.

mod configs;
mod folder;
mod norms;
mod training;
mod warnings;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

use lora_core::{
    Part, Result,
    format::{
        BaseModel, Component, Family, Fault, Key, Role, TensorFile, bitsandbytes, guess_dialect, guess_family,
        guess_foreign_family,
    },
};
use serde::Serialize;

use configs::Configs;
use folder::Folder;
pub use norms::{Strength, Turned};
pub use training::Training;
pub(crate) use warnings::{idle_warnings, rank_warnings};

use crate::{Failure, text};

/// The smallest and the largest of some numbers.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Span<T> {
    /// The smallest.
    pub min: T,
    /// The largest.
    pub max: T,
}

/// What a file turned out to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Adapters for modules of a base.
    Adapter,
    /// A base model, or a component of one.
    Base,
    /// A textual inversion.
    Embedding,
    /// Tensors that mean nothing here.
    Unknown,
}

/// What can be said of a file; its JSON form is the contract of `inspect --json`.
#[derive(Debug, Clone, Serialize)]
pub struct Inspection {
    /// The file, or the folder of a base.
    #[serde(serialize_with = "text::lossy")]
    pub path: PathBuf,
    /// What it is.
    pub kind: Kind,
    /// The spelling of its keys, for adapters.
    pub dialect: Option<String>,
    /// The family of its base.
    pub base: Option<String>,
    /// Modules with adapters, or modules of the base.
    pub modules: usize,
    /// Modules by component.
    pub components: BTreeMap<String, usize>,
    /// Tensors.
    pub tensors: usize,
    /// Numbers in them.
    pub parameters: u64,
    /// Size of the file or files.
    pub bytes: u64,
    /// How the numbers are stored.
    pub dtypes: Vec<String>,
    /// Ranks of the modules.
    pub ranks: Option<Span<usize>>,
    /// Alphas of the modules; none where the file leaves them out.
    pub alphas: Option<Span<f64>>,
    /// What multiplies the products of the modules; none where that is unknown.
    pub scales: Option<Span<f64>>,
    /// Families of adapters, joined by `+`.
    pub method: Option<String>,
    /// How large the update is.
    pub strength: Option<Strength>,
    /// What the metadata tells of the training.
    pub training: Training,
    /// What the file says about itself, as it stands there.
    pub metadata: BTreeMap<String, String>,
    /// Tensors of bundled textual inversions.
    pub embeddings: usize,
    /// What is odd about it.
    pub warnings: Vec<String>,
    /// Keys that mean nothing here.
    pub unknown_keys: Vec<String>,
    /// Whether alpha is divided by the root of the rank (rsLoRA).
    #[serde(skip)]
    pub is_stabilised: bool,
    /// Whether it is for a family of models that is not read here.
    #[serde(skip)]
    pub is_foreign: bool,
    /// Every module with its rank, in the order of the keys.
    #[serde(skip)]
    pub module_list: Vec<(String, Option<usize>, &'static str)>,
}

/// Looks at a file, or at the folder of an adapter or a base.
///
/// # Errors
/// If it cannot be read, is no safetensors file, or is a folder of several adapters.
pub fn inspect(path: &Path) -> Result<Inspection, Failure> {
    if path.is_dir() {
        return match folder::open(path)? {
            Folder::File(file) => inspect(&file),
            Folder::Base(base) => Ok(of_base(path, &base)),
        };
    }
    let file = TensorFile::open(path)?;
    let inspection = of_file(&file)?;
    if inspection.kind == Kind::Unknown {
        // A checkpoint is a base if it can be taken apart as one.
        return match BaseModel::open(path) {
            Ok(base) => Ok(of_base(path, &base)),
            Err(lora_core::Error::File { fault, .. }) if matches!(*fault, Fault::NotABase { .. }) => Ok(inspection),
            Err(error) => Err(error.into()),
        };
    }
    Ok(inspection)
}

/// What one module of a file holds.
#[derive(Default)]
struct Module<'a> {
    roles: BTreeMap<Role, &'a str>,
}

/// Whether a file holds adapters. Plain weights alone make none: every checkpoint has them.
fn has_adapters(file: &TensorFile) -> bool {
    let is_plain = |role: Role| matches!(role, Role::Weight | Role::Bias | Role::Scale);
    file.names().filter(|name| !is_embedding(name)).any(|name| Key::parse(name).is_some_and(|key| !is_plain(key.role)))
}

fn of_file(file: &TensorFile) -> Result<Inspection> {
    let mut modules: BTreeMap<&str, Module<'_>> = BTreeMap::new();
    let mut unknown = Vec::new();
    let mut embeddings = 0;
    for name in file.names() {
        match Key::parse(name) {
            _ if is_embedding(name) => embeddings += 1,
            Some(key) => drop(modules.entry(key.module).or_default().roles.insert(key.role, name)),
            None => unknown.push(name.to_owned()),
        }
    }
    let is_adapter = has_adapters(file);
    let kind = match (is_adapter, embeddings > 0) {
        (true, _) => Kind::Adapter,
        (false, true) => Kind::Embedding,
        (false, false) => Kind::Unknown,
    };
    // Programs for other models have spellings of their own; whose they are can be told all the same.
    let is_foreign = embeddings == 0 && guess_foreign_family(file).is_some();
    let mut inspection = Inspection {
        path: file.path().to_owned(),
        kind,
        dialect: is_adapter.then(|| guess_dialect(file.names()).to_string()),
        base: if is_adapter || is_foreign { family(file) } else { None },
        modules: modules.len(),
        components: BTreeMap::new(),
        tensors: file.names().len(),
        parameters: 0,
        bytes: std::fs::metadata(file.path()).map_or(0, |meta| meta.len()),
        dtypes: Vec::new(),
        ranks: None,
        alphas: None,
        scales: None,
        method: None,
        strength: None,
        training: Training::of(file.metadata()),
        metadata: file.metadata().clone(),
        embeddings,
        warnings: Vec::new(),
        unknown_keys: unknown,
        is_stabilised: false,
        is_foreign,
        module_list: Vec::new(),
    };
    let mut dtypes = BTreeSet::new();
    for info in file.names().filter_map(|name| file.info(name)) {
        inspection.parameters += info.elements() as u64;
        dtypes.insert(info.dtype.name());
    }
    inspection.dtypes = dtypes.into_iter().map(str::to_owned).collect();
    if !is_adapter {
        return Ok(inspection);
    }
    let configs = Configs::of(file);
    inspection.training.base_model = inspection.training.base_model.or_else(|| configs.base_model.clone());
    let (mut methods, mut ranks, mut alphas, mut scales) = (BTreeSet::new(), Vec::new(), Vec::new(), Vec::new());
    let mut misnamed = Vec::new();
    for (name, module) in &modules {
        let method = match method_of(file, module) {
            "lora" if configs.is_stabilised(name) => "rslora",
            method => method,
        };
        // What stands alone is broken, and no family.
        if module.roles.keys().any(|role| !matches!(role, Role::Alpha | Role::DoraScale | Role::Scale | Role::Scalar)) {
            methods.insert(method);
        }
        let rank = rank_of(file, module);
        ranks.extend(rank);
        let own_alpha = match module.roles.get(&Role::Alpha) {
            Some(key) => file.doubles(key)?.first().copied(),
            None => None,
        };
        alphas.extend(own_alpha.or_else(|| rank.and_then(|_| configs.alpha(name))));
        if let Some(rank) = rank {
            let configured = || configs.scale(name, rank);
            let unsaid = || configs.problem.is_none().then_some(1.0);
            scales.extend(own_alpha.map(|alpha| alpha / rank as f64).or_else(configured).or_else(unsaid));
            let said = configs.rank(name).filter(|said| *said != rank);
            misnamed.extend(said.map(|said| (*name, [said, rank])));
        }
        inspection.is_stabilised |= own_alpha.is_none() && configs.is_stabilised(name);
        // The parts of other models have other names.
        if !is_foreign {
            *inspection.components.entry(component_of(name).name().to_owned()).or_default() += 1;
        }
        inspection.module_list.push(((*name).to_owned(), rank, method));
    }
    inspection.method = Some(methods.into_iter().collect::<Vec<_>>().join("+")).filter(|methods| !methods.is_empty());
    inspection.ranks = span(ranks.iter().copied());
    inspection.alphas = span(alphas.iter().copied());
    inspection.scales = span(scales.iter().copied());
    let measured = norms::strength(file);
    inspection.warnings.extend(configs.problem.map(|problem| format!("{problem}, so the scale is unknown")));
    if let Some((_, idle)) = &measured {
        let idle = idle.iter().map(|(name, idle)| (&**name, *idle));
        inspection.warnings.extend(idle_warnings(idle, modules.len()));
    }
    inspection.warnings.extend(rank_warnings(misnamed.into_iter()));
    inspection.strength = measured.map(|(strength, _)| strength);
    Ok(inspection)
}

/// The family of the base: by the keys, and by the metadata where these leave a choice.
fn family(file: &TensorFile) -> Option<String> {
    let guess = guess_family(file)?;
    let says = |key: &str, start: &str| file.metadata().get(key).is_some_and(|text| text.starts_with(start));
    let refined = match guess.contains(" or ") {
        true if says("ss_base_model_version", "sd_v1") || says("modelspec.architecture", "stable-diffusion-v1") => {
            "Stable Diffusion 1.x"
        }
        true if says("ss_base_model_version", "sd_v2") || says("modelspec.architecture", "stable-diffusion-v2") => {
            "Stable Diffusion 2.x"
        }
        _ => guess,
    };
    Some(refined.to_owned())
}

fn of_base(path: &Path, base: &BaseModel) -> Inspection {
    let mut dtypes = BTreeSet::new();
    // What describes a matrix in 4 bits belongs to it.
    let stored = base.files().iter().flat_map(TensorFile::names);
    let tensors = stored.filter(|name| bitsandbytes::owner(name).is_none()).count();
    let mut parameters = 0;
    let mut components = BTreeMap::new();
    for component in base.components() {
        components.insert(component.name().to_owned(), base.modules(component).count());
        for (name, dtype, _) in base.tensors(component) {
            dtypes.insert(if base.is_packed(component, name) { "NF4" } else { dtype.name() });
            parameters += base.shape(component, name).map_or(0, |shape| shape.iter().product::<usize>()) as u64;
        }
    }
    let bytes = base.files().iter().filter_map(|file| std::fs::metadata(file.path()).ok()).map(|meta| meta.len()).sum();
    let metadata = base.files().first().map(|file| file.metadata().clone()).unwrap_or_default();
    Inspection {
        path: path.to_owned(),
        kind: Kind::Base,
        dialect: None,
        base: Some(family_name(base.family())),
        modules: components.values().sum(),
        components,
        tensors,
        parameters,
        bytes,
        dtypes: dtypes.into_iter().map(str::to_owned).collect(),
        ranks: None,
        alphas: None,
        scales: None,
        method: None,
        strength: None,
        training: Training::default(),
        metadata,
        embeddings: 0,
        warnings: Vec::new(),
        unknown_keys: base.unused().to_vec(),
        is_stabilised: false,
        is_foreign: false,
        module_list: Vec::new(),
    }
}

fn family_name(family: &Family) -> String {
    match family {
        Family::Transformers(_) => format!("{family} (no causal language model)"),
        family => family.to_string(),
    }
}

fn is_embedding(name: &str) -> bool {
    name.starts_with("bundle_emb.") || matches!(name, "emb_params" | "clip_l" | "clip_g")
}

/// The family of a module's adapter, in the word that `--method` uses where it has one.
fn method_of(file: &TensorFile, module: &Module<'_>) -> &'static str {
    let has = |role: Role| module.roles.contains_key(&role);
    let part = |part: Part| has(Role::Factor(part));
    if has(Role::DoraScale) || has(Role::PeftMagnitude) {
        "dora"
    } else if part(Part::HadaW1A) || part(Part::HadaW2A) {
        "loha"
    } else if [Part::KronW1, Part::KronW1A, Part::KronW2, Part::KronW2A].into_iter().any(part) {
        "lokr"
    } else if part(Part::GloraA1) || part(Part::GloraB1) {
        "glora"
    } else if part(Part::OftBlocks) || has(Role::PeftOft) {
        // Butterflies have a stage before the axes of the blocks.
        let blocks = module.roles.get(&Role::Factor(Part::OftBlocks)).and_then(|key| file.info(key));
        if blocks.is_some_and(|info| info.shape.len() == 4) { "boft" } else { "oft" }
    } else if has(Role::OnInput) || has(Role::PeftIa3) {
        "ia3"
    } else if part(Part::Down) || part(Part::Up) || has(Role::EmbeddingDown) || has(Role::EmbeddingUp) {
        "lora"
    } else {
        "full"
    }
}

fn rank_of(file: &TensorFile, module: &Module<'_>) -> Option<usize> {
    // Where the rank stands: role and axis.
    let places = [
        (Role::Factor(Part::Down), 0),
        (Role::Factor(Part::Up), 1),
        (Role::EmbeddingDown, 0),
        (Role::Factor(Part::HadaW1B), 0),
        (Role::Factor(Part::KronW2B), 0),
        (Role::Factor(Part::KronW1B), 0),
    ];
    let (role, axis) = places.into_iter().find(|(role, _)| module.roles.contains_key(role))?;
    file.info(module.roles.get(&role)?)?.shape.get(axis).copied()
}

/// The part of the model that a module's name in a file points to.
fn component_of(module: &str) -> Component {
    let of_peft = module.strip_prefix("base_model.model.");
    let module = of_peft.unwrap_or(module);
    let starts = |names: &[&str]| names.iter().any(|name| module.starts_with(name));
    let is_unet = starts(&["down_blocks.", "mid_block.", "up_blocks.", "conv_", "time_embedding.", "add_embedding."]);
    if starts(&["lora_te2_", "text_encoder_2.", "lycoris_te2_"]) {
        Component::TextEncoder2
    } else if starts(&["lora_te", "text_encoder", "lycoris_te", "text_model."]) {
        Component::TextEncoder
    } else if module.contains("model.layers.")
        || starts(&["lm_head", "model.embed_tokens", "transformer.h."])
        || of_peft.is_some() && !is_unet
    {
        Component::LanguageModel
    } else {
        Component::Unet
    }
}

fn span<T: PartialOrd + Copy>(numbers: impl Iterator<Item = T>) -> Option<Span<T>> {
    numbers.fold(None, |span, number| match span {
        None => Some(Span { min: number, max: number }),
        Some(Span { min, max }) => {
            Some(Span { min: if number < min { number } else { min }, max: if number > max { number } else { max } })
        }
    })
}
