//! CLIP's text encoder (Radford et al. 2021, arXiv 2103.00020, §2.4), in OpenAI's and in OpenCLIP's variant.
//!
//! ```text
//! ids ─► token + position ─► [ norm ─► attention ─► + ─► norm ─► MLP ─► + ] × layers ─► final norm ─► last
//!                                                                                        └► row of the end ─► pooled ─► projection
//! ```
//!
//! Attention is causal and nothing else is masked: padding is attended to. Axes: `b` prompts, `s` ids, `d` width.

use std::path::Path;

use lora_torch::{Projection, Projections, Scope};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::{
    Error, Result,
    config::read_json,
    layers::{LayerNorm, attend},
};

/// The activation between the two layers of the MLP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// `x · σ(1.702 x)`: OpenAI.
    QuickGelu,
    /// `x · Φ(x)`: OpenCLIP.
    Gelu,
}

/// A text encoder as its `config.json` describes it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ClipConfig {
    /// Number of words.
    pub vocab_size: usize,
    /// `d`.
    pub hidden_size: usize,
    /// Width inside the MLP.
    pub intermediate_size: usize,
    /// Number of layers.
    pub num_hidden_layers: usize,
    /// Heads of every attention.
    pub num_attention_heads: usize,
    /// The most ids that it can read.
    #[serde(default = "default_positions")]
    pub max_position_embeddings: usize,
    /// The MLP's activation.
    #[serde(default = "default_activation")]
    pub hidden_act: Activation,
    /// Added to variances.
    #[serde(default = "default_eps")]
    pub layer_norm_eps: f64,
    /// Width of the projection, where the checkpoint has one.
    #[serde(default)]
    pub projection_dim: usize,
    /// The id whose row is the pooled output; 2 stands for "the largest id", as in the published SD 1.5 files.
    #[serde(default = "default_end")]
    pub eos_token_id: i64,
}

fn default_positions() -> usize {
    77
}

fn default_activation() -> Activation {
    Activation::QuickGelu
}

fn default_eps() -> f64 {
    1e-5
}

fn default_end() -> i64 {
    49407
}

impl ClipConfig {
    /// SD 1.5, and the first encoder of SDXL (openai/clip-vit-large-patch14, `config.json`, `text_config`).
    pub fn vit_l() -> Self {
        Self {
            vocab_size: 49408,
            hidden_size: 768,
            intermediate_size: 3072,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            max_position_embeddings: 77,
            hidden_act: Activation::QuickGelu,
            layer_norm_eps: 1e-5,
            projection_dim: 768,
            eos_token_id: 49407,
        }
    }

    /// SD 2.1: OpenCLIP ViT-H without its last layer (stabilityai/stable-diffusion-2-1, `text_encoder/config.json`).
    pub fn vit_h() -> Self {
        Self {
            hidden_size: 1024,
            intermediate_size: 4096,
            num_hidden_layers: 23,
            num_attention_heads: 16,
            hidden_act: Activation::Gelu,
            projection_dim: 512,
            ..Self::vit_l()
        }
    }

    /// The second encoder of SDXL: OpenCLIP ViT-bigG (stabilityai/stable-diffusion-xl-base-1.0, `text_encoder_2/config.json`).
    pub fn vit_big_g() -> Self {
        Self {
            hidden_size: 1280,
            intermediate_size: 5120,
            num_hidden_layers: 32,
            num_attention_heads: 20,
            hidden_act: Activation::Gelu,
            projection_dim: 1280,
            ..Self::vit_l()
        }
    }

    /// Reads a `config.json`.
    ///
    /// # Errors
    /// If the file cannot be read, or describes something else.
    pub fn open(path: &Path) -> Result<Self> {
        read_json(path)
    }
}

/// What the encoder says of a batch of prompts.
#[derive(Debug)]
pub struct TextOutput {
    /// After all layers and the final norm, `[b, s, d]`: what SD 1.5 and 2.1 condition on.
    pub last: Tensor,
    /// Before the last layer, without a norm, `[b, s, d]`: what SDXL conditions on.
    pub penultimate: Tensor,
    /// The row of `last` at the first end mark, `[b, d]`.
    pub pooled: Tensor,
    /// The projection of `pooled`, `[b, projection]`, where the checkpoint has one: SDXL's pooled embedding.
    pub projected: Option<Tensor>,
}

