//! (IA)³: one factor per output row or input column (Liu et al. 2022, arXiv 2205.05638, §3.3), of LyCORIS and of peft.
//!
//! LyCORIS stores offsets `w` from 1: `W' = W ⊙ (1 + strength · w)`. peft stores the factors `l` themselves, multiplies
//! the bias with them too where they run over outputs, and its `scale` does nothing: any strength but 0 applies them whole.

use super::{Adapter, Axis, Layer, Part, shape};
use crate::{AdapterConfig, Backend, Draw, Result};

/// A vector that multiplies rows or columns.
#[derive(Debug, Clone)]
pub struct Ia3<T> {
    /// As many values as the axis is long, whatever unit axes are around them.
    pub vector: T,
    /// Which axis of the weight it runs along.
    pub axis: Axis,
    /// What its values are.
    pub kind: Ia3Kind,
}

/// What the stored values of an [`Ia3`] are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ia3Kind {
    /// Offsets from 1 (LyCORIS); the bias is left alone.
    Offset,
    /// The factors (peft); a bias is multiplied like its row.
    Factor,
}

impl<T> Ia3<T> {
    pub(super) fn map<U>(&self, change: &mut dyn FnMut(Part, &T) -> Result<U>) -> Result<Ia3<U>> {
        Ok(Ia3 { vector: change(Part::Ia3, &self.vector)?, axis: self.axis, kind: self.kind })
    }

    /// What the vector multiplies by at `strength`, minus 1.
    fn offset<B: Backend<Tensor = T>>(&self, on: &B, strength: f64) -> Result<T> {
        match self.kind {
            Ia3Kind::Offset => on.scale(&self.vector, strength),
            Ia3Kind::Factor => on.sub(&self.vector, &on.tensor(&[1.0], &[1])?),
        }
    }
}

impl<B: Backend> Adapter<B> for Ia3<B::Tensor> {
    /// Not trained here.
    fn init(_on: &B, _base: &B::Tensor, _config: &AdapterConfig, _draw: &mut Draw) -> Result<Self> {
        Err(super::init::not_trained("(IA)³"))
    }

    fn scale(&self) -> f64 {
        1.0
    }

    fn delta(&self, on: &B, base: &B::Tensor) -> Result<B::Tensor> {
        self.change(on, base, 1.0)
    }

    fn change(&self, on: &B, base: &B::Tensor, strength: f64) -> Result<B::Tensor> {
        on.mul(base, &self.axis.over_weight(on, &self.offset(on, strength)?, base)?)
    }

    fn bias_change(&self, on: &B, bias: Option<&B::Tensor>, strength: f64) -> Result<Option<B::Tensor>> {
        match (bias, self.axis, self.kind) {
            (Some(bias), Axis::Output, Ia3Kind::Factor) => {
                let offset = on.reshape(&self.offset(on, strength)?, &on.shape(bias))?;
                on.mul(bias, &offset).map(Some)
            }
            _ => Ok(None),
        }
    }

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
        let offset = shape::over_activations(on, &self.offset(on, strength)?, layer.geometry)?;
        match self.axis {
            Axis::Input => on.add(y, &layer.geometry.apply(on, &on.mul(x, &offset)?, layer.weight)?),
            Axis::Output => {
                let multiplied = match (layer.bias, self.kind) {
                    (Some(bias), Ia3Kind::Offset) => on.sub(y, &shape::over_activations(on, bias, layer.geometry)?)?,
                    _ => on.share(y)?,
                };
                on.add(y, &on.mul(&multiplied, &offset)?)
            }
        }
    }

    fn factors(&self) -> Vec<(Part, &B::Tensor)> {
        vec![(Part::Ia3, &self.vector)]
    }
}
