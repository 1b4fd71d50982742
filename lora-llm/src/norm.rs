//! Root-mean-square normalisation (Zhang and Sennrich 2019, arXiv 1910.07467, eq. 4).

use lora_torch::Scope;
use tch::{Device, Kind, Tensor};

use crate::Result;

/// `x / √(mean(x²) + eps) · weight` over the last axis.
#[derive(Debug)]
pub(crate) struct RmsNorm {
    pub(crate) weight: Tensor,
    width: i64,
    pub(crate) eps: f64,
}

impl RmsNorm {
    /// From `scope`'s `weight`, `[width]`.
    pub(crate) fn new(scope: &Scope<'_>, width: usize, eps: f64) -> Result<Self> {
        Ok(Self { weight: scope.tensor("weight", &[width])?, width: width as i64, eps })
    }

    /// `[.., width]` → the same.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        if x.device() != Device::Cpu || x.kind() != Kind::Float {
            // One kernel on CUDA; in 16 bits it computes in 32.
            return Ok(x.f_rms_norm([self.width], Some(&self.weight), self.eps)?);
        }
        // On the CPU that call is put together of squares and means, whose backward pass passes over `x` twice as often as
        // that of a norm: 1.0 ms and 0.5 ms for `[512, 256]`.
        let squares = x.f_norm_scalaropt_dim(2.0, [-1i64].as_slice(), true)?.f_square()?; // [.., 1]
        let factor = squares.f_div_scalar(self.width as f64)?.f_add_scalar(self.eps)?.f_rsqrt()?;
        Ok(x.f_mul(&self.weight)?.f_mul(&factor)?)
    }
}
