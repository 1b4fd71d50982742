//! AdamW as one fused libtorch call a learning rate (Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2).
//!
//! `aten::_fused_adamw_` reads learning rate, step, clipping divisor and the broken flag from the device, so that a step
//! neither waits nor passes over the gradient once more; `torch.optim.AdamW(fused=True)` calls the same kernel.

use tch::Tensor;

use super::{Rule, Update, scalar};
use crate::{
    Result,
    arena::Arena,
    dispatch::{Argument, call},
};

#[derive(Debug)]
pub(super) struct AdamW {
    betas: [f64; 2],
    eps: f64,
    weight_decay: f64,
    first: Tensor,
    second: Tensor,
    /// Steps that were applied; the bias corrections follow from it.
    steps: Tensor,
}

impl AdamW {
    pub(super) fn new(arena: &Arena, betas: [f64; 2], eps: f64, weight_decay: f64) -> Result<Self> {
        let steps = scalar(0.0, arena.device())?;
        Ok(Self { betas, eps, weight_decay, first: arena.zeros()?, second: arena.zeros()?, steps })
    }
}

impl Rule for AdamW {
    fn step(&mut self, update: &Update<'_>) -> Result<()> {
        // The kernel expects the number of this step, and leaves counting to its caller.
        let sound = update.broken.f_neg()?.f_add_scalar(1.0)?;
        let _ = self.steps.f_add_(&sound)?;
        for range in update.ranges() {
            let [parameters, gradient] = [range.of(update.parameters)?, range.of(update.gradient)?];
            let [first, second] = [range.of(&self.first)?, range.of(&self.second)?];
            call(
                c"aten::_fused_adamw_",
                c"tensor_lr",
                &[
                    Argument::Tensors(&[&parameters]),
                    Argument::Tensors(&[&gradient]),
                    Argument::Tensors(&[&first]),
                    Argument::Tensors(&[&second]),
                    Argument::Tensors(&[]), // maxima of the second moment: no AMSGrad
                    Argument::Tensors(&[&self.steps]),
                    Argument::Tensor(range.rate),
                    Argument::Number(self.betas[0]),
                    Argument::Number(self.betas[1]),
                    Argument::Number(self.weight_decay),
                    Argument::Number(self.eps),
                    Argument::Flag(false), // AMSGrad
                    Argument::Flag(false), // maximise
                    Argument::Optional(Some(update.divisor)),
                    Argument::Optional(Some(update.broken)),
                ],
            )?;
        }
        Ok(())
    }

    fn state(&self) -> Vec<(String, &Tensor)> {
        vec![("first".into(), &self.first), ("second".into(), &self.second), ("steps".into(), &self.steps)]
    }
}

#[cfg(test)]
mod tests {
    use crate::optimizer::{
        OptimizerConfig,
        testing::{Reference, check},
    };

    /// Algorithm 2 in 64 bits, written out per number.
    struct Formula {
        moments: Vec<[f64; 2]>,
        steps: i32,
    }

    impl Reference for Formula {
        fn step(&mut self, parameters: &mut [f64], gradient: &[f64], rates: &[f64]) {
            self.steps += 1;
            self.moments.resize(parameters.len(), [0.0; 2]);
            for (((parameter, g), rate), [m, v]) in
                parameters.iter_mut().zip(gradient).zip(rates).zip(&mut self.moments)
            {
                *m = 0.9 * *m + 0.1 * g;
                *v = 0.999 * *v + 0.001 * g * g;
                let m_hat = *m / (1.0 - 0.9_f64.powi(self.steps));
                let v_hat = *v / (1.0 - 0.999_f64.powi(self.steps));
                *parameter -= rate * (m_hat / (v_hat.sqrt() + 1e-8) + 0.01 * *parameter);
            }
        }
    }

    #[test]
    fn adamw_follows_its_formula() {
        check(OptimizerConfig::ADAMW, 1e-2, &mut Formula { moments: Vec::new(), steps: 0 });
    }
}
