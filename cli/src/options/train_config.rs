//! What a training run will do: a checked value for every option, as the engine sees it and `config.toml` keeps it.

use std::{
    num::{NonZeroU64, NonZeroUsize},
    path::{Path, PathBuf},
};

use lora_core::{AdapterConfig, Init, Method};
use serde::Serialize;

use super::{
    ConfigError, Options as _, Preset, TrainOptions,
    range::{above_zero, finite, not_below_zero, share, share_below_one},
    values::{
        Device, Dtype, Format, Mask, OnBad, OnLong, Optimizer, Prediction, Quantize, Sampler, Schedule, TrainOn, Warmup,
    },
};

/// How long a run is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Length {
    /// A number of updates.
    Steps(u64),
    /// Passes over the data.
    Epochs(f64),
}

/// What will run: a checked value for every option.
///
/// Its fields carry the options' names, so that its TOML form is a configuration file that repeats the run.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[expect(missing_docs, reason = "every field is the option of the same name, which carries the description")]
pub struct TrainConfig {
    pub data: PathBuf,
    pub base: String,
    /// Where the run is written; `None` asks for the next free folder under `runs/`. Not part of `config.toml`.
    #[serde(skip)]
    pub out: Option<PathBuf>,
    pub name: String,
    pub preset: Preset,
    pub trigger: Option<String>,
    pub rank: NonZeroUsize,
    pub alpha: f64,
    pub method: Method,
    pub targets: Vec<String>,
    pub init: Init,
    pub factor: Option<NonZeroUsize>,
    pub lr: f64,
    pub text_encoder_lr: f64,
    /// 1: all factors learn alike.
    pub lora_plus: f64,
    #[serde(flatten, serialize_with = "length")]
    pub length: Length,
    pub batch: NonZeroUsize,
    pub accum: NonZeroUsize,
    pub optimizer: Optimizer,
    pub weight_decay: f64,
    pub schedule: Schedule,
    pub warmup: Warmup,
    pub cycles: NonZeroUsize,
    pub power: f64,
    /// 0 does not clip.
    pub clip: f64,
    /// 0 keeps none.
    pub ema: f64,
    /// `None` takes the base's own.
    pub resolution: Option<u32>,
    pub caption_dropout: f64,
    pub flip: bool,
    pub mask: Mask,
    pub noise_offset: f64,
    /// 0 weighs all timesteps alike.
    pub min_snr: f64,
    pub prediction: Prediction,
    pub clip_skip: NonZeroUsize,
    pub max_len: NonZeroUsize,
    pub packing: bool,
    pub train_on: TrainOn,
    pub on_long: OnLong,
    pub on_bad: OnBad,
    /// `None` takes the model's own.
    pub chat_template: Option<PathBuf>,
    pub checkpointing: bool,
    /// 0 adds no noise.
    pub neftune: f64,
    /// 0 keeps nothing apart.
    pub validation: f64,
    /// `None`: a tenth of the run; see [`validation_interval`](Self::validation_interval).
    pub validate_every: Option<u64>,
    /// Empty: the captions of the first four pictures, or the first four questions.
    pub sample: Vec<String>,
    /// `None`: a tenth of the run; see [`sample_interval`](Self::sample_interval).
    pub sample_every: Option<u64>,
    pub sample_steps: NonZeroUsize,
    pub sample_guidance: f64,
    pub sample_negative: String,
    pub sampler: Sampler,
    /// `None`: a tenth of the run; see [`save_interval`](Self::save_interval).
    pub save_every: Option<u64>,
    pub keep: usize,
    pub log_every: NonZeroU64,
    pub format: Format,
    pub private: bool,
    pub no_metadata: bool,
    pub device: Device,
    pub dtype: Dtype,
    pub quantize: Quantize,
    pub seed: u64,
}

/// Pictures shown in a run whose length nobody said: the middle of the range that the field's presets span.
const EXPOSURES: u64 = 4000;

/// `N` as a number that is known not to be zero.
const fn positive<const N: usize>() -> NonZeroUsize {
    const { NonZeroUsize::new(N).expect("a positive constant") }
}

