//! Samplers with a stand-in network, and the noise schedule in training.

use std::collections::BTreeMap;

use lora_diffusion::schedule::{
    Prediction, ScheduleConfig,
    sampler::{Sampler, SamplerKind},
    training::{TrainingSchedule, Weighting},
};
use lora_parity::{Failure, Report};
use tch::{Device, Kind, Tensor};

use super::fixture::Case;

pub(crate) fn run(case: &Case, kind: &str, report: &mut Report) -> Result<(), Failure> {
    let kind: SamplerKind = kind.parse()?;
    let steps: usize = case.typed("steps")?;
    let slope = slope(case)?;
    let variants: BTreeMap<String, ScheduleConfig> = case.typed("variants")?;
    let noise = case.tensor("noise")?;
    for (variant, schedule) in &variants {
        let mut sampler = Sampler::new(kind, schedule, steps)?;
        let name = format!("{variant}.timesteps");
        case.close(report, &name, &Tensor::f_from_slice(sampler.timesteps())?, &case.tensor(&name)?)?;
        if let (Some(sigmas), name) = (sampler.sigmas(), format!("{variant}.sigmas")) {
            case.close(report, &name, &Tensor::f_from_slice(sigmas)?, &case.tensor(&name)?)?;
        }
        let mut x = noise.f_mul_scalar(sampler.init_sigma())?;
        let mut path = vec![x.shallow_clone()];
        for call in 0..sampler.timesteps().len() {
            let shift = (sampler.timesteps()[call] / 1000.0).sin();
            let output = sampler.scale_input(call, &x)?.f_mul_scalar(slope)?.f_add_scalar(shift)?;
            let fresh = match case.has("step_noise") {
                true => Some(case.tensor("step_noise")?.f_get(call as i64)?),
                false => None,
            };
            x = sampler.step(call, &x, &output, fresh.as_ref())?;
            path.push(x.shallow_clone());
        }
        let name = format!("{variant}.path");
        case.close(report, &name, &Tensor::f_stack(&path, 0)?, &case.tensor(&name)?)?;
    }
    Ok(())
}

/// The stand-in is described as `output(x, t) = 0.3 * x + sin(t / 1000), …`.
fn slope(case: &Case) -> Result<f64, Failure> {
    let words = case.config["model"].as_str().unwrap_or_default();
    let number = words.split_once("= ").and_then(|(_, rest)| rest.split_once(" * x"));
    number.and_then(|(number, _)| number.parse().ok()).ok_or_else(|| format!("unknown stand-in: {words}").into())
}

pub(crate) fn training(case: &Case, report: &mut Report) -> Result<(), Failure> {
    let gamma: f64 = case.typed("gamma")?;
    let schedules: BTreeMap<String, ScheduleConfig> = case.typed("schedules")?;
    let [timesteps, latents, noise] = [case.tensor("timesteps")?, case.tensor("latents")?, case.tensor("noise")?];
    for (name, config) in schedules {
        let schedule =
            |prediction_type| TrainingSchedule::new(&ScheduleConfig { prediction_type, ..config.clone() }, Device::Cpu);
        let (epsilon, v) = (schedule(Prediction::Epsilon)?, schedule(Prediction::V)?);
        let alphas = Tensor::f_from_slice(epsilon.alphas_cumprod())?;
        let at = |table: Tensor| table.f_index_select(0, &timesteps);
        let snr = alphas.f_div(&alphas.f_neg()?.f_add_scalar(1.0)?)?.f_to_kind(Kind::Float)?;
        let results = [
            ("noisy", epsilon.add_noise(&latents, &noise, &timesteps)?),
            ("v_target", v.target(&latents, &noise, &timesteps)?),
            ("snr", at(snr)?),
            ("min_snr_epsilon", at(epsilon.weights(Weighting::MinSnr(gamma))?)?),
            ("min_snr_v", at(v.weights(Weighting::MinSnr(gamma))?)?),
            ("debiased_epsilon", at(epsilon.weights(Weighting::Debiased)?)?),
            ("alphas_cumprod", alphas),
        ];
        for (what, got) in results {
            let name = format!("{name}.{what}");
            case.close(report, &name, &got, &case.tensor(&name)?)?;
        }
    }
    Ok(())
}
