//! What `lora data` and `lora eval` may be told: the part of the training options that decides how pictures are read.

use std::{
    num::NonZeroUsize,
    path::{Path, PathBuf},
};

use clap::Args;
use serde::{Deserialize, Serialize};

use super::{
    ConfigError, Options, or_lower, rebase_base,
    values::{Device, Dtype, Mask, Prediction},
};

/// What a person may set about reading pictures, by flag, variable or file; the keys are those of training.
#[derive(Debug, Clone, Default, PartialEq, Args, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct PictureOptions {
    /// Folder of pictures with captions
    #[arg(value_name = "DATA")]
    pub data: Option<PathBuf>,
    /// Base model: folder, .safetensors file or org/name from the hub
    #[arg(long, value_name = "BASE")]
    pub base: Option<String>,
    /// Side of the pictures in pixels [default: the base's own, else 512]
    #[arg(long, value_name = "PIXELS")]
    pub resolution: Option<u32>,
    /// Word that stands for the style or subject; put before every caption
    #[arg(long, value_name = "WORD")]
    pub trigger: Option<String>,
    /// What says which pixels count [default: none]
    #[arg(long, value_enum, hide_short_help = true)]
    pub mask: Option<Mask>,
    /// Pictures per step [default: 4]
    #[arg(long, value_name = "N")]
    pub batch: Option<NonZeroUsize>,
    /// What the network predicts [default: auto]
    #[arg(long, value_enum, hide_short_help = true)]
    pub prediction: Option<Prediction>,
    /// Layer of the text encoder, counted from its end as kohya does [default: 1]
    #[arg(long, value_name = "N", hide_short_help = true)]
    pub clip_skip: Option<NonZeroUsize>,
    /// auto, cpu, cuda or cuda:N [default: auto]
    #[arg(long, value_name = "DEVICE", help_heading = "Machine")]
    pub device: Option<Device>,
    /// Precision of the base [default: bf16 on a GPU, fp32 on the CPU]
    #[arg(long, value_enum, hide_short_help = true, help_heading = "Machine")]
    pub dtype: Option<Dtype>,
    /// Seed of all randomness [default: 42]
    #[arg(long, value_name = "N", help_heading = "Machine")]
    pub seed: Option<u64>,
}

impl Options for PictureOptions {
    const TABLE: Option<&'static str> = None;

    fn or(self, lower: Self) -> Self {
        or_lower!(self, lower => data, base, resolution, trigger, mask, batch, prediction, clip_skip, device, dtype, seed)
    }

    fn rebase(self, folder: &Path) -> Self {
        Self {
            data: self.data.map(|data| folder.join(data)),
            base: self.base.map(|base| rebase_base(base, folder)),
            ..self
        }
    }
}

/// How pictures will be read.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[expect(missing_docs, reason = "every field is the option of the same name, which carries the description")]
pub struct PictureConfig {
    pub data: PathBuf,
    /// `lora data` needs none, `lora eval` does: see [`base`](Self::base).
    pub base: Option<String>,
    /// `None` takes the base's own, or 512 where there is no base.
    pub resolution: Option<u32>,
    pub trigger: Option<String>,
    pub mask: Mask,
    pub batch: NonZeroUsize,
    pub prediction: Prediction,
    pub clip_skip: NonZeroUsize,
    pub device: Device,
    pub dtype: Dtype,
    pub seed: u64,
}

impl PictureOptions {
    /// Fills in the defaults.
    ///
    /// # Errors
    /// If DATA is missing or a number is out of its range.
    pub fn resolve(self) -> Result<PictureConfig, ConfigError> {
        if let Some(side) = self.resolution.filter(|side| !(8..=16384).contains(side)) {
            return Err(ConfigError::invalid("--resolution", side, "a side has 8 to 16384 pixels"));
        }
        Ok(PictureConfig {
            data: self.data.ok_or(ConfigError::Missing { option: "DATA", example: "lora data check ./pictures" })?,
            base: self.base,
            resolution: self.resolution,
            trigger: self.trigger.filter(|word| !word.trim().is_empty()),
            mask: self.mask.unwrap_or_default(),
            batch: self.batch.unwrap_or(const { NonZeroUsize::new(4).expect("a positive constant") }),
            prediction: self.prediction.unwrap_or_default(),
            clip_skip: self.clip_skip.unwrap_or(NonZeroUsize::MIN),
            device: self.device.unwrap_or_default(),
            dtype: self.dtype.unwrap_or_default(),
            seed: self.seed.unwrap_or(42),
        })
    }
}

impl PictureConfig {
    /// The base model, for a command that cannot do without.
    ///
    /// # Errors
    /// If none was named.
    pub fn base(&self) -> Result<&str, ConfigError> {
        self.base
            .as_deref()
            .ok_or(ConfigError::Missing { option: "--base", example: "lora eval ./pictures --base BASE" })
    }
}
