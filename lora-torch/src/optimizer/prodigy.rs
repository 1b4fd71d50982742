//! Prodigy: Adam that estimates the distance to the solution and from it the step size (Mishchenko and Defazio 2023,
//! arXiv 2306.06101, algorithm 4), in the form of the authors' `prodigyopt`.
//!
//! The estimate `d` is one for all groups. The whole update reads and writes it on the device.

use tch::{Kind, Tensor};

use super::{Rule, Update, scalar};
use crate::{Result, arena::Arena, backend::copied};

#[derive(Debug, Clone, Copy)]
pub(super) struct Settings {
    pub(super) betas: [f64; 2],
    pub(super) eps: f64,
    pub(super) weight_decay: f64,
    pub(super) first_estimate: f64,
    pub(super) coefficient: f64,
    pub(super) bias_correction: bool,
    pub(super) safeguard_warmup: bool,
}

#[derive(Debug)]
pub(super) struct Prodigy {
    settings: Settings,
    first: Tensor,
    second: Tensor,
    /// Weighted sum of gradients, `s` of the paper.
    sum: Tensor,
    /// Where the parameters started, `x₀`.
    start: Tensor,
    /// `d`, which never falls.
    estimate: Tensor,
    /// Running numerator of the estimate, `r`.
    numerator: Tensor,
    /// Steps that were applied.
    steps: Tensor,
}

impl Prodigy {
    pub(super) fn new(arena: &Arena, settings: Settings) -> Result<Self> {
        let device = arena.device();
        Ok(Self {
            first: arena.zeros()?,
            second: arena.zeros()?,
            sum: arena.zeros()?,
            start: copied(&arena.values()?)?,
            estimate: scalar(settings.first_estimate, device)?,
            numerator: scalar(0.0, device)?,
            steps: scalar(0.0, device)?,
            settings,
        })
    }

    /// `√(1 - β₂ᵗ) / (1 - β₁ᵗ)`, or 1.
    fn correction(&self, steps: &Tensor) -> Result<Tensor> {
        let Settings { betas, bias_correction, .. } = self.settings;
        if !bias_correction {
            return Ok(steps.f_ones_like()?);
        }
        let left = |beta: f64| -> Result<Tensor> {
            Ok(steps.f_mul_scalar(beta.ln())?.f_exp()?.f_neg()?.f_add_scalar(1.0)?) // 1 - βᵗ
        };
        Ok(left(betas[1])?.f_sqrt()?.f_div(&left(betas[0])?)?)
    }
}

impl Rule for Prodigy {
    fn step(&mut self, update: &Update<'_>) -> Result<()> {
        let Settings { betas, eps, weight_decay, first_estimate, coefficient, safeguard_warmup, .. } = self.settings;
        let root = betas[1].sqrt(); // decay rate of numerator and sum, β₃
        let gradient = update.clipped()?;
        let steps = self.steps.f_add_scalar(1.0)?;
        let correction = self.correction(&steps)?;
        let estimate = copied(&self.estimate)?;
        let relative = estimate.f_div_scalar(first_estimate)?; // d/d₀, keeps the sums in range

        let mut numerator = self.numerator.f_mul_scalar(root)?;
        let mut moments = Vec::new();
        let mut magnitude = scalar(0.0, gradient.device())?;
        for range in update.ranges() {
            let [parameters, gradient] = [range.of(update.parameters)?, range.of(&gradient)?];
            let rate = range.rate.f_to_kind(Kind::Float)?.f_mul(&correction)?.f_mul(&estimate)?; // d·γ
            let weight = relative.f_mul(&rate)?;
            let travelled = range.of(&self.start)?.f_sub(&parameters)?;
            numerator = numerator.f_add(&gradient.f_dot(&travelled)?.f_mul(&weight)?)?;
            let scaled = gradient.f_mul(&estimate)?;
            let first = range.of(&self.first)?.f_lerp(&scaled, 1.0 - betas[0])?;
            let second = range.of(&self.second)?.f_lerp(&scaled.f_square()?, 1.0 - betas[1])?;
            let weight = if safeguard_warmup { relative.f_mul(&estimate)? } else { weight };
            let sum = range.of(&self.sum)?.f_mul_scalar(root)?.f_add(&gradient.f_mul(&weight)?)?;
            magnitude = magnitude.f_add(&sum.f_abs()?.f_sum(None)?)?;
            moments.push((rate, first, second, sum));
        }

        // Without any gradient so far (0/0) the estimate stays.
        let quotient = numerator.f_div(&magnitude)?.f_mul_scalar(coefficient)?.f_nan_to_num(0.0, 0.0, 0.0)?;
        let next_estimate = self.estimate.f_maximum(&quotient)?;
        for (range, (rate, first, second, sum)) in update.ranges().zip(&moments) {
            let parameters = range.of(update.parameters)?;
            let root = second.f_sqrt()?.f_add(&next_estimate.f_mul_scalar(eps)?)?;
            let change = first.f_div(&root)?.f_add(&parameters.f_mul_scalar(weight_decay)?)?.f_mul(rate)?;
            update.commit(&parameters, &parameters.f_sub(&change)?)?;
            update.commit(&range.of(&self.first)?, first)?;
            update.commit(&range.of(&self.second)?, second)?;
            update.commit(&range.of(&self.sum)?, sum)?;
        }
        update.commit(&self.estimate, &next_estimate)?;
        update.commit(&self.numerator, &numerator)?;
        update.commit(&self.steps, &steps)?;
        Ok(())
    }

