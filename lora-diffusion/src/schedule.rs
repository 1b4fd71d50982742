//! How noise is added in training and taken away in sampling; coefficients are computed in f64.
//!
//! | module | holds |
//! |---|---|
//! | [`training`] | noisy latents, targets and loss weights |
//! | [`sampler`] | the samplers: DDIM, Euler, Euler ancestral, DPM++ 2M, PNDM, LCM, UniPC |
//!
//! Notation: `a` is the cumulative alpha of a timestep (`ᾱ` in Ho et al. 2020, arXiv 2006.11239, eq. 4), so that a noisy
//! latent is `√a · latent + √(1-a) · noise`. Field names and defaults are those of diffusers' scheduler configurations.

pub mod sampler;
pub mod training;

use std::{fs, path::Path};

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// How `β` grows with the timestep.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BetaSchedule {
    /// In equal steps.
    Linear,
    /// `√β` in equal steps: Stable Diffusion.
    ScaledLinear,
    /// From a squared cosine (Nichol and Dhariwal 2021, arXiv 2102.09672, eq. 17).
    #[serde(rename = "squaredcos_cap_v2")]
    SquaredCosine,
}

/// What the network predicts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Prediction {
    /// The noise.
    #[serde(rename = "epsilon")]
    Epsilon,
    /// The velocity `√a · noise - √(1-a) · latent` (Salimans and Ho 2022, arXiv 2202.00512, appendix D).
    #[serde(rename = "v_prediction", alias = "v")]
    V,
}

/// Which of the training timesteps a sampler visits (Lin et al. 2023, arXiv 2305.08891, table 2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Spacing {
    /// From 0 to the last in equal steps, both ends included.
    Linspace,
    /// Multiples of a whole number, from 0 on.
    Leading,
    /// From the last downwards.
    Trailing,
}

/// A noise schedule as a diffusers `scheduler_config.json` describes it.
///
/// Options that only concern pixel models (`clip_sample`, `thresholding`) are not read: latents are never clipped.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ScheduleConfig {
    /// The sampler that the base was published with.
    #[serde(rename = "_class_name", skip_serializing_if = "Option::is_none")]
    pub class_name: Option<String>,
    /// Number of training timesteps.
    pub num_train_timesteps: usize,
    /// `β` of timestep 0.
    pub beta_start: f64,
    /// `β` of the last timestep.
    pub beta_end: f64,
    /// How `β` grows between the two.
    pub beta_schedule: BetaSchedule,
    /// All `β` written out, instead of the three above.
    pub trained_betas: Option<Vec<f64>>,
    /// What the network predicts.
    pub prediction_type: Prediction,
    /// Which timesteps are visited; where it is not said, each sampler has its own default.
    pub timestep_spacing: Option<Spacing>,
    /// What [`Spacing::Leading`] adds to every timestep.
    pub steps_offset: usize,
    /// Whether `a` is 1 before timestep 0, or that of timestep 0; where it is not said, each sampler has its own default.
    pub set_alpha_to_one: Option<bool>,
    /// Whether the schedule is stretched so that nothing of the latent is left at the last timestep.
    pub rescale_betas_zero_snr: bool,
    /// Whether samplers over sigmas space them by Karras et al. 2022 (arXiv 2206.00364, eq. 5).
    pub use_karras_sigmas: bool,
    /// LCM: from how many timesteps it was distilled.
    pub original_inference_steps: usize,
}

impl Default for ScheduleConfig {
    /// What diffusers takes where a configuration is silent.
    fn default() -> Self {
        Self {
            class_name: None,
            num_train_timesteps: 1000,
            beta_start: 0.0001,
            beta_end: 0.02,
            beta_schedule: BetaSchedule::Linear,
            trained_betas: None,
            prediction_type: Prediction::Epsilon,
            timestep_spacing: None,
            steps_offset: 0,
            set_alpha_to_one: None,
            rescale_betas_zero_snr: false,
            use_karras_sigmas: false,
            original_inference_steps: 50,
        }
    }
}

impl ScheduleConfig {
    /// Stable Diffusion's schedule: 1.5, 2.1 and XL share it, only the prediction differs.
    pub fn stable_diffusion(prediction: Prediction) -> Self {
        Self {
            beta_start: 0.00085,
            beta_end: 0.012,
            beta_schedule: BetaSchedule::ScaledLinear,
            prediction_type: prediction,
            timestep_spacing: Some(Spacing::Leading),
            steps_offset: 1,
            set_alpha_to_one: Some(false),
            ..Self::default()
        }
    }

    /// Reads a `scheduler_config.json`.
    ///
    /// # Errors
    /// If the file cannot be read, or holds something that is not such a configuration.
    pub fn open(path: &Path) -> Result<Self> {
        let text = fs::read(path).map_err(|source| Error::Read { path: path.into(), source })?;
        let config: Self = serde_json::from_slice(&text).map_err(|source| Error::Json { path: path.into(), source })?;
        config.check()?;
        Ok(config)
    }

