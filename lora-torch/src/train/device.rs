//! What follows the gradient in a training step: accumulation, clipping, update, moving average.
//!
//! Everything that changes from step to step is a tensor that lives as long as the run: parameters, optimizer state, the
//! step counter with the tables that it indexes, and the numbers that are read back. So the whole step can be captured in
//! a CUDA graph, and nothing in it waits for the device.

use tch::{Device, Kind, Tensor};

use super::{TrainOptions, gradient::Gradient, trained::Trained};
use crate::{
    Result,
    arena::Arena,
    backend::copied,
    optimizer::{Rule, Update},
};

/// Which part of an accumulated step a micro-step is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Phase {
    /// The gradient starts anew.
    pub(super) first: bool,
    /// The update follows.
    pub(super) last: bool,
}

/// First scale of a half-precision loss; a broken step halves it. Peers start at 65536 and lose the first steps to it.
const FIRST_LOSS_SCALE: f64 = 4096.0;

/// What is read back after a step: loss, gradient norm before clipping, 1 if the step was broken.
pub(super) const READINGS: usize = 3;

#[derive(Debug)]
pub(super) struct DeviceState {
    pub(super) arena: Arena,
    pub(super) rule: Box<dyn Rule>,
    /// Moving average of the parameters, if there is one.
    pub(super) average: Option<Tensor>,
    /// [`READINGS`] numbers, written by each step.
    pub(super) readings: Tensor,
    /// `[1]`, whole: steps done.
    counter: Tensor,
    /// `[groups, steps]`: learning rates.
    rates: Tensor,
    /// `[steps]`: share of the new parameters in the moving average.
    average_shares: Tensor,
    /// Sum over micro-steps; there is none without accumulation.
    accumulated: Option<Accumulated>,
    /// What the loss is multiplied by before the backward pass, `[1]`; only for half precision, whose gradients underflow.
    pub(super) loss_scale: Option<Tensor>,
    micro_steps: f64,
    clip: Option<f64>,
}

#[derive(Debug)]
struct Accumulated {
    gradient: Tensor,
    loss: Tensor,
}

impl DeviceState {
    pub(super) fn new(arena: Arena, trained: &Trained, options: &TrainOptions) -> Result<Self> {
        let factors = &trained.factors;
        let _no_grad = tch::no_grad_guard();
        let device = arena.device();
        let float = (Kind::Float, device);
        // The fused kernel takes the rate in 64 bits on the CPU, and only in 32 bits elsewhere.
        let rate_kind = if device == Device::Cpu { Kind::Double } else { Kind::Float };
        let table = options.schedule.table(options.steps);
        let rates: Vec<f64> =
            factors.iter().flat_map(|factor| table.iter().map(move |value| value * factor * options.rate)).collect();
        let rates = Tensor::f_from_slice(&rates)?.f_view([factors.len() as i64, -1])?;
        let shares: Vec<f64> = (0..options.steps).map(|step| 1.0 - average_decay(options.ema, step)).collect();
        let accumulated = if options.accumulation > 1 {
            Some(Accumulated { gradient: arena.zeros()?, loss: Tensor::f_zeros([1], float)? })
        } else {
            None
        };
        Ok(Self {
            rule: options.optimizer.build(&arena)?,
            average: if options.ema.is_some() { Some(copied(&arena.values()?)?) } else { None },
            readings: Tensor::f_zeros([READINGS as i64], float)?,
            counter: Tensor::f_zeros([1], (Kind::Int64, device))?,
            rates: rates.f_to_device(device)?.f_to_kind(rate_kind)?,
            average_shares: Tensor::f_from_slice(&shares)?.f_to_device(device)?.f_to_kind(Kind::Float)?,
            loss_scale: if trained.kind() == Kind::Half {
                Some(Tensor::f_full([1], FIRST_LOSS_SCALE, float)?)
            } else {
                None
            },
            accumulated,
            micro_steps: options.accumulation as f64,
            clip: options.clip,
            arena,
        })
    }

    /// Takes a micro-step's gradient, and does everything that its phase asks for.
    pub(super) fn take(&mut self, Gradient { gradient, loss }: Gradient, phase: Phase) -> Result<()> {
        let _no_grad = tch::no_grad_guard();
        let Some(sum) = &mut self.accumulated else {
            return self.update(&gradient, &loss);
        };
        for (target, value) in [(&mut sum.gradient, gradient), (&mut sum.loss, loss)] {
            let share = value.f_div_scalar(self.micro_steps)?;
            if phase.first {
                target.f_copy_(&share)?;
            } else {
                let _ = target.f_add_(&share)?;
            }
        }
        if phase.last {
            let (gradient, loss) = (sum.gradient.shallow_clone(), sum.loss.shallow_clone());
            self.update(&gradient, &loss)?;
        }
        Ok(())
    }

    fn update(&mut self, gradient: &Tensor, loss: &Tensor) -> Result<()> {
        let norm = gradient.f_norm()?.f_view([1])?;
        let divisor = match self.clip {
            // As `torch.nn.utils.clip_grad_norm_`: g · min(1, limit / (norm + 1e-6)).
            Some(limit) => norm.f_add_scalar(1e-6)?.f_div_scalar(limit)?.f_clamp_min(1.0)?,
            None => norm.f_ones_like()?,
        };
        let broken = norm.f_add(loss)?.f_isfinite()?.f_logical_not()?.f_to_kind(Kind::Float)?;
        self.readings.f_copy_(&Tensor::f_cat(&[loss, &norm, &broken], 0)?)?;

        let rates = self.rates.f_index_select(1, &self.counter)?; // [groups, 1]
        let parameters = self.arena.values()?;
        self.rule.step(&Update {
            parameters: &parameters,
            gradient,
            groups: self.arena.groups(),
            rates: &rates.f_unbind(0)?,
            divisor: &divisor,
            broken: &broken,
        })?;
        if let Some(average) = &mut self.average {
            let share = self.average_shares.f_index_select(0, &self.counter)?;
            let _ = average.f_lerp_tensor_(&parameters, &share)?;
        }
        if let Some(scale) = &mut self.loss_scale {
            let _ = scale.f_mul_(&broken.f_mul_scalar(-0.5)?.f_add_scalar(1.0)?)?;
        }
        let _ = self.counter.f_add_scalar_(1)?;
        Ok(())
    }

    /// The mean gradient of the last step's micro-steps, where there are several.
    #[cfg(test)]
    pub(super) fn accumulated(&self) -> Option<Tensor> {
        self.accumulated.as_ref().map(|sum| sum.gradient.shallow_clone())
    }

    /// Sets the number of steps done.
    pub(super) fn set_counter(&mut self, step: u64) -> Result<()> {
        let _ = self.counter.f_fill_(step as i64)?;
        Ok(())
    }
}

/// Decay of the moving average in step `step`, warmed up as diffusers' `EMAModel` does it: none at first, then
/// `min(decay, (1 + t) / (10 + t))`.
fn average_decay(decay: Option<f64>, step: u64) -> f64 {
    let Some(decay) = decay else { return 0.0 };
    let step = step as f64;
    if step == 0.0 { 0.0 } else { decay.min((1.0 + step) / (10.0 + step)) }
}
