//! Rotary positions (Su et al. 2021, arXiv 2104.09864, eq. 34), in the layout of transformers' checkpoints.
//!
//! The numbers `i` and `i + e/2` of a head form a pair, which is turned by the angle `position · θ^(-2i/e)`. Angles, sines and
//! the products are in 32 bits whatever the model's kind.

use std::f64::consts::TAU;

use tch::{Device, Kind, Tensor};

use crate::{
    Result,
    config::{RopeConfig, RopeScaling},
};

/// The frequencies of a model's heads.
#[derive(Debug)]
pub(crate) struct Rope {
    /// `[e]`: every frequency twice, once for each of its pair.
    frequencies: Tensor,
    /// `[e]`: what a sine is multiplied by, -1 in the first half and 1 in the second.
    signs: Tensor,
}

/// Cosines and signed sines of some positions, each `[.., s, 1, e]`.
#[derive(Debug)]
pub(crate) struct Rotation {
    pub(crate) cosine: Tensor,
    pub(crate) sine: Tensor,
}

impl Rope {
    pub(crate) fn new(config: &RopeConfig, head_dim: usize, device: Device) -> Result<Self> {
        let half: Vec<f32> =
            (0..head_dim / 2).map(|pair| frequency(config, 2.0 * pair as f64 / head_dim as f64) as f32).collect();
        let signs: Vec<f32> = (0..head_dim).map(|at| if at < head_dim / 2 { -1.0 } else { 1.0 }).collect();
        Ok(Self {
            frequencies: Tensor::f_from_slice(&[half.as_slice(), &half].concat())?.f_to_device(device)?,
            signs: Tensor::f_from_slice(&signs)?.f_to_device(device)?,
        })
    }

    /// The rotations of `positions`, `[.., s]`, whole numbers.
    pub(crate) fn at(&self, positions: &Tensor) -> Result<Rotation> {
        let angles = positions.f_to_kind(Kind::Float)?.f_unsqueeze(-1)?.f_unsqueeze(-1)?.f_mul(&self.frequencies)?;
        Ok(Rotation { cosine: angles.f_cos()?, sine: angles.f_sin()?.f_mul(&self.signs)? })
    }
}

impl Rotation {
    /// Turns heads, `[.., s, h, e]` → the same.
    pub(crate) fn turn(&self, heads: &Tensor) -> Result<Tensor> {
        let half = self.sine.size().last().copied().unwrap_or(0) / 2;
        let wide = heads.f_to_kind(Kind::Float)?;
        let turned = wide.f_mul(&self.cosine)?.f_addcmul(&wide.f_roll([half], [-1])?, &self.sine)?;
        Ok(turned.f_to_kind(heads.f_kind()?)?)
    }
}

/// The frequency of the pair at `exponent` = 2i/e, in radians a position.
fn frequency(config: &RopeConfig, exponent: f64) -> f64 {
    let plain = config.theta.powf(-exponent);
    match config.scaling {
        RopeScaling::None => plain,
        RopeScaling::Linear { factor } => plain / factor,
        RopeScaling::Llama3 { factor, low, high, original } => {
            let wavelength = TAU / plain;
            // 0 where the wavelength is stretched fully, 1 where it stays.
            let kept = ((original / wavelength - low) / (high - low)).clamp(0.0, 1.0);
            (1.0 - kept) * plain / factor + kept * plain
        }
    }
}
