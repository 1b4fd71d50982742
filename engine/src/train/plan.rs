//! Everything that is said before the first step: what was found, what is trained, memory, time.

use std::path::Path;

use lora_cli::{
    Failure, disk,
    options::{
        TrainConfig,
        values::{Optimizer, Schedule},
    },
    plan::{Bucket, DataPlan, Memory, Plan, Seconds, Skipped},
    run::RunDir,
    text,
};
use lora_core::{
    Adapter, AdapterConfig, AnyAdapter, Array, Cpu, Draw, Init, Method, Purpose,
    format::{Component, ModuleKind, write_atomically},
};
use lora_diffusion::{
    data::{Dataset, Order},
    unet::UnetConfig,
};
use tch::Kind;

use super::{Known, has_kernel};
use crate::{base, failures::Explain as _};

/// The plan of a run that would be written to `out`.
///
/// # Errors
/// If the adapter's settings do not fit a target module.
pub(super) fn make(known: &Known, dataset: &Dataset, side: u32, out: &Path) -> Result<Plan, Failure> {
    let Known { config, files, names, targets, machine, .. } = known;
    let adapter = config.adapter().explain()?;
    let mut modules = 0;
    let mut parameters = 0;
    let mut components = Vec::new();
    for component in names.components() {
        let before = modules;
        for (path, module) in names.modules(component) {
            let projection = matches!(module.kind, ModuleKind::Linear | ModuleKind::Conv);
            if projection && targets.matches(component, path, has_kernel(&module.weight)) {
                modules += 1;
                parameters += numbers_in(&module.weight, &adapter)?;
            }
        }
        if modules > before {
            components.push(match component {
                Component::Unet => "the UNet",
                Component::TextEncoder2 => "the second text encoder",
                _ => "the text encoder",
            });
        }
    }
    let order = order(dataset, config);
    let through = |epochs: u64| order.as_ref().map_or(epochs, |order| order.steps(epochs));
    let steps = config.steps(through);
    let batch = order.as_ref().map_or(0, Order::batch_size) as u64;
    Ok(Plan {
        base: config.base.clone(),
        base_kind: base::describe(files, names),
        data: data(dataset, config, batch),
        adapter: describe_adapter(config),
        targets: format!("{} of {}", config.targets.join(", "), components.join(" and ")),
        modules,
        trainable_parameters: parameters,
        file_bytes: parameters * 2 + modules * 400,
        steps,
        epochs: epochs(steps, through),
        batch,
        accum: config.accum.get() as u64,
        recipe: recipe(config, steps),
        machine: machine.describe(),
        seed: config.seed,
        memory_bytes: memory(known, parameters, batch, side, dataset),
        seconds: Seconds { prepare: prepare_seconds(dataset, config, side), train: None, samples: None },
        out: out.to_owned(),
        save_every: config.save_interval(steps),
        keep: config.keep as u64,
        sample_every: config.sample_interval(steps),
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

fn order(dataset: &Dataset, config: &TrainConfig) -> Option<Order> {
    let sizes = dataset.pictures.iter().map(|picture| (picture.fit.bucket, picture.repeats));
    Some(Order::new(sizes, config.batch.get(), config.seed)?.accumulating(config.accum.get()))
}

fn data(dataset: &Dataset, config: &TrainConfig, batch: u64) -> DataPlan {
    let mut buckets: Vec<Bucket> = Vec::new();
    for picture in &dataset.pictures {
        let [width, height] = picture.fit.bucket;
        match buckets.iter_mut().find(|bucket| (bucket.width, bucket.height) == (width, height)) {
            Some(bucket) => bucket.count += 1,
            None => buckets.push(Bucket { width, height, count: 1 }),
        }
    }
    buckets.sort_by_key(|bucket| std::cmp::Reverse(bucket.count));
    let skipped =
        dataset.skipped.iter().map(|file| Skipped { path: dataset.root.join(&file.path), reason: file.reason.clone() });
    let mut notes: Vec<String> = dataset.notes.iter().map(|note| note.message.clone()).collect();
    if batch < config.batch.get() as u64 {
        notes.push(format!("batch {} cut down to {batch}, since no size has more pictures", config.batch));
    }
    DataPlan {
        source: dataset.root.clone(),
        layout: dataset.layout.clone(),
        unit: "picture".into(),
        used: dataset.pictures.len() as u64,
        skipped: skipped.collect(),
        notes,
        buckets,
    }
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

fn recipe(config: &TrainConfig, steps: u64) -> String {
    let optimizer = match config.optimizer {
        Optimizer::Adamw => "AdamW",
        Optimizer::Lion => "Lion",
        Optimizer::Adafactor => "Adafactor",
        Optimizer::Prodigy => "Prodigy",
        Optimizer::Sgd => "SGD",
    };
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
    format!("{optimizer} lr {}, {schedule}{warmup}", text::real(config.lr))
}

fn memory(known: &Known, parameters: u64, batch: u64, side: u32, dataset: &Dataset) -> Memory {
    let Known { config, files, names, machine, .. } = known;
    let kind = kind_bytes(machine.on.kind);
    let stored = |component, bytes: u64| {
        let shapes = names.tensors(component).map(|(_, _, source)| source.shape.iter().product::<usize>() as u64);
        shapes.sum::<u64>() * bytes
    };
    let weights = stored(Component::Unet, kind)
        + stored(Component::TextEncoder, kind)
        + stored(Component::TextEncoder2, kind)
        + stored(Component::Vae, 4)
        + parameters * (4 + kind);
    let moments = match config.optimizer {
        Optimizer::Adamw => 2,
        Optimizer::Lion | Optimizer::Sgd => 1,
        Optimizer::Adafactor => 0,
        Optimizer::Prodigy => 4,
    };
    let optimizer = parameters * 4 * (1 + moments + u64::from(config.ema > 0.0) + u64::from(config.accum.get() > 1));
    let latent = (u64::from(side) / files.vae.factor() as u64).pow(2);
    let pictures = dataset.pictures.len() as u64 * if config.flip { 2 } else { 1 };
    let words = 77 * files.unet.cross_attention_dim as u64 * dataset.pictures.len() as u64;
    let cache = (pictures * latent * 2 * files.vae.latent_channels as u64 + words) * 4;
    let activations = activations(&files.unet, latent, batch) * kind;
    let total = weights + optimizer + activations + cache;
    Memory { weights, activations, optimizer, cache, total, free: machine.free_memory() }
}

/// Numbers that the backward pass of the UNet needs of its forward pass.
///
/// Per layer and position about ten times the channels in a resnet and twenty-four times in a transformer block. This
/// meets the traced 0.81 GB of SD 1.5 (512 px, bf16) and 5.6 GB of SDXL (1024 px) within a tenth.
fn activations(unet: &UnetConfig, latent: u64, batch: u64) -> u64 {
    let levels = unet.block_out_channels.iter().enumerate();
    let sum: u64 = levels
        .map(|(level, channels)| {
            let positions = latent >> (2 * level as u32);
            let attends = unet
                .down_block_types
                .get(level)
                .is_some_and(|kind| *kind == lora_diffusion::unet::LevelKind::CrossAttention);
            let depth = if attends { unet.transformer_layers_per_block.at(level).unwrap_or(1) as u64 } else { 0 };
            let layers = 2 * unet.layers_per_block as u64 + 1;
            positions * *channels as u64 * layers * (10 + 24 * depth)
        })
        .sum();
    sum * batch.max(1)
}

/// A guess for machines like today's: a hundred megapixels a second are decoded, a tenth of that is encoded on a CPU.
fn prepare_seconds(dataset: &Dataset, config: &TrainConfig, side: u32) -> f64 {
    let pixels = dataset.pictures.len() as f64 * f64::from(side).powi(2) * if config.flip { 2.0 } else { 1.0 };
    pixels / 2e6
}

fn kind_bytes(kind: Kind) -> u64 {
    if kind == Kind::Float { 4 } else { 2 }
}
