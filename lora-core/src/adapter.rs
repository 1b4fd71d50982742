//! The adapter trait and its families, one file each.
//!
//! Formulas and file conventions follow `docs/formats.md`; each family names its paper.

mod any;
mod dora;
mod full;
mod glora;
mod ia3;
mod idle;
mod init;
mod loha;
mod lokr;
mod lora;
pub(crate) mod oft;
mod shape;
mod size;

pub use any::AnyAdapter;
pub use dora::{Direction, Dora, StrengthRule};
pub use full::Full;
pub use glora::{Glora, GloraOrder};
pub use ia3::{Ia3, Ia3Kind};
pub use idle::Idle;
pub use loha::Loha;
pub use lokr::{KronFactor, Lokr};
pub use lora::{Lora, Start};
pub use oft::{Boft, Cayley, Oft, OftSide};
pub use shape::Axis;
pub use size::UpdateSize;

use crate::{AdapterConfig, Backend, ConvGeometry, Draw, Result};

/// What kind of layer carries the adapter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Geometry {
    /// `y = x · Wᵀ`, `W` `[out, in]`.
    Linear,
    /// `y = x ⋆ W`, `W` `[out, in, kh, kw]`.
    Conv(ConvGeometry),
}

impl Geometry {
    /// The layer without its bias: `x` `[.., in]` or `[b, in, h, w]`.
    pub fn apply<B: Backend>(self, on: &B, x: &B::Tensor, weight: &B::Tensor) -> Result<B::Tensor> {
        match self {
            Self::Linear => on.linear(x, weight),
            Self::Conv(geometry) => on.conv2d(x, weight, geometry),
        }
    }
}

/// The frozen layer that an adapter sits on, as its forward pass sees it.
#[derive(Debug)]
pub struct Layer<'a, T> {
    /// `[out, in]` or `[out, in, kh, kw]`.
    pub weight: &'a T,
    /// `[out]`.
    pub bias: Option<&'a T>,
    /// How the weight is applied.
    pub geometry: Geometry,
}

/// A low-rank (or otherwise small) update of one frozen weight: `W' = W + strength · ΔW`.
///
/// For LoRA `ΔW = scale · B·A`, `scale = alpha / rank` (Hu et al. 2021, arXiv 2106.09685, eq. 3 and §4.1). `strength`
/// is what a person multiplies a loaded adapter by; 1 while training. Every family answers three questions the same
/// way: how it starts ([`init`](Self::init)), what it adds to an output ([`forward`](Self::forward)) and what the
/// merged weight is ([`merge`](Self::merge)). `forward` and `merge` agree for every strength.
pub trait Adapter<B: Backend>: Sized {
    /// A fresh adapter for the base weight `base`, `[out, in]` or `[out, in, kh, kw]`, whose `ΔW` is zero.
    fn init(on: &B, base: &B::Tensor, config: &AdapterConfig, draw: &mut Draw) -> Result<Self>;

    /// What multiplies the product of the factors; the one place where `alpha` meets `rank`.
    fn scale(&self) -> f64;

    /// The merged weight minus the base weight at strength 1, in the layout of `base`.
    fn delta(&self, on: &B, base: &B::Tensor) -> Result<B::Tensor>;

    /// The merged weight minus the base weight at `strength`, in the layout of `base`.
    ///
    /// `strength · ΔW` unless the family is not linear in it (DoRA, OFT).
    fn change(&self, on: &B, base: &B::Tensor, strength: f64) -> Result<B::Tensor> {
        on.scale(&self.delta(on, base)?, strength)
    }

    /// What is added to the layer's bias at `strength`, `[out]`; `None` for all families but those that touch it.
    fn bias_change(&self, on: &B, bias: Option<&B::Tensor>, strength: f64) -> Result<Option<B::Tensor>> {
        let _ = (on, bias, strength);
        Ok(None)
    }

    /// The merged weight at `strength`, in the layout of `base`, which is left as it was.
    ///
    /// Strength 0 gives the base back, bit for bit.
    fn merge(&self, on: &B, base: &B::Tensor, strength: f64) -> Result<B::Tensor> {
        if strength == 0.0 {
            return on.share(base);
        }
        on.add(base, &self.change(on, base, strength)?)
    }

    /// The merged bias at `strength`, `[out]`: `bias` itself unless the family touches it, and zero for a missing one.
    fn merge_bias(&self, on: &B, bias: Option<&B::Tensor>, strength: f64) -> Result<Option<B::Tensor>> {
        let change = if strength == 0.0 { None } else { self.bias_change(on, bias, strength)? };
        match (bias, change) {
            (Some(bias), Some(change)) => on.add(bias, &change).map(Some),
            (Some(bias), None) => on.share(bias).map(Some),
            (None, change) => Ok(change),
        }
    }

