//! The adapters' tensor operations on libtorch, on any of its devices and in any of its floating kinds.
//!
//! Everything is differentiable where the caller's grad mode says so. It knows nothing of adapters. Each operation that
//! libtorch has a kernel for is that one kernel; the plain reference is [`lora_core::Cpu`].

use lora_core::{Backend, ConvGeometry};
use tch::{Device, Kind, TchError, Tensor};

use crate::cuda::Cuda;

/// Where tensors live and in which kind new ones are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Torch {
    /// The device of new tensors.
    pub device: Device,
    /// The kind of new tensors: `Float`, `Double`, `BFloat16` or `Half`.
    pub kind: Kind,
}

impl Torch {
    /// 32-bit floats on the CPU.
    pub const CPU: Self = Self { device: Device::Cpu, kind: Kind::Float };

    /// A device, with libtorch's CUDA half opened if it is one of CUDA's.
    ///
    /// # Errors
    /// If the device cannot be had, with the reason.
    pub fn open(device: Device, kind: Kind) -> crate::Result<Self> {
        if let Device::Cuda(index) = device {
            Cuda::load(index)?;
        }
        Ok(Self { device, kind })
    }

    /// The same device with tensors of another kind.
    pub fn with_kind(self, kind: Kind) -> Self {
        Self { kind, ..self }
    }
}

impl Backend for Torch {
    type Tensor = Tensor;

    fn tensor(&self, values: &[f32], shape: &[usize]) -> lora_core::Result<Tensor> {
        if values.len() != shape.iter().product::<usize>() {
            return Err(lora_core::Error::Shapes {
                operation: "tensor",
                shapes: vec![vec![values.len()], shape.to_vec()],
            });
        }
        let make =
            || Tensor::f_from_slice(values)?.f_reshape(signed(shape))?.f_to_device(self.device)?.f_to_kind(self.kind);
        told("tensor", make())
    }

    fn values(&self, tensor: &Tensor) -> lora_core::Result<Vec<f32>> {
        told("values", host_values(tensor))
    }

    fn shape(&self, tensor: &Tensor) -> Vec<usize> {
        tensor.size().iter().map(|length| *length as usize).collect()
    }

    fn reshape(&self, tensor: &Tensor, shape: &[usize]) -> lora_core::Result<Tensor> {
        told("reshape", tensor.f_reshape(signed(shape)))
    }

    fn permute(&self, tensor: &Tensor, axes: &[usize]) -> lora_core::Result<Tensor> {
        told("permute", tensor.f_permute(signed(axes)))
    }

    fn narrow(&self, tensor: &Tensor, axis: usize, start: usize, length: usize) -> lora_core::Result<Tensor> {
        told("narrow", tensor.f_narrow(axis as i64, start as i64, length as i64))
    }

    fn concat(&self, tensors: &[Tensor], axis: usize) -> lora_core::Result<Tensor> {
        told("concat", Tensor::f_cat(tensors, axis as i64))
    }

    fn add(&self, left: &Tensor, right: &Tensor) -> lora_core::Result<Tensor> {
        told("add", left.f_add(right))
    }

    fn sub(&self, left: &Tensor, right: &Tensor) -> lora_core::Result<Tensor> {
        told("sub", left.f_sub(right))
    }

    fn mul(&self, left: &Tensor, right: &Tensor) -> lora_core::Result<Tensor> {
        told("mul", left.f_mul(right))
    }

    fn div(&self, left: &Tensor, right: &Tensor) -> lora_core::Result<Tensor> {
        told("div", left.f_div(right))
    }

    fn scale(&self, tensor: &Tensor, factor: f64) -> lora_core::Result<Tensor> {
        told("scale", if factor == 1.0 { Ok(tensor.shallow_clone()) } else { tensor.f_mul_scalar(factor) })
    }

    fn matmul(&self, left: &Tensor, right: &Tensor) -> lora_core::Result<Tensor> {
        told("matmul", left.f_matmul(right))
    }

    fn conv2d(&self, input: &Tensor, weight: &Tensor, geometry: ConvGeometry) -> lora_core::Result<Tensor> {
        told("conv2d", convolve(input, weight, None, geometry))
    }

    fn norm(&self, tensor: &Tensor, axes: &[usize]) -> lora_core::Result<Tensor> {
        told("norm", tensor.f_norm_scalaropt_dim(2.0, signed(axes), true))
    }

    fn solve(&self, matrix: &Tensor, right: &Tensor) -> lora_core::Result<Tensor> {
        told("solve", Tensor::f_linalg_solve(matrix, right, true))
    }

    fn sqrt(&self, tensor: &Tensor) -> lora_core::Result<Tensor> {
        told("sqrt", tensor.f_sqrt())
    }

    fn share(&self, tensor: &Tensor) -> lora_core::Result<Tensor> {
        Ok(tensor.shallow_clone())
    }

    fn detach(&self, tensor: &Tensor) -> lora_core::Result<Tensor> {
        told("detach", tensor.f_detach())
    }

    fn transpose(&self, matrix: &Tensor) -> lora_core::Result<Tensor> {
        told("transpose", matrix.f_transpose(0, 1))
    }

