//! How long does a whole training step of a UNet take, and is it the same step as a CUDA graph?
//!
//! `unet_step [--model tiny|sd15|sdxl] [--device cpu|cuda] [--dtype fp32|bf16|fp16] [--batch N] [--rank N] [--steps N]
//! [--threads N]` prints one JSON line a run: milliseconds a step, seconds from process start to the first finished step,
//! GPU memory. On a GPU there are three runs from the same start: twice without a graph, then with; a last line says how
//! far their losses are apart, the two alike ones first, since the backward pass of attention adds in any order.
//!
//! LoRA in every attention projection, AdamW, clipping at 1. `sd15` and `sdxl` have the true shapes of Stable Diffusion 1.5
//! at 512 and of XL at 1024 pixels, and random weights.

#![expect(clippy::print_stdout, reason = "lines of JSON are what it is for")]

use std::time::Instant;

use anyhow::{Context, Result, bail};
use lora_benches::{NoisePrediction, lora, tiny_unet, trainer};
use lora_core::format::Component;
use lora_diffusion::unet::{Unet, UnetConfig};
use lora_torch::{Report, Torch, Weights, cuda::Cuda};
use tch::{Device, Kind};

/// Steps before the clock counts: kernels are chosen, graphs captured, caches filled.
const WARM_UP: usize = 20;
/// Steps whose losses are compared.
const COMPARED: usize = 50;

struct Options {
    model: String,
    on: Torch,
    batch: usize,
    rank: usize,
    steps: usize,
    threads: i32,
}

fn main() -> Result<()> {
    let began = Instant::now();
    let options = options()?;
    tch::set_num_threads(options.threads);
    let cuda = matches!(options.on.device, Device::Cuda(_)).then(|| Cuda::load(0)).transpose()?;
    let Some(cuda) = cuda else {
        run(&options, None, false, began)?;
        return Ok(());
    };
    cuda.enter_side_stream()?;
    let eager = run(&options, Some(&cuda), false, began)?;
    let again = run(&options, Some(&cuda), false, Instant::now())?;
    let graph = run(&options, Some(&cuda), true, Instant::now())?;
    println!(
        "{}",
        serde_json::json!({"eager_and_eager": apart(&eager, &again), "eager_and_graph": apart(&eager, &graph)})
    );
    Ok(())
}

/// Times a run and gives its losses.
fn run(options: &Options, cuda: Option<&Cuda>, graph: bool, began: Instant) -> Result<Vec<f64>> {
    tch::manual_seed(7);
    let drawn = |config: UnetConfig| -> Result<(Unet, UnetConfig)> {
        let weights = Weights::drawn().of(Component::Unet);
        Ok((Unet::new(&weights.root(&options.on), &config)?, config))
    };
    let (unet, config) = match options.model.as_str() {
        "tiny" => tiny_unet(&options.on)?,
        "sd15" => drawn(UnetConfig::sd_v1_5())?,
        "sdxl" => drawn(UnetConfig::sdxl())?,
        other => bail!("--model {other}: there are tiny, sd15 and sdxl"),
    };
    let objective = NoisePrediction::new(unet, &config, options.batch)?;
    let mut trainer = trainer(&options.on, objective, lora(options.rank)?, graph)?;
    if let Some(cuda) = cuda {
        cuda.empty_cache()?;
        cuda.reset_peak()?;
    }
    let mut reports: Vec<Report> = trainer.step()?;
    if let Some(cuda) = cuda {
        cuda.synchronize()?;
    }
    let first = began.elapsed().as_secs_f64();
    for _ in 1..WARM_UP {
        reports.extend(trainer.step()?);
    }
    let mut milliseconds = Vec::new();
    let began_timing = Instant::now();
    for _ in 0..options.steps {
        let started = Instant::now();
        reports.extend(trainer.step()?);
        milliseconds.push(started.elapsed().as_secs_f64() * 1e3);
    }
    reports.extend(trainer.finish()?);
    // On a GPU single steps only enqueue work; the mean over all, with the wait at the end, is the true figure.
    let mean = began_timing.elapsed().as_secs_f64() * 1e3 / options.steps as f64;
    milliseconds.sort_by(f64::total_cmp);
    let memory = cuda.map(Cuda::memory).transpose()?;
    let line = serde_json::json!({
        "model": options.model,
        "device": cuda.map(Cuda::facts).transpose()?.map_or_else(|| "cpu".to_owned(), |facts| facts.name),
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
        "last_loss": reports.last().map(|report| report.loss),
    });
    println!("{line}");
    Ok(reports.iter().take(COMPARED).map(|report| report.loss).collect())
}

/// The largest relative difference.
fn apart(left: &[f64], right: &[f64]) -> f64 {
    left.iter().zip(right).map(|(left, right)| ((left - right) / left).abs()).fold(0.0, f64::max)
}

fn options() -> Result<Options> {
    let mut options = Options { model: "tiny".into(), on: Torch::CPU, batch: 4, rank: 8, steps: 100, threads: 2 };
    let mut arguments = std::env::args().skip(1);
    while let Some(flag) = arguments.next() {
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
