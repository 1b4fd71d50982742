//! Lion: the sign of an interpolation between gradient and momentum (Chen et al. 2023, arXiv 2302.06675, algorithm 2).

use tch::Tensor;

use super::{Rule, Update};
use crate::{Result, arena::Arena};

#[derive(Debug)]
pub(super) struct Lion {
    betas: [f64; 2],
    weight_decay: f64,
    momentum: Tensor,
}

impl Lion {
    pub(super) fn new(arena: &Arena, betas: [f64; 2], weight_decay: f64) -> Result<Self> {
        Ok(Self { betas, weight_decay, momentum: arena.zeros()? })
    }
}

impl Rule for Lion {
    fn step(&mut self, update: &Update<'_>) -> Result<()> {
        let clipped = update.clipped()?;
        for range in update.ranges() {
            let [parameters, gradient] = [range.of(update.parameters)?, range.of(&clipped)?];
            let momentum = range.of(&self.momentum)?;
            let direction = momentum.f_lerp(&gradient, 1.0 - self.betas[0])?.f_sign()?;
            let change = direction.f_add(&parameters.f_mul_scalar(self.weight_decay)?)?.f_mul(range.rate)?;
            update.commit(&parameters, &parameters.f_sub(&change)?)?;
            update.commit(&momentum, &momentum.f_lerp(&gradient, 1.0 - self.betas[1])?)?;
        }
        Ok(())
    }

    fn state(&self) -> Vec<(String, &Tensor)> {
        vec![("momentum".into(), &self.momentum)]
    }
}

#[cfg(test)]
mod tests {
    use crate::optimizer::{
        OptimizerConfig,
        testing::{Reference, check},
    };

    struct Formula(Vec<f64>);

    impl Reference for Formula {
        fn step(&mut self, parameters: &mut [f64], gradient: &[f64], rates: &[f64]) {
            self.0.resize(parameters.len(), 0.0);
            for (((parameter, g), rate), m) in parameters.iter_mut().zip(gradient).zip(rates).zip(&mut self.0) {
                let c = 0.9 * *m + 0.1 * g;
                let sign = if c > 0.0 { 1.0 } else { -1.0 };
                *parameter -= rate * (sign + 0.1 * *parameter);
                *m = 0.99 * *m + 0.01 * g;
            }
        }
    }

    #[test]
    fn lion_follows_its_formula() {
        check(OptimizerConfig::Lion { betas: [0.9, 0.99], weight_decay: 0.1 }, 1e-3, &mut Formula(Vec::new()));
    }
}
