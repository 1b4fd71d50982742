//! What `lora data` and `lora eval` may be told: the part of the training options that decides how data is read.

use std::{
    num::NonZeroUsize,
    path::{Path, PathBuf},
};

use clap::Args;
use serde::{Deserialize, Serialize};

use super::{
    ConfigError, Options, or_lower, rebase_base,
    values::{Device, Dtype, Mask, OnBad, OnLong, Prediction, Quantize, TrainOn},
};

/// What a person may set about reading data, by flag, variable or file; the keys are those of training.
#[derive(Debug, Clone, Default, PartialEq, Args, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct DataOptions {
    /// Folder of captioned pictures, or file of texts (.jsonl, .json, .txt)
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
    /// Examples per step [default: 4]
    #[arg(long, value_name = "N")]
    pub batch: Option<NonZeroUsize>,
    /// What the network predicts [default: auto]
    #[arg(long, value_enum, hide_short_help = true)]
    pub prediction: Option<Prediction>,
    /// Layer of the text encoder, counted from its end as kohya does [default: 1]
    #[arg(long, value_name = "N", hide_short_help = true)]
    pub clip_skip: Option<NonZeroUsize>,
    /// Texts: most tokens of an example [default: 1024]
    #[arg(long, value_name = "N", hide_short_help = true)]
    pub max_len: Option<NonZeroUsize>,
    /// Texts: what counts in the loss [default: completions]
    #[arg(long, value_enum, hide_short_help = true)]
    pub train_on: Option<TrainOn>,
    /// Texts: what happens to those longer than --max-len [default: truncate]
    #[arg(long, value_enum, hide_short_help = true)]
    pub on_long: Option<OnLong>,
    /// Texts: chat template in the place of the model's own
    #[arg(long, value_name = "FILE", hide_short_help = true)]
    pub chat_template: Option<PathBuf>,
    /// Texts: what happens to rows that cannot be used [default: stop]
    #[arg(long, value_enum, hide_short_help = true)]
    pub on_bad: Option<OnBad>,
    /// auto, cpu, cuda or cuda:N [default: auto]
    #[arg(long, value_name = "DEVICE", help_heading = "Machine")]
    pub device: Option<Device>,
    /// Precision of the base [default: bf16 on a GPU, fp32 on the CPU]
    #[arg(long, value_enum, hide_short_help = true, help_heading = "Machine")]
    pub dtype: Option<Dtype>,
    /// Keep the base in 4 bits a weight and compute in --dtype, as QLoRA does [default: none]
    #[arg(long, value_enum, hide_short_help = true, help_heading = "Machine")]
    pub quantize: Option<Quantize>,
    /// Seed of all randomness [default: 42]
    #[arg(long, value_name = "N", help_heading = "Machine")]
    pub seed: Option<u64>,
}

impl Options for DataOptions {
    const TABLE: Option<&'static str> = None;

    fn or(self, lower: Self) -> Self {
        or_lower!(self, lower => data, base, resolution, trigger, mask, batch, prediction, clip_skip, max_len, train_on,
            on_long, on_bad, chat_template, device, dtype, quantize, seed)
    }

    fn rebase(self, folder: &Path) -> Self {
        Self {
            data: self.data.map(|data| folder.join(data)),
            base: self.base.map(|base| rebase_base(base, folder)),
            chat_template: self.chat_template.map(|file| folder.join(file)),
            ..self
        }
    }
}

/// How data will be read.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[expect(missing_docs, reason = "every field is the option of the same name, which carries the description")]
pub struct DataConfig {
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
    #[serde(flatten)]
    pub text: TextConfig,
    /// `None` takes the model's own.
    pub chat_template: Option<PathBuf>,
    pub device: Device,
    pub dtype: Dtype,
    pub quantize: Quantize,
    pub seed: u64,
}

/// How texts are read.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[expect(missing_docs, reason = "every field is the option of the same name, which carries the description")]
pub struct TextConfig {
    pub max_len: NonZeroUsize,
    pub train_on: TrainOn,
    pub on_long: OnLong,
    pub on_bad: OnBad,
}

impl DataOptions {
    /// Fills in the defaults.
    ///
    /// # Errors
    /// If DATA is missing or a number is out of its range.
    pub fn resolve(self) -> Result<DataConfig, ConfigError> {
        if let Some(side) = self.resolution.filter(|side| !(8..=16384).contains(side)) {
            return Err(ConfigError::invalid("--resolution", side, "a side has 8 to 16384 pixels"));
        }
        Ok(DataConfig {
            data: self.data.ok_or(ConfigError::Missing { option: "DATA", example: "lora data check ./pictures" })?,
            base: self.base,
            resolution: self.resolution,
            trigger: self.trigger.filter(|word| !word.trim().is_empty()),
            mask: self.mask.unwrap_or_default(),
            batch: self.batch.unwrap_or(const { NonZeroUsize::new(4).expect("a positive constant") }),
            prediction: self.prediction.unwrap_or_default(),
            clip_skip: self.clip_skip.unwrap_or(NonZeroUsize::MIN),
            chat_template: self.chat_template,
            text: TextConfig {
                max_len: match self.max_len.unwrap_or(const { NonZeroUsize::new(1024).expect("a positive constant") }) {
                    short if short.get() < 2 => {
                        return Err(ConfigError::invalid("--max-len", short, "an example has at least two tokens"));
                    }
                    length => length,
                },
                train_on: self.train_on.unwrap_or_default(),
                on_long: self.on_long.unwrap_or_default(),
                on_bad: self.on_bad.unwrap_or_default(),
            },
            device: self.device.unwrap_or_default(),
            dtype: self.dtype.unwrap_or_default(),
            quantize: self.quantize.unwrap_or_default(),
            seed: self.seed.unwrap_or(42),
        })
    }
}

impl DataConfig {
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
