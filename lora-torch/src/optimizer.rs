//! Update rules over the flat arena, one file each, free of host synchronisation.
//!
//! A rule sees one flat gradient, a learning rate per group and two scalars on the device: what the gradient is divided
//! by (clipping), and whether the step is broken (not finite), in which case nothing may change. All of it can be captured
//! in a CUDA graph. The state of a rule is a list of named tensors, so that checkpoints need not know the rule.

mod adafactor;
mod adamw;
mod lion;
mod prodigy;
mod sgd;

use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::{Result, arena::Arena, arena::Group};

/// Which rule, with its settings. Defaults are those of the peers that each rule names.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", tag = "name")]
pub enum OptimizerConfig {
    /// Adam with decoupled weight decay (Loshchilov and Hutter 2019, arXiv 1711.05101), as `torch.optim.AdamW`.
    AdamW {
        /// Decay rates of the first and the second moment.
        betas: [f64; 2],
        /// Added to the root of the second moment.
        eps: f64,
        /// Decoupled weight decay.
        weight_decay: f64,
    },
    /// The sign of an interpolated momentum (Chen et al. 2023, arXiv 2302.06675, algorithm 2).
    Lion {
        /// Interpolation of the update, decay rate of the momentum.
        betas: [f64; 2],
        /// Decoupled weight decay.
        weight_decay: f64,
    },
    /// Factored second moments (Shazeer and Stern 2018, arXiv 1804.04235), as `transformers.Adafactor` with an external
    /// learning rate (`relative_step=False`).
    Adafactor {
        /// Exponent of the second moment's decay rate `1 - tᵉ`.
        decay_exponent: f64,
        /// Root mean square above which an update is scaled down.
        clip_threshold: f64,
        /// Whether the learning rate is multiplied by the factor's root mean square.
        scale_parameter: bool,
        /// Decoupled weight decay.
        weight_decay: f64,
    },
    /// Adam that estimates its step size (Mishchenko and Defazio 2023, arXiv 2306.06101, algorithm 4), as `prodigyopt`;
    /// the learning rate is a factor on the estimate and is usually 1.
    Prodigy {
        /// Decay rates of the first and the second moment.
        betas: [f64; 2],
        /// Added to the root of the second moment, times the estimate.
        eps: f64,
        /// Decoupled weight decay.
        weight_decay: f64,
        /// First estimate of the step size.
        first_estimate: f64,
        /// Factor on the estimate.
        coefficient: f64,
        /// Whether Adam's bias correction is applied.
        bias_correction: bool,
        /// Whether warm-up steps are kept out of the estimate's denominator.
        safeguard_warmup: bool,
    },
    /// Gradient descent with momentum, as `torch.optim.SGD`.
    Sgd {
        /// Share of the last update that is kept.
        momentum: f64,
        /// Whether the gradient is looked up ahead (Nesterov).
        nesterov: bool,
        /// Weight decay, added to the gradient.
        weight_decay: f64,
    },
}

impl OptimizerConfig {
    /// AdamW with torch's defaults.
    pub const ADAMW: Self = Self::AdamW { betas: [0.9, 0.999], eps: 1e-8, weight_decay: 0.01 };
    /// Lion with its paper's defaults for language models' smaller siblings.
    pub const LION: Self = Self::Lion { betas: [0.9, 0.99], weight_decay: 0.0 };
    /// Adafactor as sd-scripts' users set it: external learning rate, no parameter scaling.
    pub const ADAFACTOR: Self =
        Self::Adafactor { decay_exponent: -0.8, clip_threshold: 1.0, scale_parameter: false, weight_decay: 0.0 };
    /// Prodigy with the defaults of `prodigyopt`.
    pub const PRODIGY: Self = Self::Prodigy {
        betas: [0.9, 0.999],
        eps: 1e-8,
        weight_decay: 0.0,
        first_estimate: 1e-6,
        coefficient: 1.0,
        bias_correction: false,
        safeguard_warmup: false,
    };
    /// Plain gradient descent.
    pub const SGD: Self = Self::Sgd { momentum: 0.0, nesterov: false, weight_decay: 0.0 };

