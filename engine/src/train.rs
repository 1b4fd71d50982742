//! `lora train`: from options to a run's folder.
//!
//! ```text
//! options ─► base, data ─► plan ─► examples ─► trainer ─► steps, samples, checkpoints ─► adapter, report
//!            └ headers only ┘      └ loaded     session.rs                               saved.rs
//! ```
//!
//! A [`Family`] says what is its own of a run: how data becomes examples, what a sample is, what its files say. Everything
//! else is written once.

mod log;
pub(crate) mod pictures;
mod plan;
mod saved;
mod session;
mod settings;
mod texts;
mod validation;

use std::{collections::BTreeMap, path::Path, process::ExitCode, time::Instant};

use lora_cli::{
    Failure,
    options::{TrainConfig, is_language_model},
    plan::Plan,
    run::{EventWriter, RunDir, Sample},
    ui::Ui,
};
use lora_core::{
    Init, Method,
    format::{self, BaseModel, Component, Dtype, Module, ModuleKind},
    target::Targets,
};
use lora_torch::Objective;

use plan::Outline;

use crate::{failures::Explain as _, machine::Machine, signals::Signals};

/// What is known before anything is loaded.
pub(crate) struct Known {
    config: TrainConfig,
    names: BaseModel,
    targets: Targets,
    machine: Machine,
    started: Instant,
}

/// What a model family has of its own in a run.
trait Family {
    /// What is trained.
    type Objective: Objective;

    /// How its adapter files store numbers.
    const DTYPE: Dtype;

    /// Writes what the model makes of `prompts` after `step` steps into `folder`, and logs it; gradients are off.
    fn sample(
        &self,
        objective: &mut Self::Objective,
        known: &Known,
        prompts: &[String],
        at: SamplePlace<'_>,
    ) -> Result<Vec<Sample>, Failure>;

    /// The mean loss of the examples that are kept out of training, with the weights that are on the objective and nothing
    /// drawn at random; `None` if there are none. Gradients are off.
    ///
    /// # Errors
    /// If memory runs out.
    fn validate(&self, objective: &Self::Objective, known: &Known) -> Result<Option<f64>, Failure>;

    /// What its adapter files say besides the factors, after `step` steps.
    fn metadata(&self, known: &Known, facts: &Facts, plan: &Plan, step: u64) -> BTreeMap<String, String>;

    /// Which base its adapter files belong to.
    fn base(&self) -> &format::Family;

    /// Puts whatever else belongs to a finished run beside its adapter.
    ///
    /// # Errors
    /// If it cannot be written.
    fn finish(&self, _folder: &Path, _known: &Known, _plan: &Plan) -> Result<(), Failure> {
        Ok(())
    }
}

/// Where samples go.
struct SamplePlace<'a> {
    step: u64,
    folder: &'a Path,
    events: &'a mut EventWriter,
}

/// What is ready to be trained.
struct Prepared<F: Family> {
    family: F,
    objective: F::Objective,
    /// What is sampled if nobody asked for anything by name.
    prompts: Vec<String>,
    facts: Facts,
}

/// What a run trained on, as far as a file may say it.
#[derive(Debug)]
struct Facts {
    /// Hash of the data.
    data_hash: String,
    /// Hash of the base's weights.
    base_hash: String,
    /// Examples that are trained on.
    examples: usize,
}

/// Base and data of a run that were looked at, and not loaded yet.
trait Found {
    /// What is loaded of them.
    type Family: Family;

    /// The base as adapter files see it.
    ///
    /// # Errors
    /// If its files cannot be read.
    fn names(&self) -> Result<BaseModel, Failure>;

    /// What the family adds to the plan.
    fn outline(&self, known: &Known) -> Outline<'_>;

    /// Loads everything.
    ///
    /// # Errors
    /// If that cannot be done, or the data does not fit the model.
    fn prepare(self, known: &Known, ui: &Ui) -> Result<Prepared<Self::Family>, Failure>;
}

