//! From a plan to an objective: latents, embeddings, and the models that training needs.

use lora_cli::{Failure, progress::Stage, ui::Ui};
use lora_core::format::Component;
use lora_diffusion::{
    base::BaseFiles,
    data::{Cache, CaptionVariation, Dataset, Embedding, Embeddings, LatentOptions, latents::latents},
    objective::{DiffusionObjective, SampleOptions, TrainingSet},
    schedule::training::Weighting,
    text::Text,
    vae::Vae,
};
use tch::Kind;

use super::Known;
use crate::{base, failures::Explain as _, machine::Machine};

/// What is ready to be trained, and what draws samples beside it.
pub(super) struct Prepared {
    pub(super) objective: DiffusionObjective<TrainingSet>,
    /// The text encoders, unless they are in training and belong to the objective.
    pub(super) text: Option<Text>,
    pub(super) vae: Vae,
    /// Captions of the first pictures, for samples that nobody asked for by name.
    pub(super) captions: Vec<String>,
    /// What the run trains on, for checkpoints and metadata.
    pub(super) data_hash: String,
    pub(super) base_hash: String,
    pub(super) pictures: usize,
}

/// Loads the models, makes latents and embeddings, and puts the objective together.
///
/// # Errors
/// If a model cannot be loaded, or a network gives numbers that are not finite.
pub(super) fn prepare(known: &Known, mut dataset: Dataset, ui: &Ui) -> Result<Prepared, Failure> {
    let Known { config, files, targets, machine, .. } = known;
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
        false => Some(embeddings(known, &dataset, &text, &cache, machine)?),
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
    Ok(Prepared {
        objective,
        text: beside,
        vae,
        captions: dataset.pictures.iter().take(4).map(|picture| picture.caption.clone()).collect(),
        data_hash: hex(&dataset.hash()),
        base_hash: hex(&base::hash(files, &all, &cache)?),
        pictures: dataset.pictures.len(),
    })
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
    modules.any(|(path, module)| known.targets.matches(component, path, super::has_kernel(&module.weight)))
}

fn embeddings(
    known: &Known,
    dataset: &Dataset,
    text: &Text,
    cache: &Cache,
    machine: &Machine,
) -> Result<Embeddings, Failure> {
    let encoders: Vec<Component> = [Component::TextEncoder, Component::TextEncoder2]
        .into_iter()
        .filter(|component| files_have(known, *component))
        .collect();
    let hash = base::hash(&known.files, &encoders, cache)?;
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

/// A hash as people write it.
fn hex(hash: &[u8]) -> String {
    hash.iter().map(|byte| format!("{byte:02x}")).collect()
}