    /// `a` of every training timestep, falling from nearly 1.
    ///
    /// `β`, `1-β` and the products are rounded to f32, as in diffusers: bases were trained with those numbers. It shows where
    /// little noise is added: at timestep 0 of the cosine schedule `1-a` is off by a thousandth.
    pub fn alphas_cumprod(&self) -> Vec<f64> {
        let mut product = 1.0;
        let alphas: Vec<f64> = self
            .betas()
            .into_iter()
            .map(|beta| {
                product *= f64::from(1.0 - beta as f32);
                f64::from(product as f32)
            })
            .collect();
        if self.rescale_betas_zero_snr { zero_terminal_snr(&alphas) } else { alphas }
    }

    fn betas(&self) -> Vec<f64> {
        let count = self.num_train_timesteps;
        if let Some(betas) = &self.trained_betas {
            return betas.clone();
        }
        match self.beta_schedule {
            BetaSchedule::Linear => linspace(self.beta_start, self.beta_end, count),
            BetaSchedule::ScaledLinear => linspace(self.beta_start.sqrt(), self.beta_end.sqrt(), count)
                .into_iter()
                .map(|root| root * root)
                .collect(),
            BetaSchedule::SquaredCosine => {
                // The divisions are real ones: an integer division here flattens the schedule.
                let bar = |at: usize| {
                    let share = at as f64 / count as f64;
                    ((share + 0.008) / 1.008 * std::f64::consts::FRAC_PI_2).cos().powi(2)
                };
                (0..count).map(|at| (1.0 - bar(at + 1) / bar(at)).min(0.999)).collect()
            }
        }
    }

    fn check(&self) -> Result<()> {
        let wrong = |option, reason: String| Err(Error::Config { component: "scheduler", option, reason });
        if self.num_train_timesteps < 2 {
            return wrong("num_train_timesteps", format!("is {}, expected at least 2", self.num_train_timesteps));
        }
        if let Some(betas) = &self.trained_betas
            && betas.len() != self.num_train_timesteps
        {
            return wrong(
                "trained_betas",
                format!("has {} values for {} timesteps", betas.len(), self.num_train_timesteps),
            );
        }
        if self.betas().iter().any(|beta| !(0.0..1.0).contains(beta)) {
            return wrong("beta_start", "and `beta_end` must lie in 0..1".into());
        }
        Ok(())
    }
}

/// Shifts and stretches `√a` so that the last is 0 and the first stays (Lin et al. 2023, arXiv 2305.08891, algorithm 1).
fn zero_terminal_snr(alphas: &[f64]) -> Vec<f64> {
    let (Some(first), Some(last)) = (alphas.first(), alphas.last()) else { return Vec::new() };
    let (first, last) = (first.sqrt(), last.sqrt());
    alphas.iter().map(|alpha| ((alpha.sqrt() - last) * first / (first - last)).powi(2)).collect()
}

/// `count` numbers from `first` to `last`, both included.
fn linspace(first: f64, last: f64, count: usize) -> Vec<f64> {
    let step = if count > 1 { (last - first) / (count - 1) as f64 } else { 0.0 };
    (0..count).map(|at| if at + 1 == count && count > 1 { last } else { first + step * at as f64 }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_terminal_snr_keeps_the_first_alpha_and_empties_the_last() {
        let plain = ScheduleConfig::stable_diffusion(Prediction::V);
        let stretched = ScheduleConfig { rescale_betas_zero_snr: true, ..plain.clone() };
        let (plain, stretched) = (plain.alphas_cumprod(), stretched.alphas_cumprod());
        assert!((plain[0] - stretched[0]).abs() < 1e-12);
        assert_eq!(stretched[999], 0.0);
        assert!(plain[999] > 0.004);
    }

    #[test]
    fn a_published_configuration_is_read() {
        let text = r#"{"_class_name": "PNDMScheduler", "beta_end": 0.012, "beta_schedule": "scaled_linear",
            "beta_start": 0.00085, "skip_prk_steps": true, "set_alpha_to_one": false, "steps_offset": 1,
            "trained_betas": null, "clip_sample": false, "num_train_timesteps": 1000}"#;
        let config: ScheduleConfig = serde_json::from_str(text).unwrap();
        assert_eq!(config.timestep_spacing, None);
        assert_eq!(config.alphas_cumprod().len(), 1000);
        assert!((config.alphas_cumprod()[999] - 0.004_660).abs() < 1e-5);
    }

    #[test]
    fn betas_of_one_or_more_are_refused() {
        let config = ScheduleConfig { beta_end: 1.5, ..ScheduleConfig::default() };
        assert!(config.check().unwrap_err().to_string().contains("beta_start"));
    }
}
