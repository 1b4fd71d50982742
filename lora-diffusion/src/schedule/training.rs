//! Training: noisy latents, targets and loss weights.
//!
//! All tables are made once, on the device, and are looked up by timestep there: nothing here waits for the device.

use tch::{Device, Kind, Tensor};

use super::{Prediction, ScheduleConfig};
use crate::Result;

/// How the loss of one timestep counts against that of another.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Weighting {
    /// All the same.
    Uniform,
    /// Hang et al. 2023 (arXiv 2303.09556): `min(snr, γ) / snr` for noise, `min(snr, γ) / (snr + 1)` for velocity.
    MinSnr(f64),
    /// Yu et al. 2023 (arXiv 2310.08442): `1 / √snr` for noise with `snr` at most 1000; `1 / (snr + 1)` for velocity.
    Debiased,
}

/// The signal-to-noise ratio `a / (1-a)` of a cumulative alpha.
pub fn snr(alpha: f64) -> f64 {
    alpha / (1.0 - alpha)
}

impl Weighting {
    /// The weight of the loss at a timestep with this signal-to-noise ratio.
    ///
    /// Where nothing of the latent is left, the limit: 1 for min-SNR on noise, and 0 for the debiased weight, which has none.
    pub fn of(self, snr: f64, prediction: Prediction) -> f64 {
        match (self, prediction) {
            (Self::Uniform, _) => 1.0,
            (Self::MinSnr(gamma), Prediction::Epsilon) => {
                if snr <= gamma {
                    1.0
                } else {
                    gamma / snr
                }
            }
            (Self::MinSnr(gamma), Prediction::V) => snr.min(gamma) / (snr + 1.0),
            (Self::Debiased, Prediction::Epsilon) => {
                if snr == 0.0 {
                    0.0
                } else {
                    snr.min(1000.0).sqrt().recip()
                }
            }
            (Self::Debiased, Prediction::V) => (snr + 1.0).recip(),
        }
    }
}

/// The tables of one schedule on one device.
#[derive(Debug)]
pub struct TrainingSchedule {
    /// What the network predicts.
    pub prediction: Prediction,
    alphas: Vec<f64>,
    /// `√a`, `[timesteps]`, f32.
    signal: Tensor,
    /// `√(1-a)`, `[timesteps]`, f32.
    noise: Tensor,
}

impl TrainingSchedule {
    /// Makes the tables.
    ///
    /// # Errors
    /// If the device has no room for them.
    pub fn new(config: &ScheduleConfig, device: Device) -> Result<Self> {
        let alphas = config.alphas_cumprod();
        let table = |value: fn(f64) -> f64| -> Result<Tensor> {
            let values: Vec<f32> = alphas.iter().map(|alpha| value(*alpha) as f32).collect();
            Ok(Tensor::f_from_slice(&values)?.f_to_device(device)?)
        };
        let signal = table(f64::sqrt)?;
        let noise = table(|alpha| (1.0 - alpha).sqrt())?;
        Ok(Self { prediction: config.prediction_type, alphas, signal, noise })
    }

    /// Number of timesteps.
    pub fn len(&self) -> usize {
        self.alphas.len()
    }

    /// Whether there is no timestep at all.
    pub fn is_empty(&self) -> bool {
        self.alphas.is_empty()
    }

    /// `a` of every timestep.
    pub fn alphas_cumprod(&self) -> &[f64] {
        &self.alphas
    }

    /// `√a · latents + √(1-a) · noise`: all `[b, c, h, w]`, `timesteps` `[b]` whole numbers.
    pub fn add_noise(&self, latents: &Tensor, noise: &Tensor, timesteps: &Tensor) -> Result<Tensor> {
        let (signal_share, noise_share) = self.shares(timesteps)?;
        Ok(latents.f_mul(&signal_share)?.f_addcmul(noise, &noise_share)?)
    }

    /// What the network should have said: the noise, or the velocity `√a · noise - √(1-a) · latents`.
    ///
    /// Shapes as in [`add_noise`](Self::add_noise).
    pub fn target(&self, latents: &Tensor, noise: &Tensor, timesteps: &Tensor) -> Result<Tensor> {
        match self.prediction {
            Prediction::Epsilon => Ok(noise.shallow_clone()),
            Prediction::V => {
                let (signal_share, noise_share) = self.shares(timesteps)?;
                Ok(noise.f_mul(&signal_share)?.f_sub(&latents.f_mul(&noise_share)?)?)
            }
        }
    }

    /// The loss weight of every timestep, `[timesteps]` f32 on the device; a batch takes its own with `index_select`.
    pub fn weights(&self, weighting: Weighting) -> Result<Tensor> {
        let weights: Vec<f32> =
            self.alphas.iter().map(|alpha| weighting.of(snr(*alpha), self.prediction) as f32).collect();
        Ok(Tensor::f_from_slice(&weights)?.f_to_device(self.signal.device())?)
    }

    /// `√a` and `√(1-a)` of each timestep, both `[b, 1, 1, 1]`.
    fn shares(&self, timesteps: &Tensor) -> Result<(Tensor, Tensor)> {
        let timesteps = timesteps.f_to_kind(Kind::Int64)?;
        let pick = |table: &Tensor| table.f_index_select(0, &timesteps)?.f_view([-1, 1, 1, 1]);
        Ok((pick(&self.signal)?, pick(&self.noise)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn min_snr_for_noise_caps_the_weight_at_one() {
        assert_eq!(Weighting::MinSnr(5.0).of(20.0, Prediction::Epsilon), 0.25);
        assert_eq!(Weighting::MinSnr(5.0).of(0.5, Prediction::Epsilon), 1.0);
        assert_eq!(Weighting::MinSnr(5.0).of(0.0, Prediction::Epsilon), 1.0);
    }

    #[test]
    fn min_snr_for_velocity_divides_by_one_more() {
        assert_eq!(Weighting::MinSnr(5.0).of(9.0, Prediction::V), 0.5);
        assert_eq!(Weighting::MinSnr(5.0).of(0.0, Prediction::V), 0.0);
    }
}
