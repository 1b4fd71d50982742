//! `lora train`: from options to a run's folder.
//!
//! ```text
//! options ─► base, pictures ─► plan ─► latents, embeddings ─► trainer ─► steps, samples, checkpoints ─► adapter, report
//!            (headers only)    shown                                     session.rs                     saved.rs
//! ```

mod plan;
mod prepare;
mod saved;
mod session;

use std::{path::Path, process::ExitCode, time::Instant};

use lora_cli::{
    Failure,
    options::{TrainConfig, values::Mask},
    progress::Stage,
    run::RunDir,
    ui::Ui,
};
use lora_core::{
    format::{BaseModel, ModuleKind},
    target::Targets,
};
use lora_diffusion::{
    BaseFiles,
    data::{Alpha, BucketRule, Dataset, Masks, ScanOptions},
};

use crate::{base, failures::Explain as _, machine::Machine, signals::Signals};

/// What is known before anything is loaded.
pub(crate) struct Known {
    config: TrainConfig,
    files: BaseFiles,
    names: BaseModel,
    targets: Targets,
    machine: Machine,
    started: Instant,
}

/// Runs the command.
///
/// # Errors
/// Whatever stops the training, as it is to be shown.
pub(crate) fn run(config: TrainConfig, resume: bool, dry_run: bool, ui: &Ui) -> Result<ExitCode, Failure> {
    let started = Instant::now();
    let signals = Signals::listen().map_err(|error| Failure::from_error("signals", &error))?;
    let machine = Machine::choose(config.device, config.dtype)?;
    let files = base::find(&config.base, config.prediction)?;
    let names = base::names(&files)?;
    let targets = Targets::parse(&config.targets).explain()?;
    check_targets(&targets, &names)?;
    let side = base::resolution(&files, config.resolution);
    let dataset = scan(&config.data, side, config.trigger.clone(), config.mask, true, ui)?;
    dataset.refuse_if_bad().explain()?;

    let out = match &config.out {
        Some(out) => out.clone(),
        None => RunDir::next_free(Path::new("."), &config.name),
    };
    let known = Known { config, files, names, targets, machine, started };
    let plan = plan::make(&known, &dataset, side, &out)?;
    if dry_run {
        if ui.json {
            ui.json_data(&plan).map_err(|error| Failure::from_error("stdout", &error))?;
        } else {
            ui.data(&plan.render(ui.stdout())).map_err(|error| Failure::from_error("stdout", &error))?;
        }
        return Ok(ExitCode::SUCCESS);
    }
    ui.say(&plan.render(ui.stderr()));
    plan::refuse_full_disk(&plan)?;

    let run = if resume { RunDir::resume(&out)? } else { RunDir::create(&out, &known.config.to_toml())? };
    plan::write(&plan, &run)?;
    let prepared = prepare::prepare(&known, dataset, ui)?;
    let mut session = session::Session::new(known, prepared, plan, run, *ui)?;
    if resume {
        session.resume()?;
    }
    session.train(&signals)
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

fn check_targets(targets: &Targets, names: &BaseModel) -> Result<(), Failure> {
    let modules: Vec<_> = names
        .components()
        .filter(|component| targets.may_reach(*component))
        .flat_map(|component| names.modules(component).map(move |(path, module)| (component, path, module)))
        .filter(|(_, _, module)| matches!(module.kind, ModuleKind::Linear | ModuleKind::Conv))
        .map(|(component, path, module)| (component, path, has_kernel(&module.weight)))
        .collect();
    targets.check(modules).explain()
}

/// Whether a weight is that of a convolution whose window covers more than one position.
fn has_kernel(weight: &[usize]) -> bool {
    weight.get(2..).is_some_and(|window| window.iter().any(|length| *length > 1))
}
