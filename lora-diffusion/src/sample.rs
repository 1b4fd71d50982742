//! From a prompt to pictures: noise, guided steps of a sampler, and the decoder.
//!
//! Guidance follows Ho and Salimans 2022 (arXiv 2207.12598): `n + g · (e - n)` of the outputs with the negative prompt
//! (`n`) and with the prompt (`e`), both in one call of the network. Noise comes from [`Draw`], so that a seed gives the
//! same start on every device.

use lora_core::{Draw, Purpose};
use tch::{Device, Kind, Tensor};

use crate::{
    Error, Result,
    base::{Base, BaseFiles},
    layers::dims4,
    schedule::{
        ScheduleConfig,
        sampler::{Sampler, SamplerKind},
    },
    text::{Conditioning, Text},
    unet::{Added, Unet},
    vae::Vae,
};

/// What is to be drawn.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// What the pictures should show.
    pub prompt: String,
    /// What they should not; `None` is the empty prompt (SDXL: zeros).
    pub negative: Option<String>,
    /// One picture for each seed.
    pub seeds: Vec<u64>,
    /// Height in pixels.
    pub height: usize,
    /// Width in pixels.
    pub width: usize,
    /// Steps of the sampler.
    pub steps: usize,
    /// How strongly the prompt counts; 1 turns guidance off.
    pub guidance: f64,
    /// The sampler.
    pub sampler: SamplerKind,
}

impl Default for Request {
    fn default() -> Self {
        Self {
            prompt: String::new(),
            negative: None,
            seeds: vec![0],
            height: 512,
            width: 512,
            steps: 30,
            guidance: 7.5,
            sampler: SamplerKind::DpmPp2mKarras,
        }
    }
}

/// The parts of a base that draw together, borrowed: a network in training can draw as well as a loaded [`Base`].
#[derive(Debug, Clone, Copy)]
pub struct Models<'a> {
    /// From prompts to what the UNet is conditioned on.
    pub text: &'a Text,
    /// The noise predictor, with whatever adapters are on it.
    pub unet: &'a Unet,
    /// Between pictures and latents.
    pub vae: &'a Vae,
    /// The noise schedule.
    pub schedule: &'a ScheduleConfig,
    /// What is known of the base besides its weights.
    pub files: &'a BaseFiles,
    /// Where the networks are.
    pub device: Device,
}

impl<'a> From<&'a Base> for Models<'a> {
    fn from(base: &'a Base) -> Self {
        let Base { text, unet, vae, schedule, files, on } = base;
        Self { text, unet, vae, schedule, files, device: on.device }
    }
}

/// An 8-bit RGB picture, row by row from the top left, ready for a PNG encoder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Picture {
    /// Height in pixels.
    pub height: usize,
    /// Width in pixels.
    pub width: usize,
    /// `height · width · 3` values.
    pub rgb: Vec<u8>,
}

/// Draws all pictures of a request in one batch; `progress` is told the calls done and the calls in all.
///
/// # Errors
/// If the request cannot be met (sizes, steps), or memory runs out.
pub fn generate<'a>(
    models: impl Into<Models<'a>>,
    request: &Request,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Vec<Picture>> {
    let models = models.into();
    let noise = start_noise(models, request)?;
    let latents = latents(models, request, &noise, progress)?;
    pictures(models, &latents)
}

/// The start noise of a request, `[seeds, 4, h, w]`, f32 on the host, not yet scaled for the sampler.
///
/// # Errors
/// If a side is no multiple of what the autoencoder and the UNet take, or no seed is given.
pub fn start_noise<'a>(models: impl Into<Models<'a>>, request: &Request) -> Result<Tensor> {
    let models = models.into();
    let [channels, h, w] = latent_shape(models, request)?;
    noise(&request.seeds, 0, [channels, h, w])
}

/// The final latents, `[b, 4, h, w]` f32 on the models' device, still times the scaling factor.
///
/// `start` is normal noise `[b, 4, h, w]`, which gives number and size of the pictures.
///
/// # Errors
/// As [`generate`].
pub fn latents<'a>(
    models: impl Into<Models<'a>>,
    request: &Request,
    start: &Tensor,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Tensor> {
    let models = models.into();
    let _no_grad = tch::no_grad_guard();
    let [b, channels, h, w] = dims4("start noise", start)?;
    let device = models.device;
    let guided = request.guidance != 1.0;
    let conditions = conditions(models, request, b, guided)?;
    let added = added(models, &conditions, [h, w])?;
    let mut sampler = Sampler::new(request.sampler, models.schedule, request.steps)?;
    let mut x = start.f_to_device(device)?.f_to_kind(Kind::Float)?.f_mul_scalar(sampler.init_sigma())?;
    let timesteps = sampler.timesteps().to_vec();
    for (call, timestep) in timesteps.iter().enumerate() {
        let input = sampler.scale_input(call, &x)?;
        let input = if guided { Tensor::f_cat(&[&input, &input], 0)? } else { input };
        let t = Tensor::f_full([input.size()[0]], *timestep, (Kind::Float, device))?;
        let output = models.unet.forward(&input, &t, &conditions.context, added.as_ref())?.f_to_kind(Kind::Float)?;
        let output = if guided {
            let [negative, positive] = [output.f_narrow(0, 0, b)?, output.f_narrow(0, b, b)?];
            negative.f_lerp(&positive, request.guidance)?
        } else {
            output
        };
        let fresh = match sampler.takes_noise(call) {
            true => Some(noise(&request.seeds, call as u64 + 1, [channels, h, w])?.f_to_device(device)?),
            false => None,
        };
        x = sampler.step(call, &x, &output, fresh.as_ref())?;
        progress(call + 1, timesteps.len());
    }
    Ok(x)
}

