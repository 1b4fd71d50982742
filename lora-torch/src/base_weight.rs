//! The base weight of a frozen layer, in full or in 4 bits: the only place that knows which it is.
//!
//! It never takes part in gradients. What is in 4 bits is made full for each use and let go again, so that a model takes the
//! memory of its 4 bits and of one matrix.

use tch::{Kind, Tensor};

use crate::{Result, nf4::Nf4};

/// The frozen numbers of a layer.
#[derive(Debug)]
pub enum BaseWeight {
    /// All of them, in the kind that the layer computes in.
    Full(Tensor),
    /// A matrix in 4 bits; each use says which kind it wants.
    Nf4(Nf4),
}

impl BaseWeight {
    /// `[out, in]` or `[out, in, kh, kw]`.
    pub fn shape(&self) -> Vec<i64> {
        match self {
            Self::Full(weight) => weight.size(),
            Self::Nf4(weight) => weight.shape().to_vec(),
        }
    }

    /// All numbers in `kind`: the tensor itself if it is that, else one of its own.
    ///
    /// # Errors
    /// If memory runs out.
    pub fn full(&self, kind: Kind) -> Result<Tensor> {
        match self {
            Self::Full(weight) => Ok(weight.f_to_kind(kind)?),
            Self::Nf4(weight) => weight.matrix(kind),
        }
    }

    /// The tensor that holds the numbers one by one, if there is one.
    pub fn stored(&self) -> Option<&Tensor> {
        match self {
            Self::Full(weight) => Some(weight),
            Self::Nf4(_) => None,
        }
    }

    /// Whether it is in fewer bits than it computes with.
    pub fn is_quantised(&self) -> bool {
        matches!(self, Self::Nf4(_))
    }

    /// Bytes that it takes.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Full(weight) => weight.numel() * weight.kind().elt_size_in_bytes(),
            Self::Nf4(weight) => weight.bytes(),
        }
    }

    /// The same tensors once more.
    pub fn share(&self) -> Self {
        match self {
            Self::Full(weight) => Self::Full(weight.shallow_clone()),
            Self::Nf4(weight) => Self::Nf4(weight.share()),
        }
    }

    /// `x · Wᵀ + bias`, `x` `[rows, in]` → `[rows, out]`; differentiable in `x`.
    pub(crate) fn linear(&self, x: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        match self {
            Self::Full(weight) => Ok(x.f_linear(weight, bias)?),
            Self::Nf4(weight) => weight.linear(x, bias),
        }
    }
}
