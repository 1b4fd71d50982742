//! Text encoder, autoencoder, UNet, size conditioning.

use std::path::Path;

use lora_core::format::Component;
use lora_diffusion::{
    BaseFiles,
    clip::{Clip, ClipConfig},
    unet::{Added, Sinusoid, Unet, UnetConfig},
    vae::Posterior,
};
use lora_parity::{Failure, Report};
use lora_torch::{Torch, Weights};
use tch::{Device, Kind, Tensor};

use super::fixture::Case;

pub(crate) fn text_encoder(case: &Case, base: &Path, report: &mut Report) -> Result<(), Failure> {
    let clip = if case.config["text_encoder"].is_null() {
        let files = BaseFiles::find(base)?;
        Clip::new(&files.weights(Component::TextEncoder)?.root(&Torch::CPU), &files.text[0])?
    } else {
        let config: ClipConfig = case.typed("text_encoder")?;
        Clip::new(&Weights::open(&[case.folder.join("text_encoder.safetensors")])?.root(&Torch::CPU), &config)?
    };
    let ids = case.tensor("ids")?;
    let output = clip.forward(&ids)?;
    case.close(report, "last", &output.last, &case.tensor("last")?)?;
    case.close(report, "last", &clip.context(&ids, 0)?, &case.tensor("last")?)?;
    case.close(report, "penultimate", &output.penultimate, &case.tensor("penultimate")?)?;
    case.close(report, "penultimate", &clip.hidden(&ids, 1)?, &case.tensor("penultimate")?)?;
    if case.has("penultimate_normed") {
        case.close(report, "penultimate_normed", &clip.context(&ids, 1)?, &case.tensor("penultimate_normed")?)?;
    }
    if case.has("pooled") {
        case.close(report, "pooled", &output.pooled, &case.tensor("pooled")?)?;
    }
    if case.has("text_embeds") {
        let projected = output.projected.ok_or("the encoder has no projection")?;
        case.close(report, "text_embeds", &projected, &case.tensor("text_embeds")?)?;
    }
    Ok(())
}

pub(crate) fn vae(case: &Case, base: &Path, report: &mut Report) -> Result<(), Failure> {
    let vae = BaseFiles::find(base)?.load_vae(&Torch::CPU)?;
    for picture in case.stems(".picture") {
        let expected = |what: &str| case.tensor(&format!("{picture}.{what}"));
        let pixels = expected("picture")?.f_to_kind(Kind::Float)?.f_div_scalar(127.5)?.f_sub_scalar(1.0)?;
        let posterior = vae.encode(&pixels.f_unsqueeze(0)?)?;
        let sample = vae.scale(&posterior.sample(&expected("noise")?)?)?;
        let decoded = vae.decode(&expected("mean")?)?;
        let results = [
            ("mean", &posterior.mean),
            ("logvar", &posterior.log_variance),
            ("sample", &sample),
            ("decoded", &decoded),
        ];
        for (what, got) in results {
            case.close(report, &format!("{picture}.{what}"), got, &expected(what)?)?;
        }
    }
    for made_up in case.stems(".moments") {
        let posterior = Posterior::new(&case.tensor(&format!("{made_up}.moments"))?)?;
        let name = format!("{made_up}.std");
        case.close(report, &name, &posterior.deviation()?, &case.tensor(&name)?)?;
    }
    Ok(())
}

pub(crate) fn unet(case: &Case, base: &Path, report: &mut Report) -> Result<(), Failure> {
    let (unet, config) = if case.config["unet"].is_null() {
        let files = BaseFiles::find(base)?;
        (files.load_unet(&Torch::CPU)?, files.unet)
    } else {
        let config: UnetConfig = case.typed("unet")?;
        let weights = Weights::open(&[case.folder.join("unet.safetensors")])?;
        let unet = Unet::new(&weights.root(&Torch::CPU), &config)?;
        report.equal("weights that no layer reads", &weights.unused(), &[]);
        (unet, config)
    };
    let timesteps: Vec<f64> = case.typed("timesteps")?;
    let context = |run: usize| match case.has("context") {
        true => Ok(case.tensor("context")?.f_narrow(0, run as i64, 1)?),
        false => case.tensor(&format!("{run}.context")),
    };
    for (run, timestep) in timesteps.iter().enumerate() {
        let latent = case.tensor(&format!("{run}.latent"))?;
        let t = Tensor::f_full([latent.size()[0]], *timestep, (Kind::Float, Device::Cpu))?;
        let added = match case.has(&format!("{run}.pooled")) {
            true => Some(Added {
                pooled: case.tensor(&format!("{run}.pooled"))?,
                time_ids: case.tensor(&format!("{run}.time_ids"))?,
            }),
            false => None,
        };
        let name = format!("{run}.output");
        let got = unet.forward(&latent, &t, &context(run)?, added.as_ref())?;
        case.close(report, &name, &got, &case.tensor(&name)?)?;
    }
    if case.has("batch.output") {
        // The first latent twice, at the first and the third timestep, with the first two contexts.
        let latent = case.tensor("0.latent")?;
        let t = Tensor::f_from_slice(&[timesteps[0] as f32, timesteps[2] as f32])?;
        let contexts = Tensor::f_cat(&[context(0)?, context(1)?], 0)?;
        let got = unet.forward(&Tensor::f_cat(&[&latent, &latent], 0)?, &t, &contexts, None)?;
        case.close(report, "batch.output", &got, &case.tensor("batch.output")?)?;
    }
    if case.has("time_proj") {
        let numbers: Vec<f32> = timesteps.iter().map(|t| *t as f32).chain([0.0, 999.0]).collect();
        let width = config.block_out_channels[0];
        let got =
            Sinusoid::new(width, true, 0.0, Device::Cpu)?.forward(&Tensor::f_from_slice(&numbers)?, Kind::Float)?;
        case.close(report, "time_proj", &got, &case.tensor("time_proj")?)?;
    }
    Ok(())
}

pub(crate) fn sizes(case: &Case, report: &mut Report) -> Result<(), Failure> {
    let sinusoid = Sinusoid::new(case.typed("dim")?, true, 0.0, Device::Cpu)?;
    let got = sinusoid.forward_sizes(&case.tensor("time_ids")?, Kind::Float)?;
    case.close(report, "embedding", &got, &case.tensor("embedding")?)
}
