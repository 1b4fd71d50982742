//! The loss on a folder of pictures with fixed noise, so that two runs differ by the adapter alone.

use std::process::ExitCode;

use lora_cli::{
    Failure,
    options::{DataConfig, values::LoraFile},
    progress::Stage,
    text,
    ui::Ui,
};
use lora_core::format::Component;
use lora_diffusion::{
    data::{Alpha, CaptionVariation, LatentOptions, latents::latents},
    objective::{DiffusionObjective, SampleOptions, TrainingSet, evaluate, spread},
    schedule::training::Weighting,
};
use lora_torch::{Model as _, Projections as _};
use tch::Kind;

use super::Measures;
use crate::{adapters, base, failures::Explain as _, machine::Machine, train};

/// Measures at some timesteps, evenly spread, for each picture.
///
/// # Errors
/// Whatever stops it, as it is to be shown.
pub(crate) fn run(config: &DataConfig, lora: &[LoraFile], measures: Measures, ui: &Ui) -> Result<ExitCode, Failure> {
    let machine = Machine::choose(config.device, config.dtype)?;
    let files = base::find(config.base()?, config.prediction, config.quantize)?;
    let names = base::names(&files)?;
    let side = base::resolution(&files, config.resolution);
    let mut dataset = train::pictures::scan(&config.data, side, config.trigger.clone(), config.mask, true, ui)?;
    let _no_grad = tch::no_grad_guard();

    let cache = base::cache();
    let vae = files.load_vae(&machine.full_precision()).explain()?;
    let alpha = if config.mask == lora_cli::options::values::Mask::Alpha { Alpha::Mask } else { Alpha::White };
    let options =
        LatentOptions { alpha, flip: false, vae: base::hash(&files, &[Component::Vae], &cache)?, kind: Kind::Float };
    let device = machine.on.device;
    let latents = latents(
        &mut dataset,
        Some(&cache),
        options,
        &mut |pixels| vae.encode(&pixels.f_to_device(device)?),
        &mut |_, _| {},
    )
    .explain()?;
    drop(vae);
    let mut encoders = files.load_text(&machine.on).explain()?;
    encoders.clip_skip = config.clip_skip.get() - 1;
    let mut unet = files.load_unet(&machine.on).explain()?;
    let projections = unet.projections().into_iter().chain(encoders.projections()).collect();
    let mut adapters = adapters::attach(lora, &names, projections, ui)?;

    let options = SampleOptions {
        seed: config.seed,
        batch: config.batch.get(),
        micro_steps: 1,
        timesteps: 0..files.schedule.num_train_timesteps,
        noise_offset: 0.0,
        captions: CaptionVariation::default(),
    };
    let set = TrainingSet::new(&dataset, latents, None, &files.vae, options).explain()?;
    let mut objective =
        DiffusionObjective::new(unet, Some(encoders), &files.schedule, Weighting::Uniform, set).explain()?;
    let Measures { draws, compare, .. } = measures;
    let timesteps = spread(draws, files.schedule.num_train_timesteps);
    let pictures: Vec<usize> = (0..dataset.pictures.len()).collect();
    let variants = if compare { adapters.variants().into_iter().map(Some).collect() } else { vec![None] };
    let mut stage = Stage::new(*ui, "measuring", (variants.len() * pictures.len() * draws) as u64);
    let mut results = Vec::new();
    for variant in &variants {
        if let Some(variant) = variant {
            adapters.set(objective.projections(), &variant.strengths)?;
        }
        let by_timestep = evaluate(&objective, &pictures, &timesteps, device, &mut || stage.advance(1)).explain()?;
        let loss = by_timestep.iter().sum::<f64>() / draws as f64;
        let rows: Vec<_> = timesteps
            .iter()
            .zip(&by_timestep)
            .map(|(t, loss)| serde_json::json!({"timestep": t, "loss": loss}))
            .collect();
        let document =
            serde_json::json!({"loss": loss, "pictures": pictures.len(), "draws": draws, "by_timestep": rows});
        let mut lines = vec![format!(
            "loss {loss:.6} over {} and {}",
            text::plural(pictures.len() as u64, "picture"),
            text::plural(draws as u64, "timestep")
        )];
        lines.extend(timesteps.iter().zip(&by_timestep).map(|(t, loss)| format!("  t {t:>4}  {loss:.6}")));
        results.push((variant.as_ref().map(|variant| variant.label.as_str()), document, lines));
    }
    drop(stage);
    super::write(&results, ui)?;
    Ok(ExitCode::SUCCESS)
}
