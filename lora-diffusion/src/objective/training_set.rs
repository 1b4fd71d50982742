//! Examples from a folder of pictures: which, with which noise, at which timestep, under which words.
//!
//! Each of these is a function of (seed, step, sample) and of nothing else; the sample is the example's place among all of
//! the step, so that one batch of four and four micro-batches of one see the same pictures under the same noise.

use std::ops::Range;

use lora_core::{Draw, Purpose};
use tch::Tensor;

use super::{Example, Source, Words, offset_noise};
use crate::{
    Error, Result,
    data::{CaptionVariation, Dataset, Embeddings, Latents, Order},
    vae::VaeConfig,
};

/// How examples are drawn.
#[derive(Debug, Clone, PartialEq)]
pub struct SampleOptions {
    /// What everything random is drawn from.
    pub seed: u64,
    /// Examples of a micro-step.
    pub batch: usize,
    /// Micro-steps of a step, over all devices.
    pub micro_steps: u64,
    /// Timesteps that are trained; all of them are `0..1000`.
    pub timesteps: Range<usize>,
    /// Deviation of the noise that is added to whole channels; 0 is none, 0.05 customary where it is wanted.
    pub noise_offset: f64,
    /// What is changed about captions.
    pub captions: CaptionVariation,
}

/// A dataset ready to be trained on.
#[derive(Debug)]
pub struct TrainingSet {
    options: SampleOptions,
    order: Order,
    latents: Latents,
    pictures: Vec<Shown>,
    /// `None` where encoders run within the step.
    embeddings: Option<Embeddings>,
    scaling: f64,
    shift: f64,
}

#[derive(Debug)]
struct Shown {
    caption: String,
    weight: f64,
    time_ids: [f32; 6],
}

impl TrainingSet {
    /// Puts a dataset, its latents and, unless encoders run within the step, its embeddings together.
    ///
    /// # Errors
    /// If an option cannot be, the parts do not belong together, or words that change would need encoders.
    pub fn new(
        dataset: &Dataset,
        latents: Latents,
        embeddings: Option<Embeddings>,
        vae: &VaeConfig,
        options: SampleOptions,
    ) -> Result<Self> {
        let wrong = |option, reason: &str| Err(Error::Request { option, reason: reason.to_owned() });
        if options.timesteps.is_empty() {
            return wrong("timesteps", "there are none between the two ends");
        }
        if options.micro_steps == 0 {
            return wrong("accum", "at least one micro-step is needed");
        }
        if embeddings.is_some() && options.captions.changes_words() {
            return wrong("shuffle", "captions that change cannot be encoded beforehand");
        }
        if latents.len() != dataset.pictures.len() {
            return wrong("pictures", "the latents are those of another dataset");
        }
        if let Some(embeddings) = &embeddings
            && dataset.pictures.iter().any(|picture| embeddings.of(&picture.caption).is_none())
        {
            return wrong("captions", "the embeddings are those of another dataset");
        }
        let sizes = dataset.pictures.iter().map(|picture| (picture.fit.bucket, picture.repeats));
        let Some(order) = Order::new(sizes, options.batch, options.seed) else {
            return wrong("batch", "no picture would be shown");
        };
        let order = order.accumulating(options.micro_steps as usize);
        let pictures = dataset.pictures.iter().map(|picture| Shown {
            caption: picture.caption.clone(),
            weight: picture.weight,
            time_ids: picture.fit.time_ids(),
        });
        let (scaling, shift) = (vae.scaling_factor, vae.shift_factor.unwrap_or(0.0));
        Ok(Self { options, order, pictures: pictures.collect(), embeddings, scaling, shift, latents })
    }

    /// The order of training; its batch may be smaller than asked for.
    pub fn order(&self) -> &Order {
        &self.order
    }

    /// Number of pictures.
    pub fn pictures(&self) -> usize {
        self.pictures.len()
    }

