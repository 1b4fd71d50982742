//! DoRA: magnitude and direction apart, `dora(V) = g ⊙ V/‖V‖`, `V = W + ΔW` (Liu et al. 2024, arXiv 2402.09353, eq. 5).
//!
//! The direction may come from LoRA, LoHa or LoKr. `‖V‖` counts as a constant for gradients (§4.3), as in peft. Nothing is
//! added to the norm; LyCORIS adds the smallest step of its type, which is inside every tolerance. The result depends on
//! `W`: the order of adapters matters.

use super::{Adapter, Axis, Layer, Loha, Lokr, Lora, Part, shape};
use crate::{AdapterConfig, Backend, Draw, Method, Result};

/// Trained magnitudes over a low-rank direction.
#[derive(Debug, Clone)]
pub struct Dora<T> {
    /// What is added to the base weight before it is normed.
    pub direction: Direction<T>,
    /// `g`: as many values as the axis is long, whatever unit axes are around them.
    pub magnitude: T,
    /// The axis along which `g` runs; norms are taken over all others. Older LyCORIS files run along inputs.
    pub axis: Axis,
    /// What a strength other than 1 means.
    pub rule: StrengthRule,
}

/// The update that gives a [`Dora`] its direction.
#[derive(Debug, Clone)]
pub enum Direction<T> {
    /// The paper's.
    Lora(Lora<T>),
    /// LyCORIS' "doha".
    Loha(Loha<T>),
    /// LyCORIS' "dokr".
    Lokr(Lokr<T>),
}

/// What a strength other than 1 means for magnitudes; the peers disagree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StrengthRule {
    /// `W + strength · (dora(W + ΔW) − W)`: ComfyUI and A1111 on LyCORIS and kohya files.
    Interpolate,
    /// `dora(W + strength · ΔW)` with whole magnitudes: peft and diffusers. Strength 0 is still the untouched base.
    KeepMagnitudes,
}

impl StrengthRule {
    /// What multiplies ΔW inside the norm, and what multiplies the whole change.
    fn split(self, strength: f64) -> (f64, f64) {
        match self {
            Self::Interpolate => (1.0, strength),
            Self::KeepMagnitudes => (strength, 1.0),
        }
    }
}

impl<T> Dora<T> {
    pub(super) fn map<U>(&self, change: &mut dyn FnMut(Part, &T) -> Result<U>) -> Result<Dora<U>> {
        Ok(Dora {
            direction: match &self.direction {
                Direction::Lora(lora) => Direction::Lora(lora.map(change)?),
                Direction::Loha(loha) => Direction::Loha(loha.map(change)?),
                Direction::Lokr(lokr) => Direction::Lokr(lokr.map(change)?),
            },
            magnitude: change(Part::Magnitude, &self.magnitude)?,
            axis: self.axis,
            rule: self.rule,
        })
    }

    /// `g / ‖v‖` along the axis, shaped to stretch over the base weight; `norm` is cut off from gradients.
    fn factor<B: Backend<Tensor = T>>(&self, on: &B, norm: &T, base: &T) -> Result<T> {
        let norm = self.axis.over_weight(on, &on.detach(norm)?, base)?;
        on.div(&self.axis.over_weight(on, &self.magnitude, base)?, &norm)
    }
}

impl<B: Backend> Adapter<B> for Dora<B::Tensor> {
    /// LoRA's start under the base weight's own magnitudes, per output row.
    fn init(on: &B, base: &B::Tensor, config: &AdapterConfig, draw: &mut Draw) -> Result<Self> {
        let config = AdapterConfig { method: Method::Lora, ..config.clone() };
        Ok(Self {
            direction: Direction::Lora(Lora::init(on, base, &config, draw)?),
            magnitude: Axis::Output.norm(on, base)?,
            axis: Axis::Output,
            rule: StrengthRule::Interpolate,
        })
    }

    fn scale(&self) -> f64 {
        match &self.direction {
            Direction::Lora(lora) => lora.scale,
            Direction::Loha(loha) => loha.scale,
            Direction::Lokr(lokr) => lokr.scale,
        }
    }

    fn delta(&self, on: &B, base: &B::Tensor) -> Result<B::Tensor> {
        self.change(on, base, 1.0)
    }

    fn change(&self, on: &B, base: &B::Tensor, strength: f64) -> Result<B::Tensor> {
        let (inner, outer) = self.rule.split(strength);
        let delta = match &self.direction {
            Direction::Lora(lora) => lora.change(on, base, inner),
            Direction::Loha(loha) => loha.change(on, base, inner),
            Direction::Lokr(lokr) => lokr.change(on, base, inner),
        }?;
        let v = on.add(base, &delta)?;
        let factor = self.factor(on, &self.axis.norm(on, &v)?, base)?;
        on.scale(&on.sub(&on.mul(&v, &factor)?, base)?, outer)
    }

    fn bias_change(&self, on: &B, bias: Option<&B::Tensor>, strength: f64) -> Result<Option<B::Tensor>> {
        match &self.direction {
            Direction::Lora(lora) => lora.bias_change(on, bias, strength),
            Direction::Loha(_) | Direction::Lokr(_) => Ok(None),
        }
    }

    /// Over LoRA along outputs: `y + outer · (g/‖V‖ ⊙ V·x − W·x)` with `V·x = W·x + inner·scale·B·(A·x)` and `W·x` taken
    /// from `y`, so that neither ΔW nor `V` is formed.
    fn forward(
        &self,
        on: &B,
        layer: &Layer<'_, B::Tensor>,
        x: &B::Tensor,
        y: &B::Tensor,
        strength: f64,
    ) -> Result<B::Tensor> {
        if strength == 0.0 {
            return on.share(y);
        }
        let (inner, outer) = self.rule.split(strength);
        let lora = match (&self.direction, self.axis) {
            (Direction::Lora(lora), Axis::Output) if lora.mid.is_none() => lora,
            _ => return super::forward_through_change(self, on, layer, x, y, strength),
        };
        let factor = lora.row_factors(on, &self.magnitude, layer.weight, inner)?;
        let factor = shape::over_activations(on, &factor, layer.geometry)?;
        let bias = layer.bias.map(|bias| shape::over_activations(on, bias, layer.geometry)).transpose()?;
        let wx = match &bias {
            Some(bias) => on.sub(y, bias)?,
            None => on.share(y)?,
        };
        let vx = on.mul(&lora.products_onto(on, layer, x, &wx, inner)?, &factor)?;
        let output = match (outer == 1.0, &bias) {
            (true, Some(bias)) => on.add(&vx, bias)?,
            (true, None) => vx,
            (false, _) => on.add(y, &on.scale(&on.sub(&vx, &wx)?, outer)?)?,
        };
        match self.bias_change(on, layer.bias, strength)? {
            Some(change) => on.add(&output, &shape::over_activations(on, &change, layer.geometry)?),
            None => Ok(output),
        }
    }

    fn factors(&self) -> Vec<(Part, &B::Tensor)> {
        let mut factors = match &self.direction {
            Direction::Lora(lora) => Adapter::<B>::factors(lora),
            Direction::Loha(loha) => Adapter::<B>::factors(loha),
            Direction::Lokr(lokr) => Adapter::<B>::factors(lokr),
        };
        factors.push((Part::Magnitude, &self.magnitude));
        factors
    }
}
