//! DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2), its first and last step of first order.

use tch::Tensor;

use super::{Plan, Solver, combine, ladder};
use crate::{
    Result,
    schedule::{BetaSchedule, Prediction, ScheduleConfig, Spacing},
};

pub(super) fn plan(config: &ScheduleConfig, steps: usize, karras: bool) -> Result<(Plan, Box<dyn Solver>)> {
    let ladder = sigmas(config, steps, karras);
    let solver = DpmPp2m { prediction: config.prediction_type, sigmas: ladder.sigmas.clone(), previous: None };
    Ok((Plan { timesteps: ladder.timesteps, sigmas: Some(ladder.sigmas), init_sigma: 1.0 }, Box::new(solver)))
}

/// The ladder that multistep samplers share.
pub(super) fn sigmas(config: &ScheduleConfig, steps: usize, karras: bool) -> ladder::Ladder {
    let all = ladder::all_sigmas(config);
    if !karras {
        let spacing = config.timestep_spacing.unwrap_or(Spacing::Linspace);
        return ladder::plain(&all, ladder::multistep_timesteps(config, spacing, steps));
    }
    let mut sigmas = ladder::karras(all[all.len() - 1], all[0], steps);
    let timesteps = sigmas
        .iter()
        .map(|sigma| {
            let timestep = ladder::timestep_of(&all, *sigma);
            if config.beta_schedule == BetaSchedule::SquaredCosine {
                // The peer does not round here and then cuts: its 999 comes out as 998.99999 and becomes 998.
                (timestep - 1e-6).floor().max(0.0)
            } else {
                timestep.round_ties_even()
            }
        })
        .collect();
    sigmas.push(0.0);
    ladder::Ladder { timesteps, sigmas }
}

/// `(alpha, sigma)` of a latent whose clean part and noise have squares that sum to 1, from their ratio.
pub(super) fn shares(ratio: f64) -> (f64, f64) {
    let whole = ratio.hypot(1.0);
    (whole.recip(), ratio / whole)
}

#[derive(Debug)]
struct DpmPp2m {
    prediction: Prediction,
    sigmas: Vec<f64>,
    /// What the call before made of the clean latent.
    previous: Option<Tensor>,
}

impl Solver for DpmPp2m {
    fn step(&mut self, call: usize, x: &Tensor, output: &Tensor, _noise: Option<&Tensor>) -> Result<Tensor> {
        let (now, then) = (self.sigmas[call], self.sigmas[call + 1]);
        let (alpha, sigma) = shares(now);
        let clean = self.prediction.clean(x, output, alpha, sigma)?;
        let previous = self.previous.replace(clean.shallow_clone());
        if then == 0.0 {
            return Ok(clean);
        }
        let (alpha_then, sigma_then) = shares(then);
        let width = (now / then).ln(); // h in the paper: the step in λ = ln(alpha / sigma)
        let direction = match previous {
            Some(previous) => {
                let half_ratio = width / (2.0 * (self.sigmas[call - 1] / now).ln());
                combine([(1.0 + half_ratio, &clean), (-half_ratio, &previous)])?
            }
            None => clean,
        };
        combine([(sigma_then / sigma, x), (-alpha_then * (-width).exp_m1(), &direction)])
    }
}
