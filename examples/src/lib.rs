//! What examples and tests share: a tiny UNet of diffusers-rs, as a model that this project has not written.

use diffusers::models::unet_2d::{BlockConfig, UNet2DConditionModel, UNet2DConditionModelConfig};
use tch::nn;

/// Width of the context that [`tiny_unet`] attends to.
pub const CONTEXT: i64 = 48;

/// Two levels of the structure of Stable Diffusion 1.5, random weights, about a second for a hundred steps.
///
/// Latents `[b, 4, h, w]`, `h` and `w` even; context `[b, t, 48]`. Widths are multiples of 32 because diffusers-rs gives
/// the norms of residual blocks 32 groups whatever its configuration says.
pub fn tiny_unet(variables: nn::Path<'_>) -> UNet2DConditionModel {
    let config = UNet2DConditionModelConfig {
        blocks: vec![
            BlockConfig { out_channels: 32, use_cross_attn: true, attention_head_dim: 4 },
            BlockConfig { out_channels: 64, use_cross_attn: false, attention_head_dim: 4 },
        ],
        layers_per_block: 1,
        cross_attention_dim: CONTEXT,
        ..Default::default()
    };
    UNet2DConditionModel::new(variables, 4, 4, config)
}
