//! The few tensor operations that adapters need, as one trait.
//!
//! A backend knows nothing of adapters, files or models. [`Cpu`] is the plain reference in safe Rust that every faster
//! backend is measured against (`tests/backends.rs` runs one suite over all of them). Operations never change their
//! arguments. Where a backend records gradients, all of them are differentiable in every tensor argument.

mod array;
mod cpu;
pub mod decompose;
mod gram;
mod leading;
mod product_svd;
#[cfg(test)]
mod testing;

pub use array::Array;
pub use cpu::Cpu;

use crate::{Error, Result};

/// How a two-dimensional convolution walks over its input; `[height, width]` pairs, zero padding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConvGeometry {
    /// Step between two windows.
    pub stride: [usize; 2],
    /// Zeros added on both sides.
    pub padding: [usize; 2],
    /// Distance between two elements of a window.
    pub dilation: [usize; 2],
}

impl ConvGeometry {
    /// A window that touches every position once: what a 1×1 factor uses.
    pub const POINTWISE: Self = Self { stride: [1, 1], padding: [0, 0], dilation: [1, 1] };
}

/// Tensor operations over real numbers; shapes are row-major torch shapes.
pub trait Backend {
    /// A tensor. Not `Clone`, since `tch::Tensor` is not; see [`share`](Self::share).
    type Tensor;

    /// A tensor of `shape` from its values in row-major order.
    fn tensor(&self, values: &[f32], shape: &[usize]) -> Result<Self::Tensor>;
    /// The values in row-major order, on the host.
    fn values(&self, tensor: &Self::Tensor) -> Result<Vec<f32>>;
    /// The length of every axis.
    fn shape(&self, tensor: &Self::Tensor) -> Vec<usize>;

    /// The same values under another shape of equal size.
    fn reshape(&self, tensor: &Self::Tensor, shape: &[usize]) -> Result<Self::Tensor>;
    /// The axes in the order `axes`.
    fn permute(&self, tensor: &Self::Tensor, axes: &[usize]) -> Result<Self::Tensor>;
    /// `length` positions of `axis`, from `start` on.
    fn narrow(&self, tensor: &Self::Tensor, axis: usize, start: usize, length: usize) -> Result<Self::Tensor>;
    /// Tensors one after the other along `axis`.
    fn concat(&self, tensors: &[Self::Tensor], axis: usize) -> Result<Self::Tensor>;

    /// `left + right`, axes of length 1 stretched.
    fn add(&self, left: &Self::Tensor, right: &Self::Tensor) -> Result<Self::Tensor>;
    /// `left - right`, axes of length 1 stretched.
    fn sub(&self, left: &Self::Tensor, right: &Self::Tensor) -> Result<Self::Tensor>;
    /// `left ⊙ right`, axes of length 1 stretched.
    fn mul(&self, left: &Self::Tensor, right: &Self::Tensor) -> Result<Self::Tensor>;
    /// `left ⊘ right`, axes of length 1 stretched.
    fn div(&self, left: &Self::Tensor, right: &Self::Tensor) -> Result<Self::Tensor>;
    /// `tensor · factor`.
    fn scale(&self, tensor: &Self::Tensor, factor: f64) -> Result<Self::Tensor>;

    /// `[.., m, k] · [.., k, n] → [.., m, n]`; leading axes equal.
    fn matmul(&self, left: &Self::Tensor, right: &Self::Tensor) -> Result<Self::Tensor>;
    /// `[b, in, h, w] ⋆ [out, in, kh, kw] → [b, out, h', w']`.
    fn conv2d(&self, input: &Self::Tensor, weight: &Self::Tensor, geometry: ConvGeometry) -> Result<Self::Tensor>;
    /// The Euclidean norm over `axes`, which stay with length 1.
    fn norm(&self, tensor: &Self::Tensor, axes: &[usize]) -> Result<Self::Tensor>;
    /// `X` of `matrix · X = right`: `[.., n, n]`, `[.., n, m]` → `[.., n, m]`; leading axes equal.
    fn solve(&self, matrix: &Self::Tensor, right: &Self::Tensor) -> Result<Self::Tensor>;

