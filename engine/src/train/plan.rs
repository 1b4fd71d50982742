//! Everything that is said before the first step: what was found, what is trained, memory, time.

use std::path::Path;

use lora_cli::{
    Failure, disk,
    options::{
        TrainConfig,
        values::{Optimizer, Schedule},
    },
    plan::{DataPlan, Memory, Plan, Seconds},
    run::RunDir,
    text,
};
use lora_core::{
    Adapter, AdapterConfig, AnyAdapter, Array, Cpu, Draw, Init, Method, Purpose,
    format::{BaseModel, Component, ModuleKind, write_atomically},
};
use lora_torch::nf4::Scheme;
use tch::Kind;

use super::{Known, can_be_a_target, has_kernel};
use crate::failures::Explain as _;

/// What a model family says of a run before it starts.
pub(super) struct Outline<'a> {
    /// What the base turned out to be.
    pub(super) base_kind: String,
    pub(super) data: DataPlan,
    /// Steps that so many passes over the data take.
    pub(super) steps_in: Box<dyn Fn(u64) -> u64 + 'a>,
    /// Examples per batch.
    pub(super) batch: u64,
    /// Bytes of frozen weights.
    pub(super) weights: u64,
    /// Bytes that the backward pass needs of the forward pass.
    pub(super) activations: u64,
    /// Bytes of examples that are kept.
    pub(super) cache: u64,
    /// Seconds until the first step.
    pub(super) prepare: f64,
    /// Bytes of a number in the adapter file.
    pub(super) file_number: u64,
    /// Whether examples are kept for validation.
    pub(super) validates: bool,
}

/// The plan of a run that would be written to `out`.
///
/// # Errors
/// If the adapter's settings do not fit a target module.
pub(super) fn make(known: &Known, outline: Outline<'_>, out: &Path) -> Result<Plan, Failure> {
    let Known { config, names, targets, machine, .. } = known;
    let adapter = config.adapter().explain()?;
    let mut modules = 0;
    let mut parameters = 0;
    let mut components = Vec::new();
    for component in names.components() {
        let before = modules;
        for (path, module) in names.modules(component) {
            if can_be_a_target(component, module) && targets.matches(component, path, has_kernel(&module.weight)) {
                modules += 1;
                parameters += numbers_in(&module.weight, &adapter)?;
            }
        }
        if modules > before {
            components.push(match component {
                Component::Unet => "the UNet",
                Component::TextEncoder2 => "the second text encoder",
                Component::LanguageModel => "the language model",
                _ => "the text encoder",
            });
        }
    }
    let memory_bytes = memory(known, parameters, &outline);
    let Outline { base_kind, data, steps_in, batch, prepare, file_number, validates, .. } = outline;
    let steps = config.steps(&steps_in);
    Ok(Plan {
        base: config.base.clone(),
        base_kind,
        data,
        adapter: describe_adapter(config),
        targets: format!("{} of {}", config.targets.join(", "), components.join(" and ")),
        modules,
        trainable_parameters: parameters,
        file_bytes: parameters * file_number + modules * 400,
        steps,
        epochs: epochs(steps, &steps_in),
        batch,
        accum: config.accum.get() as u64,
        recipe: recipe(config, steps),
        machine: machine.describe(),
        seed: config.seed,
        memory_bytes,
        seconds: Seconds { prepare, train: None, samples: None },
        out: out.to_owned(),
        save_every: config.save_interval(steps),
        keep: config.keep as u64,
        sample_every: config.sample_interval(steps),
        validate_every: config.validation_interval(steps, validates),
    })
}

/// Stops before the first step where the disk cannot hold what the run will write.
///
/// # Errors
/// If less is free than two checkpoints and the samples take.
pub(super) fn refuse_full_disk(plan: &Plan) -> Result<(), Failure> {
    // Parameters, two moments and a moving average in 32 bits, the adapter, and as much again while a checkpoint is staged.
    let needed = (plan.trainable_parameters * 16 + plan.file_bytes) * (plan.keep.clamp(1, 8) + 1);
    let folder = plan.out.ancestors().find(|folder| folder.is_dir()).unwrap_or(Path::new("."));
    match disk::free_bytes(folder) {
        Ok(free) if free < needed => {
            Err(Failure::new("disk_full", format!("not enough disk space for {}", plan.out.display()))
                .detail(format!(
                    "{} free, checkpoints and adapter take about {}",
                    text::bytes(free),
                    text::bytes(needed)
                ))
                .hint("free some space, choose another folder with `--out`, or keep fewer checkpoints with `--keep 1`"))
        }
        _ => Ok(()),
    }
}

/// Passes over the data in so many steps.
fn epochs(steps: u64, through: impl Fn(u64) -> u64) -> f64 {
    let whole = (0..).find(|epochs| through(epochs + 1) > steps).unwrap_or(0);
    let length = (through(whole + 1) - through(whole)).max(1);
    whole as f64 + (steps - through(whole)) as f64 / length as f64
}