    fn linear(&self, input: &Tensor, weight: &Tensor) -> lora_core::Result<Tensor> {
        told("linear", input.f_linear(weight, None::<&Tensor>))
    }

    fn linear_onto(&self, y: &Tensor, x: &Tensor, weight: &Tensor, factor: f64) -> lora_core::Result<Tensor> {
        told("linear_onto", add_product(y, x, weight, factor))
    }

    fn row_factors(
        &self,
        magnitude: &Tensor,
        weight: &Tensor,
        [up, down]: [&Tensor; 2],
        factor: f64,
    ) -> lora_core::Result<Tensor> {
        told("row_factors", magnitude_over_norm(magnitude, weight, up, down, factor))
    }
}

/// `y + factor · (x · Wᵀ)` in one matrix product: `y` `[.., out]`, `x` `[.., in]`, `weight` `[out, in]`.
fn add_product(y: &Tensor, x: &Tensor, weight: &Tensor, factor: f64) -> Result<Tensor, TchError> {
    let y_rows = rows(y)?;
    let sum = addmm(&y_rows, &rows(x)?, &weight.f_transpose(0, 1)?, factor)?; // [rows, out]
    sum.f_view(y.size().as_slice())
}

/// `magnitude / ‖weight + factor · up·down‖` of every row in the kind of `weight`, by way of 32-bit norms.
///
/// A norm rounded to bf16 would change a whole output channel by up to 0.4 %, and in another direction each time the
/// factors move. The product with `weight` stays in its kind: it is a small part of the sum, and the one that costs.
fn magnitude_over_norm(
    magnitude: &Tensor,
    weight: &Tensor,
    up: &Tensor,
    down: &Tensor,
    factor: f64,
) -> Result<Tensor, TchError> {
    let wide = if weight.kind() == Kind::Double { Kind::Double } else { Kind::Float };
    let norm = {
        let _no_grad = tch::no_grad_guard();
        let squares = weight.f_norm_scalaropt_dim_dtype(2.0, [1i64].as_slice(), false, wide)?.f_square()?; // [out]
        let mixed = weight.f_linear(&down.f_to_kind(weight.kind())?, None::<&Tensor>)?.f_to_kind(wide)?; // [out, rank]
        let (up, down) = (up.f_to_kind(wide)?, down.f_to_kind(wide)?);
        let gram = down.f_matmul(&down.f_transpose(0, 1)?)?; // [rank, rank]
        let mixed = addmm(&mixed.f_mul_scalar(2.0)?, &up, &gram, factor)?;
        let added = up.f_mul(&mixed)?.f_sum_dim_intlist([1i64].as_slice(), false, wide)?; // [out]
        squares.f_add(&added.f_mul_scalar(factor)?)?.f_sqrt()?
    };
    magnitude.f_reshape([-1])?.f_to_kind(wide)?.f_div(&norm)?.f_to_kind(weight.kind())
}

/// `sum + factor · left·right`. The generated binding has no `alpha`; `baddbmm` has one, but forms batches, which the
/// CPU path of libtorch runs without its fast kernels. A factor on the smaller operand costs next to nothing.
fn addmm(sum: &Tensor, left: &Tensor, right: &Tensor, factor: f64) -> Result<Tensor, TchError> {
    if factor == 1.0 { sum.f_addmm(left, right) } else { sum.f_addmm(&left.f_mul_scalar(factor)?, right) }
}

/// The tensor as a matrix of its last axis: `[.., n] → [rows, n]`, a view where the strides allow it.
pub(crate) fn rows(tensor: &Tensor) -> Result<Tensor, TchError> {
    match tensor.size().as_slice() {
        [_, _] => Ok(tensor.shallow_clone()),
        [.., width] => tensor.f_reshape([-1, *width]),
        [] => tensor.f_reshape([1, 1]),
    }
}

/// `input ⋆ weight + bias`.
pub(crate) fn convolve(
    input: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    geometry: ConvGeometry,
) -> Result<Tensor, TchError> {
    let ConvGeometry { stride, padding, dilation } = geometry;
    input.f_conv2d(weight, bias, signed(&stride), signed(&padding), signed(&dilation), 1)
}

/// All values in row-major order as 32-bit floats on the host.
pub(crate) fn host_values(tensor: &Tensor) -> Result<Vec<f32>, TchError> {
    let host = tensor.f_detach()?.f_to_device(Device::Cpu)?.f_to_kind(Kind::Float)?.f_contiguous()?;
    let mut values = vec![0.0; host.numel()];
    host.f_copy_data(&mut values, host.numel())?;
    Ok(values)
}

/// The same values in memory of their own.
pub(crate) fn copied(tensor: &Tensor) -> Result<Tensor, TchError> {
    let mut copy = tensor.f_empty_like()?;
    copy.f_copy_(tensor)?;
    Ok(copy)
}

/// A shape as libtorch wants it.
pub(crate) fn signed(lengths: &[usize]) -> Vec<i64> {
    lengths.iter().map(|length| *length as i64).collect()
}

fn told<T>(operation: &'static str, result: Result<T, TchError>) -> lora_core::Result<T> {
    result.map_err(|error| lora_core::Error::Backend { operation, source: Box::new(crate::Error::from(error)) })
}
