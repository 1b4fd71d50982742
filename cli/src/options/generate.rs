//! What may be said about drawing pictures, and what will be drawn.

use std::{
    num::NonZeroUsize,
    path::{Path, PathBuf},
};

use clap::Args;
use serde::{Deserialize, Serialize};

use super::{
    ConfigError, Options, or_lower,
    range::{above_zero, not_below_zero, share},
    rebase_base,
    values::{Device, Dtype, LoraFile, Quantize, Sampler, Size},
};

/// What a person may set about a picture or an answer, by flag, variable or in the table `[generate]`.
#[derive(Debug, Clone, Default, PartialEq, Args, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct GenerateOptions {
    /// Base model: folder, .safetensors file or org/name from the hub
    #[arg(long, value_name = "BASE")]
    pub base: Option<String>,
    /// Adapter with its strength; repeat for several
    ///
    /// The strength is a number (default 1, may be negative) or one per part: `unet=0.8,te=0.4`.
    #[arg(long, value_name = "FILE[:STRENGTH]")]
    pub lora: Option<Vec<LoraFile>>,
    /// Where the picture goes [default: a free name in the working folder], or the text [default: stdout]
    #[arg(long, short, value_name = "FILE")]
    pub out: Option<PathBuf>,
    /// What the picture should not show
    #[arg(long, value_name = "PROMPT", help_heading = "Pictures")]
    pub negative: Option<String>,
    /// Pictures or answers, each from a seed one higher [default: 1]
    #[arg(long, short = 'n', value_name = "N")]
    pub count: Option<NonZeroUsize>,
    /// Pixels, as 512 or 512x768 [default: the base's own]
    #[arg(long, value_name = "SIZE", help_heading = "Pictures")]
    pub size: Option<Size>,
    /// Steps of the sampler [default: 30]
    #[arg(long, value_name = "N", help_heading = "Pictures")]
    pub steps: Option<NonZeroUsize>,
    /// Classifier-free guidance; 1 is none [default: 7]
    #[arg(long, value_name = "X", help_heading = "Pictures")]
    pub guidance: Option<f64>,
    /// How the picture is drawn [default: ddim]
    #[arg(long, value_enum, hide_short_help = true, help_heading = "Pictures")]
    pub sampler: Option<Sampler>,
    /// Layer of the text encoder, counted from its end as kohya does [default: 1]
    #[arg(long, value_name = "N", hide_short_help = true, help_heading = "Pictures")]
    pub clip_skip: Option<NonZeroUsize>,
    /// What the assistant is told before anything else
    #[arg(long, value_name = "TEXT", hide_short_help = true, help_heading = "Texts")]
    pub system: Option<String>,
    /// Chat template in the place of the model's own
    #[arg(long, value_name = "FILE", hide_short_help = true, help_heading = "Texts")]
    pub chat_template: Option<PathBuf>,
    /// Go on with the prompt as it stands, without the chat template [default: false]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", hide_short_help = true, help_heading = "Texts")]
    pub raw: Option<bool>,
    /// Most tokens of an answer [default: 512]
    #[arg(long, value_name = "N", help_heading = "Texts")]
    pub max_tokens: Option<NonZeroUsize>,
    /// How freely tokens are chosen; 0 takes the likeliest [default: 0.7]
    #[arg(long, value_name = "X", help_heading = "Texts")]
    pub temperature: Option<f64>,
    /// Choose among so many of the likeliest tokens [default: all]
    #[arg(long, value_name = "N", hide_short_help = true, help_heading = "Texts")]
    pub top_k: Option<NonZeroUsize>,
    /// Choose among the likeliest tokens of this probability together [default: 1]
    #[arg(long, value_name = "SHARE", hide_short_help = true, help_heading = "Texts")]
    pub top_p: Option<f64>,
    /// Choose among tokens of this share of the likeliest one's probability [default: 0]
    #[arg(long, value_name = "SHARE", hide_short_help = true, help_heading = "Texts")]
    pub min_p: Option<f64>,
    /// What tokens that were there already are held down by; 1 does nothing [default: 1]
    #[arg(long, value_name = "X", hide_short_help = true, help_heading = "Texts")]
    pub repetition_penalty: Option<f64>,
    /// Text that ends an answer; repeatable
    #[arg(long, value_name = "TEXT", hide_short_help = true, help_heading = "Texts")]
    pub stop: Option<Vec<String>>,
    /// auto, cpu, cuda or cuda:N [default: auto]
    #[arg(long, value_name = "DEVICE", help_heading = "Machine")]
    pub device: Option<Device>,
    /// Precision of the base [default: bf16 on a GPU, fp32 on the CPU]
    #[arg(long, value_enum, hide_short_help = true, help_heading = "Machine")]
    pub dtype: Option<Dtype>,
    /// Keep the base in 4 bits a weight and compute in --dtype, as QLoRA does [default: none]
    #[arg(long, value_enum, hide_short_help = true, help_heading = "Machine")]
    pub quantize: Option<Quantize>,
    /// Seed of the first picture or answer [default: 42]
    #[arg(long, value_name = "N", help_heading = "Machine")]
    pub seed: Option<u64>,
}