    /// The adapted output: `y` is what the frozen layer made of `x`, its bias included.
    ///
    /// Linear: `x` `[.., in]`, `y` `[.., out]`; conv: `x` `[b, in, h, w]`, `y` `[b, out, h', w']`. Families that can do
    /// so never form `ΔW`; this default forms it.
    fn forward(
        &self,
        on: &B,
        layer: &Layer<'_, B::Tensor>,
        x: &B::Tensor,
        y: &B::Tensor,
        strength: f64,
    ) -> Result<B::Tensor> {
        forward_through_change(self, on, layer, x, y, strength)
    }

    /// The tensors with the role that each plays, always in the same order; the frozen ones among them say so
    /// ([`Part::is_frozen`]).
    fn factors(&self) -> Vec<(Part, &B::Tensor)>;
}

/// The forward pass of a family that has to form the change of the weight.
fn forward_through_change<B: Backend>(
    adapter: &impl Adapter<B>,
    on: &B,
    layer: &Layer<'_, B::Tensor>,
    x: &B::Tensor,
    y: &B::Tensor,
    strength: f64,
) -> Result<B::Tensor> {
    if strength == 0.0 {
        return on.share(y);
    }
    let change = adapter.change(on, layer.weight, strength)?;
    let output = on.add(y, &layer.geometry.apply(on, x, &change)?)?;
    match adapter.bias_change(on, layer.bias, strength)? {
        Some(change) => on.add(&output, &shape::over_activations(on, &change, layer.geometry)?),
        None => Ok(output),
    }
}

/// The role of a tensor inside one adapter; the names of all files' keys map onto these.
///
/// Shapes are those of a linear layer · a convolution; see `docs/formats.md` §4.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Part {
    /// `A`, `[rank, in]` · `[rank, in, kh, kw]`.
    Down,
    /// `B`, `[out, rank]` · `[out, rank, 1, 1]`.
    Up,
    /// The core of a Tucker LoCon, `[rank, rank, kh, kw]`.
    Mid,
    /// `lora_B.bias` of peft, `[out]`.
    UpBias,
    /// Frozen: what `A` was at first, where the start is taken out of the update.
    StartDown,
    /// Frozen: what `B` was at first.
    StartUp,
    /// DoRA's magnitudes, `[out, 1, ..]` or `[1, in, ..]`.
    Magnitude,
    /// LoHa: `hada_w1_a`, `[out, rank]`.
    HadaW1A,
    /// LoHa: `hada_w1_b`, `[rank, in·kh·kw]`.
    HadaW1B,
    /// LoHa: `hada_w2_a`.
    HadaW2A,
    /// LoHa: `hada_w2_b`.
    HadaW2B,
    /// LoHa: core of the first half.
    HadaT1,
    /// LoHa: core of the second half.
    HadaT2,
    /// LoKr: the whole first factor.
    KronW1,
    /// LoKr: `lokr_w1_a`.
    KronW1A,
    /// LoKr: `lokr_w1_b`.
    KronW1B,
    /// LoKr: the whole second factor.
    KronW2,
    /// LoKr: `lokr_w2_a`.
    KronW2A,
    /// LoKr: `lokr_w2_b`.
    KronW2B,
    /// LoKr: core of the first factor, which LyCORIS reserves and never writes.
    KronT1,
    /// LoKr: core of the second factor.
    KronT2,
    /// GLoRA: `a1`.
    GloraA1,
    /// GLoRA: `a2`.
    GloraA2,
    /// GLoRA: `b1`.
    GloraB1,
    /// GLoRA: `b2`.
    GloraB2,
    /// Full difference of a weight (also of a norm), as `W`.
    Diff,
    /// Full difference of a bias, `[out]`.
    DiffBias,
    /// (IA)³: offsets from 1 (LyCORIS) or factors (peft).
    Ia3,
    /// Blocks of OFT (`[blocks, b, b]`, of peft `[blocks, b(b−1)/2]`) or BOFT (`[stages, blocks, b, b]`).
    OftBlocks,
    /// OFT, BOFT: row factors.
    Rescale,
}

impl Part {
    /// Whether training leaves this tensor as it is.
    pub fn is_frozen(self) -> bool {
        matches!(self, Self::StartDown | Self::StartUp)
    }
}
