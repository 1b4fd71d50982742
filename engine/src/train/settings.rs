//! What a run's options mean to the trainer, and which of them make a run the run that it is.

use std::collections::BTreeMap;

use lora_cli::{
    Failure,
    options::{
        CHANGEABLE, TrainConfig,
        values::{Optimizer, Schedule},
    },
};
use lora_torch::{
    TrainOptions,
    optimizer::OptimizerConfig,
    schedule::{self, Decay},
};
use serde_json::Value;

use super::Facts;
use crate::failures::Explain as _;

/// What the trainer is told, in a run of so many steps.
///
/// # Errors
/// If no adapter can have such settings.
pub(super) fn train_options(config: &TrainConfig, steps: u64) -> Result<TrainOptions, Failure> {
    let weight_decay = config.weight_decay;
    let optimizer = match config.optimizer {
        Optimizer::Adamw => OptimizerConfig::AdamW { betas: [0.9, 0.999], eps: 1e-8, weight_decay },
        Optimizer::Lion => OptimizerConfig::Lion { betas: [0.9, 0.99], weight_decay },
        Optimizer::Adafactor => OptimizerConfig::Adafactor {
            decay_exponent: -0.8,
            clip_threshold: 1.0,
            scale_parameter: false,
            weight_decay,
        },
        Optimizer::Prodigy => OptimizerConfig::Prodigy {
            betas: [0.9, 0.999],
            eps: 1e-8,
            weight_decay,
            first_estimate: 1e-6,
            coefficient: 1.0,
            bias_correction: true,
            safeguard_warmup: true,
        },
        Optimizer::Sgd => OptimizerConfig::Sgd { momentum: 0.9, nesterov: false, weight_decay },
    };
    let decay = match config.schedule {
        Schedule::Constant => Decay::Constant,
        Schedule::Linear => Decay::Linear,
        Schedule::Cosine => Decay::Cosine,
        Schedule::CosineRestarts => Decay::Restarts { cycles: config.cycles.get() as u32 },
        Schedule::Polynomial => Decay::Polynomial { power: config.power, end: 0.0 },
    };
    Ok(TrainOptions {
        seed: config.seed,
        steps,
        accumulation: config.accum.get() as u64,
        adapter: config.adapter().explain()?,
        optimizer,
        rate: config.lr,
        up_rate: config.lora_plus,
        schedule: schedule::Schedule { decay, warmup: config.warmup.steps(steps) },
        clip: (config.clip > 0.0).then_some(config.clip),
        ema: (config.ema > 0.0).then_some(config.ema),
        graphs: true,
    })
}

/// What a checkpoint must have in common with the run that goes on from it.
///
/// Options that change nothing about the numbers may differ: where things are written, how often, what is drawn.
///
/// # Errors
/// If an option cannot be written down.
pub(super) fn identity(config: &TrainConfig, facts: &Facts) -> Result<BTreeMap<String, String>, Failure> {
    // Where things lie and how they are written; base and data go in by content, seed and optimizer by the trainer.
    const ELSEWHERE: [&str; 10] =
        ["data", "base", "name", "preset", "format", "private", "no-metadata", "device", "seed", "optimizer"];
    let value = serde_json::to_value(config).map_err(|error| Failure::from_error("options", &error))?;
    let Value::Object(options) = value else { return Ok(BTreeMap::new()) };
    let mut identity: BTreeMap<String, String> = options
        .into_iter()
        .filter(|(key, value)| {
            !CHANGEABLE.contains(&key.as_str()) && !ELSEWHERE.contains(&key.as_str()) && !value.is_null()
        })
        .map(|(key, value)| (key, value.to_string()))
        .collect();
    identity.insert("data".to_owned(), facts.data_hash.clone());
    identity.insert("base".to_owned(), facts.base_hash.clone());
    Ok(identity)
}