impl TrainOptions {
    /// Fills in the defaults, here and nowhere else, and checks what types cannot say.
    ///
    /// # Errors
    /// If DATA or BASE is missing, or a number is out of its range.
    pub fn resolve(self) -> Result<TrainConfig, ConfigError> {
        let preset = self.preset().unwrap_or_default();
        let data =
            self.data.ok_or(ConfigError::Missing { option: "DATA", example: "lora train ./pictures --base BASE" })?;
        let base =
            self.base.ok_or(ConfigError::Missing { option: "--base", example: "lora train ./pictures --base BASE" })?;
        let rank = self.rank.unwrap_or(positive::<16>());
        let scale = if matches!(preset, Preset::Language | Preset::DemoText) { 2.0 } else { 1.0 };
        let lr = above_zero("--lr", self.lr.unwrap_or(1e-4))?;
        let (method, optimizer) = (self.method.unwrap_or_default(), self.optimizer.unwrap_or_default());
        let batch = self.batch.unwrap_or(positive::<4>());
        let accum = self.accum.unwrap_or(positive::<1>());
        let length = match (self.steps, self.epochs) {
            (Some(_), Some(epochs)) => {
                return Err(ConfigError::invalid("--epochs", epochs, "`--steps` already says how long the run is"));
            }
            (Some(0), _) => return Err(ConfigError::invalid("--steps", 0, "a run has at least one step")),
            (Some(steps), _) => Length::Steps(steps),
            (None, Some(epochs)) => Length::Epochs(above_zero("--epochs", epochs)?),
            (None, None) => Length::Steps(EXPOSURES.div_ceil(batch.get() as u64 * accum.get() as u64)),
        };
        let name = match self.name {
            Some(name) => name,
            None => name_of(&data),
        };
        if name.is_empty() || name.starts_with('.') || name.contains(['/', '\\', '\0']) {
            return Err(ConfigError::invalid(
                "--name",
                name,
                "it becomes a file name, so it holds no slash or leading dot",
            ));
        }
        Ok(TrainConfig {
            base: if Path::new(&base).exists() {
                absolute(Path::new(&base)).to_string_lossy().into_owned()
            } else {
                base
            },
            out: self.out,
            name,
            data: absolute(&data),
            preset,
            trigger: self.trigger.filter(|word| !word.trim().is_empty()),
            rank,
            alpha: finite("--alpha", self.alpha.unwrap_or(scale * rank.get() as f64))?,
            method,
            targets: self.targets.unwrap_or_else(|| vec!["attention+ff".into()]),
            init: self.init.unwrap_or_default(),
            factor: self.factor,
            lr,
            text_encoder_lr: not_below_zero("--text-encoder-lr", self.text_encoder_lr.unwrap_or(lr / 2.0))?,
            lora_plus: self.lora_plus.map_or(Ok(1.0), |ratio| lora_plus(ratio, method, optimizer))?,
            length,
            batch,
            accum,
            optimizer,
            weight_decay: not_below_zero("--weight-decay", self.weight_decay.unwrap_or(0.01))?,
            schedule: self.schedule.unwrap_or_default(),
            warmup: self.warmup.unwrap_or(Warmup::Share(0.05)),
            cycles: self.cycles.unwrap_or(positive::<1>()),
            power: above_zero("--power", self.power.unwrap_or(2.0))?,
            clip: not_below_zero("--clip", self.clip.unwrap_or(1.0))?,
            ema: share_below_one("--ema", self.ema.unwrap_or(0.0))?,
            resolution: match self.resolution {
                Some(side) if !(8..=16384).contains(&side) => {
                    return Err(ConfigError::invalid("--resolution", side, "a side has 8 to 16384 pixels"));
                }
                side => side,
            },
            caption_dropout: share("--caption-dropout", self.caption_dropout.unwrap_or(0.05))?,
            flip: self.flip.unwrap_or(true),
            mask: self.mask.unwrap_or_default(),
            noise_offset: not_below_zero("--noise-offset", self.noise_offset.unwrap_or(0.0))?,
            min_snr: not_below_zero("--min-snr", self.min_snr.unwrap_or(5.0))?,
            prediction: self.prediction.unwrap_or_default(),
            clip_skip: self.clip_skip.unwrap_or(positive::<1>()),
            max_len: match self.max_len.unwrap_or(positive::<1024>()) {
                short if short.get() < 2 => {
                    return Err(ConfigError::invalid("--max-len", short, "nothing can be learnt of a single token"));
                }
                length => length,
            },
            packing: self.packing.unwrap_or(false),
            train_on: self.train_on.unwrap_or_default(),
            on_long: self.on_long.unwrap_or_default(),
            on_bad: self.on_bad.unwrap_or_default(),
            chat_template: self.chat_template.as_deref().map(absolute),
            checkpointing: self.checkpointing.unwrap_or(false),
            neftune: not_below_zero("--neftune", self.neftune.unwrap_or(0.0))?,
            validation: share_below_one("--validation", self.validation.unwrap_or(0.0))?,
            validate_every: self.validate_every,
            sample: self.sample.unwrap_or_default(),
            sample_every: self.sample_every,
            sample_steps: self.sample_steps.unwrap_or(positive::<30>()),
            sample_guidance: finite("--sample-guidance", self.sample_guidance.unwrap_or(7.0))?,
            sample_negative: self.sample_negative.unwrap_or_default(),
            sampler: self.sampler.unwrap_or_default(),
            save_every: self.save_every,
            keep: self.keep.unwrap_or(2),
            log_every: self.log_every.unwrap_or(NonZeroU64::MIN),
            format: self.format.unwrap_or_default(),
            private: self.private.unwrap_or(false),
            no_metadata: self.no_metadata.unwrap_or(false),
            device: self.device.unwrap_or_default(),
            dtype: self.dtype.unwrap_or_default(),
            quantize: self.quantize.unwrap_or_default(),
            seed: self.seed.unwrap_or(42),
        })
    }
}

