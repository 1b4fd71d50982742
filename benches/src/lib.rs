//! What the benches share: model shapes by name, and random tensors.
//!
//! Nothing is measured here; each file under `benches/` answers one question, named in its first lines.

use lora_core::{AdapterConfig, Draw, Method, Purpose};
use lora_torch::{Result, Torch};
use std::num::NonZeroUsize;
use tch::Tensor;

/// A linear layer of a real model, as one batch sees it.
#[derive(Debug, Clone, Copy)]
pub struct LinearShape {
    /// The model and the place.
    pub name: &'static str,
    /// Tokens of the whole batch.
    pub tokens: usize,
    /// Width of the input.
    pub inner: usize,
    /// Width of the output.
    pub out: usize,
}

/// Self-attention projections and the widest feed-forward layer, each where its model has most tokens.
pub const LINEARS: [LinearShape; 4] = [
    LinearShape { name: "tiny-sd to_q, batch 4, 128 px", tokens: 4 * 256, inner: 96, out: 96 },
    LinearShape { name: "tiny-sd ff, batch 4, 128 px", tokens: 4 * 256, inner: 96, out: 768 },
    LinearShape { name: "sd 1.5 to_q, batch 1, 512 px", tokens: 4096, inner: 320, out: 320 },
    LinearShape { name: "sd 1.5 ff, batch 1, 512 px", tokens: 4096, inner: 320, out: 2560 },
];

/// Normal numbers of deviation 1; the same for the same `seed`.
///
/// # Errors
/// If memory runs out.
pub fn normal(seed: u64, shape: &[usize]) -> Result<Tensor> {
    use lora_core::Backend;
    let values = Draw::new(seed, Purpose::Sample, 0, 0).normal(shape.iter().product(), 1.0);
    Ok(Torch::CPU.tensor(&values, shape)?)
}

/// Plain LoRA with `alpha = rank`.
///
/// # Errors
/// Never for a rank that is not 0.
pub fn lora(rank: usize) -> Result<AdapterConfig> {
    let rank = NonZeroUsize::new(rank).unwrap_or(NonZeroUsize::MIN);
    Ok(AdapterConfig::new(Method::Lora, rank, rank.get() as f64)?)
}
