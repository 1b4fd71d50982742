//! What a file is, judged by its header, its keys and a look at its numbers; no base model is needed.

mod norms;
mod training;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

use lora_core::{
    Part, Result,
    format::{
        BaseModel, Component, Fault, Key, PeftConfig, Role, TensorFile, guess_dialect, guess_family,
        guess_foreign_family,
    },
};
use serde::Serialize;
use serde_json::{Map, Value};

pub use norms::{Strength, Turned};
pub use training::Training;

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
    /// Keys that mean nothing here.
    pub unknown_keys: Vec<String>,
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
/// If it cannot be read, or is no safetensors file.
pub fn inspect(path: &Path) -> Result<Inspection> {
    if path.is_dir() {
        let inside = ["adapter_model.safetensors", "pytorch_lora_weights.safetensors"];
        return match inside.iter().map(|name| path.join(name)).find(|file| file.is_file()) {
            Some(file) => inspect(&file),
            None => Ok(of_base(path, &BaseModel::open(path)?)),
        };
    }
    let file = TensorFile::open(path)?;
    let inspection = of_file(&file)?;
    if inspection.kind == Kind::Unknown {
        // A checkpoint is a base if it can be taken apart as one.
        return match BaseModel::open(path) {
            Ok(base) => Ok(of_base(path, &base)),
            Err(lora_core::Error::File { fault, .. }) if matches!(*fault, Fault::NotABase { .. }) => Ok(inspection),
            Err(error) => Err(error),
        };
    }
    Ok(inspection)
}

