//! The autoencoder between pictures and latents (Rombach et al. 2022, arXiv 2112.10752, §3.1; Kingma and Welling 2013).
//!
//! ```text
//! picture [b, 3, 8h, 8w] ─► encoder ─► mean, log variance [b, 4, h, w] each ─► sample · scaling factor = latent
//! latent / scaling factor ─► decoder ─► picture
//! ```
//!
//! Pictures are −1..1. It runs in f32 whatever the UNet runs in: SDXL's overflows in f16. Group norms use eps 1e-6.

use std::path::Path;

use lora_core::ConvGeometry;
use lora_torch::{Projection, Projections, Scope};
use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::{
    Error, Result,
    config::read_json,
    layers::{GroupNorm, attend, dims4},
    resnet::{Downsample, Resnet, ResnetShape, SAME, Upsample},
};

const EPS: f64 = 1e-6;

/// An autoencoder as its `config.json` describes it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct VaeConfig {
    /// Channels of a picture.
    pub in_channels: usize,
    /// Channels of a decoded picture.
    pub out_channels: usize,
    /// Channels of a latent.
    pub latent_channels: usize,
    /// Channels of each level, from the outermost inwards.
    pub block_out_channels: Vec<usize>,
    /// Residual blocks of a level in the encoder; the decoder has one more.
    pub layers_per_block: usize,
    /// Groups of the norms.
    pub norm_num_groups: usize,
    /// What latents are multiplied by, so that their variance is near 1.
    pub scaling_factor: f64,
    /// What is taken from latents before that.
    pub shift_factor: Option<f64>,
    /// Whether the middle has attention.
    pub mid_block_add_attention: bool,
    /// Whether the moments pass through one more convolution.
    pub use_quant_conv: bool,
    /// Whether latents pass through one more convolution before the decoder.
    pub use_post_quant_conv: bool,
    /// Kinds of the encoder's levels.
    pub down_block_types: Vec<String>,
    /// Kinds of the decoder's levels.
    pub up_block_types: Vec<String>,
}

impl Default for VaeConfig {
    /// The autoencoder of SD 1.5 and 2.1 (stable-diffusion-v1-5, `vae/config.json`).
    fn default() -> Self {
        Self {
            in_channels: 3,
            out_channels: 3,
            latent_channels: 4,
            block_out_channels: vec![128, 256, 512, 512],
            layers_per_block: 2,
            norm_num_groups: 32,
            scaling_factor: 0.18215,
            shift_factor: None,
            mid_block_add_attention: true,
            use_quant_conv: true,
            use_post_quant_conv: true,
            down_block_types: vec![DOWN.to_owned(); 4],
            up_block_types: vec![UP.to_owned(); 4],
        }
    }
}

const DOWN: &str = "DownEncoderBlock2D";
const UP: &str = "UpDecoderBlock2D";

impl VaeConfig {
    /// The autoencoder of SDXL (stable-diffusion-xl-base-1.0, `vae/config.json`).
    pub fn sdxl() -> Self {
        Self { scaling_factor: 0.13025, ..Self::default() }
    }

    /// Reads a `config.json`.
    ///
    /// # Errors
    /// If the file cannot be read, or describes something else.
    pub fn open(path: &Path) -> Result<Self> {
        read_json(path)
    }

    /// Pixels along a side for one latent pixel.
    pub fn factor(&self) -> usize {
        1 << self.block_out_channels.len().saturating_sub(1)
    }

    fn check(&self) -> Result<()> {
        let wrong = |option, reason: String| Err(Error::Config { component: "vae", option, reason });
        let levels = self.block_out_channels.len();
        if levels == 0 || self.block_out_channels.iter().any(|c| *c == 0 || c % self.norm_num_groups.max(1) != 0) {
            return wrong("block_out_channels", format!("must be multiples of {} groups", self.norm_num_groups));
        }
        if self.norm_num_groups == 0 {
            return wrong("norm_num_groups", "is 0".into());
        }
        if let Some(other) = self.down_block_types.iter().find(|kind| *kind != DOWN) {
            return wrong("down_block_types", format!("names `{other}`, known is `{DOWN}`"));
        }
        if let Some(other) = self.up_block_types.iter().find(|kind| *kind != UP) {
            return wrong("up_block_types", format!("names `{other}`, known is `{UP}`"));
        }
        if !(self.scaling_factor.is_finite() && self.scaling_factor != 0.0) {
            return wrong("scaling_factor", format!("is {}", self.scaling_factor));
        }
        Ok(())
    }
}