impl Options for GenerateOptions {
    const TABLE: Option<&'static str> = Some("generate");

    fn or(self, lower: Self) -> Self {
        or_lower!(self, lower => base, lora, out, negative, count, size, steps, guidance, sampler, clip_skip, system,
            chat_template, raw, max_tokens, temperature, top_k, top_p, min_p, repetition_penalty, stop, device, dtype, quantize,
            seed)
    }

    fn rebase(self, folder: &Path) -> Self {
        let lora = self
            .lora
            .map(|files| files.into_iter().map(|file| LoraFile { path: folder.join(file.path), ..file }).collect());
        Self {
            base: self.base.map(|base| rebase_base(base, folder)),
            lora,
            out: self.out.map(|out| folder.join(out)),
            chat_template: self.chat_template.map(|file| folder.join(file)),
            ..self
        }
    }
}

/// What will be drawn or said.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[expect(missing_docs, reason = "every field is the option of the same name, which carries the description")]
pub struct GenerateConfig {
    pub prompt: String,
    pub base: String,
    pub lora: Vec<LoraFile>,
    /// `None` asks for a free name in the working folder.
    pub out: Option<PathBuf>,
    pub negative: String,
    pub count: NonZeroUsize,
    /// `None` takes the base's own.
    pub size: Option<Size>,
    pub steps: NonZeroUsize,
    pub guidance: f64,
    pub sampler: Sampler,
    pub clip_skip: NonZeroUsize,
    #[serde(flatten)]
    pub answer: AnswerConfig,
    pub device: Device,
    pub dtype: Dtype,
    pub quantize: Quantize,
    pub seed: u64,
}

/// How a language model answers.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[expect(missing_docs, reason = "every field is the option of the same name, which carries the description")]
pub struct AnswerConfig {
    pub system: Option<String>,
    /// `None` takes the model's own.
    pub chat_template: Option<PathBuf>,
    pub raw: bool,
    pub max_tokens: NonZeroUsize,
    pub temperature: f64,
    pub top_k: Option<NonZeroUsize>,
    /// `None` takes all.
    pub top_p: Option<f64>,
    /// `None` takes all.
    pub min_p: Option<f64>,
    pub repetition_penalty: f64,
    pub stop: Vec<String>,
}

impl GenerateOptions {
    /// Fills in the defaults.
    ///
    /// # Errors
    /// If BASE is missing or a number is out of its range.
    pub fn resolve(self, prompt: String) -> Result<GenerateConfig, ConfigError> {
        let guidance = self.guidance.unwrap_or(7.0);
        if !guidance.is_finite() {
            return Err(ConfigError::invalid("--guidance", guidance, "it must be a finite number"));
        }
        Ok(GenerateConfig {
            prompt,
            base: self
                .base
                .ok_or(ConfigError::Missing { option: "--base", example: "lora generate \"a house\" --base BASE" })?,
            lora: self.lora.unwrap_or_default(),
            out: self.out,
            negative: self.negative.unwrap_or_default(),
            count: self.count.unwrap_or(NonZeroUsize::MIN),
            size: self.size,
            steps: self.steps.unwrap_or(const { NonZeroUsize::new(30).expect("a positive constant") }),
            guidance,
            sampler: self.sampler.unwrap_or_default(),
            clip_skip: self.clip_skip.unwrap_or(NonZeroUsize::MIN),
            answer: AnswerConfig {
                system: self.system,
                chat_template: self.chat_template,
                raw: self.raw.unwrap_or(false),
                max_tokens: self.max_tokens.unwrap_or(const { NonZeroUsize::new(512).expect("a positive constant") }),
                temperature: not_below_zero("--temperature", self.temperature.unwrap_or(0.7))?,
                top_k: self.top_k,
                top_p: self.top_p.map(|value| share("--top-p", value)).transpose()?,
                min_p: self.min_p.map(|value| share("--min-p", value)).transpose()?,
                repetition_penalty: above_zero("--repetition-penalty", self.repetition_penalty.unwrap_or(1.0))?,
                stop: self.stop.unwrap_or_default(),
            },
            device: self.device.unwrap_or_default(),
            dtype: self.dtype.unwrap_or_default(),
            quantize: self.quantize.unwrap_or_default(),
            seed: self.seed.unwrap_or(42),
        })
    }
}
