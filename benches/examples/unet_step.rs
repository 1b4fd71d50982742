//! How long does a whole training step of a UNet take, and is it the same step as a CUDA graph?
//!
//! `unet_step [--model tiny|sd15] [--device cpu|cuda] [--dtype fp32|bf16|fp16] [--batch N] [--rank N] [--steps N]
//! [--threads N] [--no-graph]` prints one JSON line: milliseconds a step (median and least), seconds from process start to
//! the first finished step, losses of the first steps, GPU memory.
//!
//! LoRA in every attention projection, AdamW, clipping at 1. `sd15` has the true shapes of Stable Diffusion 1.5 at 512×512
//! pixels and random weights, whose names and shapes come from diffusers-rs.

#![expect(clippy::print_stdout, reason = "one line of JSON is what it is for")]

use std::time::Instant;

use anyhow::{Context, Result, bail};
use diffusers::models::unet_2d::{UNet2DConditionModel, UNet2DConditionModelConfig};
use lora_benches::{NoisePrediction, lora, tiny_unet, trainer};
use lora_core::format::Component;
use lora_diffusion::unet::{Unet, UnetConfig};
use lora_torch::{Torch, Weights, cuda::Cuda};
use tch::{Device, Kind, nn};

/// Steps before the clock counts: kernels are chosen, graphs captured, caches filled.
const WARM_UP: usize = 20;

struct Options {
    model: String,
    on: Torch,
    batch: usize,
    rank: usize,
    steps: usize,
    threads: i32,
    graph: bool,
}

fn main() -> Result<()> {
    let began = Instant::now();
    let options = options()?;
    tch::set_num_threads(options.threads);
    let cuda = matches!(options.on.device, Device::Cuda(_)).then(|| Cuda::load(0)).transpose()?;
    let (unet, side, width) = match options.model.as_str() {
        "tiny" => (tiny_unet(&options.on)?, 16, 160),
        "sd15" => (random_sd15(&options.on)?, 64, 768),
        other => bail!("--model {other}: there are tiny and sd15"),
    };
    let objective = NoisePrediction::new(unet, options.batch, side, width)?;
    let mut trainer = trainer(&options.on, objective, lora(options.rank)?, options.graph)?;

    let (mut losses, mut first) = (Vec::new(), None);
    let mut run = |steps: usize| -> Result<Vec<f64>> {
        let mut milliseconds = Vec::new();
        for _ in 0..steps {
            let started = Instant::now();
            let reports = trainer.step()?;
            milliseconds.push(started.elapsed().as_secs_f64() * 1e3);
            if !reports.is_empty() {
                first.get_or_insert_with(|| began.elapsed().as_secs_f64());
            }
            losses.extend(reports.iter().map(|report| report.loss));
        }
        Ok(milliseconds)
    };
    run(WARM_UP)?;
    let began_timing = Instant::now();
    let mut milliseconds = run(options.steps)?;
    losses.extend(trainer.finish()?.iter().map(|report| report.loss));
    // On a GPU single steps only enqueue work; the mean over all, with the wait at the end, is the true figure.
    let mean = began_timing.elapsed().as_secs_f64() * 1e3 / options.steps as f64;
    milliseconds.sort_by(f64::total_cmp);
    let memory = cuda.map(|cuda| cuda.memory()).transpose()?;
    let line = serde_json::json!({
        "model": options.model,
        "device": format!("{:?}", options.on.device),
        "dtype": format!("{:?}", options.on.kind),
        "batch": options.batch,
        "rank": options.rank,
        "ms_mean": mean,
        "ms_median": milliseconds[milliseconds.len() / 2],
        "ms_min": milliseconds[0],
        "first_step_s": first,
        "modules": trainer.modules(),
        "trained": trainer.trainable_parameters(),
        "how": trainer.graphs().unwrap_or_else(|| "eager".into()),
        "peak_gib": memory.map(|memory| memory.allocated_peak as f64 / f64::from(1 << 30)),
        "first_losses": &losses[..losses.len().min(5)],
        "last_loss": losses.last(),
    });
    println!("{line}");
    Ok(())
}

fn options() -> Result<Options> {
    let mut options =
        Options { model: "tiny".into(), on: Torch::CPU, batch: 4, rank: 8, steps: 100, threads: 2, graph: true };
    let mut arguments = std::env::args().skip(1);
    while let Some(flag) = arguments.next() {
        if flag == "--no-graph" {
            options.graph = false;
            continue;
        }
        let value = arguments.next().with_context(|| format!("{flag} needs a value"))?;
        match (flag.as_str(), value.as_str()) {
            ("--model", _) => options.model = value,
            ("--device", "cpu") => options.on.device = Device::Cpu,
            ("--device", "cuda") => options.on.device = Device::Cuda(0),
            ("--dtype", "fp32") => options.on.kind = Kind::Float,
            ("--dtype", "bf16") => options.on.kind = Kind::BFloat16,
            ("--dtype", "fp16") => options.on.kind = Kind::Half,
            ("--batch", _) => options.batch = value.parse()?,
            ("--rank", _) => options.rank = value.parse()?,
            ("--steps", _) => options.steps = value.parse::<usize>()?.max(1),
            ("--threads", _) => options.threads = value.parse()?,
            _ => bail!("{flag} {value} is not an option of this program"),
        }
    }
    Ok(options)
}

/// Stable Diffusion 1.5 with the first values that its layers get in diffusers-rs.
fn random_sd15(on: &Torch) -> Result<Unet> {
    let store = nn::VarStore::new(on.device);
    let config = UNet2DConditionModelConfig { cross_attention_dim: 768, ..Default::default() };
    let theirs = UNet2DConditionModel::new(store.root(), 4, 4, config);
    drop(theirs); // the variables stay with the store
    let _no_grad = tch::no_grad_guard();
    let tensors = store.variables().into_iter().map(|(name, tensor)| (name, tensor.detach()));
    let weights = Weights::from_tensors(tensors).of(Component::Unet);
    Ok(Unet::new(&weights.root(on), &UnetConfig::sd_v1_5())?)
}