    fn state(&self) -> Vec<(String, &Tensor)> {
        vec![
            ("first".into(), &self.first),
            ("second".into(), &self.second),
            ("sum".into(), &self.sum),
            ("start".into(), &self.start),
            ("estimate".into(), &self.estimate),
            ("numerator".into(), &self.numerator),
            ("steps".into(), &self.steps),
        ]
    }
}

#[cfg(test)]
mod tests {
    use crate::optimizer::{
        OptimizerConfig,
        testing::{Reference, check},
    };

    /// Algorithm 4 in 64 bits with the variable names of the paper.
    struct Formula {
        x0: Vec<f64>,
        m: Vec<f64>,
        v: Vec<f64>,
        s: Vec<f64>,
        r: f64,
        d: f64,
        d0: f64,
    }

    impl Reference for Formula {
        fn step(&mut self, x: &mut [f64], g: &[f64], rates: &[f64]) {
            if self.x0.is_empty() {
                (self.x0, self.m, self.v, self.s) =
                    (x.to_vec(), vec![0.0; x.len()], vec![0.0; x.len()], vec![0.0; x.len()]);
            }
            let beta3 = 0.999_f64.sqrt();
            let d = self.d;
            self.r *= beta3;
            for i in 0..x.len() {
                let dlr = d * rates[i];
                self.r += d / self.d0 * dlr * g[i] * (self.x0[i] - x[i]);
                self.m[i] = 0.9 * self.m[i] + 0.1 * d * g[i];
                self.v[i] = 0.999 * self.v[i] + 0.001 * (d * g[i]).powi(2);
                self.s[i] = beta3 * self.s[i] + d / self.d0 * dlr * g[i];
            }
            let d_hat = self.r / self.s.iter().map(|s| s.abs()).sum::<f64>();
            self.d = d.max(d_hat);
            for i in 0..x.len() {
                let dlr = d * rates[i];
                x[i] -= dlr * (self.m[i] / (self.v[i].sqrt() + self.d * 1e-8) + 0.02 * x[i]);
            }
        }
    }

    #[test]
    fn prodigy_follows_its_formula_and_its_estimate_grows() {
        let d0 = 1e-3; // large enough that the estimate moves within the test's steps
        let config = OptimizerConfig::Prodigy {
            betas: [0.9, 0.999],
            eps: 1e-8,
            weight_decay: 0.02,
            first_estimate: d0,
            coefficient: 1.0,
            bias_correction: false,
            safeguard_warmup: false,
        };
        let mut formula = Formula { x0: vec![], m: vec![], v: vec![], s: vec![], r: 0.0, d: d0, d0 };
        check(config, 1.0, &mut formula);
        assert!(formula.d > 1.5 * d0, "{}", formula.d);
    }
}
