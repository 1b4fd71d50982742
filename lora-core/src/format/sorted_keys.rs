//! The keys of an adapter file, sorted by the module of the base that each belongs to; factors are made module by module.
//!
//! What reads a whole file ([`AdapterFile`]) and what reads as it goes ([`AdapterStream`](super::AdapterStream)) share this.

use std::collections::BTreeMap;

use serde_json::Value;

use super::{
    AdaptedModule, AdapterFile, BaseModel, Component, Dtype, Fault, Key, Module, PeftConfig, PeftKind, Reason,
    Replacement, Role, TensorFile, Warning,
    assemble::Group,
    base::{HEAD, read_config},
    guess, json,
    names::{Found, Names, Place},
};
use crate::{Error, Result};

/// Every key of a file, sorted by module.
#[derive(Debug)]
pub(super) struct SortedKeys {
    /// What is known of the file without its numbers: no modules, no whole tensors.
    pub found: AdapterFile,
    groups: BTreeMap<Place, FoundKeys>,
    configs: Configs,
}

#[derive(Debug)]
struct FoundKeys {
    spelling: String,
    keys: BTreeMap<Role, String>,
}

impl SortedKeys {
    /// Sorts the keys; what finds no place in the base is listed in [`found`](Self::found).
    ///
    /// # Errors
    /// If nothing belongs to the base, a module is spelled in two ways, or a configuration is malformed or missing.
    pub(super) fn of(file: &TensorFile, base: &BaseModel) -> Result<Self> {
        let fault = |fault| Error::file(file.path(), fault);
        if file.names().len() == 0 {
            return Err(fault(Fault::NoTensors));
        }
        if let Some(model) = guess::whole_model(file) {
            return Err(fault(model));
        }
        let found = AdapterFile {
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
        let mut sorted = Self { found, groups: BTreeMap::new(), configs: Configs::of(file)? };
        sorted.sort(file, base)?;
        sorted.join_tied(base);
        sorted.found.unapplied.sort_by(|a, b| a.0.cmp(&b.0));
        if sorted.groups.is_empty() && sorted.found.embeddings.is_empty() {
            return Err(fault(guess::nothing_matches(file, base)));
        }
        Ok(sorted)
    }

    /// The modules that have keys.
    pub(super) fn places(&self) -> impl Iterator<Item = &Place> {
        self.groups.keys()
    }

    /// How many keys belong to a module.
    pub(super) fn keys_of(&self, place: &Place) -> usize {
        self.groups.get(place).map_or(0, |group| group.keys.len())
    }

    /// The rank that a configuration gives a module, of the families that have one.
    pub(super) fn configured_rank(&self, (component, path): &Place) -> Option<usize> {
        let config = self.configs.of_component(*component)?;
        let bare = path.strip_prefix("base_model.model.").unwrap_or(path);
        let names = [bare, bare.strip_prefix("text_model.").unwrap_or(bare)];
        matches!(config.kind, PeftKind::Lora | PeftKind::Loha | PeftKind::Lokr).then(|| config.module_rank(&names))
    }

    /// Makes the adapters and whole tensors of one module and appends them to `into`.
    ///
    /// # Errors
    /// If the module's tensors do not make an adapter of the base's module.
    pub(super) fn assemble(
        &self,
        file: &TensorFile,
        base: &BaseModel,
        place: &Place,
        into: &mut AdapterFile,
    ) -> Result<()> {
        let (component, path) = place;
        let Some((found, module)) = self.groups.get(place).zip(base.module(*component, path)) else { return Ok(()) };
        let grown = found.grown(file, path, module);
        let module = grown.as_ref().unwrap_or(module);
        let config = self.configs.of_component(*component);
        if config.is_none() && found.spelling.starts_with("base_model.model.") {
            return Err(Error::file(file.path(), Fault::NoPeftConfig { key: found.first_key().to_owned() }));
        }
        let keys = found.keys.iter().map(|(role, key)| (*role, key.as_str())).collect();
        let spelling = &*found.spelling;
        let group = Group { component: *component, path, module, spelling, keys, file, base, config };
        let assembled = group.assemble()?;
        if let Some(key) = assembled.alpha_is_zero {
            into.warnings.push(Warning::AlphaIsZero(key));
        }
        if self.changes_both_roles(base, place, &assembled.replacements) {
            into.warnings.push(Warning::TiedHead(path.clone()));
        }
        let dtype = found.dtype(file);
        for adapter in assembled.adapters {
            into.modules.push(AdaptedModule {
                component: *component,
                path: path.clone(),
                adapter,
                weight: module.weight.clone(),
                dtype,
                turned: assembled.turned,
            });
        }
        into.replacements.extend(assembled.replacements);
        Ok(())
    }

    /// Whether the file was trained with table and head as one, where the base has them as one.
    pub(super) fn ties_head(&self, base: &BaseModel) -> bool {
        let config = self.configs.of_component(Component::LanguageModel);
        base.has_tied_head() && config.is_some_and(PeftConfig::ties_head)
    }

    /// Takes what a file holds twice for a table and a head that stay one: peft writes both roles, with the same numbers.
    fn join_tied(&mut self, base: &BaseModel) {
        let place = |path: &str| (Component::LanguageModel, path.to_owned());
        let Some(table) = base.vocabulary().filter(|_| self.ties_head(base)) else { return };
        if self.groups.contains_key(&place(table)) {
            self.groups.remove(&place(HEAD));
        }
    }

    /// Whether what a file has for the embedding table, and was trained for it alone, acts on the head as well.
    fn changes_both_roles(&self, base: &BaseModel, (component, path): &Place, whole: &[Replacement]) -> bool {
        let is_table = *component == Component::LanguageModel && base.vocabulary() == Some(path);
        let has_own_head = self.groups.contains_key(&(Component::LanguageModel, HEAD.to_owned()));
        let splits = whole.iter().any(|new| new.splits_head(base));
        base.has_tied_head() && is_table && !has_own_head && !splits && !self.ties_head(base)
    }

    fn sort(&mut self, file: &TensorFile, base: &BaseModel) -> Result<()> {
        let names = Names::of(base);
        for key in file.names() {
            if key.starts_with("bundle_emb.") {
                self.found.embeddings.push(key.to_owned());
                continue;
            }
            let Some(parsed) = Key::parse(key) else {
                let stem = key.rsplit_once('.').map_or(key, |(stem, _)| stem);
                let reason = match names.find(stem) {
                    Found::Module(_) => Reason::UnknownSuffix,
                    other => reason(other),
                };
                self.found.unapplied.push((key.to_owned(), reason));
                continue;
            };
            let place = match names.find(parsed.module) {
                Found::Module(place) => place,
                other => {
                    self.found.unapplied.push((key.to_owned(), reason(other)));
                    continue;
                }
            };
            let twice = |module: &str, first: &str| {
                let (module, first, second) = (module.to_owned(), first.to_owned(), key.to_owned());
                Err(Error::file(file.path(), Fault::TwoSpellings { module, first, second }))
            };
            match self.groups.get_mut(&place) {
                None => {
                    let keys = BTreeMap::from([(parsed.role, key.to_owned())]);
                    self.groups.insert(place, FoundKeys { spelling: parsed.module.to_owned(), keys });
                }
                Some(group) if group.spelling != parsed.module => return twice(&place.1, group.first_key()),
                Some(group) => {
                    // T-LoRA has one role for all its tensors: it is refused whatever they are.
                    if let Some(first) = group.keys.insert(parsed.role, key.to_owned())
                        && parsed.role != Role::TLora
                    {
                        return twice(&place.1, &first);
                    }
                }
            }
        }
        Ok(())
    }
}

impl FoundKeys {
    /// The module with as many rows as the table that peft keeps under its adapter, where tokens were added.
    fn grown(&self, file: &TensorFile, path: &str, module: &Module) -> Option<Module> {
        let weight = &file.info(self.keys.get(&Role::BaseWeight)?)?.shape;
        module.grows_to(path, weight).then(|| Module { weight: weight.clone(), ..module.clone() })
    }

