//! One definition for flags, `LORA_*` variables and configuration files, in two levels: said, and resolved.
//!
//! Precedence, highest first: flag, variable, `--config` file, `lora.toml` (searched upwards from the working folder),
//! user configuration, preset, default. A configuration key is the flag's name; the variable is the flag's name in
//! capitals after `LORA_`. What only `lora generate` knows sits in the table `[generate]` and in `LORA_GENERATE_*`.

mod data;
mod error;
mod file;
mod generate;
mod keys;
mod layers;
mod lora_file;
mod preset;
mod range;
mod train;
mod train_config;
pub mod values;

use std::path::Path;

use serde::{Serialize, de::DeserializeOwned};

pub use data::{DataConfig, DataOptions, TextConfig};
pub use error::{ConfigError, Place};
pub use generate::{AnswerConfig, GenerateConfig, GenerateOptions};
pub use keys::{Key, closest, describe, keys, variable};
pub use layers::{CHANGEABLE, Layer, Layers, Origin, Surroundings, resume};
pub use preset::Preset;
pub use train::TrainOptions;
pub use train_config::{Length, TrainConfig};

/// A set of options that can come from several layers.
pub trait Options: clap::Args + Default + Serialize + DeserializeOwned {
    /// The table of a configuration file that holds the keys of this command alone; `None` for the top level.
    const TABLE: Option<&'static str>;

    /// `self` where it speaks, `lower` where it is silent.
    fn or(self, lower: Self) -> Self;

    /// The preset whose values lie below everything that is said; `None` where presets have no meaning.
    fn preset(&self) -> Option<Preset> {
        None
    }

    /// The options of a file in `folder`: relative paths in a file start at the file.
    fn rebase(self, folder: &Path) -> Self;
}

/// Keys that mean the same to every command and are written at the top level of a configuration file.
pub(crate) const COMMON: [&str; 6] = ["base", "device", "dtype", "quantize", "seed", "clip-skip"];

/// `upper.or(lower)` field by field; a field that is not listed does not compile.
macro_rules! or_lower {
    ($upper:expr, $lower:expr => $($field:ident),+ $(,)?) => {{
        let Self { $($field),+ } = $upper;
        let lower = $lower;
        Self { $($field: $field.or(lower.$field)),+ }
    }};
}
use or_lower;

/// Whether a base is a language model: a transformers folder and no pipeline of diffusers.
///
/// What cannot be found is none; whoever opens it says what is wrong.
pub fn is_language_model(base: &str) -> bool {
    let Ok(folder) = lora_core::hub::locate(base) else { return false };
    folder.join("config.json").is_file() && !folder.join("model_index.json").is_file()
}

/// A base that a file in `folder` names: a path where there is such a file, else a name from the hub.
fn rebase_base(base: String, folder: &Path) -> String {
    let path = folder.join(&base);
    if path.exists() { path.to_string_lossy().into_owned() } else { base }
}