/// Where a picture may lie in latent space: a normal distribution for each latent pixel.
#[derive(Debug)]
pub struct Posterior {
    /// `[b, c, h, w]`, unscaled.
    pub mean: Tensor,
    /// `[b, c, h, w]`, within −30..20.
    pub log_variance: Tensor,
}

impl Posterior {
    /// Takes the encoder's moments apart: `[b, 2c, h, w]`.
    pub fn new(moments: &Tensor) -> Result<Self> {
        let [_, channels, _, _] = dims4("moments", moments)?;
        let half = channels / 2;
        Ok(Self {
            mean: moments.f_narrow(1, 0, half)?,
            log_variance: moments.f_narrow(1, half, half)?.f_clamp(-30.0, 20.0)?,
        })
    }

    /// Standard deviations, `[b, c, h, w]`.
    pub fn deviation(&self) -> Result<Tensor> {
        Ok(self.log_variance.f_mul_scalar(0.5)?.f_exp()?)
    }

    /// A point of the distribution, unscaled; `noise` is normal and `[b, c, h, w]`.
    pub fn sample(&self, noise: &Tensor) -> Result<Tensor> {
        Ok(self.mean.f_addcmul(&self.deviation()?, noise)?)
    }
}

/// The autoencoder.
#[derive(Debug)]
pub struct Vae {
    encoder: Encoder,
    quant: Option<Projection>,
    post_quant: Option<Projection>,
    decoder: Decoder,
    scaling_factor: f64,
    shift: f64,
    factor: i64,
}

impl Vae {
    /// Reads the weights.
    ///
    /// # Errors
    /// If a tensor is missing or does not fit the configuration, or the configuration asks for something unknown.
    pub fn new(scope: &Scope<'_>, config: &VaeConfig) -> Result<Self> {
        config.check()?;
        let latent = config.latent_channels;
        let pointwise = |name: &str, channels: usize| {
            Projection::conv2d(&(scope / name), [channels, channels, 1, 1], ConvGeometry::POINTWISE, true)
        };
        Ok(Self {
            encoder: Encoder::new(&(scope / "encoder"), config)?,
            quant: if config.use_quant_conv { Some(pointwise("quant_conv", 2 * latent)?) } else { None },
            post_quant: if config.use_post_quant_conv { Some(pointwise("post_quant_conv", latent)?) } else { None },
            decoder: Decoder::new(&(scope / "decoder"), config)?,
            scaling_factor: config.scaling_factor,
            shift: config.shift_factor.unwrap_or(0.0),
            factor: config.factor() as i64,
        })
    }

    /// Pictures `[b, 3, h, w]`, −1..1, sides multiples of [`VaeConfig::factor`] → where they may lie.
    ///
    /// # Errors
    /// If the sides do not fit.
    pub fn encode(&self, pictures: &Tensor) -> Result<Posterior> {
        let [_, _, h, w] = dims4("picture", pictures)?;
        if h % self.factor != 0 || w % self.factor != 0 {
            let expected = "sides that are multiples of the VAE's factor";
            return Err(Error::Shape { what: "picture", actual: pictures.size(), expected });
        }
        let moments = self.encoder.forward(pictures)?;
        match &self.quant {
            Some(quant) => Posterior::new(&quant.forward(&moments)?),
            None => Posterior::new(&moments),
        }
    }

    /// Unscaled latents `[b, c, h, w]` → pictures `[b, 3, 8h, 8w]`, about −1..1, not clamped.
    pub fn decode(&self, latents: &Tensor) -> Result<Tensor> {
        match &self.post_quant {
            Some(post_quant) => self.decoder.forward(&post_quant.forward(latents)?),
            None => self.decoder.forward(latents),
        }
    }

    /// From the encoder's numbers to those that the UNet sees.
    pub fn scale(&self, latents: &Tensor) -> Result<Tensor> {
        Ok(latents.f_sub_scalar(self.shift)?.f_mul_scalar(self.scaling_factor)?)
    }