/// What one module of a file holds.
#[derive(Default)]
struct Module<'a> {
    roles: BTreeMap<Role, &'a str>,
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
    // Plain weights alone make no adapter: every checkpoint has them.
    let plain =
        |module: &Module<'_>| module.roles.keys().all(|role| matches!(role, Role::Weight | Role::Bias | Role::Scale));
    let is_adapter = modules.values().any(|module| !plain(module));
    let kind = match (is_adapter, embeddings > 0) {
        (true, _) => Kind::Adapter,
        (false, true) => Kind::Embedding,
        (false, false) => Kind::Unknown,
    };
    let mut inspection = Inspection {
        path: file.path().to_owned(),
        kind,
        dialect: is_adapter.then(|| guess_dialect(file.names()).to_string()),
        base: if is_adapter { family(file) } else { None },
        modules: modules.len(),
        components: BTreeMap::new(),
        tensors: file.names().len(),
        parameters: 0,
        bytes: std::fs::metadata(file.path()).map_or(0, |meta| meta.len()),
        dtypes: Vec::new(),
        ranks: None,
        alphas: None,
        method: None,
        strength: None,
        training: Training::of(file.metadata()),
        metadata: file.metadata().clone(),
        embeddings,
        unknown_keys: unknown,
        is_foreign: false,
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
    let is_foreign = guess_foreign_family(file).is_some();
    inspection.is_foreign = is_foreign;
    let configs = Configs::of(file);
    let (mut methods, mut ranks, mut alphas) = (BTreeSet::new(), Vec::new(), Vec::new());
    for (name, module) in &modules {
        let method = method_of(module);
        // What stands alone is broken, and no family.
        if module.roles.keys().any(|role| !matches!(role, Role::Alpha | Role::DoraScale | Role::Scale | Role::Scalar)) {
            methods.insert(method);
        }
        let rank = rank_of(file, module);
        ranks.extend(rank);
        match module.roles.get(&Role::Alpha) {
            Some(key) => alphas.extend(file.doubles(key)?.first()),
            None => alphas.extend(rank.and_then(|_| configs.alpha(name))),
        }
        // The parts of other models have other names.
        if !is_foreign {
            *inspection.components.entry(component_of(name).name().to_owned()).or_default() += 1;
        }
        inspection.module_list.push(((*name).to_owned(), rank, method));
    }
    inspection.method = Some(methods.into_iter().collect::<Vec<_>>().join("+")).filter(|methods| !methods.is_empty());
    inspection.ranks = span(ranks.iter().copied());
    inspection.alphas = span(alphas.iter().copied());
    inspection.strength = norms::strength(file);
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

/// The alphas of files whose keys hold none: of peft beside the file, of diffusers in its header.
#[derive(Debug, Default)]
struct Configs {
    /// peft's, for whatever the file holds.
    whole: Option<PeftConfig>,
    /// diffusers', by the component that stands before a field (`unet.lora_alpha`) and before a key.
    components: Vec<(&'static str, PeftConfig)>,
}

impl Configs {
    /// What is malformed gives no alphas here: it is `lora check` that says so.
    fn of(file: &TensorFile) -> Self {
        let parsed = |text: String| serde_json::from_str::<Map<String, Value>>(&text).ok();
        if file.names().any(|name| name.starts_with("base_model.model.")) {
            let text = std::fs::read_to_string(file.path().with_file_name("adapter_config.json")).ok();
            let whole = text.and_then(parsed).and_then(|fields| PeftConfig::of(fields).ok());
            return Self { whole, components: Vec::new() };
        }
        let fields = file.metadata().get("lora_adapter_metadata").cloned().and_then(parsed).unwrap_or_default();
        let of_component = |component: Component| {
            let own = fields.iter().filter_map(|(key, value)| {
                let field = key.strip_prefix(component.name())?.strip_prefix('.')?;
                Some((field.to_owned(), value.clone()))
            });
            let own: Map<String, Value> = own.collect();
            (!own.is_empty()).then(|| PeftConfig::of(own).ok()).flatten().map(|config| (component.name(), config))
        };
        Self { whole: None, components: Component::ALL.into_iter().filter_map(of_component).collect() }
    }

    /// Alpha of a module as the file spells it.
    fn alpha(&self, module: &str) -> Option<f64> {
        let (config, name) = match &self.whole {
            Some(config) => (config, module.strip_prefix("base_model.model.")?),
            None => self
                .components
                .iter()
                .find_map(|(component, config)| Some((config, module.strip_prefix(component)?.strip_prefix('.')?)))?,
        };
        let names = [name, name.strip_prefix("text_model.").unwrap_or(name)];
        Some(config.module_alpha(&names))
    }
}

fn of_base(path: &Path, base: &BaseModel) -> Inspection {
    let mut dtypes = BTreeSet::new();
    let (mut tensors, mut parameters) = (0, 0);
    let mut components = BTreeMap::new();
    for component in base.components() {
        components.insert(component.name().to_owned(), base.modules(component).count());
        for (name, dtype, _) in base.tensors(component) {
            tensors += 1;
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
        base: Some(base.family().to_string()),
        modules: components.values().sum(),
        components,
        tensors,
        parameters,
        bytes,
        dtypes: dtypes.into_iter().map(str::to_owned).collect(),
        ranks: None,
        alphas: None,
        method: None,
        strength: None,
        training: Training::default(),
        metadata,
        embeddings: 0,
        unknown_keys: base.unused().to_vec(),
        is_foreign: false,
        module_list: Vec::new(),
    }
}

fn is_embedding(name: &str) -> bool {
    name.starts_with("bundle_emb.") || matches!(name, "emb_params" | "clip_l" | "clip_g")
}

/// The family of a module's adapter, in the word that `--method` uses where it has one.
fn method_of(module: &Module<'_>) -> &'static str {
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
        "oft"
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
    let module = module.strip_prefix("base_model.model.").unwrap_or(module);
    let starts = |names: &[&str]| names.iter().any(|name| module.starts_with(name));
    if starts(&["lora_te2_", "text_encoder_2.", "lycoris_te2_"]) {
        Component::TextEncoder2
    } else if starts(&["lora_te", "text_encoder", "lycoris_te", "text_model."]) {
        Component::TextEncoder
    } else if module.contains("model.layers.") || starts(&["lm_head", "model.embed_tokens", "transformer.h."]) {
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