/// Decodes latents as [`latents`] gives them, one at a time, so that memory does not grow with their number.
pub fn pictures<'a>(models: impl Into<Models<'a>>, latents: &Tensor) -> Result<Vec<Picture>> {
    let models = models.into();
    let _no_grad = tch::no_grad_guard();
    let [b, ..] = dims4("latents", latents)?;
    (0..b).map(|i| to_picture(&models.vae.decode(&models.vae.unscale(&latents.f_narrow(0, i, 1)?)?)?)).collect()
}

/// `round(255 · clamp(x/2 + 1/2))` of a decoded picture `[1, 3, h, w]`.
fn to_picture(decoded: &Tensor) -> Result<Picture> {
    let [_, _, height, width] = dims4("picture", decoded)?;
    let bytes = decoded
        .f_mul_scalar(0.5)?
        .f_add_scalar(0.5)?
        .f_clamp(0.0, 1.0)?
        .f_mul_scalar(255.0)?
        .f_round()?
        .f_squeeze_dim(0)?
        .f_permute([1, 2, 0])? // [h, w, 3]
        .f_to_kind(Kind::Uint8)?
        .f_to_device(tch::Device::Cpu)?
        .f_contiguous()?;
    let mut rgb = vec![0; bytes.numel()];
    bytes.f_copy_data(&mut rgb, bytes.numel())?;
    Ok(Picture { height: height as usize, width: width as usize, rgb })
}

/// Noise of each seed, `[seeds, ..shape]`; `step` 0 is the start.
fn noise(seeds: &[u64], step: u64, shape: [i64; 3]) -> Result<Tensor> {
    let count = shape.iter().product::<i64>() as usize;
    let values: Vec<f32> =
        seeds.iter().flat_map(|seed| Draw::new(*seed, Purpose::Sample, step, 0).normal(count, 1.0)).collect();
    Ok(Tensor::f_from_slice(&values)?.f_view([seeds.len() as i64, shape[0], shape[1], shape[2]])?)
}

fn latent_shape(models: Models<'_>, request: &Request) -> Result<[i64; 3]> {
    let refused = |option, reason: String| Err(Error::Request { option, reason });
    let factor = models.vae.factor() as usize;
    for (option, side) in [("--height", request.height), ("--width", request.width)] {
        if side == 0 || side % factor != 0 {
            return refused(option, format!("{side} pixels asked for, expected a multiple of {factor}"));
        }
    }
    if request.seeds.is_empty() {
        return refused("--seed", "no seed is given, so there is nothing to draw".into());
    }
    if models.files.unet.in_channels != models.files.vae.latent_channels {
        let channels = models.files.unet.in_channels;
        return refused(
            "--base",
            format!("takes {channels} channels: an inpainting model, which needs a picture and a mask"),
        );
    }
    let [h, w] = [request.height, request.width].map(|side| (side / factor) as i64);
    Ok([models.files.vae.latent_channels as i64, h, w])
}

/// Contexts of `b` pictures: the negative ones first where guidance is on.
fn conditions(models: Models<'_>, request: &Request, b: i64, guided: bool) -> Result<Conditioning> {
    let positive = models.text.encode(&[&request.prompt], models.device)?;
    let repeat = |one: &Conditioning| -> Result<Conditioning> {
        let pooled = one.pooled.as_ref().map(|pooled| pooled.f_expand([b, -1], false)).transpose()?;
        Ok(Conditioning { context: one.context.f_expand([b, -1, -1], false)?, pooled })
    };
    if !guided {
        return repeat(&positive);
    }
    let negative = match &request.negative {
        None if models.files.zero_negative => positive.zeros()?,
        negative => models.text.encode(&[negative.as_deref().unwrap_or_default()], models.device)?,
    };
    let [negative, positive] = [repeat(&negative)?, repeat(&positive)?];
    let pooled = match (&negative.pooled, &positive.pooled) {
        (Some(negative), Some(positive)) => Some(Tensor::f_cat(&[negative, positive], 0)?),
        _ => None,
    };
    Ok(Conditioning { context: Tensor::f_cat(&[&negative.context, &positive.context], 0)?, pooled })
}

/// What SDXL is told besides: a whole picture of the asked size, not cropped.
fn added(models: Models<'_>, conditions: &Conditioning, [h, w]: [i64; 2]) -> Result<Option<Added>> {
    let Some(pooled) = &conditions.pooled else { return Ok(None) };
    let factor = models.vae.factor();
    let [height, width] = [(h * factor) as f32, (w * factor) as f32];
    let sizes = Tensor::f_from_slice(&[height, width, 0.0, 0.0, height, width])?.f_to_device(models.device)?;
    let time_ids = sizes.f_unsqueeze(0)?.f_expand([pooled.size()[0], 6], false)?;
    Ok(Some(Added { pooled: pooled.shallow_clone(), time_ids }))
}