impl TrainConfig {
    /// The adapter's own settings.
    ///
    /// # Errors
    /// If no adapter can have them.
    pub fn adapter(&self) -> lora_core::Result<AdapterConfig> {
        let config = AdapterConfig::new(self.method, self.rank, self.alpha)?;
        Ok(AdapterConfig { init: self.init, factor: self.factor, ..config })
    }

    /// Updates in the run; `through` says how many updates a number of whole passes over the data takes.
    pub fn steps(&self, through: impl Fn(u64) -> u64) -> u64 {
        match self.length {
            Length::Steps(steps) => steps,
            Length::Epochs(epochs) => {
                let whole = epochs as u64;
                let start = through(whole);
                let next = through(whole + 1).saturating_sub(start);
                (start + (epochs.fract() * next as f64).round() as u64).max(1)
            }
        }
    }

    /// Steps between checkpoints in a run of `total` steps; `None` saves at the end only.
    pub fn save_interval(&self, total: u64) -> Option<u64> {
        interval(self.save_every, total)
    }

    /// Steps between samples in a run of `total` steps; `None` draws none, not even before and after.
    pub fn sample_interval(&self, total: u64) -> Option<u64> {
        interval(self.sample_every, total)
    }

    /// Steps between measurements of the validation loss in a run of `total` steps, where examples are `kept` for it; `None`
    /// measures none, not even before and after.
    pub fn validation_interval(&self, total: u64, kept: bool) -> Option<u64> {
        interval(self.validate_every, total).filter(|_| kept)
    }

    /// The configuration file that repeats the run.
    pub fn to_toml(&self) -> String {
        let body = toml::to_string(self).expect("a flat struct of numbers and words has a TOML form");
        format!("# Every option of this run. Repeat it with `lora train --config` and this file.\n{body}")
    }
}

/// A ratio of learning rates that the method has a meaning for.
fn lora_plus(ratio: f64, method: Method, optimizer: Optimizer) -> Result<f64, ConfigError> {
    let ratio = above_zero("--lora-plus", ratio)?;
    let reason = match (method, optimizer) {
        _ if ratio == 1.0 => return Ok(ratio),
        (Method::Loha | Method::Lokr, _) => "it needs `down` and `up`, which `--method lora`, `rslora` and `dora` have",
        (_, Optimizer::Prodigy) => "Prodigy finds one rate for all factors; take another `--optimizer`",
        _ => return Ok(ratio),
    };
    Err(ConfigError::invalid("--lora-plus", ratio, reason))
}

/// The name of a run whose data is `data`: the folder's own, or the file's without its ending.
fn name_of(data: &Path) -> String {
    absolute(data).file_stem().map_or_else(|| "adapter".into(), |stem| stem.to_string_lossy().into_owned())
}

/// The path from the root on, so that a stored configuration means the same from everywhere.
fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}

