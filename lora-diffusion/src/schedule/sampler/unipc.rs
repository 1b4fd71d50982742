//! UniPC of order 2 in the variant B₂(h) on clean latents (Zhao et al. 2023, arXiv 2302.04867, algorithms 1 and 2).
//!
//! Every call first corrects the latent that the call before predicted, then predicts the next one.

use tch::Tensor;

use super::{Plan, Solver, combine, dpm};
use crate::{
    Result,
    schedule::{Prediction, ScheduleConfig},
};

pub(super) fn plan(config: &ScheduleConfig, steps: usize) -> Result<(Plan, Box<dyn Solver>)> {
    let ladder = dpm::sigmas(config, steps, config.use_karras_sigmas);
    let solver =
        UniPc { prediction: config.prediction_type, sigmas: ladder.sigmas.clone(), points: Vec::new(), before: None };
    Ok((Plan { timesteps: ladder.timesteps, sigmas: Some(ladder.sigmas), init_sigma: 1.0 }, Box::new(solver)))
}

#[derive(Debug)]
struct UniPc {
    prediction: Prediction,
    sigmas: Vec<f64>,
    /// Clean latents of the last two calls, the newest last.
    points: Vec<Tensor>,
    /// The latent that the last prediction started from.
    before: Option<Tensor>,
}

impl UniPc {
    /// `λ = ln(alpha / sigma)` at a rung.
    fn lambda(&self, rung: usize) -> f64 {
        -self.sigmas[rung].ln()
    }

    /// Order of the prediction that follows a call: the first and the last are of first order.
    fn order(&self, call: usize) -> usize {
        (self.sigmas.len() - 1 - call).min(call + 1).min(2)
    }

    /// From rung `from` to the next one: the predictor, or with the clean latent found there the corrector.
    fn update(&self, x: &Tensor, from: usize, order: usize, found: Option<&Tensor>) -> Result<Tensor> {
        let (_, sigma) = dpm::shares(self.sigmas[from]);
        let (alpha_then, sigma_then) = dpm::shares(self.sigmas[from + 1]);
        let width = self.lambda(from + 1) - self.lambda(from); // h in the paper
        let phi = (-width).exp_m1();
        let [.., newest] = &self.points[..] else { return Ok(x.shallow_clone()) };
        let plain = combine([(sigma_then / sigma, x), (-alpha_then * phi, newest)])?;
        // Weights of the difference to the point before and of the difference to what was found.
        let (ratio, weights) = match (order, found) {
            (1, _) => (1.0, (0.0, 0.5)),
            _ => {
                let ratio = (self.lambda(from - 1) - self.lambda(from)) / width;
                let weights = match found {
                    None => (0.5, 0.0),
                    Some(_) => {
                        // The two conditions of order for ρ₁ and ρ₂: ρ₁ + ρ₂ and r·ρ₁ + ρ₂ are given.
                        let first = phi / -width - 1.0;
                        let second = first / -width - 0.5;
                        let (sum, tilted) = (first / phi, 2.0 * second / phi);
                        let earlier = (tilted - sum) / (ratio - 1.0);
                        (earlier, sum - earlier)
                    }
                };
                (ratio, weights)
            }
        };
        let mut result = plain;
        if order > 1
            && let [.., earlier, newest] = &self.points[..]
        {
            let factor = -alpha_then * phi * weights.0 / ratio;
            result = combine([(1.0, &result), (factor, earlier), (-factor, newest)])?;
        }
        if let Some(found) = found {
            let factor = -alpha_then * phi * weights.1;
            result = combine([(1.0, &result), (factor, found), (-factor, newest)])?;
        }
        Ok(result)
    }
}

impl Solver for UniPc {
    fn step(&mut self, call: usize, x: &Tensor, output: &Tensor, _noise: Option<&Tensor>) -> Result<Tensor> {
        let (alpha, sigma) = dpm::shares(self.sigmas[call]);
        let clean = self.prediction.clean(x, output, alpha, sigma)?;
        let x = match self.before.take() {
            Some(before) => self.update(&before, call - 1, self.order(call - 1), Some(&clean))?,
            None => x.shallow_clone(),
        };
        if self.points.len() == 2 {
            drop(self.points.remove(0));
        }
        self.points.push(clean);
        let next = self.update(&x, call, self.order(call), None)?;
        self.before = Some(x);
        Ok(next)
    }
}
