//! What the benches share: model shapes by name, random tensors, the tiny base, a training objective on fixed inputs.
//!
//! Nothing is measured here; each file under `benches/` answers one question, named in its first lines.

use std::{num::NonZeroUsize, path::Path};

use lora_core::{AdapterConfig, Backend, Draw, Method, Purpose, format::Component, target::Targets};
use lora_diffusion::{
    BaseFiles,
    unet::{Added, Unet, UnetConfig},
};
use lora_torch::{
    Batch, Error, Model, Objective, Projection, Projections, Result, Target, Torch, TrainOptions, Trainer,
    optimizer::OptimizerConfig, schedule::Schedule,
};
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

/// The UNet of the bundled Stable Diffusion, and its configuration.
///
/// # Errors
/// If it does not lie in `assets/`, or memory runs out.
pub fn tiny_unet(on: &Torch) -> lora_diffusion::Result<(Unet, UnetConfig)> {
    let files = BaseFiles::find(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/tiny-sd"))?;
    Ok((files.load_unet(on)?, files.unet))
}

/// The projections of a UNet's attentions: what `--targets attention` trains.
///
/// # Errors
/// Never: the name is a known one.
pub fn attention(unet: &mut Unet) -> Result<Vec<&mut Projection>> {
    let targets = Targets::parse(["attention"])?;
    Ok(unet.projections().into_iter().filter(|layer| is_target(&targets, layer)).collect())
}

fn is_target(targets: &Targets, layer: &Projection) -> bool {
    targets.matches(Component::Unet, layer.path(), layer.is_conv_with_kernel())
}

/// Squared error of the predicted noise, on inputs that are the same in every step.
#[derive(Debug)]
pub struct NoisePrediction {
    unet: Unet,
    /// Noisy latents, timesteps, contexts, noise; of SDXL also pooled embeddings and sizes.
    inputs: Vec<Tensor>,
}

impl NoisePrediction {
    /// Random inputs of the sizes that a configuration asks for.
    ///
    /// # Errors
    /// If memory runs out.
    pub fn new(unet: Unet, config: &UnetConfig, batch: usize) -> Result<Self> {
        let (side, width) = (config.sample_size, config.cross_attention_dim);
        let timesteps: Vec<i64> = (0..batch as i64).map(|row| 37 + 211 * row % 1000).collect();
        let mut inputs = vec![
            normal(1, &[batch, 4, side, side])?,
            Tensor::f_from_slice(&timesteps)?,
            normal(2, &[batch, 77, width])?,
            normal(3, &[batch, 4, side, side])?,
        ];
        if let (Some(all), Some(each)) = (config.projection_class_embeddings_input_dim, config.addition_time_embed_dim)
        {
            let pixels = side as f32 * 8.0;
            let sizes = [pixels, pixels, 0.0, 0.0, pixels, pixels].repeat(batch);
            inputs.push(normal(4, &[batch, all - 6 * each])?);
            inputs.push(Tensor::f_from_slice(&sizes)?.f_view([-1, 6])?);
        }
        Ok(Self { unet, inputs })
    }
}

impl Model for NoisePrediction {
    fn loss(&self, inputs: &[Tensor]) -> Result<Tensor> {
        let [noisy, timesteps, context, noise, rest @ ..] = inputs else {
            return Err(Error::Config { option: "batch", reason: format!("has {} tensors, not 4", inputs.len()) });
        };
        let added = match rest {
            [pooled, sizes] => Some(Added { pooled: pooled.shallow_clone(), time_ids: sizes.shallow_clone() }),
            _ => None,
        };
        let predicted = self.unet.forward(noisy, timesteps, context, added.as_ref()).map_err(Error::model)?;
        Ok(predicted.f_to_kind(tch::Kind::Float)?.f_mse_loss(noise, tch::Reduction::Mean)?)
    }

    fn projections(&mut self) -> Vec<&mut Projection> {
        self.unet.projections()
    }
}

impl Objective for NoisePrediction {
    fn batch(&self, _step: u64, _micro: u64) -> Result<Batch> {
        let inputs: Vec<Tensor> = self.inputs.iter().map(Tensor::shallow_clone).collect();
        Ok(Batch { bucket: 0, examples: inputs[0].size()[0] as usize, inputs })
    }
}

/// A trainer of LoRA in every attention projection, with no end in sight: AdamW at a constant rate, clipping at 1.
///
/// # Errors
/// If memory runs out.
pub fn trainer(
    on: &Torch,
    objective: NoisePrediction,
    adapter: AdapterConfig,
    graphs: bool,
) -> Result<Trainer<NoisePrediction>> {
    let targets = Targets::parse(["attention"])?;
    let options = TrainOptions {
        seed: 42,
        steps: 1_000_000,
        accumulation: 1,
        adapter,
        optimizer: OptimizerConfig::ADAMW,
        rate: 1e-4,
        up_rate: 1.0,
        schedule: Schedule::default(),
        clip: Some(1.0),
        ema: None,
        graphs,
    };
    Trainer::new(on, objective, &mut |layer| is_target(&targets, layer).then(Target::default), options)
}
