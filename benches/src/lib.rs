//! What the benches share: model shapes by name, random tensors, the tiny base.
//!
//! Nothing is measured here; each file under `benches/` answers one question, named in its first lines.

use std::{num::NonZeroUsize, path::Path};

use lora_core::{AdapterConfig, Backend, Draw, Method, Purpose, format::Component, target::Targets};
use lora_diffusion::unet::{Unet, UnetConfig};
use lora_torch::{Projection, Projections, Result, Torch, Weights};
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

/// The UNet of the bundled Stable Diffusion, in 32-bit floats on the CPU.
///
/// # Errors
/// If it does not lie in `assets/`.
pub fn tiny_unet() -> lora_diffusion::Result<Unet> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/tiny-sd/unet");
    let weights = Weights::open(&[folder.join("diffusion_pytorch_model.safetensors")])?.of(Component::Unet);
    Unet::new(&weights.root(&Torch::CPU), &UnetConfig::open(&folder.join("config.json"))?)
}

/// The projections of a UNet's attentions: what `--targets attention` trains.
///
/// # Errors
/// Never: the name is a known one.
pub fn attention(unet: &mut Unet) -> Result<Vec<&mut Projection>> {
    let targets = Targets::parse(["attention"])?;
    let wanted = |layer: &&mut Projection| targets.matches(Component::Unet, layer.path(), layer.is_conv_with_kernel());
    Ok(unet.projections().into_iter().filter(wanted).collect())
}
