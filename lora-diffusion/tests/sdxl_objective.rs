//! The objective on SDXL's structure, against a recorded output of diffusers (`fixtures/sd/unet_sdxl`).

use std::{fs, path::Path};

use lora_diffusion::{
    Result,
    objective::{DiffusionObjective, Example, Source, Words},
    schedule::{Prediction, ScheduleConfig, training::Weighting},
    unet::{Unet, UnetConfig},
};
use lora_torch::{Model, Torch, Weights};
use tch::{Kind, Tensor};

/// The loss is a mean of squares of what 32-bit arithmetic gives within 1e-5 of the largest value.
const TOLERANCE: f64 = 1e-4;

#[derive(Debug)]
struct NoExamples;

impl Source for NoExamples {
    fn examples(&self, _: u64, _: u64) -> Result<(u64, Vec<Example>)> {
        Ok((0, Vec::new()))
    }

    fn masked(&self) -> bool {
        false
    }
}

/// Without noise, the epsilon target is zero and the loss is the mean square of what the network says; the latent is
/// divided by `√a` beforehand, so that the network sees the recorded one.
#[test]
fn sdxl_is_told_pooled_words_and_sizes() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/sd/unet_sdxl");
    let case: serde_json::Value = serde_json::from_slice(&fs::read(folder.join("case.json")).unwrap()).unwrap();
    let config: UnetConfig = serde_json::from_value(case["config"]["unet"].clone()).unwrap();
    let unet = Weights::open(&[folder.join("unet.safetensors")]).unwrap();
    let unet = Unet::new(&unet.root(&Torch::CPU), &config).unwrap();
    let recorded = Weights::open(&[folder.join("tensors.safetensors")]).unwrap();
    let tensor = |name: &str| -> Tensor {
        let shape = recorded.shape(name).unwrap();
        recorded.root(&Torch::CPU).tensor(name, &shape).unwrap()
    };
    let schedule = ScheduleConfig::stable_diffusion(Prediction::Epsilon);
    let alphas = schedule.alphas_cumprod();
    let objective = DiffusionObjective::new(unet, None, &schedule, Weighting::Uniform, NoExamples).unwrap();
    for (run, timestep) in case["config"]["timesteps"].as_array().unwrap().iter().enumerate() {
        let timestep = timestep.as_u64().unwrap() as usize;
        let of_run = |what: &str| tensor(&format!("{run}.{what}")).f_get(0).unwrap();
        let latent = of_run("latent").f_div_scalar(alphas[timestep].sqrt()).unwrap();
        let example = |time_ids: [f32; 6]| Example {
            noise: latent.f_zeros_like().unwrap(),
            latent: latent.shallow_clone(),
            timestep,
            words: Words::Embedded { context: of_run("context"), pooled: Some(of_run("pooled")) },
            mask: None,
            weight: 1.0,
            time_ids,
        };
        let loss = |time_ids: [f32; 6]| {
            let inputs = objective.inputs(&[example(time_ids)]).unwrap();
            objective.loss(&inputs).unwrap().f_double_value(&[]).unwrap()
        };
        let wanted = of_run("output").f_square().unwrap().f_mean(Kind::Double).unwrap();
        let wanted = wanted.f_double_value(&[]).unwrap();
        let sizes: Vec<f32> = Vec::try_from(of_run("time_ids")).unwrap();
        let sizes: [f32; 6] = sizes.try_into().unwrap();
        let got = loss(sizes);
        assert!((got / wanted - 1.0).abs() < TOLERANCE, "run {run}: {got}, expected {wanted}");
        let other = loss([sizes[0] / 2.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
        assert!((other / wanted - 1.0).abs() > 10.0 * TOLERANCE, "run {run}: sizes change nothing");
    }
}
