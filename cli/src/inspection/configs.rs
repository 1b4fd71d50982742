//! The configurations of files whose keys hold no alphas: of peft beside the file, of diffusers in its header.

use std::path::Path;

use lora_core::{
    ScaleRule,
    format::{Component, PeftConfig, PeftKind, TensorFile},
};
use serde_json::{Map, Value};

/// peft's, beside its file.
const NAME: &str = "adapter_config.json";

/// What configurations say of the modules of a file.
#[derive(Debug, Default)]
pub(super) struct Configs {
    /// peft's, for whatever the file holds.
    whole: Option<PeftConfig>,
    /// diffusers', by the component that stands before a field (`unet.lora_alpha`) and before a key.
    components: Vec<(&'static str, PeftConfig)>,
    /// The model that peft's was trained on.
    pub base_model: Option<String>,
    /// Why one of them is missing or cannot be followed, so that the scale of its modules is unknown.
    pub problem: Option<String>,
}

impl Configs {
    /// Reads what is there; what is malformed gives a [`problem`](Self::problem).
    pub(super) fn of(file: &TensorFile) -> Self {
        if let Some(path) = PeftConfig::beside(file) {
            return Self::read(&path);
        }
        let mut configs = Self::default();
        let Some(text) = file.metadata().get("lora_adapter_metadata") else { return configs };
        let fields: Map<String, Value> = match serde_json::from_str(text) {
            Ok(fields) => fields,
            Err(error) => return Self { problem: Some(format!("lora_adapter_metadata: {error}")), ..configs },
        };
        for component in Component::ALL {
            match PeftConfig::of_component(&fields, component.name()) {
                Ok(config) => configs.components.extend(config.map(|config| (component.name(), config))),
                Err(fault) => configs.problem = Some(format!("lora_adapter_metadata, {component}: {fault}")),
            }
        }
        configs
    }

    fn read(path: &Path) -> Self {
        let problem = |text: String| Self { problem: Some(format!("{NAME}: {text}")), ..Self::default() };
        let bytes = match std::fs::read(path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return problem("it is not beside the file, which says no scale of its own".to_owned());
            }
            Err(error) => return problem(error.to_string()),
        };
        let fields: Map<String, Value> = match serde_json::from_slice(&bytes) {
            Ok(fields) => fields,
            Err(error) => return problem(format!("no JSON object: {error}")),
        };
        let base_model = fields.get("base_model_name_or_path").and_then(Value::as_str).map(str::to_owned);
        let base_model = base_model.filter(|name| !name.trim().is_empty());
        match PeftConfig::of(fields) {
            Ok(config) => Self { whole: Some(config), base_model, ..Self::default() },
            Err(fault) => Self { base_model, ..problem(fault.to_string()) },
        }
    }

    /// What is said of a module as the file spells it: its configuration, and the names that peft may know it under.
    fn of_module<'a>(&self, module: &'a str) -> Option<(&PeftConfig, [&'a str; 2])> {
        let (config, name) = match &self.whole {
            Some(config) => (config, module.strip_prefix("base_model.model.").unwrap_or(module)),
            None => self
                .components
                .iter()
                .find_map(|(component, config)| Some((config, module.strip_prefix(component)?.strip_prefix('.')?)))?,
        };
        Some((config, [name, name.strip_prefix("text_model.").unwrap_or(name)]))
    }

    /// Alpha of a module.
    pub(super) fn alpha(&self, module: &str) -> Option<f64> {
        self.of_module(module).map(|(config, names)| config.module_alpha(&names))
    }

    /// Scale of a module whose tensors have this rank.
    pub(super) fn scale(&self, module: &str, rank: usize) -> Option<f64> {
        self.of_module(module).map(|(config, names)| config.scale(&names, Some(rank)))
    }

    /// The rank that a module is said to have, of the families that have one.
    pub(super) fn rank(&self, module: &str) -> Option<usize> {
        let (config, names) = self.of_module(module)?;
        matches!(config.kind, PeftKind::Lora | PeftKind::Loha | PeftKind::Lokr).then(|| config.module_rank(&names))
    }

    /// Whether alpha is divided by the root of the rank (rsLoRA).
    pub(super) fn is_stabilised(&self, module: &str) -> bool {
        self.of_module(module).is_some_and(|(config, _)| config.rule == ScaleRule::RankRoot)
    }
}