    /// The learning rate that people start with.
    pub fn usual_rate(&self) -> f64 {
        match self {
            Self::AdamW { .. } => 1e-4,
            Self::Lion { .. } => 3e-5,
            Self::Adafactor { .. } => 1e-3,
            Self::Prodigy { .. } => 1.0,
            Self::Sgd { .. } => 1e-2,
        }
    }

    /// A rule with fresh state for the factors of `arena`.
    pub fn build(self, arena: &Arena) -> Result<Box<dyn Rule>> {
        Ok(match self {
            Self::AdamW { betas, eps, weight_decay } => Box::new(adamw::AdamW::new(arena, betas, eps, weight_decay)?),
            Self::Lion { betas, weight_decay } => Box::new(lion::Lion::new(arena, betas, weight_decay)?),
            Self::Adafactor { decay_exponent, clip_threshold, scale_parameter, weight_decay } => {
                let settings = adafactor::Settings { decay_exponent, clip_threshold, scale_parameter, weight_decay };
                Box::new(adafactor::Adafactor::new(arena, settings)?)
            }
            Self::Prodigy {
                betas,
                eps,
                weight_decay,
                first_estimate,
                coefficient,
                bias_correction,
                safeguard_warmup,
            } => {
                let settings = prodigy::Settings {
                    betas,
                    eps,
                    weight_decay,
                    first_estimate,
                    coefficient,
                    bias_correction,
                    safeguard_warmup,
                };
                Box::new(prodigy::Prodigy::new(arena, settings)?)
            }
            Self::Sgd { momentum, nesterov, weight_decay } => {
                Box::new(sgd::Sgd::new(arena, momentum, nesterov, weight_decay)?)
            }
        })
    }
}

/// An update rule with its state.
pub trait Rule: Send + std::fmt::Debug {
    /// Applies one step in place; grad mode is off.
    fn step(&mut self, update: &Update<'_>) -> Result<()>;

    /// Every tensor that the next step depends on, with a name that never changes. Writing to them restores the rule.
    fn state(&self) -> Vec<(String, &Tensor)>;
}

/// What one step works on.
#[derive(Debug)]
pub struct Update<'a> {
    /// Flat values, changed in place.
    pub parameters: &'a Tensor,
    /// Flat gradient.
    pub gradient: &'a Tensor,
    /// The ranges of the learning rates.
    pub groups: &'a [Group],
    /// One learning rate a group, scalars on the device: `Double` on the CPU, `Float` elsewhere.
    pub rates: &'a [Tensor],
    /// What the gradient is divided by, a 32-bit scalar that is at least 1.
    pub divisor: &'a Tensor,
    /// 1 if the step must not change anything, else 0; a 32-bit scalar.
    pub broken: &'a Tensor,
}

/// A range of the flat tensors with its learning rate.
struct Range<'a> {
    group: Group,
    rate: &'a Tensor,
}

impl Update<'_> {
    fn ranges(&self) -> impl Iterator<Item = Range<'_>> {
        self.groups.iter().zip(self.rates).map(|(group, rate)| Range { group: *group, rate })
    }

    /// The clipped gradient.
    fn clipped(&self) -> Result<Tensor> {
        Ok(self.gradient.f_div(self.divisor)?)
    }

    /// Writes `value` into `target` unless the step is broken.
    fn commit(&self, target: &Tensor, value: &Tensor) -> Result<()> {
        let sound = self.broken.f_eq(0.0)?;
        target.shallow_clone().f_copy_(&value.f_where_self(&sound, target)?)?;
        Ok(())
    }
}

impl Range<'_> {
    /// This range of a flat tensor, as a view.
    fn of(&self, flat: &Tensor) -> Result<Tensor> {
        Ok(flat.f_narrow(0, self.group.offset as i64, self.group.length as i64)?)
    }
}

/// A 32-bit scalar of a rule's state.
fn scalar(value: f64, device: Device) -> Result<Tensor> {
    Ok(Tensor::f_full([1], value, (Kind::Float, device))?)
}

#[cfg(test)]
mod testing;