/// Runs the command: on pictures or on texts, as the base says.
///
/// # Errors
/// Whatever stops the training, as it is to be shown.
pub(crate) fn run(config: TrainConfig, resume: bool, dry_run: bool, ui: &Ui) -> Result<ExitCode, Failure> {
    let started = Instant::now();
    let signals = Signals::listen().map_err(|error| Failure::from_error("signals", &error))?;
    let machine = Machine::choose(config.device, config.dtype)?;
    let targets = Targets::parse(&config.targets).explain()?;
    let known = |names| Known { config: config.clone(), names, targets, machine, started };
    if is_language_model(&config.base) {
        run_found(texts::find(&config, resume)?, known, resume, dry_run, ui, &signals)
    } else {
        run_found(pictures::find(&config, ui)?, known, resume, dry_run, ui, &signals)
    }
}

fn run_found<F: Found>(
    found: F,
    known: impl FnOnce(BaseModel) -> Known,
    resume: bool,
    dry_run: bool,
    ui: &Ui,
    signals: &Signals,
) -> Result<ExitCode, Failure> {
    let known = known(found.names()?);
    check_targets(&known)?;
    let Some((plan, run)) = begin(&known, found.outline(&known), resume, dry_run, ui)? else {
        return Ok(ExitCode::SUCCESS);
    };
    let prepared = found.prepare(&known, ui)?;
    session::Session::new(known, prepared, plan, run, *ui)?.run(resume, signals)
}

/// Shows the plan, and opens the run's folder unless that was all.
fn begin(
    known: &Known,
    outline: Outline<'_>,
    resume: bool,
    dry_run: bool,
    ui: &Ui,
) -> Result<Option<(Plan, RunDir)>, Failure> {
    let config = &known.config;
    let out = config.out.clone().unwrap_or_else(|| RunDir::next_free(Path::new("."), &config.name));
    let plan = plan::make(known, outline, &out)?;
    if dry_run {
        let shown = if ui.json { ui.json_data(&plan) } else { ui.data(&plan.render(ui.stdout())) };
        shown.map_err(|error| Failure::from_error("stdout", &error))?;
        return Ok(None);
    }
    ui.say(&plan.render(ui.stderr()));
    if config.validate_every.is_some_and(|every| every > 0) && config.validation == 0.0 {
        ui.warn("--validate-every has nothing to measure: keep some examples apart with `--validation 0.1`");
    }
    plan::refuse_full_disk(&plan)?;
    let run = if resume { RunDir::resume(&out)? } else { RunDir::create(&out, &config.to_toml())? };
    plan::write(&plan, &run)?;
    Ok(Some((plan, run)))
}

fn check_targets(Known { config, targets, names, .. }: &Known) -> Result<(), Failure> {
    let modules: Vec<_> = names
        .components()
        .filter(|component| targets.may_reach(*component))
        .flat_map(|component| names.modules(component).map(move |(path, module)| (component, path, module)))
        .filter(|(component, _, module)| can_be_a_target(*component, module))
        .collect();
    let asked = modules.iter().map(|(component, path, module)| (*component, *path, has_kernel(&module.weight)));
    targets.check(asked).explain()?;
    let is_table = |(component, path, module): &&(_, &str, &Module)| {
        module.kind == ModuleKind::Embedding && targets.matches(*component, path, false)
    };
    let plain =
        matches!(config.method, Method::Lora | Method::RsLora) && matches!(config.init, Init::Kaiming | Init::Gaussian);
    match modules.iter().find(is_table) {
        Some((_, path, _)) if !plain => Err(Failure::usage(
            "bad_targets",
            format!("--targets: `{path}` is an embedding, which takes plain LoRA alone"),
        )
        .hint("--method lora --init gaussian")),
        _ => Ok(()),
    }
}

/// Whether a module can carry an adapter in training: layers, and the embedding of a language model.
fn can_be_a_target(component: Component, module: &Module) -> bool {
    match module.kind {
        ModuleKind::Linear | ModuleKind::Conv => true,
        ModuleKind::Embedding => component == Component::LanguageModel,
        _ => false,
    }
}

/// Whether a weight is that of a convolution whose window covers more than one position.
fn has_kernel(weight: &[usize]) -> bool {
    weight.get(2..).is_some_and(|window| window.iter().any(|length| *length > 1))
}

/// A hash as people write it.
fn hex(hash: &[u8]) -> String {
    hash.iter().map(|byte| format!("{byte:02x}")).collect()
}
