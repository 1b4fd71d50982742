//! What adapters of a diffusion model are trained on: the noise in a noisy latent (Ho et al. 2020, arXiv 2006.11239, eq. 14).
//!
//! ```text
//! host    latent, noise, timestep ─► noisy, target, weight ─┐
//!         caption ─► embedding (cached), or ids ────────────┤ one copy a step
//! device                                UNet(noisy, t, context) ─► prediction ─► weighted square error
//! ```
//!
//! Everything random is drawn on the host, by counter; everything that needs no network is computed there, too, so that
//! [`loss`](Objective::loss) is the networks and five small operations more, waits for nothing, and can be captured in a
//! CUDA graph. Where the examples come from is a [`Source`]: [`TrainingSet`] for pictures, recorded numbers in tests.

mod training_set;

use lora_torch::{Batch, Objective, Projection, Projections as _};
use tch::{Device, Kind, Tensor};

pub use training_set::{SampleOptions, TrainingSet};

use crate::{
    Error, Result,
    schedule::{
        ScheduleConfig,
        training::{TrainingSchedule, Weighting},
    },
    text::{Conditioning, Text},
    unet::{Added, Unet},
};

/// One example before noise is added; all tensors on the host, in 32 bits.
#[derive(Debug)]
pub struct Example {
    /// What the UNet is to see through the noise, `[c, h, w]`, scaled.
    pub latent: Tensor,
    /// Normal noise, `[c, h, w]`; with its offset, if there is one.
    pub noise: Tensor,
    /// Which share of it is added, 0..1000.
    pub timestep: usize,
    /// What the UNet is told.
    pub words: Words,
    /// Where the loss counts, `[1, h, w]` in 0..1; `None` is everywhere.
    pub mask: Option<Tensor>,
    /// What the loss of this example counts.
    pub weight: f64,
    /// SDXL's size conditioning; see [`Fit::time_ids`](crate::data::Fit::time_ids).
    pub time_ids: [f32; 6],
}

/// What the UNet is told, as far as that is known before the step.
#[derive(Debug)]
pub enum Words {
    /// The output of a frozen text encoder.
    Embedded {
        /// `[77, d]`.
        context: Tensor,
        /// `[p]`, SDXL only.
        pooled: Option<Tensor>,
    },
    /// A caption that is encoded within the step, by encoders that are trained or because the words change.
    Caption(String),
}

/// Where examples come from.
pub trait Source {
    /// The examples of a micro-step, with the number of their bucket: a pure function of `step` and `micro`.
    fn examples(&self, step: u64, micro: u64) -> Result<(u64, Vec<Example>)>;

    /// Whether batches carry a mask; those of pictures without one are all ones.
    fn masked(&self) -> bool;
}

/// Adds `amount · unit` to noise: an offset per channel lets a model learn overall brightness.
///
/// Guttenberg 2023, "Diffusion with offset noise". `noise` `[c, h, w]`, `unit` `[c, 1, 1]` and normal.
pub fn offset_noise(noise: &Tensor, unit: &Tensor, amount: f64) -> Result<Tensor> {
    Ok(noise.f_add(&unit.f_mul_scalar(amount)?)?)
}

/// The objective of a Stable Diffusion base.
#[derive(Debug)]
pub struct DiffusionObjective<S> {
    unet: Unet,
    /// Encoders that run within the step.
    text: Option<Text>,
    schedule: TrainingSchedule,
    /// Loss weight by timestep, on the host.
    weights: Tensor,
    source: S,
}

impl<S: Source> DiffusionObjective<S> {
    /// An objective for a base; `text` is needed where the source gives captions instead of embeddings.
    ///
    /// # Errors
    /// If there is no memory for the schedule's tables.
    pub fn new(
        unet: Unet,
        text: Option<Text>,
        schedule: &ScheduleConfig,
        weighting: Weighting,
        source: S,
    ) -> Result<Self> {
        let schedule = TrainingSchedule::new(schedule, Device::Cpu)?;
        let weights = schedule.weights(weighting)?;
        Ok(Self { unet, text, schedule, weights, source })
    }

    /// Where the examples come from.
    pub fn source(&self) -> &S {
        &self.source
    }

    /// The network, for samples during training.
    pub fn unet(&self) -> &Unet {
        &self.unet
    }

    /// The text encoders, if they run within the step.
    pub fn text(&self) -> Option<&Text> {
        self.text.as_ref()
    }

