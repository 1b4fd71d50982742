//! From a plan to an objective: latents, embeddings, and the models that training needs.

use lora_cli::{Failure, progress::Stage, ui::Ui};
use lora_core::format::Component;
use lora_diffusion::{
    base::BaseFiles,
    data::{Cache, CaptionVariation, Dataset, Embedding, Embeddings, LatentOptions, latents::latents},
    objective::{DiffusionObjective, SampleOptions, TrainingSet},
    schedule::training::Weighting,
    text::Text,
};
use tch::Kind;

use super::{FoundPictures, Pictures};
use crate::{
    base,
    failures::Explain as _,
    train::{Facts, Known, Prepared, has_kernel, hex},
};

/// Loads the models, makes latents and embeddings, and puts the objective together.
///
/// # Errors
/// If a model cannot be loaded, or a network gives numbers that are not finite.
pub(super) fn prepare(found: FoundPictures, known: &Known, ui: &Ui) -> Result<Prepared<Pictures>, Failure> {
    let FoundPictures { files: base_files, mut dataset, side } = found;
    let Known { config, targets, machine, .. } = known;
    let files = &base_files;
    let cache = base::cache();
    let vae = files.load_vae(&machine.full_precision()).explain()?;
    let vae_hash = base::hash(files, &[Component::Vae], &cache)?;
    let alpha = if config.mask == lora_cli::options::values::Mask::Alpha {
        lora_diffusion::data::Alpha::Mask
    } else {
        lora_diffusion::data::Alpha::White
    };
    let options = LatentOptions { alpha, flip: config.flip, vae: vae_hash, kind: Kind::Float };
    let mut stage =
        Stage::new(*ui, "encoding pictures", dataset.pictures.len() as u64 * if config.flip { 2 } else { 1 });
    let device = machine.on.device;
    let latents = latents(
        &mut dataset,
        Some(&cache),
        options,
        &mut |pixels| vae.encode(&pixels.f_to_device(device)?),
        &mut |done, _| stage.set(done as u64),
    )
    .explain()?;
    drop(stage);

    let encoders = [Component::TextEncoder, Component::TextEncoder2];
    let trained = encoders
        .iter()
        .any(|component| files_have(known, *component) && targets.may_reach(*component) && reaches(known, *component));
    let lanes = machine.lanes(config.batch.get());
    let mut texts = files.load_texts(&machine.on, if trained { 1 + lanes } else { 1 }).explain()?;
    texts.iter_mut().for_each(|text| text.clip_skip = config.clip_skip.get() - 1);
    let mut texts = texts.into_iter();
    let Some(text) = texts.next() else { return Err(nothing_in(files)) };
    let embeddings = match trained {
        true => None,
        false => Some(embeddings(known, files, &dataset, &text, &cache)?),
    };
    let options = SampleOptions {
        seed: config.seed,
        batch: config.batch.get(),
        micro_steps: config.accum.get() as u64,
        timesteps: 0..files.schedule.num_train_timesteps,
        noise_offset: config.noise_offset,
        captions: CaptionVariation { dropout: config.caption_dropout as f32, ..CaptionVariation::default() },
    };
    let set = TrainingSet::new(&dataset, latents, embeddings, &files.vae, options).explain()?;
    let weighting = match config.min_snr {
        0.0 => Weighting::Uniform,
        gamma => Weighting::MinSnr(gamma),
    };
    let mut unets = files.load_unets(&machine.on, 1 + lanes).explain()?.into_iter();
    let Some(unet) = unets.next() else { return Err(nothing_in(files)) };
    let (within, beside) = if trained { (Some(text), None) } else { (None, Some(text)) };
    let objective = DiffusionObjective::new(unet, within, &files.schedule, weighting, set).explain()?;
    let replicas = unets.zip(texts.map(Some).chain(std::iter::repeat_with(|| None)));
    let objective = objective.with_replicas(replicas);
    let all = [Component::Unet, Component::TextEncoder, Component::TextEncoder2, Component::Vae];
    let all: Vec<Component> = all.into_iter().filter(|component| files_have(known, *component)).collect();
    let facts = Facts {
        data_hash: hex(&dataset.hash()),
        base_hash: hex(&base::hash(files, &all, &cache)?),
        examples: dataset.pictures.len() - dataset.kept_apart().count(),
    };
    // What the adapter has not seen says more than what it has.
    let validation: Vec<usize> = dataset.kept_apart().collect();
    let seen = (0..dataset.pictures.len()).filter(|place| !validation.contains(place));
    let shown = validation.iter().copied().chain(seen).take(4);
    let prompts = shown.map(|place| dataset.pictures[place].caption.clone()).collect();
    let family = Pictures { files: base_files, text: beside, vae, side, validation };
    Ok(Prepared { family, objective, prompts, facts })
}

fn nothing_in(files: &BaseFiles) -> Failure {
    Failure::new("base", format!("nothing was built from {}", files.path.display()))
}

fn files_have(known: &Known, component: Component) -> bool {
    known.names.has(component)
}

/// Whether any module of the component is a target.
fn reaches(known: &Known, component: Component) -> bool {
    let mut modules = known.names.modules(component);
    modules.any(|(path, module)| known.targets.matches(component, path, has_kernel(&module.weight)))
}

fn embeddings(
    known: &Known,
    files: &BaseFiles,
    dataset: &Dataset,
    text: &Text,
    cache: &Cache,
) -> Result<Embeddings, Failure> {
    let machine = &known.machine;
    let encoders: Vec<Component> = [Component::TextEncoder, Component::TextEncoder2]
        .into_iter()
        .filter(|component| files_have(known, *component))
        .collect();
    let hash = base::hash(files, &encoders, cache)?;
    let settings = format!("clip skip {}, {:?}", text.clip_skip, machine.on.kind);
    let captions = dataset.pictures.iter().map(|picture| picture.caption.as_str());
    Embeddings::new(captions, Some(cache), hash, &settings, &mut |captions| {
        let conditioning = text.encode(captions, machine.on.device)?;
        let row = |tensor: &tch::Tensor, at: usize| tensor.f_select(0, at as i64);
        (0..captions.len())
            .map(|at| {
                let pooled = conditioning.pooled.as_ref().map(|pooled| row(pooled, at)).transpose()?;
                Ok(Embedding { context: row(&conditioning.context, at)?, pooled })
            })
            .collect()
    })
    .explain()
}
