//! The UNet of Stable Diffusion 1.5, 2.1 and XL (Rombach et al. 2022, arXiv 2112.10752, fig. 3; Podell et al. 2023,
//! arXiv 2307.01952).
//!
//! ```text
//! x ─► conv_in ─► down 0 ─► down 1 ─► … ─► mid ─► … ─► up n-1 ─► up n ─► norm, silu, conv_out ─► prediction
//!                   └──────── skips ──────────────────────┘
//! ```
//!
//! What differs between the versions comes from `config.json`: levels, heads, depths of the transformers, linear or
//! convolutional projections, what joins the time embedding. Axes: `b` latents, `c` channels, `h`, `w` height and width,
//! `t` ids of the prompt, `d` width of the context.

mod config;
mod embedding;
mod level;
mod transformer;

pub use config::{Addition, LevelKind, UnetConfig};
pub use embedding::{Added, Sinusoid};

use lora_torch::{Projection, Projections, Scope};
use tch::{Kind, Tensor};

use crate::{
    Error, Result,
    layers::{GroupNorm, dims4},
    resnet::SAME,
};

use embedding::TimeEmbedding;
use level::{Down, Mid, Up};
use transformer::Context;

/// The noise predictor.
#[derive(Debug)]
pub struct Unet {
    time: TimeEmbedding,
    conv_in: Projection,
    down: Vec<Down>,
    mid: Mid,
    up: Vec<Up>,
    norm_out: GroupNorm,
    conv_out: Projection,
    kind: Kind,
}

impl Unet {
    /// Reads the weights.
    ///
    /// # Errors
    /// If a tensor is missing or does not fit the configuration, or the configuration asks for something unknown.
    pub fn new(scope: &Scope<'_>, config: &UnetConfig) -> Result<Self> {
        config.check()?;
        let first = config.block_out_channels[0];
        let levels = 0..config.levels();
        Ok(Self {
            time: TimeEmbedding::new(scope, config)?,
            conv_in: Projection::conv2d(&(scope / "conv_in"), [first, config.in_channels, 3, 3], SAME, true)?,
            down: levels
                .clone()
                .map(|level| Down::new(&(scope / "down_blocks" / level), level, config))
                .collect::<Result<_>>()?,
            mid: Mid::new(&(scope / "mid_block"), config)?,
            up: levels.map(|step| Up::new(&(scope / "up_blocks" / step), step, config)).collect::<Result<_>>()?,
            norm_out: GroupNorm::new(&(scope / "conv_norm_out"), first, config.norm_num_groups, config.norm_eps)?,
            conv_out: Projection::conv2d(&(scope / "conv_out"), [config.out_channels, first, 3, 3], SAME, true)?,
            kind: scope.backend().kind,
        })
    }

    /// What the network predicts for the latent `x` at step `t` (noise or velocity; the network does not know which).
    ///
    /// `x` `[b, c, h, w]`, `t` `[b]` within 0..1000, `context` `[b, t, d]` → `[b, c, h, w]` in the kind of the weights.
    /// `added` is what SDXL needs besides. Nothing waits for the device.
    ///
    /// # Errors
    /// If shapes do not fit, or memory runs out.
    pub fn forward(&self, x: &Tensor, t: &Tensor, context: &Tensor, added: Option<&Added>) -> Result<Tensor> {
        dims4("latent", x)?;
        let &[_, _, width] = context.size().as_slice() else {
            return Err(Error::Shape { what: "context", actual: context.size(), expected: "[batch, ids, width]" });
        };
        let context = Context { rows: context.f_to_kind(self.kind)?.f_reshape([-1, width])? };
        let time = self.time.forward(t, added)?;
        let mut x = self.conv_in.forward(&x.f_to_kind(self.kind)?)?;
        let mut skips = vec![x.shallow_clone()];
        for down in &self.down {
            x = down.forward(&x, &time, &context, &mut skips)?; // one skip a layer; all but the last halve h, w
        }
        x = self.mid.forward(&x, &time, &context)?;
        for up in &self.up {
            x = up.forward(&x, &time, &context, &mut skips)?; // takes the skips in reverse; all but the last double h, w
        }
        Ok(self.conv_out.forward(&self.norm_out.forward_silu(&x)?)?)
    }
}

impl Projections for Unet {
    fn projections(&mut self) -> Vec<&mut Projection> {
        let Self { time, conv_in, down, mid, up, conv_out, .. } = self;
        let mut all = vec![conv_in];
        all.extend(time.projections());
        all.extend(down.iter_mut().flat_map(Down::projections));
        all.extend(mid.projections());
        all.extend(up.iter_mut().flat_map(Up::projections));
        all.push(conv_out);
        all
    }
}
