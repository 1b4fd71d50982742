//! How long is a whole training step of Stable Diffusion's true shapes on a GPU, and is a captured step the same step?
//!
//! ```text
//! cargo run --release -p lora-benches --example sd_step -- [sd15|sdxl|tiny] [BATCH] [RANK] [cuda|cpu] [STEPS]
//! ```
//! Random weights, cached latents and contexts, LoRA on every attention projection, bf16 base under 32-bit factors (fp32
//! on the CPU): forward, backward, clipping and AdamW. The same inputs go through an eager and a captured run, whose
//! losses are compared; `benches/peers/step.py` times diffusers + peft on the same shapes.
#![expect(clippy::print_stdout, reason = "a program that reports on its standard output")]

use std::{error::Error, time::Instant};

use lora_benches::{NoisePrediction, lora, trainer};
use lora_core::format::Component;
use lora_diffusion::unet::{Unet, UnetConfig};
use lora_torch::{Report, Torch, Weights, cuda::Cuda};
use tch::{Device, Kind};

/// Steps that are run and not timed: library set-up, capture, clocks.
const WARM_UP: usize = 20;

fn main() -> Result<(), Box<dyn Error>> {
    let start = Instant::now();
    let words: Vec<String> = std::env::args().skip(1).collect();
    let word = |at: usize, default: &str| words.get(at).cloned().unwrap_or_else(|| default.to_owned());
    let (model, device) = (word(0, "sd15"), word(3, "cuda"));
    let (batch, rank, steps) = (word(1, "1").parse()?, word(2, "16").parse()?, word(4, "100").parse::<usize>()?);
    let on = match device.as_str() {
        "cpu" => Torch::CPU,
        _ => Torch { device: Device::Cuda(0), kind: Kind::BFloat16 },
    };
    let cuda = if on.device == Device::Cpu { None } else { Some(Cuda::load(0)?) };
    if let Some(cuda) = &cuda {
        cuda.enter_side_stream()?;
    }
    let config = match model.as_str() {
        "sdxl" => return Err("SDXL needs size conditioning, which this bench does not feed yet".into()),
        "tiny" => UnetConfig::open("assets/tiny-sd/unet/config.json".as_ref())?,
        _ => UnetConfig::sd_v1_5(),
    };
    let run = |graphs: bool, measured: usize| -> Result<Run, Box<dyn Error>> {
        tch::manual_seed(7);
        let unet = Unet::new(&Weights::drawn().of(Component::Unet).root(&on), &config)?;
        let objective = NoisePrediction::new(unet, batch, config.sample_size, config.cross_attention_dim)?;
        let mut trainer = trainer(&on, objective, lora(rank)?, graphs)?;
        if let Some(cuda) = &cuda {
            cuda.reset_peak()?;
        }
        let mut reports = trainer.step()?;
        if let Some(cuda) = &cuda {
            cuda.synchronize()?;
        }
        let first = start.elapsed().as_secs_f64();
        for _ in 0..WARM_UP {
            reports.extend(trainer.step()?);
        }
        let mut times = Vec::with_capacity(measured);
        for _ in 0..measured {
            let before = Instant::now();
            reports.extend(trainer.step()?);
            times.push(before.elapsed().as_secs_f64() * 1e3);
        }
        // Steps overlap; the mean over all of them, with the last waited for, is what a run sees.
        let before = Instant::now();
        for _ in 0..measured {
            reports.extend(trainer.step()?);
        }
        reports.extend(trainer.finish()?);
        if let Some(cuda) = &cuda {
            cuda.synchronize()?;
        }
        let mean = before.elapsed().as_secs_f64() * 1e3 / measured as f64;
        times.sort_by(f64::total_cmp);
        let peak = cuda.as_ref().map(Cuda::memory).transpose()?.map(|memory| memory.allocated_peak);
        let (parameters, how) = (trainer.trainable_parameters(), trainer.graphs());
        Ok(Run { reports, mean, median: times[measured / 2], first, peak, parameters, how })
    };
    let eager = run(false, steps.min(30))?;
    println!("{model} batch {batch} rank {rank}, {} trained numbers, {:?}", eager.parameters, on);
    eager.print("eager");
    let again = run(false, steps.min(30))?;
    let graph = run(true, steps)?;
    graph.print("graph");
    println!(
        "losses: eager and eager differ by {:.1e}, graph and eager by {:.1e} of the loss",
        eager.apart(&again),
        eager.apart(&graph)
    );
    Ok(())
}

/// What came of one run.
struct Run {
    reports: Vec<Report>,
    /// Milliseconds a step, over many steps in a row.
    mean: f64,
    /// Milliseconds of the median call of `step`.
    median: f64,
    /// Seconds from the start of the process to the end of the first step.
    first: f64,
    peak: Option<u64>,
    parameters: usize,
    how: Option<String>,
}

impl Run {
    fn print(&self, name: &str) {
        let peak =
            self.peak.map_or_else(String::new, |bytes| format!(", peak {:.2} GiB", bytes as f64 / (1u64 << 30) as f64));
        let how = self.how.as_deref().map_or_else(String::new, |how| format!(", {how}"));
        println!(
            "{name}: {:.2} ms a step (median call {:.2}), first step after {:.1} s{peak}{how}",
            self.mean, self.median, self.first
        );
    }

    /// Largest relative difference of the losses of the first steps.
    fn apart(&self, other: &Self) -> f64 {
        let pairs = self.reports.iter().zip(&other.reports).take(50);
        pairs.map(|(a, b)| ((a.loss - b.loss) / a.loss).abs()).fold(0.0, f64::max)
    }
}
