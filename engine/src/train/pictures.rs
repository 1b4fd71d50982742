//! What is a run's own when it learns from pictures: Stable Diffusion.

mod metadata;
mod outline;
mod prepare;

use std::{collections::BTreeMap, path::Path};

use lora_cli::{
    Failure,
    options::{TrainConfig, values::Mask},
    plan::Plan,
    progress::Stage,
    run::Sample,
    ui::Ui,
};
use lora_core::format::{self, BaseModel, Dtype};
use lora_diffusion::{
    BaseFiles,
    data::{Alpha, BucketRule, Dataset, Masks, ScanOptions},
    objective::{DiffusionObjective, TrainingSet, evaluate, spread},
    sample::{self, Models, Request},
    text::Text,
    vae::Vae,
};

use super::{Facts, Family, Found, Known, Prepared, SamplePlace, plan::Outline};
use crate::{base, failures::Explain as _, pictures};

/// A base and pictures that were found, and not loaded yet.
pub(super) struct FoundPictures {
    files: BaseFiles,
    dataset: Dataset,
    side: u32,
}

/// What draws beside a training.
pub(super) struct Pictures {
    files: BaseFiles,
    /// The text encoders, unless they are in training and belong to the objective.
    text: Option<Text>,
    vae: Vae,
    /// Side of pictures in pixels.
    side: u32,
    /// Places in the training set of pictures that no epoch shows.
    validation: Vec<usize>,
}

/// Timesteps at which the loss of such a picture is measured: enough to meet coarse and fine, few enough to cost no more
/// than some steps of training.
const DRAWS: usize = 4;

/// Looks at base and pictures.
///
/// # Errors
/// If the base is none, or there is nothing to train on.
pub(super) fn find(config: &TrainConfig, ui: &Ui) -> Result<FoundPictures, Failure> {
    let files = base::find(&config.base, config.prediction, config.quantize)?;
    let side = base::resolution(&files, config.resolution);
    if config.neftune > 0.0 {
        return Err(Failure::usage(
            "bad_option",
            "--neftune is for language models: it adds noise to their embeddings",
        )
        .hint("leave --neftune out; for pictures there is `--noise-offset 0.05`"));
    }
    let mut dataset = scan(&config.data, side, config.trigger.clone(), config.mask, true, ui)?;
    dataset.refuse_if_bad().explain()?;
    dataset.keep_apart(config.validation, config.seed);
    Ok(FoundPictures { files, dataset, side })
}

impl Found for FoundPictures {
    type Family = Pictures;

    fn names(&self) -> Result<BaseModel, Failure> {
        base::names(&self.files)
    }

    fn outline(&self, known: &Known) -> Outline<'_> {
        self.in_plan(known)
    }

    fn prepare(self, known: &Known, ui: &Ui) -> Result<Prepared<Pictures>, Failure> {
        prepare::prepare(self, known, ui)
    }
}

/// Reads a folder of pictures, with a bar where it takes long.
///
/// # Errors
/// If there is nothing that can be trained on.
pub(crate) fn scan(
    folder: &Path,
    side: u32,
    trigger: Option<String>,
    mask: Mask,
    verify: bool,
    ui: &Ui,
) -> Result<Dataset, Failure> {
    let options = ScanOptions {
        trigger,
        buckets: BucketRule::new(side),
        alpha: if mask == Mask::Alpha { Alpha::Mask } else { Alpha::White },
        masks: if mask == Mask::File { Masks::Auto } else { Masks::Off },
        verify,
        ..ScanOptions::new(side)
    };
    let stage = std::sync::Mutex::new(None::<Stage>);
    let progress = |done: usize, total: usize| {
        // A bar that cannot be drawn is no reason to stop.
        let Ok(mut stage) = stage.lock() else { return };
        let stage = stage.get_or_insert_with(|| Stage::new(*ui, "reading pictures", total as u64));
        stage.set(done as u64);
    };
    Dataset::scan(folder, &options, &progress).explain()
}

impl Family for Pictures {
    type Objective = DiffusionObjective<TrainingSet>;

    const DTYPE: Dtype = Dtype::F16;

    fn sample(
        &self,
        objective: &mut Self::Objective,
        Known { config, machine, .. }: &Known,
        prompts: &[String],
        SamplePlace { step, folder, events }: SamplePlace<'_>,
    ) -> Result<Vec<Sample>, Failure> {
        let Self { files, vae, side, .. } = self;
        let Some(text) = self.text.as_ref().or(objective.text()) else {
            return Err(Failure::new("sample", "there is no text encoder"));
        };
        let (schedule, device) = (&files.schedule, machine.on.device);
        let models = Models { text, unet: objective.unet(), vae, schedule, files, device };
        let mut samples = Vec::new();
        for (at, prompt) in prompts.iter().enumerate() {
            let request = Request {
                prompt: prompt.clone(),
                negative: (!config.sample_negative.is_empty()).then(|| config.sample_negative.clone()),
                seeds: vec![config.seed + at as u64],
                height: *side as usize,
                width: *side as usize,
                steps: config.sample_steps.get(),
                guidance: config.sample_guidance,
                sampler: pictures::sampler(config.sampler),
            };
            for picture in sample::generate(models, &request, &mut |_, _| {}).explain()? {
                let png = pictures::png(&picture)?;
                let file = format!("{at:02}.png");
                pictures::write(&folder.join(&file), &png)?;
                let size = [picture.width as u32, picture.height as u32];
                events.image(step, &format!("samples/{at:02} {prompt}"), size, &png)?;
                samples.push(Sample { file, prompt: prompt.clone(), seed: request.seeds[0] });
            }
        }
        Ok(samples)
    }

    fn validate(&self, objective: &Self::Objective, Known { machine, .. }: &Known) -> Result<Option<f64>, Failure> {
        if self.validation.is_empty() {
            return Ok(None);
        }
        let timesteps = spread(DRAWS, self.files.schedule.num_train_timesteps);
        let losses = evaluate(objective, &self.validation, &timesteps, machine.on.device, &mut || {}).explain()?;
        Ok(Some(losses.iter().sum::<f64>() / losses.len() as f64))
    }

    fn metadata(&self, known: &Known, facts: &Facts, plan: &Plan, step: u64) -> BTreeMap<String, String> {
        metadata::metadata(self, known, facts, plan, step)
    }

    fn base(&self) -> &format::Family {
        &self.files.family
    }
}
