//! What may be said about a training run: the one definition of flags, variables and configuration keys of `lora train`.
//!
//! `None` means "not said"; [`TrainConfig`](super::TrainConfig) is what becomes of it.

use std::{
    num::{NonZeroU64, NonZeroUsize},
    path::{Path, PathBuf},
};

use clap::Args;
use lora_core::{Init, Method};
use serde::{Deserialize, Serialize};

use super::{
    Options, Preset, or_lower, rebase_base,
    values::{
        Device, Dtype, Format, Mask, OnBad, OnLong, Optimizer, Prediction, Quantize, Sampler, Schedule, TrainOn,
        Warmup, choice,
    },
};

/// What a person may set about a training run, by flag, variable or file.
#[derive(Debug, Clone, Default, PartialEq, Args, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct TrainOptions {
    /// Folder of captioned pictures, or file of texts (.jsonl, .json, .txt)
    #[arg(value_name = "DATA")]
    pub data: Option<PathBuf>,
    /// Base model: folder, .safetensors file or org/name
    #[arg(long, value_name = "BASE")]
    pub base: Option<String>,
    /// Folder of the run [default: runs/NAME-1, -2, ...]
    #[arg(long, value_name = "RUN")]
    pub out: Option<PathBuf>,
    /// Name of the adapter file [default: the data folder's name]
    #[arg(long, hide_short_help = true)]
    pub name: Option<String>,
    /// Set of defaults to start from [default: balanced; language for a language model]
    #[arg(long, value_enum, hide_possible_values = true)]
    pub preset: Option<Preset>,
    /// Pictures: word that calls up the style; put before every caption
    #[arg(long, value_name = "WORD")]
    pub trigger: Option<String>,

    /// Width of the update: capacity and file size [default: 16]
    #[arg(long, value_name = "N")]
    pub rank: Option<NonZeroUsize>,
    /// Numerator of the scale alpha / rank [default: the rank; twice that for a language model]
    #[arg(long, value_name = "X", hide_short_help = true, help_heading = "Adapter", allow_negative_numbers = true)]
    pub alpha: Option<f64>,
    /// Family of the adapter [default: lora]
    #[arg(long, hide_short_help = true, help_heading = "Adapter", value_parser = choice::<Method>(&["lora", "rslora", "dora", "loha", "lokr"]))]
    pub method: Option<Method>,
    /// Modules that get an adapter; repeat for several [default: attention+ff; linear for a language model]
    ///
    /// One of `cross-attention`, `attention`, `attention+ff`, `linear`, `all`, each also with `+te` for the text
    /// encoder, or a regular expression that is matched against the module's path in the checkpoint. The embedding and the
    /// head of a language model are reached by name alone: `--targets linear --targets embed_tokens --targets lm_head`.
    #[arg(long, value_name = "SET|REGEX", hide_short_help = true, help_heading = "Adapter")]
    pub targets: Option<Vec<String>>,
    /// How the factors start [default: kaiming; gaussian for a language model]
    #[arg(long, hide_short_help = true, help_heading = "Adapter", value_parser = choice::<Init>(&["kaiming", "gaussian", "pissa", "olora"]))]
    pub init: Option<Init>,
    /// LoKr: size of the first factor [default: nearest to a square]
    #[arg(long, value_name = "N", hide_short_help = true, help_heading = "Adapter")]
    pub factor: Option<NonZeroUsize>,

    /// Learning rate [default: 1e-4; 2e-4 for a language model]
    #[arg(long, value_name = "RATE")]
    pub lr: Option<f64>,
    /// Learning rate of the text encoder's adapter [default: half of --lr]
    ///
    /// Matters only if `--targets` holds modules of the text encoder.
    #[arg(long, value_name = "RATE", hide_short_help = true, help_heading = "Training")]
    pub text_encoder_lr: Option<f64>,
    /// LoRA+: how many times as fast `up` learns as `down` [default: 1]
    ///
    /// The rate of `up` is this times `--lr`; 16 is customary for language models, 2 to 4 for pictures. For LoRA, rsLoRA
    /// and DoRA, and any optimizer but Prodigy. Hayou et al. 2024, arXiv 2402.12354.
    #[arg(long, value_name = "RATIO", hide_short_help = true, help_heading = "Training")]
    pub lora_plus: Option<f64>,
    /// Length of the run [default: about 4000 pictures' worth, or 3 passes over texts]
    #[arg(long, value_name = "N")]
    pub steps: Option<u64>,
    /// Length of the run in passes over the data
    #[arg(long, value_name = "X", hide_short_help = true, help_heading = "Training")]
    pub epochs: Option<f64>,
    /// Examples per step [default: 4]
    #[arg(long, value_name = "N")]
    pub batch: Option<NonZeroUsize>,
    /// Batches whose gradients are added up before each update [default: 1]
    #[arg(long, value_name = "N", hide_short_help = true, help_heading = "Training")]
    pub accum: Option<NonZeroUsize>,
    /// Rule of the updates [default: adamw]
    #[arg(long, value_enum, hide_short_help = true, help_heading = "Training")]
    pub optimizer: Option<Optimizer>,
    /// Decoupled weight decay [default: 0.01]
    #[arg(long, value_name = "X", hide_short_help = true, help_heading = "Training")]
    pub weight_decay: Option<f64>,
    /// How the learning rate moves after the warm-up [default: cosine]
    #[arg(long, value_enum, hide_short_help = true, help_heading = "Training")]
    pub schedule: Option<Schedule>,
    /// Steps, or share of the run, until the rate is reached [default: 5%]
    #[arg(long, value_name = "N|P%", hide_short_help = true, help_heading = "Training")]
    pub warmup: Option<Warmup>,
    /// Number of cosines of the schedule `cosine-restarts` [default: 1]
    #[arg(long, value_name = "N", hide_short_help = true, help_heading = "Training")]
    pub cycles: Option<NonZeroUsize>,
    /// Exponent of the schedule `polynomial` [default: 2]
    #[arg(long, value_name = "X", hide_short_help = true, help_heading = "Training")]
    pub power: Option<f64>,
    /// Largest norm of the gradient; 0 does not clip [default: 1]
    #[arg(long, value_name = "NORM", hide_short_help = true, help_heading = "Training")]
    pub clip: Option<f64>,
    /// Decay of a moving average of the adapter, which is then saved; 0 keeps none [default: 0]
    #[arg(long, value_name = "DECAY", hide_short_help = true, help_heading = "Training")]
    pub ema: Option<f64>,

    /// Side of the pictures in pixels [default: the base's own]
    #[arg(long, value_name = "PIXELS")]
    pub resolution: Option<u32>,
    /// Share of captions that are left empty, 0 to 1 [default: 0.05]
    #[arg(long, value_name = "SHARE", hide_short_help = true, help_heading = "Pictures")]
    pub caption_dropout: Option<f64>,
    /// Mirror every second picture [default: true]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", hide_short_help = true, help_heading = "Pictures")]
    pub flip: Option<bool>,
    /// What says which pixels count [default: none]
    #[arg(long, value_enum, hide_short_help = true, help_heading = "Pictures")]
    pub mask: Option<Mask>,
    /// Strength of a noise that is one value per channel; 0 adds none [default: 0]
    #[arg(long, value_name = "X", hide_short_help = true, help_heading = "Pictures")]
    pub noise_offset: Option<f64>,
    /// Cap of the signal-to-noise weight of the loss; 0 weighs all alike [default: 5]
    ///
    /// Hang et al. 2023, arXiv 2303.09556.
    #[arg(long, value_name = "GAMMA", hide_short_help = true, help_heading = "Pictures")]
    pub min_snr: Option<f64>,
    /// What the network predicts [default: auto]
    #[arg(long, value_enum, hide_short_help = true, help_heading = "Pictures")]
    pub prediction: Option<Prediction>,
    /// Layer of the text encoder, counted from its end as kohya does [default: 1]
    #[arg(long, value_name = "N", hide_short_help = true, help_heading = "Pictures")]
    pub clip_skip: Option<NonZeroUsize>,

    /// Most tokens of an example [default: 1024]
    #[arg(long, value_name = "N", hide_short_help = true, help_heading = "Texts")]
    pub max_len: Option<NonZeroUsize>,
    /// Put several short examples into one row; they do not see each other [default: false]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", hide_short_help = true, help_heading = "Texts")]
    pub packing: Option<bool>,
    /// What counts in the loss [default: completions]
    #[arg(long, value_enum, hide_short_help = true, help_heading = "Texts")]
    pub train_on: Option<TrainOn>,
    /// What happens to texts longer than --max-len [default: truncate]
    #[arg(long, value_enum, hide_short_help = true, help_heading = "Texts")]
    pub on_long: Option<OnLong>,
    /// Chat template in the place of the model's own
    #[arg(long, value_name = "FILE", hide_short_help = true, help_heading = "Texts")]
    pub chat_template: Option<PathBuf>,
    /// What happens to rows that cannot be used [default: stop]
    #[arg(long, value_enum, hide_short_help = true, help_heading = "Texts")]
    pub on_bad: Option<OnBad>,
    /// NEFTune: strength of the noise on the embeddings of what is trained on; 0 adds none [default: 0]
    ///
    /// Each number is uniform within ± ALPHA / √(tokens · width) of its example; 5 is customary. Samples and validation
    /// have none. Jain et al. 2023, arXiv 2310.05914.
    #[arg(long, value_name = "ALPHA", hide_short_help = true, help_heading = "Texts")]
    pub neftune: Option<f64>,
    /// Compute layers again in the backward pass: less memory, more time [default: false]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", hide_short_help = true, help_heading = "Texts")]
    pub checkpointing: Option<bool>,

    /// Share of the examples that is kept out of training and measured instead, 0 to 1 [default: 0]
    ///
    /// Their loss is in metrics.jsonl, TensorBoard and the report beside that of training: where it rises, the adapter has
    /// begun to learn by heart.
    #[arg(long, value_name = "SHARE", hide_short_help = true, help_heading = "Samples and saving")]
    pub validation: Option<f64>,
    /// Steps between measurements of the validation loss; 0 measures none [default: a tenth of the run]
    #[arg(long, value_name = "N", hide_short_help = true, help_heading = "Samples and saving")]
    pub validate_every: Option<u64>,
    /// Prompt to draw or answer while training; repeatable
    ///
    /// Without one, the captions of the first four pictures, or the first four questions of the texts.
    #[arg(long, value_name = "PROMPT")]
    pub sample: Option<Vec<String>>,
    /// Steps between samples; 0 draws none [default: a tenth of the run]
    #[arg(long, value_name = "N", hide_short_help = true, help_heading = "Samples and saving")]
    pub sample_every: Option<u64>,
    /// Steps of the sampler [default: 30]
    #[arg(long, value_name = "N", hide_short_help = true, help_heading = "Samples and saving")]
    pub sample_steps: Option<NonZeroUsize>,
    /// Classifier-free guidance of the samples [default: 7]
    #[arg(long, value_name = "X", hide_short_help = true, help_heading = "Samples and saving")]
    pub sample_guidance: Option<f64>,
    /// What the samples should not show [default: nothing]
    #[arg(long, value_name = "PROMPT", hide_short_help = true, help_heading = "Samples and saving")]
    pub sample_negative: Option<String>,
    /// How the samples are drawn [default: ddim]
    #[arg(long, value_enum, hide_short_help = true, help_heading = "Samples and saving")]
    pub sampler: Option<Sampler>,
    /// Steps between checkpoints; 0 saves at the end only [default: a tenth of the run]
    #[arg(long, value_name = "N", hide_short_help = true, help_heading = "Samples and saving")]
    pub save_every: Option<u64>,
    /// Newest checkpoints that are kept; 0 keeps all [default: 2]
    #[arg(long, value_name = "N", hide_short_help = true, help_heading = "Samples and saving")]
    pub keep: Option<usize>,
    /// Steps between lines of metrics.jsonl [default: 1]
    #[arg(long, value_name = "N", hide_short_help = true, help_heading = "Samples and saving")]
    pub log_every: Option<NonZeroU64>,
    /// Layout of the adapter file [default: kohya]
    #[arg(long, value_enum, hide_short_help = true, help_heading = "Samples and saving")]
    pub format: Option<Format>,
    /// Leave paths, captions and settings out of the adapter file [default: false]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", hide_short_help = true, help_heading = "Samples and saving")]
    pub private: Option<bool>,
    /// Write no metadata into the adapter file [default: false]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", hide_short_help = true, help_heading = "Samples and saving")]
    pub no_metadata: Option<bool>,

    /// auto, cpu, cuda or cuda:N [default: auto]
    #[arg(long, value_name = "DEVICE")]
    pub device: Option<Device>,
    /// Precision of the base [default: bf16 on a GPU, fp32 on the CPU]
    #[arg(long, value_enum, hide_short_help = true, help_heading = "Machine")]
    pub dtype: Option<Dtype>,
    /// Keep the base in 4 bits a weight and compute in --dtype, as QLoRA does [default: none]
    #[arg(long, value_enum, hide_short_help = true, help_heading = "Machine")]
    pub quantize: Option<Quantize>,
    /// Seed of all randomness [default: 42]
    #[arg(long, value_name = "N", hide_short_help = true, help_heading = "Machine")]
    pub seed: Option<u64>,
}

