//! Full differences of a weight and a bias: `W' = W + strength · diff`, `b' = b + strength · diff_bias`.
//!
//! LyCORIS writes them for linear, convolutional and norm layers (`diff`, `diff_b`; `w_norm`, `b_norm`). There is no
//! rank and no alpha. A norm's weight `[channels]` merges like any other; only `forward` needs a linear layer or a
//! convolution.

use super::{Adapter, Part};
use crate::{AdapterConfig, Backend, Draw, Error, Result};

/// A difference as large as the weight itself.
#[derive(Debug, Clone)]
pub struct Full<T> {
    /// Difference of the weight, as many values as the weight; `None` leaves it alone.
    pub diff: Option<T>,
    /// Difference of the bias, `[out]`; `None` leaves it alone.
    pub diff_bias: Option<T>,
}

impl<T> Full<T> {
    pub(super) fn map<U>(&self, change: &mut dyn FnMut(Part, &T) -> Result<U>) -> Result<Full<U>> {
        Ok(Full {
            diff: self.diff.as_ref().map(|diff| change(Part::Diff, diff)).transpose()?,
            diff_bias: self.diff_bias.as_ref().map(|diff| change(Part::DiffBias, diff)).transpose()?,
        })
    }
}

impl<B: Backend> Adapter<B> for Full<B::Tensor> {
    /// A difference of zero for the weight alone; `config` has no say.
    fn init(on: &B, base: &B::Tensor, _config: &AdapterConfig, _draw: &mut Draw) -> Result<Self> {
        let shape = on.shape(base);
        let zeros = vec![0.0; shape.iter().product()];
        Ok(Self { diff: Some(on.tensor(&zeros, &shape)?), diff_bias: None })
    }

    fn scale(&self) -> f64 {
        1.0
    }

    fn delta(&self, on: &B, base: &B::Tensor) -> Result<B::Tensor> {
        match &self.diff {
            Some(diff) => on.reshape(diff, &on.shape(base)),
            None => on.scale(base, 0.0),
        }
    }

    fn merge(&self, on: &B, base: &B::Tensor, strength: f64) -> Result<B::Tensor> {
        match &self.diff {
            Some(_) if strength != 0.0 => on.add(base, &self.change(on, base, strength)?),
            _ => on.share(base),
        }
    }

    fn bias_change(&self, on: &B, bias: Option<&B::Tensor>, strength: f64) -> Result<Option<B::Tensor>> {
        let Some(diff) = &self.diff_bias else {
            return Ok(None);
        };
        if let Some(bias) = bias.filter(|bias| on.shape(bias) != on.shape(diff)) {
            return Err(Error::Shapes {
                operation: "difference of a bias",
                shapes: vec![on.shape(bias), on.shape(diff)],
            });
        }
        on.scale(diff, strength).map(Some)
    }

    fn factors(&self) -> Vec<(Part, &B::Tensor)> {
        let diff = self.diff.iter().map(|diff| (Part::Diff, diff));
        diff.chain(self.diff_bias.iter().map(|diff| (Part::DiffBias, diff))).collect()
    }
}