/// The text encoder.
#[derive(Debug)]
pub struct Clip {
    words: Tensor,
    positions: Tensor,
    layers: Vec<Layer>,
    final_norm: LayerNorm,
    projection: Option<Projection>,
    end: i64,
}

impl Clip {
    /// Reads the weights; names may start with `text_model.` or not.
    ///
    /// # Errors
    /// If a tensor is missing or does not fit the configuration.
    pub fn new(scope: &Scope<'_>, config: &ClipConfig) -> Result<Self> {
        let width = config.hidden_size;
        if config.num_attention_heads == 0 || !width.is_multiple_of(config.num_attention_heads) {
            return Err(Error::Config {
                component: "text_encoder",
                option: "num_attention_heads",
                reason: format!("is {}, which does not divide {width}", config.num_attention_heads),
            });
        }
        let body = scope / "text_model";
        let body = if body.has("final_layer_norm.weight") { body } else { scope.clone() };
        let embeddings = &body / "embeddings";
        let layers = &body / "encoder" / "layers";
        Ok(Self {
            words: embeddings.tensor("token_embedding.weight", &[config.vocab_size, width])?,
            positions: embeddings.tensor("position_embedding.weight", &[config.max_position_embeddings, width])?,
            layers: (0..config.num_hidden_layers).map(|i| Layer::new(&(&layers / i), config)).collect::<Result<_>>()?,
            final_norm: LayerNorm::new(&(&body / "final_layer_norm"), width, config.layer_norm_eps)?,
            projection: match scope.has("text_projection.weight") {
                true => Some(Projection::linear(&(scope / "text_projection"), [config.projection_dim, width], false)?),
                false => None,
            },
            end: config.eos_token_id,
        })
    }

    /// Everything that a base may want to know of the prompts: `ids` `[b, s]`, whole numbers.
    ///
    /// # Errors
    /// If an id is outside of the vocabulary or there are more than the encoder can read.
    pub fn forward(&self, ids: &Tensor) -> Result<TextOutput> {
        let (before_last, last_layer) = self.layers.split_at(self.layers.len().saturating_sub(1));
        let input = self.embed(ids)?;
        let penultimate = self.run(input, before_last, ids)?;
        let last = self.run(penultimate.shallow_clone(), last_layer, ids)?;
        let last = self.final_norm.forward(&last)?; // [b·s, d]
        let pooled = self.pool(&last, ids)?;
        let projected = self.projection.as_ref().map(|projection| projection.forward(&pooled)).transpose()?;
        let [last, penultimate] = [self.sequences(&last, ids)?, self.sequences(&penultimate, ids)?];
        Ok(TextOutput { last, penultimate, pooled, projected })
    }

    /// What SD 1.5 and 2.1 condition on: the layers less the last `skip` of them, then the final norm; `[b, s, d]`.
    ///
    /// `skip` 1 is the "clip skip 2" of kohya and A1111, and the `clip_skip=1` of diffusers.
    ///
    /// # Errors
    /// As [`forward`](Self::forward), or if there are not so many layers to skip.
    pub fn context(&self, ids: &Tensor, skip: usize) -> Result<Tensor> {
        let hidden = self.run(self.embed(ids)?, self.without_last(skip)?, ids)?;
        self.sequences(&self.final_norm.forward(&hidden)?, ids)
    }

    /// The output of the layers less the last `skip` of them, without a norm, `[b, s, d]`.
    ///
    /// # Errors
    /// As [`context`](Self::context).
    pub fn hidden(&self, ids: &Tensor, skip: usize) -> Result<Tensor> {
        self.sequences(&self.run(self.embed(ids)?, self.without_last(skip)?, ids)?, ids)
    }

    fn without_last(&self, skip: usize) -> Result<&[Layer]> {
        let layers = self.layers.len();
        let kept = layers.checked_sub(skip).filter(|kept| *kept > 0).ok_or_else(|| Error::Request {
            option: "--clip-skip",
            reason: format!("leaves nothing of the {layers} layers of the text encoder"),
        })?;
        Ok(&self.layers[..kept])
    }

