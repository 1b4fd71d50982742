//! The levels of the UNet: residual blocks, each followed by a transformer where the level has them.
//!
//! On the way down every layer leaves its output as a skip; on the way up every layer takes one and joins it to its input.

use lora_torch::{Projection, Scope};
use tch::Tensor;

use super::{
    config::{LevelKind, UnetConfig},
    transformer::{Context, Transformer, TransformerShape},
};
use crate::{
    Error, Result,
    layers::dims4,
    resnet::{Downsample, Resnet, ResnetShape, Upsample},
};

/// A residual block and perhaps a transformer.
#[derive(Debug)]
struct Layer {
    resnet: Resnet,
    transformer: Option<Transformer>,
}

impl Layer {
    /// The `i`-th layer of a level of the given kind; transformers count from 0 among themselves, as residual blocks do.
    fn new(
        scope: &Scope<'_>,
        i: usize,
        [input, output]: [usize; 2],
        level: usize,
        kind: LevelKind,
        config: &UnetConfig,
    ) -> Result<Self> {
        Ok(Self {
            resnet: Resnet::new(&(scope / "resnets" / i), resnet_shape(input, output, config))?,
            transformer: match kind {
                LevelKind::CrossAttention => {
                    Some(Transformer::new(&(scope / "attentions" / i), transformer_shape(output, level, config))?)
                }
                LevelKind::Plain => None,
            },
        })
    }

    fn forward(&self, x: &Tensor, time: &Tensor, context: &Context) -> Result<Tensor> {
        let x = self.resnet.forward(x, Some(time))?;
        match &self.transformer {
            Some(transformer) => transformer.forward(&x, context),
            None => Ok(x),
        }
    }

    fn projections(&mut self) -> impl Iterator<Item = &mut Projection> {
        let transformer = self.transformer.iter_mut().flat_map(Transformer::projections);
        self.resnet.projections().chain(transformer)
    }
}

/// One level on the way down.
#[derive(Debug)]
pub(super) struct Down {
    layers: Vec<Layer>,
    down: Option<Downsample>,
}

impl Down {
    pub(super) fn new(scope: &Scope<'_>, level: usize, config: &UnetConfig) -> Result<Self> {
        let channels = &config.block_out_channels;
        let (input, output) = (channels[level.saturating_sub(1)], channels[level]);
        let layers = (0..config.layers_per_block)
            .map(|i| {
                let widths = [if i == 0 { input } else { output }, output];
                Layer::new(scope, i, widths, level, config.down_block_types[level], config)
            })
            .collect::<Result<_>>()?;
        let down = match level + 1 < channels.len() {
            true => Some(Downsample::new(&(scope / "downsamplers" / 0), output, false)?),
            false => None,
        };
        Ok(Self { layers, down })
    }

    /// `x` `[b, c, h, w]` → `[b, c', h/2, w/2]`, or `[b, c', h, w]` at the innermost level.
    pub(super) fn forward(
        &self,
        x: &Tensor,
        time: &Tensor,
        context: &Context,
        skips: &mut Vec<Tensor>,
    ) -> Result<Tensor> {
        let mut x = x.shallow_clone();
        for layer in &self.layers {
            x = layer.forward(&x, time, context)?;
            skips.push(x.shallow_clone());
        }
        if let Some(down) = &self.down {
            x = down.forward(&x)?;
            skips.push(x.shallow_clone());
        }
        Ok(x)
    }

    pub(super) fn projections(&mut self) -> impl Iterator<Item = &mut Projection> {
        let Self { layers, down } = self;
        layers.iter_mut().flat_map(Layer::projections).chain(down.iter_mut().map(Downsample::projection))
    }
}

/// The innermost part: a residual block, a transformer, a residual block.
#[derive(Debug)]
pub(super) struct Mid {
    first: Resnet,
    transformer: Transformer,
    second: Resnet,
}