    /// A picture as it is evaluated: not mirrored, the mean of its posterior, its whole caption, and noise that belongs
    /// to picture and timestep, so that two evaluations differ by the weights alone.
    ///
    /// # Errors
    /// If there is no such picture.
    pub fn fixed(&self, picture: usize, timestep: usize) -> Result<Example> {
        let Some(shown) = self.pictures.get(picture) else {
            return Err(Error::Request { option: "picture", reason: format!("there is no picture {picture}") });
        };
        let latent = self.latents.get(picture, false)?;
        let mut draw = Draw::new(0, Purpose::Noise, timestep as u64, picture as u32);
        let shape = latent.mean.size();
        let noise = Tensor::f_from_slice(&draw.normal(latent.mean.numel(), 1.0))?.f_view(shape.as_slice())?;
        Ok(Example {
            latent: self.scaled(&latent.mean)?,
            noise,
            timestep,
            words: self.words(&shown.caption)?,
            mask: latent.mask,
            weight: 1.0,
            time_ids: shown.time_ids,
        })
    }

    fn example(&self, picture: usize, step: u64, sample: u32) -> Result<Example> {
        let SampleOptions { seed, ref timesteps, noise_offset, captions, .. } = self.options;
        let draw = |purpose| Draw::new(seed, purpose, step, sample);
        let shown = &self.pictures[picture];
        // Every other time the mirror image.
        let mirrored = self.latents.has_mirrored() && draw(Purpose::Augment).unit() < 0.5;
        let latent = self.latents.get(picture, mirrored)?;
        let shape = latent.mean.size();
        let normal = |purpose, shape: &[i64]| -> Result<Tensor> {
            let count = shape.iter().product::<i64>() as usize;
            Ok(Tensor::f_from_slice(&draw(purpose).normal(count, 1.0))?.f_view(shape)?)
        };
        let deviation = latent.log_variance.f_mul_scalar(0.5)?.f_exp()?;
        let sampled = latent.mean.f_addcmul(&deviation, &normal(Purpose::Posterior, &shape)?)?;
        let mut noise = normal(Purpose::Noise, &shape)?;
        if noise_offset != 0.0 {
            noise = offset_noise(&noise, &normal(Purpose::NoiseOffset, &[shape[0], 1, 1])?, noise_offset)?;
        }
        let words = if captions.drops(seed, step, sample) {
            String::new()
        } else {
            captions.words(&shown.caption, seed, step, sample)
        };
        Ok(Example {
            latent: self.scaled(&sampled)?,
            noise,
            timestep: timesteps.start + draw(Purpose::Timestep).below(timesteps.len() as u32) as usize,
            words: self.words(&words)?,
            mask: latent.mask,
            weight: shown.weight,
            time_ids: shown.time_ids,
        })
    }

    fn scaled(&self, latent: &Tensor) -> Result<Tensor> {
        Ok(latent.f_sub_scalar(self.shift)?.f_mul_scalar(self.scaling)?)
    }

    fn words(&self, caption: &str) -> Result<Words> {
        let Some(embeddings) = &self.embeddings else { return Ok(Words::Caption(caption.to_owned())) };
        let Some(embedding) = embeddings.of(caption) else {
            return Err(Error::Request { option: "captions", reason: format!("“{caption}” has no embedding") });
        };
        let pooled = embedding.pooled.as_ref().map(Tensor::shallow_clone);
        Ok(Words::Embedded { context: embedding.context.shallow_clone(), pooled })
    }
}

impl Source for TrainingSet {
    fn examples(&self, step: u64, micro: u64) -> Result<(u64, Vec<Example>)> {
        let chosen = self.order.batch(step * self.options.micro_steps + micro);
        let first = micro as usize * self.order.batch_size();
        let examples = chosen
            .pictures
            .iter()
            .enumerate()
            .map(|(at, picture)| self.example(*picture, step, (first + at) as u32))
            .collect::<Result<_>>()?;
        Ok((chosen.group as u64, examples))
    }

    fn masked(&self) -> bool {
        self.latents.masked
    }
}