fn interval(said: Option<u64>, total: u64) -> Option<u64> {
    match said {
        Some(0) => None,
        Some(steps) => Some(steps),
        None => Some(total.div_ceil(10).max(1)),
    }
}

fn length<S: serde::Serializer>(length: &Length, serializer: S) -> Result<S::Ok, S::Error> {
    use serde::ser::SerializeMap;
    let mut map = serializer.serialize_map(Some(1))?;
    match length {
        Length::Steps(steps) => map.serialize_entry("steps", steps)?,
        Length::Epochs(epochs) => map.serialize_entry("epochs", epochs)?,
    }
    map.end()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said() -> TrainOptions {
        TrainOptions { data: Some("pictures".into()), base: Some("base".into()), ..TrainOptions::default() }
    }

    #[test]
    fn what_runs_is_a_file_that_repeats_the_run() {
        let options = TrainOptions {
            alpha: Some(7.5),
            epochs: Some(2.5),
            warmup: Some(Warmup::Share(0.07)),
            sample: Some(vec!["a \"quoted\" house".into()]),
            trigger: Some("ohwx".into()),
            device: Some(Device::Cuda(1)),
            sample_every: Some(0),
            ..said()
        };
        let config = options.resolve().unwrap();
        let again: TrainOptions = toml::from_str(&config.to_toml()).unwrap();
        assert_eq!(again.resolve().unwrap(), config);
    }

    #[test]
    fn alpha_defaults_to_the_rank() {
        let config = TrainOptions { rank: NonZeroUsize::new(9), ..said() }.resolve().unwrap();
        assert_eq!(config.adapter().unwrap().alpha, 9.0);
    }

    #[test]
    fn an_unsaid_length_shows_as_many_pictures_whatever_the_batch() {
        let two_by_three = TrainOptions { batch: NonZeroUsize::new(2), accum: NonZeroUsize::new(3), ..said() };
        assert_eq!(two_by_three.resolve().unwrap().length, Length::Steps(667));
        assert_eq!(said().resolve().unwrap().length, Length::Steps(1000));
    }

    #[test]
    fn steps_on_top_silence_epochs_below() {
        let top = TrainOptions { steps: Some(10), ..said() };
        let merged = top.or(TrainOptions { epochs: Some(3.0), ..said() });
        assert_eq!((merged.steps, merged.epochs), (Some(10), None));
    }

    #[test]
    fn the_text_encoder_learns_at_half_the_rate() {
        let config = TrainOptions { lr: Some(3e-4), ..said() }.resolve().unwrap();
        assert_eq!(config.text_encoder_lr, 1.5e-4);
    }

    #[test]
    fn intervals_are_a_tenth_unless_said() {
        let config = said().resolve().unwrap();
        assert_eq!(config.save_interval(805), Some(81));
        assert_eq!(config.save_interval(3), Some(1));
        let never = TrainOptions { sample_every: Some(0), ..said() }.resolve().unwrap();
        assert_eq!((never.sample_interval(805), never.validation_interval(805, false)), (None, None));
        let measured = TrainOptions { validation: Some(0.1), ..said() }.resolve().unwrap();
        assert_eq!(measured.validation_interval(805, true), Some(81));
    }

    #[test]
    fn values_outside_their_range_are_refused() {
        let wrong = [
            TrainOptions { lr: Some(0.0), ..said() },
            TrainOptions { lr: Some(f64::NAN), ..said() },
            TrainOptions { caption_dropout: Some(1.5), ..said() },
            TrainOptions { ema: Some(1.0), ..said() },
            TrainOptions { steps: Some(0), ..said() },
            TrainOptions { steps: Some(9), epochs: Some(1.0), ..said() },
            TrainOptions { resolution: Some(4), ..said() },
            TrainOptions { name: Some("../x".into()), ..said() },
            TrainOptions { alpha: Some(f64::INFINITY), ..said() },
            TrainOptions { lora_plus: Some(0.0), ..said() },
            TrainOptions { lora_plus: Some(16.0), optimizer: Some(Optimizer::Prodigy), ..said() },
            TrainOptions { lora_plus: Some(16.0), method: Some(Method::Lokr), ..said() },
            TrainOptions { neftune: Some(-5.0), ..said() },
            TrainOptions { validation: Some(1.0), ..said() },
        ];
        for options in wrong {
            assert!(options.clone().resolve().is_err(), "{options:?}");
        }
    }
}