impl Options for TrainOptions {
    const TABLE: Option<&'static str> = None;

    fn or(self, lower: Self) -> Self {
        // A length that was said as steps silences a lower one in epochs, and the other way round.
        let lower = if self.steps.is_some() || self.epochs.is_some() {
            Self { steps: None, epochs: None, ..lower }
        } else {
            lower
        };
        or_lower!(self, lower => data, base, out, name, preset, trigger, rank, alpha, method, targets, init, factor,
            lr, text_encoder_lr, lora_plus, steps, epochs, batch, accum, optimizer, weight_decay, schedule, warmup, cycles, power,
            clip, ema, resolution, caption_dropout, flip, mask, noise_offset, min_snr, prediction, clip_skip, sample,
            max_len, packing, train_on, on_long, on_bad, chat_template, neftune, validation, validate_every,
            checkpointing,
            sample_every, sample_steps, sample_guidance, sample_negative, sampler, save_every, keep, log_every, format,
            private, no_metadata, device, dtype, quantize, seed)
    }

    fn preset(&self) -> Option<Preset> {
        let by_base = || self.base.as_deref().is_some_and(super::is_language_model).then_some(Preset::Language);
        self.preset.or_else(by_base).or_else(|| Some(Preset::default()))
    }

    fn rebase(self, folder: &Path) -> Self {
        Self {
            data: self.data.map(|data| folder.join(data)),
            base: self.base.map(|base| rebase_base(base, folder)),
            out: self.out.map(|out| folder.join(out)),
            chat_template: self.chat_template.map(|file| folder.join(file)),
            ..self
        }
    }
}
