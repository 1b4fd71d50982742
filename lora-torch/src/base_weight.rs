//! The base weight of a frozen layer, in full, in the 16 bits of its file, or in 4: the only place that knows which it is.
//!
//! It never takes part in gradients. What is in fewer bits than the layer computes with is made full for each use and let go
//! again, so that a model takes the memory of those bits and of one matrix.

use tch::{Kind, Tensor};

use crate::{
    Result,
    backward::with_slope,
    matvec::product,
    memory::{Numbers, floats_mut},
    nf4::Nf4,
};

/// The frozen numbers of a layer.
#[derive(Debug)]
pub enum BaseWeight {
    /// All of them, in the kind that the layer computes in.
    Full(Tensor),
    /// A matrix in 16 bits under a layer that computes in 32: the same numbers in half the memory.
    Narrow(Tensor),
    /// A matrix in 4 bits; each use says which kind it wants.
    Nf4(Nf4),
}

impl BaseWeight {
    /// `[out, in]` or `[out, in, kh, kw]`.
    pub fn shape(&self) -> Vec<i64> {
        match self {
            Self::Full(weight) | Self::Narrow(weight) => weight.size(),
            Self::Nf4(weight) => weight.shape().to_vec(),
        }
    }

    /// All numbers in `kind`: the tensor itself if it is that, else one of its own.
    ///
    /// # Errors
    /// If memory runs out.
    pub fn full(&self, kind: Kind) -> Result<Tensor> {
        match self {
            Self::Full(weight) | Self::Narrow(weight) => Ok(weight.f_to_kind(kind)?),
            Self::Nf4(weight) => weight.matrix(kind),
        }
    }

    /// The tensor that holds the numbers one by one, if there is one.
    pub fn stored(&self) -> Option<&Tensor> {
        match self {
            Self::Full(weight) | Self::Narrow(weight) => Some(weight),
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
            Self::Full(weight) | Self::Narrow(weight) => weight.numel() * weight.kind().elt_size_in_bytes(),
            Self::Nf4(weight) => weight.bytes(),
        }
    }

    /// The same tensors once more.
    pub fn share(&self) -> Self {
        match self {
            Self::Full(weight) => Self::Full(weight.shallow_clone()),
            Self::Narrow(weight) => Self::Narrow(weight.shallow_clone()),
            Self::Nf4(weight) => Self::Nf4(weight.share()),
        }
    }

    /// `x · Wᵀ + bias`, `x` `[rows, in]` → `[rows, out]`; differentiable in `x`.
    pub(crate) fn linear(&self, x: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        match self {
            Self::Full(weight) => Ok(x.f_linear(weight, bias)?),
            Self::Narrow(weight) => widened_linear(weight, x, bias),
            Self::Nf4(weight) => weight.linear(x, bias),
        }
    }

    /// The rows of a table at `ids`, `[..] → [.., width]`, in `kind`.
    pub(crate) fn rows(&self, ids: &Tensor, kind: Kind) -> Result<Tensor> {
        let table = match self {
            Self::Full(table) | Self::Narrow(table) => table,
            Self::Nf4(table) => &table.matrix(kind)?,
        };
        Ok(Tensor::f_embedding(table, ids, -1, false, false)?.f_to_kind(kind)?)
    }
}

/// The product with a matrix that is made full for it, in the backward pass once more.
fn widened_linear(weight: &Tensor, x: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    if let Some(y) = one_row(weight, x, bias)? {
        return Ok(y);
    }
    let kind = x.f_kind()?;
    let y = {
        let _no_grad = tch::no_grad_guard();
        x.f_linear(&weight.f_to_kind(kind)?, bias)?
    };
    let weight = weight.shallow_clone();
    with_slope(y, x, move |slope| Ok(slope.f_mm(&weight.f_to_kind(kind)?)?))
}

/// The same for a single row on the CPU that nobody asks a gradient of: nothing needs to be made full.
fn one_row(weight: &Tensor, x: &Tensor, bias: Option<&Tensor>) -> Result<Option<Tensor>> {
    let (&[1, _], &[out, _]) = (x.size().as_slice(), weight.size().as_slice()) else { return Ok(None) };
    if x.requires_grad() {
        return Ok(None);
    }
    let row = x.f_contiguous()?;
    let mut y = Tensor::f_empty([1, out], (Kind::Float, x.device()))?;
    let (Some(weight), Some(row)) = (Numbers::of(weight), Numbers::of(&row).and_then(Numbers::floats)) else {
        return Ok(None);
    };
    let Some(numbers) = floats_mut(&mut y) else { return Ok(None) };
    product(weight, row, numbers);
    Ok(Some(match bias {
        Some(bias) => y.f_add_(bias)?,
        None => y,
    }))
}

#[cfg(test)]
mod tests {
    use lora_core::{Draw, Purpose};

    use super::*;
    use crate::random;

    /// 32-bit sums of 40 terms of size 1 in another order.
    const TOLERANCE: f64 = 1e-5;

    fn drawn(sample: u32, shape: &[usize]) -> Tensor {
        random::normal(&mut Draw::new(1, Purpose::Init, 6, sample), shape).unwrap()
    }

    fn error(left: &Tensor, right: &Tensor) -> f64 {
        (left - right).abs().max().double_value(&[])
    }

    #[test]
    fn a_narrow_matrix_computes_as_its_numbers_in_full() {
        let bias = drawn(1, &[5]);
        for kind in [Kind::BFloat16, Kind::Half] {
            let narrow = drawn(0, &[5, 40]).to_kind(kind);
            let (full, narrow) = (BaseWeight::Full(narrow.to_kind(Kind::Float)), BaseWeight::Narrow(narrow));
            assert_eq!(2 * narrow.bytes(), full.bytes());
            for rows in [1, 3] {
                let outcome = |weight: &BaseWeight, asked: bool| {
                    let x = drawn(2, &[rows, 40]).f_set_requires_grad(asked).unwrap();
                    let y = weight.linear(&x, Some(&bias)).unwrap();
                    let slope = asked.then(|| {
                        let loss = y.f_square().unwrap().f_sum(Kind::Float).unwrap();
                        Tensor::f_run_backward(&[loss], &[&x], false, false).unwrap().remove(0)
                    });
                    (y.detach(), slope)
                };
                assert!(error(&outcome(&narrow, false).0, &outcome(&full, false).0) < TOLERANCE);
                let ((y, slope), (expected, expected_slope)) = (outcome(&narrow, true), outcome(&full, true));
                assert_eq!(y, expected);
                assert_eq!(slope.unwrap(), expected_slope.unwrap());
            }
            let ids = Tensor::from_slice(&[3i64, 0]);
            assert_eq!(narrow.rows(&ids, Kind::Float).unwrap(), full.rows(&ids, Kind::Float).unwrap());
        }
    }
}
