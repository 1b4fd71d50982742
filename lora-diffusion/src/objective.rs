//! What adapters of a diffusion model are trained on: the noise in a noisy latent (Ho et al. 2020, arXiv 2006.11239, eq. 14).
//!
//! ```text
//! host    latent, noise, timestep ─► noisy, target, weight ─┐
//!         caption ─► embedding (cached), or ids ────────────┤ one copy a step
//! device                                UNet(noisy, t, context) ─► prediction ─► weighted square error
//! ```
//!
//! Everything random is drawn on the host, by counter; everything that needs no network is computed there, too, so that
//! [`loss`](Model::loss) is the networks and five small operations more, waits for nothing, and can be captured in a
//! CUDA graph. Where the examples come from is a [`Source`]: [`TrainingSet`] for pictures, recorded numbers in tests.

mod denoiser;
mod evaluation;
mod training_set;

use lora_torch::{Batch, Model, Objective, Projection};
use tch::{Device, Tensor};

pub use evaluation::{evaluate, spread};
pub use training_set::{SampleOptions, TrainingSet};

use crate::{
    Error, Result,
    schedule::{
        ScheduleConfig,
        training::{TrainingSchedule, Weighting},
    },
    text::Text,
    unet::Unet,
};

use denoiser::Denoiser;

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
    model: Denoiser,
    /// Further copies of it, until the trainer takes them.
    replicas: Vec<Denoiser>,
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
        let model = Denoiser { unet, text, masked: source.masked() };
        Ok(Self { model, replicas: Vec::new(), schedule, weights, source })
    }

    /// Further copies of the networks that [`new`](Self::new) was given, over the same tensors; see
    /// [`Objective::replicas`].
    pub fn with_replicas(mut self, replicas: impl IntoIterator<Item = (Unet, Option<Text>)>) -> Self {
        let masked = self.source.masked();
        self.replicas = replicas.into_iter().map(|(unet, text)| Denoiser { unet, text, masked }).collect();
        self
    }

    /// Where the examples come from.
    pub fn source(&self) -> &S {
        &self.source
    }

    /// The network, for samples during training.
    pub fn unet(&self) -> &Unet {
        &self.model.unet
    }

    /// The text encoders, if they run within the step.
    pub fn text(&self) -> Option<&Text> {
        self.model.text.as_ref()
    }

    /// What [`loss`](Model::loss) reads, from examples of one size, on the host:
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
        match &self.model.text {
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
}

impl<S: Source> Objective for DiffusionObjective<S> {
    fn batch(&self, step: u64, micro: u64) -> lora_torch::Result<Batch> {
        let (bucket, examples) = self.source.examples(step, micro).map_err(lower)?;
        let inputs = self.inputs(&examples).map_err(lower)?;
        Ok(Batch { bucket, inputs, examples: examples.len() })
    }

    fn replicas(&mut self) -> Vec<Box<dyn Model + Send>> {
        let boxed = |model| Box::new(model) as Box<dyn Model + Send>;
        std::mem::take(&mut self.replicas).into_iter().map(boxed).collect()
    }
}

impl<S: Source> Model for DiffusionObjective<S> {
    fn loss(&self, inputs: &[Tensor]) -> lora_torch::Result<Tensor> {
        self.model.loss(inputs)
    }

    fn projections(&mut self) -> Vec<&mut Projection> {
        self.model.projections()
    }
}

/// An error on its way through the trainer; one that came from below stays what it was.
fn lower(error: Error) -> lora_torch::Error {
    match error {
        Error::Torch(error) => error,
        error => lora_torch::Error::model(error),
    }
}