impl Mid {
    pub(super) fn new(scope: &Scope<'_>, config: &UnetConfig) -> Result<Self> {
        let level = config.levels() - 1;
        let channels = config.block_out_channels[level];
        let resnet = |i: usize| Resnet::new(&(scope / "resnets" / i), resnet_shape(channels, channels, config));
        Ok(Self {
            first: resnet(0)?,
            transformer: Transformer::new(&(scope / "attentions" / 0), transformer_shape(channels, level, config))?,
            second: resnet(1)?,
        })
    }

    /// `[b, c, h, w]` → the same.
    pub(super) fn forward(&self, x: &Tensor, time: &Tensor, context: &Context) -> Result<Tensor> {
        let x = self.first.forward(x, Some(time))?;
        let x = self.transformer.forward(&x, context)?;
        self.second.forward(&x, Some(time))
    }

    pub(super) fn projections(&mut self) -> impl Iterator<Item = &mut Projection> {
        let Self { first, transformer, second } = self;
        first.projections().chain(transformer.projections()).chain(second.projections())
    }
}

/// One level on the way up.
#[derive(Debug)]
pub(super) struct Up {
    layers: Vec<Layer>,
    up: Option<Upsample>,
}

impl Up {
    /// `step` counts from the innermost level outwards, as the checkpoint's names do.
    pub(super) fn new(scope: &Scope<'_>, step: usize, config: &UnetConfig) -> Result<Self> {
        let channels = &config.block_out_channels;
        let level = channels.len() - 1 - step;
        let output = channels[level];
        let below = channels[(level + 1).min(channels.len() - 1)]; // what the level below hands up
        let count = config.layers_per_block + 1;
        let layers = (0..count)
            .map(|i| {
                let hidden = if i == 0 { below } else { output };
                // The last skip of a level was made by the level before, or by the first convolution.
                let skip = if i + 1 == count { channels[level.saturating_sub(1)] } else { output };
                Layer::new(scope, i, [hidden + skip, output], level, config.up_block_types[step], config)
            })
            .collect::<Result<_>>()?;
        let up = match step + 1 < channels.len() {
            true => Some(Upsample::new(&(scope / "upsamplers" / 0), output)?),
            false => None,
        };
        Ok(Self { layers, up })
    }

    /// `x` `[b, c, h, w]` → `[b, c', 2h, 2w]`, or `[b, c', h, w]` at the outermost level.
    pub(super) fn forward(
        &self,
        x: &Tensor,
        time: &Tensor,
        context: &Context,
        skips: &mut Vec<Tensor>,
    ) -> Result<Tensor> {
        let mut x = x.shallow_clone();
        for layer in &self.layers {
            let Some(skip) = skips.pop() else {
                return Err(Error::Config {
                    component: "unet",
                    option: "layers_per_block",
                    reason: "leaves fewer skips than the way up takes".into(),
                });
            };
            x = layer.forward(&Tensor::f_cat(&[x, skip], 1)?, time, context)?;
        }
        match (&self.up, skips.last()) {
            (Some(up), Some(next)) => {
                // The size of the next skip, so that latents need not be multiples of 8.
                let [_, _, h, w] = dims4("skip", next)?;
                up.forward(&x, Some([h, w]))
            }
            _ => Ok(x),
        }
    }

    pub(super) fn projections(&mut self) -> impl Iterator<Item = &mut Projection> {
        let Self { layers, up } = self;
        layers.iter_mut().flat_map(Layer::projections).chain(up.iter_mut().map(Upsample::projection))
    }
}

fn resnet_shape(input: usize, output: usize, config: &UnetConfig) -> ResnetShape {
    let time = Some(4 * config.block_out_channels[0]);
    ResnetShape { input, output, time, groups: config.norm_num_groups, eps: config.norm_eps }
}

/// `check` has seen that every level has heads and a depth.
fn transformer_shape(channels: usize, level: usize, config: &UnetConfig) -> TransformerShape {
    TransformerShape {
        channels,
        context: config.cross_attention_dim,
        heads: config.heads(level).unwrap_or(1),
        depth: config.transformer_layers_per_block.at(level).unwrap_or(1),
        groups: config.norm_num_groups,
        linear: config.use_linear_projection,
    }
}
