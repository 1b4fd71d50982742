//! Latent consistency sampling (Luo et al. 2023, arXiv 2310.04378, algorithm 3): a clean guess, then noise again.

use tch::Tensor;

use super::{Plan, Solver, combine, refuse_pure_noise};
use crate::{
    Error, Result,
    schedule::{Prediction, ScheduleConfig},
};

/// How strongly timesteps are stretched in the boundary condition; the value of the published models.
const TIMESTEP_SCALING: f64 = 10.0;
/// Deviation of the data that the boundary condition assumes, squared.
const DATA_VARIANCE: f64 = 0.25;

pub(super) fn plan(config: &ScheduleConfig, steps: usize) -> Result<(Plan, Box<dyn Solver>)> {
    let origin = config.original_inference_steps;
    if steps > origin {
        return Err(Error::Sampler {
            sampler: "lcm",
            reason: format!("{steps} steps asked for, expected 1 to {origin}"),
        });
    }
    // The timesteps that the model was distilled on, whatever the spacing says; from high to low.
    let ratio = config.num_train_timesteps / origin;
    let timesteps: Vec<usize> = (0..steps).map(|at| (origin - at * origin / steps) * ratio - 1).collect();
    let alphas = config.alphas_cumprod();
    let alphas: Vec<f64> = timesteps.iter().map(|timestep| alphas[*timestep]).collect();
    refuse_pure_noise("lcm", config, alphas.iter().copied())?;
    let timesteps: Vec<f64> = timesteps.into_iter().map(|timestep| timestep as f64).collect();
    let solver = Lcm { prediction: config.prediction_type, timesteps: timesteps.clone(), alphas };
    Ok((Plan { timesteps, sigmas: None, init_sigma: 1.0 }, Box::new(solver)))
}

#[derive(Debug)]
struct Lcm {
    prediction: Prediction,
    timesteps: Vec<f64>,
    alphas: Vec<f64>,
}

impl Solver for Lcm {
    fn takes_noise(&self, call: usize) -> bool {
        call + 1 < self.alphas.len()
    }

    fn step(&mut self, call: usize, x: &Tensor, output: &Tensor, noise: Option<&Tensor>) -> Result<Tensor> {
        let alpha = self.alphas[call];
        let clean = self.prediction.clean(x, output, alpha.sqrt(), (1.0 - alpha).sqrt())?;
        let scaled = self.timesteps[call] * TIMESTEP_SCALING;
        let below = scaled * scaled + DATA_VARIANCE;
        let clean = combine([(scaled / below.sqrt(), &clean), (DATA_VARIANCE / below, x)])?;
        match self.alphas.get(call + 1) {
            None => Ok(clean),
            Some(then) => match noise {
                Some(noise) => combine([(then.sqrt(), &clean), ((1.0 - then).sqrt(), noise)]),
                None => combine([(then.sqrt(), &clean)]),
            },
        }
    }
}
