//! The residual block of two convolutions, and the two ways to another resolution; VAE and UNet share them.
//!
//! Axes: `b` pictures, `c` channels, `h`, `w` height and width of the feature map.

use lora_core::ConvGeometry;
use lora_torch::{Projection, Scope};
use tch::Tensor;

use crate::{
    Result,
    layers::{GroupNorm, dims4},
};

/// A 3×3 window that keeps the size.
pub(crate) const SAME: ConvGeometry = ConvGeometry { stride: [1, 1], padding: [1, 1], dilation: [1, 1] };

/// What a residual block is built of.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ResnetShape {
    /// Channels that come in.
    pub(crate) input: usize,
    /// Channels that go out.
    pub(crate) output: usize,
    /// Width of the time embedding, where there is one.
    pub(crate) time: Option<usize>,
    /// Groups of the norms.
    pub(crate) groups: usize,
    /// Added to variances: 1e-5 in the UNet, 1e-6 in the VAE.
    pub(crate) eps: f64,
}

/// `x + conv(silu(norm(conv(silu(norm(x))) + time)))` (He et al. 2016, arXiv 1603.05027; Ho et al. 2020, appendix B).
#[derive(Debug)]
pub(crate) struct Resnet {
    norm1: GroupNorm,
    conv1: Projection,
    time: Option<Projection>,
    norm2: GroupNorm,
    conv2: Projection,
    shortcut: Option<Projection>,
}

impl Resnet {
    pub(crate) fn new(scope: &Scope<'_>, shape: ResnetShape) -> Result<Self> {
        let ResnetShape { input, output, time, groups, eps } = shape;
        let shortcut = || {
            let scope = scope / "conv_shortcut";
            Projection::conv2d(&scope, [output, input, 1, 1], ConvGeometry::POINTWISE, true)
        };
        Ok(Self {
            norm1: GroupNorm::new(&(scope / "norm1"), input, groups, eps)?,
            conv1: Projection::conv2d(&(scope / "conv1"), [output, input, 3, 3], SAME, true)?,
            time: match time {
                Some(width) => Some(Projection::linear(&(scope / "time_emb_proj"), [output, width], true)?),
                None => None,
            },
            norm2: GroupNorm::new(&(scope / "norm2"), output, groups, eps)?,
            conv2: Projection::conv2d(&(scope / "conv2"), [output, output, 3, 3], SAME, true)?,
            shortcut: if input == output { None } else { Some(shortcut()?) },
        })
    }

    /// `x` `[b, c, h, w]`, `time` `[b, width]` after its activation → `[b, c', h, w]`.
    pub(crate) fn forward(&self, x: &Tensor, time: Option<&Tensor>) -> Result<Tensor> {
        let mut hidden = self.conv1.forward(&self.norm1.forward_silu(x)?)?; // [b, c', h, w]
        if let (Some(projection), Some(time)) = (&self.time, time) {
            let time = projection.forward(time)?.f_unsqueeze(-1)?.f_unsqueeze(-1)?; // [b, c', 1, 1]
            hidden = hidden.f_add_(&time)?;
        }
        let mut hidden = self.conv2.forward(&self.norm2.forward_silu(&hidden)?)?;
        // Into the convolution's fresh output: its backward pass does not need that.
        Ok(match &self.shortcut {
            Some(shortcut) => hidden.f_add_(&shortcut.forward(x)?)?,
            None => hidden.f_add_(x)?,
        })
    }

    pub(crate) fn projections(&mut self) -> impl Iterator<Item = &mut Projection> {
        let Self { conv1, time, conv2, shortcut, .. } = self;
        [Some(conv1), time.as_mut(), Some(conv2), shortcut.as_mut()].into_iter().flatten()
    }
}

/// A strided convolution that halves height and width.
#[derive(Debug)]
pub(crate) struct Downsample {
    conv: Projection,
    /// Zeros right and below before the convolution: the VAE's way; the UNet pads all around inside the convolution.
    one_sided: bool,
}

impl Downsample {
    pub(crate) fn new(scope: &Scope<'_>, channels: usize, one_sided: bool) -> Result<Self> {
        let padding = if one_sided { [0, 0] } else { [1, 1] };
        let geometry = ConvGeometry { stride: [2, 2], padding, dilation: [1, 1] };
        let conv = Projection::conv2d(&(scope / "conv"), [channels, channels, 3, 3], geometry, true)?;
        Ok(Self { conv, one_sided })
    }

    /// `[b, c, h, w]` → `[b, c, h/2, w/2]`.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        if self.one_sided {
            return Ok(self.conv.forward(&x.f_constant_pad_nd([0, 1, 0, 1])?)?);
        }
        Ok(self.conv.forward(x)?)
    }

    pub(crate) fn projection(&mut self) -> &mut Projection {
        &mut self.conv
    }
}

/// Nearest neighbours, then a convolution.
#[derive(Debug)]
pub(crate) struct Upsample {
    conv: Projection,
}

impl Upsample {
    pub(crate) fn new(scope: &Scope<'_>, channels: usize) -> Result<Self> {
        Ok(Self { conv: Projection::conv2d(&(scope / "conv"), [channels, channels, 3, 3], SAME, true)? })
    }

    /// `[b, c, h, w]` → `[b, c, height, width]`, twice the size where none is given.
    pub(crate) fn forward(&self, x: &Tensor, size: Option<[i64; 2]>) -> Result<Tensor> {
        let [_, _, h, w] = dims4("feature map", x)?;
        let size = size.unwrap_or([2 * h, 2 * w]);
        Ok(self.conv.forward(&x.f_upsample_nearest2d(size, None, None)?)?)
    }

    pub(crate) fn projection(&mut self) -> &mut Projection {
        &mut self.conv
    }
}
