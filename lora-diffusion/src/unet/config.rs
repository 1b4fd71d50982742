//! A UNet as its `config.json` describes it.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::{
    Error, Result,
    config::{PerLevel, read_json},
};

/// What one level of the UNet holds besides residual blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum LevelKind {
    /// A transformer after every residual block.
    #[serde(rename = "CrossAttnDownBlock2D", alias = "CrossAttnUpBlock2D")]
    CrossAttention,
    /// Nothing.
    #[serde(rename = "DownBlock2D", alias = "UpBlock2D")]
    Plain,
}

/// What joins the time embedding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Addition {
    /// Pooled text and six sizes: SDXL.
    TextTime,
}

/// The parts of diffusers' `UNet2DConditionModel` that Stable Diffusion 1.5, 2.1 and XL use.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct UnetConfig {
    /// Sides of a latent that the base was trained on.
    pub sample_size: usize,
    /// Channels of a latent; 9 for inpainting bases.
    pub in_channels: usize,
    /// Channels of the prediction.
    pub out_channels: usize,
    /// Channels of each level, from the outermost inwards.
    pub block_out_channels: Vec<usize>,
    /// Kind of each level, from the outermost inwards.
    pub down_block_types: Vec<LevelKind>,
    /// Kind of each level, from the innermost outwards.
    pub up_block_types: Vec<LevelKind>,
    /// Residual blocks of a level on the way down; one more on the way up.
    pub layers_per_block: usize,
    /// Width of the context.
    pub cross_attention_dim: usize,
    /// Number of heads of each level, whatever the name says.
    pub attention_head_dim: PerLevel,
    /// The same under its right name, in the few files that have it.
    pub num_attention_heads: Option<PerLevel>,
    /// Blocks of each transformer.
    pub transformer_layers_per_block: PerLevel,
    /// Whether transformers begin and end with a linear layer instead of a 1×1 convolution.
    pub use_linear_projection: bool,
    /// Groups of the norms.
    pub norm_num_groups: usize,
    /// Added to variances in residual blocks; transformers have 1e-6.
    pub norm_eps: f64,
    /// What joins the time embedding.
    pub addition_embed_type: Option<Addition>,
    /// Width of the embedding of one size.
    pub addition_time_embed_dim: Option<usize>,
    /// Width of pooled text and six sizes together.
    pub projection_class_embeddings_input_dim: Option<usize>,
    /// Whether cosines come before sines in the time embedding.
    pub flip_sin_to_cos: bool,
    /// What is taken from the number of frequencies.
    pub freq_shift: f64,
    /// Options that change the network in ways that are not built here; a value that matters is refused.
    #[serde(flatten)]
    pub other: serde_json::Map<String, serde_json::Value>,
}

impl Default for UnetConfig {
    /// SD 1.5 (stable-diffusion-v1-5, `unet/config.json`).
    fn default() -> Self {
        use LevelKind::{CrossAttention, Plain};
        Self {
            sample_size: 64,
            in_channels: 4,
            out_channels: 4,
            block_out_channels: vec![320, 640, 1280, 1280],
            down_block_types: vec![CrossAttention, CrossAttention, CrossAttention, Plain],
            up_block_types: vec![Plain, CrossAttention, CrossAttention, CrossAttention],
            layers_per_block: 2,
            cross_attention_dim: 768,
            attention_head_dim: PerLevel::Same(8),
            num_attention_heads: None,
            transformer_layers_per_block: PerLevel::Same(1),
            use_linear_projection: false,
            norm_num_groups: 32,
            norm_eps: 1e-5,
            addition_embed_type: None,
            addition_time_embed_dim: None,
            projection_class_embeddings_input_dim: None,
            flip_sin_to_cos: true,
            freq_shift: 0.0,
            other: serde_json::Map::new(),
        }
    }
}

impl UnetConfig {
    /// SD 1.5.
    pub fn sd_v1_5() -> Self {
        Self::default()
    }

    /// SD 2.1 (stabilityai/stable-diffusion-2-1, `unet/config.json`).
    pub fn sd_v2_1() -> Self {
        Self {
            sample_size: 96,
            cross_attention_dim: 1024,
            attention_head_dim: PerLevel::Each(vec![5, 10, 20, 20]),
            use_linear_projection: true,
            ..Self::default()
        }
    }

    /// SDXL (stabilityai/stable-diffusion-xl-base-1.0, `unet/config.json`).
    pub fn sdxl() -> Self {
        use LevelKind::{CrossAttention, Plain};
        Self {
            sample_size: 128,
            block_out_channels: vec![320, 640, 1280],
            down_block_types: vec![Plain, CrossAttention, CrossAttention],
            up_block_types: vec![CrossAttention, CrossAttention, Plain],
            cross_attention_dim: 2048,
            attention_head_dim: PerLevel::Each(vec![5, 10, 20]),
            transformer_layers_per_block: PerLevel::Each(vec![1, 2, 10]),
            use_linear_projection: true,
            addition_embed_type: Some(Addition::TextTime),
            addition_time_embed_dim: Some(256),
            projection_class_embeddings_input_dim: Some(2816),
            ..Self::default()
        }
    }