    fn first_key(&self) -> &str {
        self.keys.values().next().map_or("", String::as_str)
    }

    /// A type that holds the numbers of all factors: their own, or where they differ one that all of them fit into.
    fn dtype(&self, file: &TensorFile) -> Dtype {
        let numbers = self.keys.iter().filter(|(role, _)| !matches!(role, Role::Alpha | Role::Scale | Role::Scalar));
        let dtypes =
            numbers.filter_map(|(_, key)| file.info(key)).map(|info| info.dtype).filter(|dtype| dtype.is_float());
        let joined = dtypes.reduce(|one, other| match (one, other) {
            _ if one == other => one,
            (Dtype::F64, _) | (_, Dtype::F64) => Dtype::F64,
            _ => Dtype::F32,
        });
        joined.unwrap_or(Dtype::F32)
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
#[derive(Debug)]
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
            let malformed = |message: String| {
                let what = "`lora_adapter_metadata` in the header";
                Error::file(file.path(), Fault::Text { what, message })
            };
            let Value::Object(fields) = json::parse(text.as_bytes()).map_err(|error| malformed(error.to_string()))?
            else {
                return Err(malformed("it is no object".to_owned()));
            };
            for component in Component::ALL {
                let config = PeftConfig::of_component(&fields, component.name());
                if let Some(config) = config.map_err(|fault| Error::file(file.path(), fault))? {
                    configs.components.insert(component, config);
                }
            }
        }
        if let Some(beside) = PeftConfig::beside(file)
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
