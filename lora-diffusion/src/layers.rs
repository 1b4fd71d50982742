//! What the models share besides projections: norms, activations, attention.

use lora_torch::Scope;
use tch::Tensor;

use crate::{Error, Result};

/// Normalises groups of channels over space (Wu and He 2018, arXiv 1803.08494).
#[derive(Debug)]
pub(crate) struct GroupNorm {
    weight: Tensor,
    bias: Tensor,
    groups: i64,
    eps: f64,
}

impl GroupNorm {
    /// From `scope`'s `weight` and `bias`, both `[channels]`.
    pub(crate) fn new(scope: &Scope<'_>, channels: usize, groups: usize, eps: f64) -> Result<Self> {
        let [weight, bias] = [scope.tensor("weight", &[channels])?, scope.tensor("bias", &[channels])?];
        Ok(Self { weight, bias, groups: groups as i64, eps })
    }

    /// `[b, channels, h, w]` → the same.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(x.f_group_norm(self.groups, Some(&self.weight), Some(&self.bias), self.eps, true)?)
    }

    /// The norm followed by [`silu`].
    pub(crate) fn forward_silu(&self, x: &Tensor) -> Result<Tensor> {
        silu(self.forward(x)?)
    }
}

/// Normalises the last axis (Ba et al. 2016, arXiv 1607.06450).
#[derive(Debug)]
pub(crate) struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
    width: i64,
    eps: f64,
}

impl LayerNorm {
    /// From `scope`'s `weight` and `bias`, both `[width]`.
    pub(crate) fn new(scope: &Scope<'_>, width: usize, eps: f64) -> Result<Self> {
        let [weight, bias] = [scope.tensor("weight", &[width])?, scope.tensor("bias", &[width])?];
        Ok(Self { weight, bias, width: width as i64, eps })
    }

    /// `[.., width]` → the same.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(x.f_layer_norm([self.width], Some(&self.weight), Some(&self.bias), self.eps, true)?)
    }
}

/// `x · σ(x)`, in place where no gradient is recorded.
pub(crate) fn silu(mut x: Tensor) -> Result<Tensor> {
    Ok(if x.requires_grad() { x.f_silu()? } else { x.f_silu_()? })
}

/// `softmax(q·kᵀ/√e)·v` over heads (Vaswani et al. 2017, arXiv 1706.03762, eq. 1).
///
/// `q` holds `batch` sequences of rows `[b·s, h·e]`, `k` and `v` `[b·t, h·e]` → `[b·s, h·e]`. `causal` hides what comes later.
pub(crate) fn attend(q: &Tensor, k: &Tensor, v: &Tensor, batch: i64, heads: i64, causal: bool) -> Result<Tensor> {
    let width = q.size().last().copied().unwrap_or(0);
    let split = |rows: &Tensor| rows.f_view([batch, -1, heads, width / heads])?.f_transpose(1, 2); // [b, h, s, e]
    let y = Tensor::f_scaled_dot_product_attention(
        &split(q)?,
        &split(k)?,
        &split(v)?,
        None::<&Tensor>,
        0.0,
        causal,
        None,
        false,
    )?; // [b, h, s, e]
    Ok(y.f_transpose(1, 2)?.f_reshape([-1, width])?)
}

/// The four lengths of a picture-like tensor, `[b, channels, h, w]`.
pub(crate) fn dims4(what: &'static str, x: &Tensor) -> Result<[i64; 4]> {
    x.size().try_into().map_err(|actual| Error::Shape { what, actual, expected: "[batch, channels, height, width]" })
}