/// Puts the plan beside the run's configuration, for the report.
///
/// # Errors
/// If it cannot be written.
pub(super) fn write(plan: &Plan, run: &RunDir) -> Result<(), Failure> {
    let text = serde_json::to_vec_pretty(plan).map_err(|error| Failure::from_error("plan", &error))?;
    write_atomically(&run.plan(), |file| file.write_all(&text)).explain()
}

/// Numbers that an adapter of a weight of this shape learns.
fn numbers_in(weight: &[usize], config: &AdapterConfig) -> Result<u64, Failure> {
    // How it starts changes no size, and the starts from the base weight need a decomposition.
    let config = AdapterConfig { init: Init::Kaiming, ..config.clone() };
    let base = Array { shape: weight.to_vec(), values: vec![0.0; weight.iter().product()] };
    let adapter = AnyAdapter::init(&Cpu, &base, &config, &mut Draw::new(0, Purpose::Init, 0, 0)).explain()?;
    let factors = Adapter::<Cpu>::factors(&adapter);
    Ok(factors.iter().map(|(_, factor)| factor.values.len() as u64).sum())
}

fn describe_adapter(config: &TrainConfig) -> String {
    let name = match config.method {
        Method::Lora => "LoRA",
        Method::RsLora => "rsLoRA",
        Method::Dora => "DoRA",
        Method::Loha => "LoHa",
        Method::Lokr => "LoKr",
    };
    format!("{name} rank {}, alpha {}", config.rank, text::real(config.alpha))
}

/// What papers and other programs call an optimizer.
pub(super) fn optimizer_name(optimizer: Optimizer) -> &'static str {
    match optimizer {
        Optimizer::Adamw => "AdamW",
        Optimizer::Lion => "Lion",
        Optimizer::Adafactor => "Adafactor",
        Optimizer::Prodigy => "Prodigy",
        Optimizer::Sgd => "SGD",
    }
}

fn recipe(config: &TrainConfig, steps: u64) -> String {
    let optimizer = optimizer_name(config.optimizer);
    let schedule = match config.schedule {
        Schedule::Constant => "constant",
        Schedule::Linear => "linear",
        Schedule::Cosine => "cosine",
        Schedule::CosineRestarts => "cosine with restarts",
        Schedule::Polynomial => "polynomial",
    };
    let warmup = match config.warmup.steps(steps) {
        0 => String::new(),
        warmup => format!(" after {} of warm-up", text::plural(warmup, "step")),
    };
    let up = if config.lora_plus == 1.0 { String::new() } else { format!(" (LoRA+ {})", text::real(config.lora_plus)) };
    let noise = if config.neftune == 0.0 { String::new() } else { format!(", NEFTune {}", text::real(config.neftune)) };
    format!("{optimizer} lr {}{up}, {schedule}{warmup}{noise}", text::real(config.lr))
}

fn memory(known: &Known, parameters: u64, outline: &Outline<'_>) -> Memory {
    let Known { config, machine, .. } = known;
    let weights = outline.weights + parameters * (4 + kind_bytes(machine.on.kind));
    let moments = match config.optimizer {
        Optimizer::Adamw => 2,
        Optimizer::Lion | Optimizer::Sgd => 1,
        Optimizer::Adafactor => 0,
        Optimizer::Prodigy => 4,
    };
    let optimizer = parameters * 4 * (1 + moments + u64::from(config.ema > 0.0) + u64::from(config.accum.get() > 1));
    let Outline { activations, cache, .. } = *outline;
    let total = weights + optimizer + activations + cache;
    Memory { weights, activations, optimizer, cache, total, free: machine.free_memory() }
}

/// Bytes that the weights of a component take, with linear layers (but a language model's head) quantised if `scheme`
/// says so, and of the largest matrix that is made full for each use.
pub(super) fn weights(names: &BaseModel, component: Component, scheme: Option<Scheme>, kind: u64) -> [u64; 2] {
    let (mut all, mut largest) = (0, 0);
    for (name, _, source) in names.tensors(component) {
        let count: u64 = source.shape.iter().product::<usize>() as u64;
        let linear = || {
            let module = name.strip_suffix(".weight").filter(|path| *path != "lm_head")?;
            (names.module(component, module)?.kind == ModuleKind::Linear).then_some(())
        };
        let stored = names.is_packed(component, name).then_some(Scheme::Nf4);
        match stored.or_else(|| scheme.filter(|_| linear().is_some())) {
            Some(scheme) => {
                all += scheme.bytes(count);
                largest = count.max(largest);
            }
            None => all += count * kind,
        }
    }
    [all, largest * kind]
}

/// Bytes of a number of that kind.
pub(super) fn kind_bytes(kind: Kind) -> u64 {
    if kind == Kind::Float { 4 } else { 2 }
}