    fn embed(&self, ids: &Tensor) -> Result<Tensor> {
        let &[_, s] = ids.size().as_slice() else {
            return Err(Error::Shape { what: "ids", actual: ids.size(), expected: "[prompts, ids]" });
        };
        let words = Tensor::f_embedding(&self.words, ids, -1, false, false)?; // [b, s, d]
        Ok(words.f_add(&self.positions.f_narrow(0, 0, s)?)?.f_flatten(0, 1)?) // [b·s, d]
    }

    fn run(&self, mut x: Tensor, layers: &[Layer], ids: &Tensor) -> Result<Tensor> {
        let batch = ids.size()[0];
        for layer in layers {
            x = layer.forward(&x, batch)?;
        }
        Ok(x)
    }

    fn sequences(&self, rows: &Tensor, ids: &Tensor) -> Result<Tensor> {
        let width = self.positions.size()[1];
        Ok(rows.f_view([ids.size()[0], -1, width])?)
    }

    fn pool(&self, rows: &Tensor, ids: &Tensor) -> Result<Tensor> {
        // 2 was never CLIP's end mark; files that say so mean the largest id, which is the end mark.
        let rank = if self.end == 2 { ids.shallow_clone() } else { ids.f_eq(self.end)?.f_to_kind(Kind::Int)? };
        let at = rank.f_argmax(1, true)?; // [b, 1], the first of equals
        let [batch, s] = [ids.size()[0], ids.size()[1]];
        let first = Tensor::f_arange_start_step(0, batch * s, s, (Kind::Int64, ids.device()))?.f_view([-1, 1])?;
        Ok(rows.f_index_select(0, &at.f_add(&first)?.f_flatten(0, 1)?)?) // [b, d]
    }
}

impl Projections for Clip {
    fn projections(&mut self) -> Vec<&mut Projection> {
        let layers = self.layers.iter_mut().flat_map(|layer| {
            let Layer { query, key, value, out, wide, narrow, .. } = layer;
            [query, key, value, out, wide, narrow]
        });
        layers.chain(&mut self.projection).collect()
    }
}

/// One layer: attention and MLP, each on its normalised input and added to it.
#[derive(Debug)]
struct Layer {
    attention_norm: LayerNorm,
    query: Projection,
    key: Projection,
    value: Projection,
    out: Projection,
    mlp_norm: LayerNorm,
    wide: Projection,
    narrow: Projection,
    heads: i64,
    activation: Activation,
}

impl Layer {
    fn new(scope: &Scope<'_>, config: &ClipConfig) -> Result<Self> {
        let (width, inner) = (config.hidden_size, config.intermediate_size);
        let attention = |name| Projection::linear(&(scope / "self_attn" / name), [width, width], true);
        Ok(Self {
            attention_norm: LayerNorm::new(&(scope / "layer_norm1"), width, config.layer_norm_eps)?,
            query: attention("q_proj")?,
            key: attention("k_proj")?,
            value: attention("v_proj")?,
            out: attention("out_proj")?,
            mlp_norm: LayerNorm::new(&(scope / "layer_norm2"), width, config.layer_norm_eps)?,
            wide: Projection::linear(&(scope / "mlp" / "fc1"), [inner, width], true)?,
            narrow: Projection::linear(&(scope / "mlp" / "fc2"), [width, inner], true)?,
            heads: config.num_attention_heads as i64,
            activation: config.hidden_act,
        })
    }

    /// `batch` sequences of rows, `[b·s, d]` → the same.
    fn forward(&self, x: &Tensor, batch: i64) -> Result<Tensor> {
        let normed = self.attention_norm.forward(x)?;
        let [q, k, v] = [self.query.forward(&normed)?, self.key.forward(&normed)?, self.value.forward(&normed)?];
        let x = self.out.forward(&attend(&q, &k, &v, batch, self.heads, true)?)?.f_add_(x)?;
        let wide = self.wide.forward(&self.mlp_norm.forward(&x)?)?; // [b·s, inner]
        let wide = match self.activation {
            Activation::QuickGelu => wide.f_mul(&wide.f_mul_scalar(1.702)?.f_sigmoid()?)?,
            Activation::Gelu => wide.f_gelu("none")?,
        };
        Ok(self.narrow.forward(&wide)?.f_add_(&x)?)
    }
}