    /// From the UNet's numbers to those that the decoder takes.
    pub fn unscale(&self, latents: &Tensor) -> Result<Tensor> {
        Ok(latents.f_div_scalar(self.scaling_factor)?.f_add_scalar(self.shift)?)
    }

    /// Pixels along a side for one latent pixel.
    pub fn factor(&self) -> i64 {
        self.factor
    }
}

impl Projections for Vae {
    fn projections(&mut self) -> Vec<&mut Projection> {
        let Self { encoder, quant, post_quant, decoder, .. } = self;
        let mut all = encoder.projections();
        all.extend(quant);
        all.extend(post_quant);
        all.extend(decoder.projections());
        all
    }
}

fn resnet(scope: &Scope<'_>, input: usize, output: usize, config: &VaeConfig) -> Result<Resnet> {
    Resnet::new(scope, ResnetShape { input, output, time: None, groups: config.norm_num_groups, eps: EPS })
}

#[derive(Debug)]
struct Encoder {
    conv_in: Projection,
    levels: Vec<(Vec<Resnet>, Option<Downsample>)>,
    mid: Mid,
    norm_out: GroupNorm,
    conv_out: Projection,
}

impl Encoder {
    fn new(scope: &Scope<'_>, config: &VaeConfig) -> Result<Self> {
        let channels = &config.block_out_channels;
        let (first, last) = (channels[0], channels[channels.len() - 1]);
        let mut input = first;
        let mut levels = Vec::new();
        for (level, &output) in channels.iter().enumerate() {
            let scope = scope / "down_blocks" / level;
            let resnets = (0..config.layers_per_block)
                .map(|i| resnet(&(&scope / "resnets" / i), if i == 0 { input } else { output }, output, config))
                .collect::<Result<_>>()?;
            let down = match level + 1 < channels.len() {
                true => Some(Downsample::new(&(&scope / "downsamplers" / 0), output, true)?),
                false => None,
            };
            levels.push((resnets, down));
            input = output;
        }
        Ok(Self {
            conv_in: Projection::conv2d(&(scope / "conv_in"), [first, config.in_channels, 3, 3], SAME, true)?,
            levels,
            mid: Mid::new(&(scope / "mid_block"), last, config)?,
            norm_out: GroupNorm::new(&(scope / "conv_norm_out"), last, config.norm_num_groups, EPS)?,
            conv_out: Projection::conv2d(&(scope / "conv_out"), [2 * config.latent_channels, last, 3, 3], SAME, true)?,
        })
    }

    /// `[b, 3, 8h, 8w]` → moments `[b, 2c, h, w]`.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut x = self.conv_in.forward(x)?;
        for (resnets, down) in &self.levels {
            for resnet in resnets {
                x = resnet.forward(&x, None)?;
            }
            if let Some(down) = down {
                x = down.forward(&x)?; // halves h and w
            }
        }
        x = self.mid.forward(&x)?;
        Ok(self.conv_out.forward(&self.norm_out.forward_silu(&x)?)?)
    }

    fn projections(&mut self) -> Vec<&mut Projection> {
        let Self { conv_in, levels, mid, conv_out, .. } = self;
        let mut all = vec![conv_in];
        for (resnets, down) in levels {
            all.extend(resnets.iter_mut().flat_map(Resnet::projections));
            all.extend(down.iter_mut().map(Downsample::projection));
        }
        all.extend(mid.projections());
        all.push(conv_out);
        all
    }
}

#[derive(Debug)]
struct Decoder {
    conv_in: Projection,
    mid: Mid,
    levels: Vec<(Vec<Resnet>, Option<Upsample>)>,
    norm_out: GroupNorm,
    conv_out: Projection,
}

impl Decoder {
    fn new(scope: &Scope<'_>, config: &VaeConfig) -> Result<Self> {
        let channels = &config.block_out_channels;
        let (first, last) = (channels[0], channels[channels.len() - 1]);
        let mut input = last;
        let mut levels = Vec::new();
        for (level, &output) in channels.iter().rev().enumerate() {
            let scope = scope / "up_blocks" / level;
            let resnets = (0..=config.layers_per_block)
                .map(|i| resnet(&(&scope / "resnets" / i), if i == 0 { input } else { output }, output, config))
                .collect::<Result<_>>()?;
            let up = match level + 1 < channels.len() {
                true => Some(Upsample::new(&(&scope / "upsamplers" / 0), output)?),
                false => None,
            };
            levels.push((resnets, up));
            input = output;
        }
        Ok(Self {
            conv_in: Projection::conv2d(&(scope / "conv_in"), [last, config.latent_channels, 3, 3], SAME, true)?,
            mid: Mid::new(&(scope / "mid_block"), last, config)?,
            levels,
            norm_out: GroupNorm::new(&(scope / "conv_norm_out"), first, config.norm_num_groups, EPS)?,
            conv_out: Projection::conv2d(&(scope / "conv_out"), [config.out_channels, first, 3, 3], SAME, true)?,
        })
    }

