//! Euler and Euler ancestral over sigmas (Karras et al. 2022, arXiv 2206.00364, algorithm 2; Crowson's k-diffusion).
//!
//! The latent here is `clean + σ · noise`; the network is given `x / √(σ² + 1)`.

use tch::Tensor;

use super::{Plan, Solver, combine, ladder};
use crate::{
    Result,
    schedule::{Prediction, ScheduleConfig, Spacing},
};

pub(super) fn plan(config: &ScheduleConfig, steps: usize, ancestral: bool) -> Result<(Plan, Box<dyn Solver>)> {
    let spacing = config.timestep_spacing.unwrap_or(Spacing::Linspace);
    let all = ladder::all_sigmas(config);
    let mut ladder = ladder::plain(&all, ladder::timesteps(config, spacing, steps, false));
    if config.use_karras_sigmas && !ancestral {
        // Unlike DPM++, Euler spans its ladder between the first and the last of the chosen timesteps.
        let mut sigmas = ladder::karras(ladder.sigmas[0], ladder.sigmas[steps - 1], steps);
        ladder.timesteps = sigmas.iter().map(|sigma| ladder::timestep_of(&all, *sigma)).collect();
        sigmas.push(0.0);
        ladder.sigmas = sigmas;
    }
    let highest = ladder.sigmas[0];
    let init_sigma = if spacing == Spacing::Leading { highest.hypot(1.0) } else { highest };
    let solver = Euler { prediction: config.prediction_type, sigmas: ladder.sigmas.clone(), ancestral };
    Ok((Plan { timesteps: ladder.timesteps, sigmas: Some(ladder.sigmas), init_sigma }, Box::new(solver)))
}

#[derive(Debug)]
struct Euler {
    prediction: Prediction,
    sigmas: Vec<f64>,
    ancestral: bool,
}

impl Euler {
    /// To which sigma the step goes without noise, and how much noise follows.
    fn split(&self, call: usize) -> (f64, f64) {
        let (now, then) = (self.sigmas[call], self.sigmas[call + 1]);
        if !self.ancestral {
            return (then, 0.0);
        }
        let up = then * (now * now - then * then).max(0.0).sqrt() / now;
        ((then * then - up * up).max(0.0).sqrt(), up)
    }
}

impl Solver for Euler {
    fn takes_noise(&self, call: usize) -> bool {
        self.split(call).1 > 0.0
    }

    fn scale_input(&self, call: usize, x: &Tensor) -> Result<Tensor> {
        Ok(x.f_mul_scalar(self.sigmas[call].hypot(1.0).recip())?)
    }

    fn step(&mut self, call: usize, x: &Tensor, output: &Tensor, noise: Option<&Tensor>) -> Result<Tensor> {
        let sigma = self.sigmas[call];
        let (down, up) = self.split(call);
        // The slope (x - clean) / σ, with its terms collected.
        let slope = match self.prediction {
            Prediction::Epsilon => output.shallow_clone(),
            Prediction::V => {
                let square = sigma * sigma + 1.0;
                combine([(sigma / square, x), (square.sqrt().recip(), output)])?
            }
        };
        match noise {
            Some(noise) if up > 0.0 => combine([(1.0, x), (down - sigma, &slope), (up, noise)]),
            _ => combine([(1.0, x), (down - sigma, &slope)]),
        }
    }
}
