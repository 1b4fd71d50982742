//! Named sets of defaults for training.

use std::num::NonZero;

use clap::ValueEnum;
use lora_core::Init;
use serde::{Deserialize, Serialize};

use super::{
    TrainOptions,
    values::{Format, Optimizer, Sampler, Schedule, Warmup},
};

/// A set of defaults that a run starts from; whatever is said elsewhere overrides it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Preset {
    /// Attention and feed-forward, gentle rate, cosine: a style or subject from 20 to 50 pictures.
    #[default]
    Balanced,
    /// All linear layers of a language model, three passes over the data.
    Language,
    /// Attention alone, high rate, 300 steps: the bundled tiny language model learns new facts in a minute.
    DemoText,
    /// Attention and feed-forward, high rate, 800 steps: the demo's tiny base learns a style in minutes.
    DemoStyle,
}

impl Preset {
    /// The options that the preset sets.
    pub fn options(self) -> TrainOptions {
        match self {
            // What OneTrainer, sd-scripts and diffusers recommend for Stable Diffusion 1.5, brought to alpha = rank.
            Self::Balanced => TrainOptions {
                rank: NonZero::new(16),
                targets: Some(vec!["attention+ff".into()]),
                optimizer: Some(Optimizer::Adamw),
                lr: Some(1e-4),
                weight_decay: Some(0.01),
                schedule: Some(Schedule::Cosine),
                warmup: Some(Warmup::Share(0.05)),
                clip: Some(1.0),
                batch: NonZero::new(4),
                flip: Some(true),
                caption_dropout: Some(0.05),
                min_snr: Some(5.0),
                noise_offset: Some(0.0),
                ..TrainOptions::default()
            },
            // Rank, rate and targets of the QLoRA paper (Dettmers et al. 2023, arXiv 2305.14314, appendix B) as peft's and
            // axolotl's examples have settled on them. A normal start, as in diffusers' scripts, learns faster at the same
            // rate and was no worse in any setting that was tried (benches/README.md).
            Self::Language => TrainOptions {
                rank: NonZero::new(16),
                init: Some(Init::Gaussian),
                targets: Some(vec!["linear".into()]),
                optimizer: Some(Optimizer::Adamw),
                lr: Some(2e-4),
                weight_decay: Some(0.0),
                schedule: Some(Schedule::Cosine),
                warmup: Some(Warmup::Share(0.03)),
                clip: Some(1.0),
                epochs: Some(3.0),
                batch: NonZero::new(4),
                format: Some(Format::Peft),
                ..TrainOptions::default()
            },
            // Measured on the bundled model with new facts and with pirate speech, five seeds each.
            Self::DemoText => TrainOptions {
                rank: NonZero::new(8),
                alpha: Some(16.0),
                targets: Some(vec!["attention".into()]),
                lr: Some(2e-3),
                steps: Some(300),
                batch: NonZero::new(16),
                epochs: None,
                ..Self::Language.options()
            },
            // Measured on the demo's base with four styles: caption dropout, and low guidance when drawing, are what
            // keep the objects recognisable at this rate.
            Self::DemoStyle => TrainOptions {
                rank: NonZero::new(16),
                targets: Some(vec!["attention+ff".into()]),
                optimizer: Some(Optimizer::Adamw),
                lr: Some(2e-3),
                weight_decay: Some(0.01),
                schedule: Some(Schedule::Cosine),
                warmup: Some(Warmup::Steps(20)),
                clip: Some(1.0),
                steps: Some(800),
                batch: NonZero::new(4),
                flip: Some(false),
                caption_dropout: Some(0.15),
                min_snr: Some(0.0),
                noise_offset: Some(0.0),
                sampler: Some(Sampler::Ddim),
                sample_steps: NonZero::new(30),
                sample_guidance: Some(2.5),
                ..TrainOptions::default()
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_demo_is_what_its_scores_were_measured_with() {
        let options = Preset::DemoStyle.options();
        assert_eq!((options.lr, options.steps, options.caption_dropout), (Some(2e-3), Some(800), Some(0.15)));
        assert_eq!((options.sample_guidance, options.warmup), (Some(2.5), Some(Warmup::Steps(20))));
    }
}
