//! Reading adapters of every dialect against a base model, with every key accounted for.
//!
//! The dialect is decided key by key, since one file can mix spellings and families. What cannot be applied is listed with
//! its reason; what would be applied wrongly is an error that names the key.

use std::{
    collections::BTreeMap,
    fmt,
    path::{Path, PathBuf},
};

use serde_json::{Map, Value};

use super::{
    BaseModel, Component, Dialect, Dtype, Fault, Key, PeftConfig, Quoted, Replacement, Role, TensorFile,
    assemble::Group,
    base::read_config,
    guess,
    names::{Found, Names},
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
        let fault = |fault| Error::file(file.path(), fault);
        if file.names().len() == 0 {
            return Err(fault(Fault::NoTensors));
        }
        let mut read = Self {
            path: file.path().to_owned(),
            dialect: guess::dialect(file.names()),
            modules: Vec::new(),
            replacements: Vec::new(),
            embeddings: Vec::new(),
            unapplied: Vec::new(),
            warnings: Vec::new(),
            metadata: file.metadata().clone(),
            keys: file.names().len(),
        };
        let groups = read.sort_keys(file, base)?;
        if groups.is_empty() && read.embeddings.is_empty() {
            return Err(fault(guess::nothing_matches(file, base)));
        }
        let configs = Configs::of(file)?;
        for ((component, path), found) in &groups {
            let Some(module) = base.module(*component, path) else { continue };
            let config = configs.of_component(*component);
            let group = Group {
                component: *component,
                path,
                module,
                spelling: found.spelling,
                keys: found.keys.clone(),
                file,
                base,
                config,
            };
            if config.is_none() && found.spelling.starts_with("base_model.model.") {
                return Err(fault(Fault::NoPeftConfig { key: found.first_key().to_owned() }));
            }
            let assembled = group.assemble()?;
            if let Some(key) = assembled.alpha_is_zero {
                read.warnings.push(Warning::AlphaIsZero(key));
            }
            if base.has_tied_head() && (path.ends_with("embed_tokens") || path == "lm_head") {
                read.warnings.push(Warning::TiedHead(path.clone()));
            }
            let dtype = found.dtype(file);
            for adapter in assembled.adapters {
                read.modules.push(AdaptedModule {
                    component: *component,
                    path: path.clone(),
                    adapter,
                    weight: module.weight.clone(),
                    dtype,
                    turned: assembled.turned,
                });
            }
            read.replacements.extend(assembled.replacements);
        }
        read.unapplied.sort_by(|a, b| a.0.cmp(&b.0));
        Ok(read)
    }

    /// How many keys took part.
    pub fn applied(&self) -> usize {
        self.keys - self.unapplied.len() - self.embeddings.len()
    }

    /// Gathers keys by module; what finds no place is listed.
    fn sort_keys<'a>(&mut self, file: &'a TensorFile, base: &BaseModel) -> Result<Groups<'a>> {
        let names = Names::of(base);
        let mut groups = Groups::new();
        for key in file.names() {
            if key.starts_with("bundle_emb.") {
                self.embeddings.push(key.to_owned());
                continue;
            }
            let Some(parsed) = Key::parse(key) else {
                let stem = key.rsplit_once('.').map_or(key, |(stem, _)| stem);
                let reason = match names.find(stem) {
                    Found::Module(_) => Reason::UnknownSuffix,
                    other => reason(other),
                };
                self.unapplied.push((key.to_owned(), reason));
                continue;
            };
            let place = match names.find(parsed.module) {
                Found::Module(place) => place,
                other => {
                    self.unapplied.push((key.to_owned(), reason(other)));
                    continue;
                }
            };
            let twice = |module: &str, first: &str| {
                let (module, first, second) = (module.to_owned(), first.to_owned(), key.to_owned());
                Err(Error::file(file.path(), Fault::TwoSpellings { module, first, second }))
            };
            match groups.get_mut(&place) {
                None => {
                    let keys = BTreeMap::from([(parsed.role, key)]);
                    groups.insert(place, FoundKeys { spelling: parsed.module, keys });
                }
                Some(group) if group.spelling != parsed.module => return twice(&place.1, group.first_key()),
                Some(group) => {
                    if let Some(first) = group.keys.insert(parsed.role, key) {
                        return twice(&place.1, first);
                    }
                }
            }
        }
        Ok(groups)
    }
}

type Groups<'a> = BTreeMap<(Component, String), FoundKeys<'a>>;

struct FoundKeys<'a> {
    spelling: &'a str,
    keys: BTreeMap<Role, &'a str>,
}

impl FoundKeys<'_> {
    fn first_key(&self) -> &str {
        self.keys.values().next().copied().unwrap_or_default()
    }

    /// The type of the largest tensor.
    fn dtype(&self, file: &TensorFile) -> Dtype {
        let infos = self.keys.values().filter_map(|key| file.info(key));
        infos.max_by_key(|info| info.elements()).map_or(Dtype::F32, |info| info.dtype)
    }
}

fn reason(found: Found) -> Reason {
    match found {
        Found::NoModule(component) => Reason::NoModule(component),
        Found::NoComponent(component) => Reason::NoComponent(component),
        Found::OtherFamily(family) => Reason::OtherFamily(family),
        Found::Module(_) | Found::Unknown => Reason::UnknownKey,
    }
}

/// The configurations that come with a file.
struct Configs {
    /// `adapter_config.json`: one for whatever the file holds.
    whole: Option<PeftConfig>,
    /// `lora_adapter_metadata`: one a component.
    components: BTreeMap<Component, PeftConfig>,
}

impl Configs {
    fn of(file: &TensorFile) -> Result<Self> {
        let mut configs = Self { whole: None, components: BTreeMap::new() };
        if let Some(text) = file.metadata().get("lora_adapter_metadata") {
            let fields: Map<String, Value> = serde_json::from_str(text).map_err(|error| {
                let what = "`lora_adapter_metadata` in the header";
                Error::file(file.path(), Fault::Text { what, message: error.to_string() })
            })?;
            for component in Component::ALL {
                let config = PeftConfig::of_component(&fields, component.name());
                if let Some(config) = config.map_err(|fault| Error::file(file.path(), fault))? {
                    configs.components.insert(component, config);
                }
            }
        }
        let beside = file.path().with_file_name("adapter_config.json");
        if file.names().any(|name| name.starts_with("base_model.model."))
            && let Value::Object(fields) = read_config(&beside)?
        {
            configs.whole = Some(PeftConfig::of(fields).map_err(|fault| Error::file(&beside, fault))?);
        }
        Ok(configs)
    }

    fn of_component(&self, component: Component) -> Option<&PeftConfig> {
        self.components.get(&component).or(self.whole.as_ref())
    }
}

/// The file inside a folder, or the path itself.
fn adapter_path(path: &Path) -> Result<PathBuf> {
    if !path.is_dir() {
        return Ok(path.to_owned());
    }
    let file = ["adapter_model.safetensors", "pytorch_lora_weights.safetensors"]
        .into_iter()
        .map(|name| path.join(name))
        .find(|file| file.is_file());
    file.ok_or_else(|| Error::file(path, Fault::NoWeights { found: 0 }))
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
