//! Foldings and products that several families share.

use super::Geometry;
use crate::{Backend, Error, Result};

/// One of the two axes of a weight that a vector can run along.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Axis {
    /// Axis 0 of `[out, in, ..]`: one value a row.
    Output,
    /// Axis 1: one value an input column (or channel).
    Input,
}

impl Axis {
    /// Where the axis stands in a weight.
    pub(super) fn index(self) -> usize {
        match self {
            Self::Output => 0,
            Self::Input => 1,
        }
    }

    /// `vector` shaped so that it stretches over a weight of as many axes as `base`: `[out, 1, ..]` or `[1, in, ..]`.
    pub(super) fn over_weight<B: Backend>(self, on: &B, vector: &B::Tensor, base: &B::Tensor) -> Result<B::Tensor> {
        let (shape, base) = (on.shape(vector), on.shape(base));
        let length: usize = shape.iter().product();
        if base.get(self.index()) != Some(&length) {
            return Err(Error::Shapes { operation: "vector over a weight", shapes: vec![shape, base] });
        }
        let mut over = vec![1; base.len()];
        over[self.index()] = length;
        on.reshape(vector, &over)
    }

    /// The norm of a weight along all other axes, which stay with length 1.
    pub(super) fn norm<B: Backend>(self, on: &B, weight: &B::Tensor) -> Result<B::Tensor> {
        let others: Vec<usize> = (0..on.shape(weight).len()).filter(|axis| *axis != self.index()).collect();
        on.norm(weight, &others)
    }
}

/// `[first, rest]`: every axis after the first folded into one.
pub(super) fn flat<B: Backend>(on: &B, tensor: &B::Tensor) -> Result<B::Tensor> {
    let shape = on.shape(tensor);
    match shape[..] {
        [_, _] => on.share(tensor),
        [first, ref rest @ ..] => on.reshape(tensor, &[first, rest.iter().product()]),
        [] => Err(Error::Shapes { operation: "flat", shapes: vec![shape] }),
    }
}

/// A change `[out, in·kh·kw]` in the layout of the weight.
pub(super) fn laid_as<B: Backend>(on: &B, change: B::Tensor, base: &B::Tensor) -> Result<B::Tensor> {
    let shape = on.shape(base);
    if on.shape(&change) == shape { Ok(change) } else { on.reshape(&change, &shape) }
}

/// A down factor as the kernel of a convolution: matrices of a 1×1 layer get their two unit axes.
pub(super) fn as_kernel<B: Backend>(on: &B, down: &B::Tensor, base: &B::Tensor) -> Result<B::Tensor> {
    let (shape, base) = (on.shape(down), on.shape(base));
    match (&shape[..], &base[..]) {
        ([_, _, _, _], _) => on.share(down),
        ([rank, width], [_, channels, kh, kw]) if *width == channels * kh * kw => {
            on.reshape(down, &[*rank, *channels, *kh, *kw])
        }
        _ => Err(Error::Shapes { operation: "down factor of a convolution", shapes: vec![shape, base] }),
    }
}

/// An up factor as the kernel of a 1×1 convolution, `[out, rank, 1, 1]`.
pub(super) fn as_point<B: Backend>(on: &B, up: &B::Tensor) -> Result<B::Tensor> {
    let shape = on.shape(up);
    match shape[..] {
        [_, _, 1, 1] => on.share(up),
        [out, rank] => on.reshape(up, &[out, rank, 1, 1]),
        _ => Err(Error::Shapes { operation: "up factor of a convolution", shapes: vec![shape] }),
    }
}

/// `Σ_pq core[p,q,·] · out[p,o] · input[q,i]`: core `[p, q, kh, kw]`, out `[p, o]`, input `[q, i]` → `[o, i·kh·kw]`.
pub(super) fn tucker<B: Backend>(on: &B, core: &B::Tensor, out: &B::Tensor, input: &B::Tensor) -> Result<B::Tensor> {
    let (shape, out_shape, input_shape) = (on.shape(core), on.shape(out), on.shape(input));
    let (&[p, q, ref kernel @ ..], &[_, o], &[_, i]) = (&shape[..], &out_shape[..], &input_shape[..]) else {
        return Err(Error::Shapes { operation: "core", shapes: vec![shape, out_shape, input_shape] });
    };
    let k: usize = kernel.iter().product();
    let core = on.permute(&on.reshape(core, &[p, q, k])?, &[0, 2, 1])?; // [p, k, q]
    let inner = on.matmul(&on.reshape(&core, &[p * k, q])?, input)?; // [p·k, i]
    let outer = on.matmul(&on.transpose(out)?, &on.reshape(&inner, &[p, k * i])?)?; // [o, k·i]
    let outer = on.permute(&on.reshape(&outer, &[o, k, i])?, &[0, 2, 1])?; // [o, i, k]
    on.reshape(&outer, &[o, i * k])
}

/// A vector over channels, shaped so that it meets a layer's input or output: `[n]` or `[n, 1, 1]`.
pub(super) fn over_activations<B: Backend>(on: &B, vector: &B::Tensor, geometry: Geometry) -> Result<B::Tensor> {
    let length: usize = on.shape(vector).iter().product();
    match geometry {
        Geometry::Linear => on.reshape(vector, &[length]),
        Geometry::Conv(_) => on.reshape(vector, &[length, 1, 1]),
    }
}