    /// What [`loss`](Objective::loss) reads, from examples of one size, on the host:
    /// noisy `[b, c, h, w]`, target `[b, c, h, w]`, timesteps `[b]`, weights `[b]`,
    /// then context `[b, 77, d]` (and pooled `[b, p]`) or ids `[b, 77]` of each encoder,
    /// then time ids `[b, 6]`, then, if the source has masks, mask `[b, 1, h, w]`.
    ///
    /// # Errors
    /// If there is no example, or they are of several sizes, or some have captions and others embeddings.
    pub fn inputs(&self, examples: &[Example]) -> Result<Vec<Tensor>> {
        let stack = |part: fn(&Example) -> &Tensor| -> Result<Tensor> {
            let tensors: Vec<&Tensor> = examples.iter().map(part).collect();
            Ok(Tensor::f_stack(&tensors, 0)?)
        };
        let (latents, noise) = (stack(|example| &example.latent)?, stack(|example| &example.noise)?);
        let timesteps: Vec<i64> = examples.iter().map(|example| example.timestep as i64).collect();
        let timesteps = Tensor::f_from_slice(&timesteps)?;
        let own: Vec<f32> = examples.iter().map(|example| example.weight as f32).collect();
        let weights = self.weights.f_index_select(0, &timesteps)?.f_mul(&Tensor::f_from_slice(&own)?)?;
        let mut inputs = vec![
            self.schedule.add_noise(&latents, &noise, &timesteps)?,
            self.schedule.target(&latents, &noise, &timesteps)?,
            timesteps,
            weights,
        ];
        inputs.extend(self.words(examples)?);
        let sizes: Vec<f32> = examples.iter().flat_map(|example| example.time_ids).collect();
        inputs.push(Tensor::f_from_slice(&sizes)?.f_view([-1, 6])?);
        if self.source.masked() {
            let mask = |example: &Example| match &example.mask {
                Some(mask) => Ok(mask.shallow_clone()),
                None => Ok(example.latent.f_narrow(0, 0, 1)?.f_ones_like()?),
            };
            let masks: Vec<Tensor> = examples.iter().map(mask).collect::<Result<_>>()?;
            inputs.push(Tensor::f_stack(&masks, 0)?);
        }
        Ok(inputs)
    }

    fn words(&self, examples: &[Example]) -> Result<Vec<Tensor>> {
        let (mut contexts, mut pooled, mut captions) = (Vec::new(), Vec::new(), Vec::new());
        for example in examples {
            match &example.words {
                Words::Embedded { context, pooled: one } => {
                    contexts.push(context);
                    pooled.extend(one);
                }
                Words::Caption(caption) => captions.push(caption.as_str()),
            }
        }
        match &self.text {
            Some(text) if captions.len() == examples.len() => text.ids(&captions),
            None if contexts.len() == examples.len() => {
                let mut words = vec![Tensor::f_stack(&contexts, 0)?];
                if !pooled.is_empty() {
                    words.push(Tensor::f_stack(&pooled, 0)?);
                }
                Ok(words)
            }
            _ => Err(Error::Request {
                option: "captions",
                reason: "encoders within the step need captions, and captions need encoders".to_owned(),
            }),
        }
    }

    /// The loss on the device; `inputs` as [`inputs`](Self::inputs) gives them.
    fn weighted_error(&self, inputs: &[Tensor]) -> Result<Tensor> {
        let [noisy, target, timesteps, weights, rest @ ..] = inputs else { return Err(self.too_few(inputs)) };
        let (mask, rest) = match rest {
            [rest @ .., mask] if self.source.masked() => (Some(mask), rest),
            rest => (None, rest),
        };
        let [words @ .., time_ids] = rest else { return Err(self.too_few(inputs)) };
        let conditioning = match (&self.text, words) {
            (Some(text), ids) => text.encode_ids(ids)?,
            (None, [context]) => Conditioning { context: context.shallow_clone(), pooled: None },
            (None, [context, pooled]) => {
                Conditioning { context: context.shallow_clone(), pooled: Some(pooled.shallow_clone()) }
            }
            (None, _) => return Err(self.too_few(inputs)),
        };
        let added = conditioning.pooled.map(|pooled| Added { pooled, time_ids: time_ids.shallow_clone() });
        let prediction = self.unet.forward(noisy, timesteps, &conditioning.context, added.as_ref())?;
        let mut error = prediction.f_to_kind(Kind::Float)?.f_sub(target)?.f_square()?; // [b, c, h, w]
        if let Some(mask) = mask {
            error = error.f_mul(mask)?;
        }
        let each = error.f_mean_dim([1i64, 2, 3].as_slice(), false, Kind::Float)?; // [b]
        Ok(each.f_mul(weights)?.f_mean(Kind::Float)?)
    }

    fn too_few(&self, inputs: &[Tensor]) -> Error {
        Error::Shape { what: "inputs of the loss", actual: vec![inputs.len() as i64], expected: "those of `inputs`" }
    }
}

impl<S: Source> Objective for DiffusionObjective<S> {
    fn batch(&self, step: u64, micro: u64) -> lora_torch::Result<Batch> {
        let (bucket, examples) = self.source.examples(step, micro).map_err(lower)?;
        let inputs = self.inputs(&examples).map_err(lower)?;
        Ok(Batch { bucket, inputs, examples: examples.len() })
    }

    fn loss(&self, inputs: &[Tensor]) -> lora_torch::Result<Tensor> {
        self.weighted_error(inputs).map_err(lower)
    }

    fn projections(&mut self) -> Vec<&mut Projection> {
        let mut all = self.unet.projections();
        all.extend(self.text.as_mut().map(|text| text.projections()).unwrap_or_default());
        all
    }
}

/// An error on its way through the trainer; one that came from below stays what it was.
fn lower(error: Error) -> lora_torch::Error {
    match error {
        Error::Torch(error) => error,
        error => lora_torch::Error::model(error),
    }
}
