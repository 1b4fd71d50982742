//! The transformer over the positions of a feature map (Rombach et al. 2022, arXiv 2112.10752, §3.3 and table 13).
//!
//! ```text
//! x ─► norm ─► proj_in ─► [ norm ─► self-attention ─► + ─► norm ─► cross-attention ─► + ─► norm ─► GEGLU ─► + ] × depth
//! └──────────────────────────────────── + ◄─ proj_out ◄──────────────────────────────────────────────────────────────┘
//! ```
//!
//! Inside, a feature map is a matrix of rows, one a position: `[b·s, c]` with `s = h·w`; on rows the outer projections are
//! matrix products too, whether the checkpoint stores them as linear layers or as 1×1 convolutions. Matrices have no views between a
//! product and the addition that follows it, so additions go into the product's own memory. The context is the rows
//! `[b·t, d]`.

use lora_core::ConvGeometry;
use lora_torch::{Projection, Scope};
use tch::{Device, Tensor};

use crate::{
    Error, Result,
    layers::{GroupNorm, LayerNorm, attend, dims4},
};

/// Added to variances before a transformer; residual blocks have 1e-5.
const GROUP_EPS: f64 = 1e-6;
const LAYER_EPS: f64 = 1e-5;

/// What a transformer is built of.
#[derive(Debug, Clone, Copy)]
pub(super) struct TransformerShape {
    /// Channels of the feature map.
    pub(super) channels: usize,
    /// Width of the context.
    pub(super) context: usize,
    /// Heads of the attentions.
    pub(super) heads: usize,
    /// Number of blocks.
    pub(super) depth: usize,
    /// Groups of the first norm.
    pub(super) groups: usize,
    /// Whether the outer projections are linear layers or 1×1 convolutions.
    pub(super) linear: bool,
}

/// The text that is attended to, as rows `[b·t, d]`.
#[derive(Debug)]
pub(super) struct Context {
    pub(super) rows: Tensor,
}

/// A transformer with its outer projections.
#[derive(Debug)]
pub(super) struct Transformer {
    norm: GroupNorm,
    proj_in: Projection,
    blocks: Vec<Block>,
    proj_out: Projection,
}

impl Transformer {
    pub(super) fn new(scope: &Scope<'_>, shape: TransformerShape) -> Result<Self> {
        let TransformerShape { channels, groups, depth, linear, .. } = shape;
        let outer = |name: &str| match linear {
            true => Projection::linear(&(scope / name), [channels, channels], true),
            false => Projection::conv2d(&(scope / name), [channels, channels, 1, 1], ConvGeometry::POINTWISE, true),
        };
        Ok(Self {
            norm: GroupNorm::new(&(scope / "norm"), channels, groups, GROUP_EPS)?,
            proj_in: outer("proj_in")?,
            blocks: (0..depth)
                .map(|i| Block::new(&(scope / "transformer_blocks" / i), shape))
                .collect::<Result<_>>()?,
            proj_out: outer("proj_out")?,
        })
    }

    /// `x` `[b, c, h, w]` → the same.
    pub(super) fn forward(&self, x: &Tensor, context: &Context) -> Result<Tensor> {
        let [b, c, h, w] = dims4("feature map", x)?;
        let normed = self.norm.forward(x)?.f_permute([0, 2, 3, 1])?.f_reshape([b * h * w, c])?; // [b·s, c]
        let mut rows = self.proj_in.forward(&normed)?; // [b·s, c]
        for block in &self.blocks {
            rows = block.forward(rows, context, b)?;
        }
        let change = self.proj_out.forward(&rows)?.f_view([b, h, w, c])?.f_permute([0, 3, 1, 2])?; // [b, c, h, w]
        Ok(x.f_add(&change)?) // `x` first: the sum takes its layout
    }

    pub(super) fn projections(&mut self) -> impl Iterator<Item = &mut Projection> {
        let Self { proj_in, blocks, proj_out, .. } = self;
        [proj_in].into_iter().chain(blocks.iter_mut().flat_map(Block::projections)).chain([proj_out])
    }
}

/// Self-attention, cross-attention and a feed-forward layer, each on its normalised input and added to it.
#[derive(Debug)]
struct Block {
    norm1: LayerNorm,
    attention: Attention,
    norm2: LayerNorm,
    cross_attention: Attention,
    norm3: LayerNorm,
    feed_forward: FeedForward,
}