    /// `[b, c, h, w]` → `[b, 3, 8h, 8w]`.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut x = self.mid.forward(&self.conv_in.forward(x)?)?;
        for (resnets, up) in &self.levels {
            for resnet in resnets {
                x = resnet.forward(&x, None)?;
            }
            if let Some(up) = up {
                x = up.forward(&x, None)?; // doubles h and w
            }
        }
        Ok(self.conv_out.forward(&self.norm_out.forward_silu(&x)?)?)
    }

    fn projections(&mut self) -> Vec<&mut Projection> {
        let Self { conv_in, mid, levels, conv_out, .. } = self;
        let mut all = vec![conv_in];
        all.extend(mid.projections());
        for (resnets, up) in levels {
            all.extend(resnets.iter_mut().flat_map(Resnet::projections));
            all.extend(up.iter_mut().map(Upsample::projection));
        }
        all.push(conv_out);
        all
    }
}

/// The middle of encoder and decoder: a residual block, attention over all positions with one head, a residual block.
#[derive(Debug)]
struct Mid {
    first: Resnet,
    attention: Option<SpaceAttention>,
    second: Resnet,
}

impl Mid {
    fn new(scope: &Scope<'_>, channels: usize, config: &VaeConfig) -> Result<Self> {
        Ok(Self {
            first: resnet(&(scope / "resnets" / 0), channels, channels, config)?,
            attention: match config.mid_block_add_attention {
                true => Some(SpaceAttention::new(&(scope / "attentions" / 0), channels, config.norm_num_groups)?),
                false => None,
            },
            second: resnet(&(scope / "resnets" / 1), channels, channels, config)?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut x = self.first.forward(x, None)?;
        if let Some(attention) = &self.attention {
            x = attention.forward(&x)?;
        }
        self.second.forward(&x, None)
    }

    fn projections(&mut self) -> impl Iterator<Item = &mut Projection> {
        let Self { first, attention, second } = self;
        let attention =
            attention.iter_mut().flat_map(|SpaceAttention { query, key, value, out, .. }| [query, key, value, out]);
        first.projections().chain(attention).chain(second.projections())
    }
}

#[derive(Debug)]
struct SpaceAttention {
    norm: GroupNorm,
    query: Projection,
    key: Projection,
    value: Projection,
    out: Projection,
}

impl SpaceAttention {
    fn new(scope: &Scope<'_>, channels: usize, groups: usize) -> Result<Self> {
        // Folders saved before diffusers 0.18 spell the four layers in the old way.
        let old = scope.has("query.weight");
        let layer = |today: &str, before: &str| {
            Projection::linear(&(scope / if old { before } else { today }), [channels, channels], true)
        };
        Ok(Self {
            norm: GroupNorm::new(&(scope / "group_norm"), channels, groups, EPS)?,
            query: layer("to_q", "query")?,
            key: layer("to_k", "key")?,
            value: layer("to_v", "value")?,
            out: layer("to_out.0", "proj_attn")?,
        })
    }

    /// `[b, c, h, w]` → the same.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let [b, c, h, w] = dims4("feature map", x)?;
        let rows = self.norm.forward(x)?.f_permute([0, 2, 3, 1])?.f_reshape([b * h * w, c])?; // [b·h·w, c]
        let [q, k, v] = [self.query.forward(&rows)?, self.key.forward(&rows)?, self.value.forward(&rows)?];
        let y = self.out.forward(&attend(&q, &k, &v, b, 1, false)?)?; // [b·h·w, c]
        Ok(x.f_add(&y.f_view([b, h, w, c])?.f_permute([0, 3, 1, 2])?)?)
    }
}
