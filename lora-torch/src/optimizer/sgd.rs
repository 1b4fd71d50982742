//! Gradient descent with momentum, in the form of `torch.optim.SGD`: the decay joins the gradient, the learning rate
//! multiplies the momentum (Sutskever et al. 2013 have it inside; PyTorch's documentation notes the difference).

use tch::Tensor;

use super::{Rule, Update};
use crate::{Result, arena::Arena};

#[derive(Debug)]
pub(super) struct Sgd {
    momentum: f64,
    nesterov: bool,
    weight_decay: f64,
    velocity: Tensor,
}

impl Sgd {
    pub(super) fn new(arena: &Arena, momentum: f64, nesterov: bool, weight_decay: f64) -> Result<Self> {
        Ok(Self { momentum, nesterov, weight_decay, velocity: arena.zeros()? })
    }
}

impl Rule for Sgd {
    fn step(&mut self, update: &Update<'_>) -> Result<()> {
        let clipped = update.clipped()?;
        for range in update.ranges() {
            let parameters = range.of(update.parameters)?;
            let gradient = range.of(&clipped)?.f_add(&parameters.f_mul_scalar(self.weight_decay)?)?;
            let velocity = range.of(&self.velocity)?;
            let next = velocity.f_mul_scalar(self.momentum)?.f_add(&gradient)?;
            let direction =
                if self.nesterov { gradient.f_add(&next.f_mul_scalar(self.momentum)?)? } else { next.shallow_clone() };
            update.commit(&parameters, &parameters.f_sub(&direction.f_mul(range.rate)?)?)?;
            update.commit(&velocity, &next)?;
        }
        Ok(())
    }

    fn state(&self) -> Vec<(String, &Tensor)> {
        vec![("velocity".into(), &self.velocity)]
    }
}

#[cfg(test)]
mod tests {
    use crate::optimizer::{
        OptimizerConfig,
        testing::{Reference, check},
    };

    struct Formula {
        velocity: Vec<f64>,
        nesterov: bool,
    }

    impl Reference for Formula {
        fn step(&mut self, parameters: &mut [f64], gradient: &[f64], rates: &[f64]) {
            self.velocity.resize(parameters.len(), 0.0);
            for (((parameter, g), rate), v) in parameters.iter_mut().zip(gradient).zip(rates).zip(&mut self.velocity) {
                let g = g + 0.05 * *parameter;
                *v = 0.8 * *v + g;
                *parameter -= rate * if self.nesterov { g + 0.8 * *v } else { *v };
            }
        }
    }

    #[test]
    fn sgd_follows_its_formula_with_and_without_looking_ahead() {
        for nesterov in [false, true] {
            let config = OptimizerConfig::Sgd { momentum: 0.8, nesterov, weight_decay: 0.05 };
            check(config, 1e-2, &mut Formula { velocity: Vec::new(), nesterov });
        }
    }
}