impl Block {
    fn new(scope: &Scope<'_>, shape: TransformerShape) -> Result<Self> {
        let TransformerShape { channels, context, heads, .. } = shape;
        let norm = |name: &str| LayerNorm::new(&(scope / name), channels, LAYER_EPS);
        Ok(Self {
            norm1: norm("norm1")?,
            attention: Attention::new(&(scope / "attn1"), channels, channels, heads)?,
            norm2: norm("norm2")?,
            cross_attention: Attention::new(&(scope / "attn2"), channels, context, heads)?,
            norm3: norm("norm3")?,
            feed_forward: FeedForward::new(&(scope / "ff" / "net"), channels)?,
        })
    }

    /// `batch` maps of rows, `[b·s, c]` → the same.
    fn forward(&self, x: Tensor, context: &Context, batch: i64) -> Result<Tensor> {
        let normed = self.norm1.forward(&x)?;
        let x = self.attention.forward(&normed, &normed, batch)?.f_add_(&x)?;
        let x = self.cross_attention.forward(&self.norm2.forward(&x)?, &context.rows, batch)?.f_add_(&x)?;
        Ok(self.feed_forward.forward(&self.norm3.forward(&x)?)?.f_add_(&x)?)
    }

    fn projections(&mut self) -> impl Iterator<Item = &mut Projection> {
        let Self { attention, cross_attention, feed_forward, .. } = self;
        attention.projections().into_iter().chain(cross_attention.projections()).chain(feed_forward.projections())
    }
}

/// Attention of `x` to `context`, which is `x` itself in self-attention.
#[derive(Debug)]
struct Attention {
    query: Projection,
    key: Projection,
    value: Projection,
    out: Projection,
    heads: i64,
}

impl Attention {
    fn new(scope: &Scope<'_>, channels: usize, context: usize, heads: usize) -> Result<Self> {
        Ok(Self {
            query: Projection::linear(&(scope / "to_q"), [channels, channels], false)?,
            key: Projection::linear(&(scope / "to_k"), [channels, context], false)?,
            value: Projection::linear(&(scope / "to_v"), [channels, context], false)?,
            out: Projection::linear(&(scope / "to_out" / 0), [channels, channels], true)?,
            heads: heads as i64,
        })
    }

    /// `x` `[b·s, c]`, `context` `[b·t, d]` → `[b·s, c]`.
    fn forward(&self, x: &Tensor, context: &Tensor, batch: i64) -> Result<Tensor> {
        let [q, k, v] = [self.query.forward(x)?, self.key.forward(context)?, self.value.forward(context)?];
        Ok(self.out.forward(&attend(&q, &k, &v, batch, self.heads, false)?)?)
    }

    fn projections(&mut self) -> [&mut Projection; 4] {
        [&mut self.query, &mut self.key, &mut self.value, &mut self.out]
    }
}

/// GEGLU: one half of a wide layer, gated by the other (Shazeer 2020, arXiv 2002.05202, eq. 6), and back.
#[derive(Debug)]
struct FeedForward {
    wide: Projection,
    narrow: Projection,
}

impl FeedForward {
    fn new(scope: &Scope<'_>, channels: usize) -> Result<Self> {
        let inner = 4 * channels;
        Ok(Self {
            wide: Projection::linear(&(scope / 0 / "proj"), [2 * inner, channels], true)?,
            narrow: Projection::linear(&(scope / 2), [channels, inner], true)?,
        })
    }

    /// `[b·s, c]` → the same.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let [value, gate] = self.halves(x)?; // [b·s, 4c] each
        Ok(self.narrow.forward(&value.f_mul(&gate.f_gelu("none")?)?)?)
    }

    /// The two halves of the wide layer's output.
    fn halves(&self, x: &Tensor) -> Result<[Tensor; 2]> {
        match self.wide.bias() {
            // Two products instead of one: the backward pass then need not join the gradients of the halves, which on the
            // CPU takes longer than the second product. On CUDA it is the number of kernels that counts.
            Some(bias) if self.wide.is_bare() && !self.wide.is_quantised() && x.device() == Device::Cpu => {
                let (weight, inner) = (self.wide.weight()?, bias.size()[0] / 2);
                let half =
                    |start| x.f_linear(&weight.f_narrow(0, start, inner)?, Some(&bias.f_narrow(0, start, inner)?));
                Ok([half(0)?, half(inner)?])
            }
            _ => {
                let halves = self.wide.forward(x)?.f_chunk(2, -1)?;
                halves.try_into().map_err(|halves: Vec<Tensor>| Error::Shape {
                    what: "wide layer's halves",
                    actual: vec![halves.len() as i64],
                    expected: "two tensors",
                })
            }
        }
    }

    fn projections(&mut self) -> [&mut Projection; 2] {
        [&mut self.wide, &mut self.narrow]
    }
}
