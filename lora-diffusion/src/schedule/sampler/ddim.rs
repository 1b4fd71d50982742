//! DDIM without noise (Song et al. 2020, arXiv 2010.02502, eq. 12 with η = 0).

use tch::Tensor;

use super::{Plan, Solver, combine, ladder, refuse_pure_noise};
use crate::{
    Result,
    schedule::{Prediction, ScheduleConfig, Spacing},
};

pub(super) fn plan(config: &ScheduleConfig, steps: usize) -> Result<(Plan, Box<dyn Solver>)> {
    let spacing = config.timestep_spacing.unwrap_or(Spacing::Leading);
    let timesteps = ladder::timesteps(config, spacing, steps, true);
    let alphas = config.alphas_cumprod();
    let last = if config.set_alpha_to_one.unwrap_or(true) { 1.0 } else { alphas[0] };
    let ratio = config.num_train_timesteps / steps;
    let at = |timestep: f64| alphas[(timestep as usize).min(alphas.len() - 1)];
    // The step always leads down by the same number of timesteps, whatever the spacing.
    let pairs: Vec<(f64, f64)> = timesteps
        .iter()
        .map(|&timestep| {
            let before = timestep - ratio as f64;
            (at(timestep), if before < 0.0 { last } else { at(before) })
        })
        .collect();
    refuse_pure_noise("ddim", config, pairs.iter().map(|pair| pair.0))?;
    let solver = Ddim { prediction: config.prediction_type, pairs };
    Ok((Plan { timesteps, sigmas: None, init_sigma: 1.0 }, Box::new(solver)))
}

#[derive(Debug)]
struct Ddim {
    prediction: Prediction,
    /// Cumulative alphas before and after each step.
    pairs: Vec<(f64, f64)>,
}

impl Solver for Ddim {
    fn step(&mut self, call: usize, x: &Tensor, output: &Tensor, _noise: Option<&Tensor>) -> Result<Tensor> {
        let (now, then) = self.pairs[call];
        let (alpha, sigma) = (now.sqrt(), (1.0 - now).sqrt());
        let clean = self.prediction.clean(x, output, alpha, sigma)?;
        let noise = self.prediction.noise(x, output, alpha, sigma)?;
        combine([(then.sqrt(), &clean), ((1.0 - then).sqrt(), &noise)])
    }
}