    /// Reads a `config.json`.
    ///
    /// # Errors
    /// If the file cannot be read, or describes something else.
    pub fn open(path: &Path) -> Result<Self> {
        read_json(path)
    }

    /// Number of levels.
    pub fn levels(&self) -> usize {
        self.block_out_channels.len()
    }

    /// Heads of the attentions of a level.
    pub(super) fn heads(&self, level: usize) -> Option<usize> {
        self.num_attention_heads.as_ref().unwrap_or(&self.attention_head_dim).at(level)
    }

    /// Refuses what would be built wrongly.
    ///
    /// # Errors
    /// If lists have other lengths than there are levels, widths do not divide, or an option asks for another network.
    pub(super) fn check(&self) -> Result<()> {
        let wrong = |option, reason: String| Err(Error::Config { component: "unet", option, reason });
        let levels = self.levels();
        if levels == 0 {
            return wrong("block_out_channels", "is empty".into());
        }
        for (option, kinds) in [("down_block_types", &self.down_block_types), ("up_block_types", &self.up_block_types)]
        {
            if kinds.len() != levels {
                return wrong(option, format!("names {} levels, `block_out_channels` {levels}", kinds.len()));
            }
        }
        if self.layers_per_block == 0 {
            return wrong("layers_per_block", "is 0".into());
        }
        for (level, &channels) in self.block_out_channels.iter().enumerate() {
            if self.norm_num_groups == 0 || channels % self.norm_num_groups != 0 {
                return wrong(
                    "norm_num_groups",
                    format!("is {}, which does not divide {channels}", self.norm_num_groups),
                );
            }
            match self.heads(level) {
                Some(heads) if heads > 0 && channels % heads == 0 => {}
                Some(heads) => {
                    return wrong("attention_head_dim", format!("has {heads} heads for {channels} channels"));
                }
                None => return wrong("attention_head_dim", format!("has no value for level {level}")),
            }
            if self.transformer_layers_per_block.at(level).is_none() {
                return wrong("transformer_layers_per_block", format!("has no value for level {level}"));
            }
        }
        if self.addition_embed_type.is_some()
            && (self.addition_time_embed_dim.is_none() || self.projection_class_embeddings_input_dim.is_none())
        {
            return wrong(
                "addition_embed_type",
                "needs `addition_time_embed_dim` and `projection_class_embeddings_input_dim`".into(),
            );
        }
        self.check_other()
    }

    fn check_other(&self) -> Result<()> {
        for (option, harmless) in OTHER {
            let value = self.other.get(*option).unwrap_or(&serde_json::Value::Null);
            let written = value.to_string();
            let known = value.is_null() || harmless.contains(&written.as_str());
            if !known {
                return Err(Error::Config {
                    component: "unet",
                    option,
                    reason: format!("is {value}, expected {}", harmless.first().unwrap_or(&"null")),
                });
            }
        }
        Ok(())
    }
}

/// Options that change the network, and the values of them that are built here.
const OTHER: &[(&str, &[&str])] = &[
    ("act_fn", &["\"silu\"", "\"swish\""]),
    ("attention_type", &["\"default\""]),
    ("center_input_sample", &["false"]),
    ("class_embed_type", &[]),
    ("class_embeddings_concat", &["false"]),
    ("conv_in_kernel", &["3"]),
    ("conv_out_kernel", &["3"]),
    ("cross_attention_norm", &[]),
    ("downsample_padding", &["1"]),
    ("dual_cross_attention", &["false"]),
    ("encoder_hid_dim_type", &[]),
    ("mid_block_only_cross_attention", &["false"]),
    ("mid_block_scale_factor", &["1", "1.0"]),
    ("mid_block_type", &["\"UNetMidBlock2DCrossAttn\""]),
    ("num_class_embeds", &[]),
    ("only_cross_attention", &["false"]),
    ("resnet_out_scale_factor", &["1.0", "1"]),
    ("resnet_skip_time_act", &["false"]),
    ("resnet_time_scale_shift", &["\"default\""]),
    ("reverse_transformer_layers_per_block", &[]),
    ("time_cond_proj_dim", &[]),
    ("time_embedding_act_fn", &[]),
    ("time_embedding_dim", &[]),
    ("time_embedding_type", &["\"positional\""]),
    ("timestep_post_act", &[]),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn published_configurations_are_sound() {
        for config in [UnetConfig::sd_v1_5(), UnetConfig::sd_v2_1(), UnetConfig::sdxl()] {
            config.check().unwrap();
        }
    }

    #[test]
    fn another_network_is_refused_by_the_name_of_its_option() {
        let text = r#"{"class_embed_type": "timestep", "attention_head_dim": 8}"#;
        let config: UnetConfig = serde_json::from_str(text).unwrap();
        assert!(config.check().unwrap_err().to_string().contains("`class_embed_type` is \"timestep\""));
        let config = UnetConfig { attention_head_dim: PerLevel::Each(vec![8, 8]), ..UnetConfig::default() };
        assert!(config.check().unwrap_err().to_string().contains("level 2"));
        let config = UnetConfig { norm_num_groups: 48, ..UnetConfig::default() };
        assert!(config.check().unwrap_err().to_string().contains("does not divide 320"));
    }
}
