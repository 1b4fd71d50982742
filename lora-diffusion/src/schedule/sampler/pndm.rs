//! Pseudo linear multistep (Liu et al. 2022, arXiv 2202.09778, eq. 11 and 12), started without Runge-Kutta steps.
//!
//! One call more than steps: the second call repeats the first step with the mean of both outputs.

use std::collections::VecDeque;

use tch::Tensor;

use super::{Plan, Solver, combine, ladder, refuse_pure_noise};
use crate::{
    Result,
    schedule::{Prediction, ScheduleConfig, Spacing},
};

pub(super) fn plan(config: &ScheduleConfig, steps: usize) -> Result<(Plan, Box<dyn Solver>)> {
    let spacing = config.timestep_spacing.unwrap_or(Spacing::Leading);
    let mut timesteps = ladder::timesteps(config, spacing, steps, true);
    if steps > 1 {
        timesteps.insert(1, timesteps[1]);
    }
    let alphas = config.alphas_cumprod();
    let last = if config.set_alpha_to_one.unwrap_or(false) { 1.0 } else { alphas[0] };
    let ratio = (config.num_train_timesteps / steps) as f64;
    let at = |timestep: f64| match timestep {
        below if below < 0.0 => last,
        timestep => alphas[(timestep as usize).min(alphas.len() - 1)],
    };
    let pairs: Vec<(f64, f64)> = timesteps
        .iter()
        .enumerate()
        .map(|(call, &timestep)| {
            let from = if call == 1 { timestep + ratio } else { timestep };
            (at(from), at(from - ratio))
        })
        .collect();
    refuse_pure_noise("pndm", config, pairs.iter().map(|pair| pair.0))?;
    let solver = Pndm { prediction: config.prediction_type, pairs, outputs: VecDeque::new(), start: None };
    Ok((Plan { timesteps, sigmas: None, init_sigma: 1.0 }, Box::new(solver)))
}

#[derive(Debug)]
struct Pndm {
    prediction: Prediction,
    /// Cumulative alphas before and after each call's step.
    pairs: Vec<(f64, f64)>,
    /// Up to four outputs, the newest first.
    outputs: VecDeque<Tensor>,
    /// The latent of the first call, which the second starts from again.
    start: Option<Tensor>,
}

impl Solver for Pndm {
    fn step(&mut self, call: usize, x: &Tensor, output: &Tensor, _noise: Option<&Tensor>) -> Result<Tensor> {
        let mut x = x.shallow_clone();
        let mut slope = output.shallow_clone();
        if call == 1 {
            if let (Some(start), Some(first)) = (self.start.take(), self.outputs.front()) {
                slope = combine([(0.5, output), (0.5, first)])?;
                x = start;
            }
        } else {
            self.outputs.push_front(output.shallow_clone());
            self.outputs.truncate(4);
            let outputs: Vec<&Tensor> = self.outputs.iter().collect();
            match outputs[..] {
                [a, b] => slope = combine([(1.5, a), (-0.5, b)])?,
                [a, b, c] => slope = combine([(23.0 / 12.0, a), (-16.0 / 12.0, b), (5.0 / 12.0, c)])?,
                [a, b, c, d] => {
                    slope = combine([(55.0 / 24.0, a), (-59.0 / 24.0, b), (37.0 / 24.0, c), (-9.0 / 24.0, d)])?;
                }
                _ => self.start = Some(x.shallow_clone()),
            }
        }
        let (now, then) = self.pairs[call];
        let noise = self.prediction.noise(&x, &slope, now.sqrt(), (1.0 - now).sqrt())?;
        // Eq. 11, in the form that does not subtract nearly equal numbers.
        let below = now * (1.0 - then).sqrt() + (now * (1.0 - now) * then).sqrt();
        combine([((then / now).sqrt(), &x), (-(then - now) / below, &noise)])
    }
}