    /// `√tensor`, element by element. This default goes through the host and is not differentiable.
    fn sqrt(&self, tensor: &Self::Tensor) -> Result<Self::Tensor> {
        let roots: Vec<f32> = self.values(tensor)?.into_iter().map(f32::sqrt).collect();
        self.tensor(&roots, &self.shape(tensor))
    }

    /// A second handle or a copy; neither lets one holder change what the other sees.
    fn share(&self, tensor: &Self::Tensor) -> Result<Self::Tensor> {
        self.reshape(tensor, &self.shape(tensor))
    }

    /// The same values, cut off from whatever records gradients.
    fn detach(&self, tensor: &Self::Tensor) -> Result<Self::Tensor> {
        self.share(tensor)
    }

    /// A matrix turned over: `[m, n] → [n, m]`.
    fn transpose(&self, matrix: &Self::Tensor) -> Result<Self::Tensor> {
        self.permute(matrix, &[1, 0])
    }

    /// `x · Wᵀ`: `[.., in]`, `[out, in]` → `[.., out]`.
    fn linear(&self, input: &Self::Tensor, weight: &Self::Tensor) -> Result<Self::Tensor> {
        let mut shape = self.shape(input);
        let width = shape.pop().unwrap_or(1);
        let rows = shape.iter().product();
        let flat = self.reshape(input, &[rows, width])?;
        let output = self.matmul(&flat, &self.transpose(weight)?)?; // [rows, out]
        shape.push(self.shape(weight)[0]);
        self.reshape(&output, &shape)
    }

    /// `y + factor · (x · Wᵀ)`: a [`linear`](Self::linear) added to something that is there already.
    ///
    /// `y` `[.., out]`, `x` `[.., in]`, `weight` `[out, in]`. One kernel where a backend has it.
    fn linear_onto(
        &self,
        y: &Self::Tensor,
        x: &Self::Tensor,
        weight: &Self::Tensor,
        factor: f64,
    ) -> Result<Self::Tensor> {
        self.add(y, &self.scale(&self.linear(x, weight)?, factor)?)
    }

    /// `magnitude / ‖weight + factor · up·down‖` of every row: what DoRA multiplies its rows by, `[out]`.
    ///
    /// `magnitude` `[out]` with any unit axes, `weight` `[out, n]`, `up` `[out, rank]`, `down` `[rank, n]`. The norm counts
    /// as a constant: gradients flow to `magnitude` alone. The sum is never formed. With `s = factor`,
    /// `‖W_o + s·B_o·A‖² = ‖W_o‖² + s·B_o·(2·A·W_oᵀ + s·A·Aᵀ·B_oᵀ)`, whose largest intermediate is `[out, rank]`. Backends
    /// whose tensors are narrower than 32 bits have to carry the norm wider: its rounding would reach every output.
    fn row_factors(
        &self,
        magnitude: &Self::Tensor,
        weight: &Self::Tensor,
        [up, down]: [&Self::Tensor; 2],
        factor: f64,
    ) -> Result<Self::Tensor> {
        let (weight, up, down) = (self.detach(weight)?, self.detach(up)?, self.detach(down)?);
        let shape = self.shape(&up);
        let &[out, rank] = &shape[..] else {
            return Err(Error::Shapes { operation: "row factors", shapes: vec![shape] });
        };
        let mixed = self.scale(&self.linear(&weight, &down)?, 2.0)?; // 2·W·Aᵀ, [out, rank]
        let gram = self.linear(&down, &down)?; // A·Aᵀ, [rank, rank]
        let mixed = self.add(&mixed, &self.scale(&self.matmul(&up, &gram)?, factor)?)?;
        let rows = self.reshape(&self.scale(&up, factor)?, &[out, 1, rank])?;
        let added = self.reshape(&self.matmul(&rows, &self.reshape(&mixed, &[out, rank, 1])?)?, &[out])?;
        let norm = self.reshape(&self.norm(&weight, &[1])?, &[out])?;
        let norm = self.sqrt(&self.add(&self.mul(&norm, &norm)?, &added)?)?;
        self.div(&self.reshape(magnitude, &[out])?, &norm)
    }
}
