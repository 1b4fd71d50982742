//! Checks on a machine with CUDA that a captured training step is the same step, and how much faster it is.
//!
//! ```text
//! cargo run --release -p lora-torch --example cuda_graph            # or: ... --example cuda_graph -- cpu
//! ```
//! Trains a small transformer with a convolution, bf16 under 32-bit factors, in two buckets: without graphs twice (which
//! shows how far two such runs differ by themselves, since attention's backward pass adds in any order), with graphs, with
//! accumulation, through a batch that is not finite, and across a checkpoint. Ends with 1 if a check fails. With `cpu` the
//! same checks run without graphs on a smaller model.
#![expect(clippy::print_stdout, reason = "an example talks to people")]

use std::{collections::BTreeMap, num::NonZeroUsize, process::ExitCode, time::Instant};

use lora_core::{AdapterConfig, ConvGeometry, Draw, Method, Purpose};
use lora_torch::{
    Batch, Model, Objective, Projection, Report, Result, Target, Torch, TrainOptions, Trainer, Weights,
    checkpoint::Checkpoints, cuda::Cuda, optimizer::OptimizerConfig, random, schedule::Schedule,
};
use tch::{Device, Kind, Tensor};

/// Width of the model and heads.
const WIDTH: i64 = 320;
const HEADS: i64 = 8;

/// Steps of each run; the first of them run without a graph or capture one.
const STEPS: u64 = 60;

fn main() -> Result<ExitCode> {
    let device = if std::env::args().nth(1).as_deref() == Some("cpu") { Device::Cpu } else { Device::Cuda(0) };
    let cuda = if device == Device::Cpu { None } else { Some(Cuda::load(0)?) };
    if let Some(cuda) = &cuda {
        println!("{:?}", cuda.facts()?);
    }
    let mut checks = Checks::default();
    let options = options()?;
    let eager = run(device, TrainOptions { graphs: false, ..options.clone() }, None)?;
    let again = run(device, TrainOptions { graphs: false, ..options.clone() }, None)?;
    if let Some(cuda) = &cuda {
        println!("memory without graphs: {:?}", cuda.memory()?);
        cuda.reset_peak()?;
    }
    let graph = run(device, options.clone(), None)?;
    if let Some(cuda) = &cuda {
        println!("memory with graphs:    {:?}", cuda.memory()?);
    }
    let noise = difference(&eager, &again);
    checks.close("losses of graph and eager steps", difference(&graph, &eager), noise);
    checks.close("factors of graph and eager steps", graph.apart(&eager), eager.apart(&again));
    println!("eager {:.2} ms a step, graph {:.2} ms a step ({:?})", eager.milliseconds, graph.milliseconds, graph.how);

    let accumulating = TrainOptions { accumulation: 3, ..options.clone() };
    let eager = run(device, TrainOptions { graphs: false, ..accumulating.clone() }, None)?;
    let graph = run(device, accumulating, None)?;
    checks.close("losses with accumulation", difference(&graph, &eager), noise);

    let broken = run(device, options.clone(), Some(20))?;
    let applied: Vec<u64> = broken.reports.iter().filter(|report| !report.applied).map(|report| report.step).collect();
    checks.that("a batch that is not finite is left out", applied == [21] && broken.sound());

    let prodigy = OptimizerConfig::Prodigy {
        betas: [0.9, 0.999],
        eps: 1e-8,
        weight_decay: 0.0,
        first_estimate: 1e-4, // the usual 1e-6 needs more steps than these to get going
        coefficient: 1.0,
        bias_correction: true,
        safeguard_warmup: true,
    };
    for optimizer in [OptimizerConfig::LION, OptimizerConfig::ADAFACTOR, prodigy, OptimizerConfig::SGD] {
        // Sixty steps of plain descent at its usual rate move too little to tell.
        let rate = if matches!(optimizer, OptimizerConfig::Sgd { .. }) { 1.0 } else { optimizer.usual_rate() };
        let graph = run(device, TrainOptions { optimizer, rate, ema: Some(0.99), ..options.clone() }, None)?;
        checks.that(&format!("{optimizer:?} in a graph learns"), graph.sound() && graph.learns());
    }
    checks.close("losses across a checkpoint", resumed(device, &options)?, noise);
    Ok(if checks.failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn options() -> Result<TrainOptions> {
    let rank = NonZeroUsize::MIN.saturating_add(15);
    Ok(TrainOptions {
        seed: 1,
        steps: STEPS,
        accumulation: 1,
        adapter: AdapterConfig::new(Method::Lora, rank, 16.0)?,
        optimizer: OptimizerConfig::ADAMW,
        rate: 1e-3,
        up_rate: 1.0,
        schedule: Schedule { warmup: 5, ..Schedule::default() },
        clip: Some(1.0),
        ema: None,
        graphs: true,
    })
}

/// What came of a run.
struct Outcome {
    reports: Vec<Report>,
    factors: Vec<Tensor>,
    milliseconds: f64,
    how: Option<String>,
}

impl Outcome {
    fn sound(&self) -> bool {
        self.factors.iter().all(|factor| factor.isfinite().all().int64_value(&[]) == 1)
    }

    fn learns(&self) -> bool {
        let mean = |part: &[Report]| part.iter().map(|report| report.loss).sum::<f64>() / part.len() as f64;
        let last = self.reports.len().saturating_sub(10);
        mean(&self.reports[last..]) < mean(&self.reports[..10])
    }

    /// Largest distance of two runs' factors, relative to their size.
    fn apart(&self, other: &Self) -> f64 {
        let distance = |(a, b): (&Tensor, &Tensor)| ((a - b).norm() / a.norm().clamp_min(1e-3)).double_value(&[]);
        self.factors.iter().zip(&other.factors).map(distance).fold(0.0, f64::max)
    }
}

fn run(device: Device, options: TrainOptions, broken: Option<u64>) -> Result<Outcome> {
    let mut trainer = trainer(device, options, broken)?;
    let (mut reports, mut start) = (Vec::new(), Instant::now());
    while !trainer.is_finished() {
        if trainer.steps_done() == STEPS / 2 {
            reports.extend(trainer.finish()?);
            start = Instant::now();
        }
        reports.extend(trainer.step()?);
    }
    reports.extend(trainer.finish()?);
    let milliseconds = start.elapsed().as_secs_f64() * 1e3 / (STEPS - STEPS / 2) as f64;
    let mut factors = Vec::new();
    for named in trainer.adapters(false)? {
        named.adapter.map(&mut |_, tensor| {
            factors.push(tensor.shallow_clone());
            Ok(())
        })?;
    }
    Ok(Outcome { reports, factors, milliseconds, how: trainer.graphs() })
}

/// Difference of the losses of a run that was stopped half way and one that was not.
fn resumed(device: Device, options: &TrainOptions) -> Result<f64> {
    let folder = std::env::temp_dir().join(format!("cuda-graph-{}", std::process::id()));
    let checkpoints = Checkpoints::new(&folder, 1);
    let whole = run(device, options.clone(), None)?;
    let mut first = trainer(device, options.clone(), None)?;
    let mut reports = Vec::new();
    for _ in 0..STEPS / 2 {
        reports.extend(first.step()?);
    }
    reports.extend(first.finish()?);
    first.save(&checkpoints, BTreeMap::new(), serde_json::Value::Null, |_| Ok(()))?;
    drop(first);
    let mut second = trainer(device, options.clone(), None)?;
    second.resume(&checkpoints, BTreeMap::new())?;
    while !second.is_finished() {
        reports.extend(second.step()?);
    }
    reports.extend(second.finish()?);
    // Nothing depends on whether the folder could be removed.
    let _ = std::fs::remove_dir_all(folder);
    Ok(difference(&whole, &Outcome { reports, factors: Vec::new(), milliseconds: 0.0, how: None }))
}

/// Largest relative difference of two runs' losses.
fn difference(left: &Outcome, right: &Outcome) -> f64 {
    assert_eq!(left.reports.len(), right.reports.len());
    let pairs = left.reports.iter().zip(&right.reports);
    pairs.map(|(a, b)| (a.loss - b.loss).abs() / a.loss.abs().max(1e-6)).fold(0.0, f64::max)
}

#[derive(Default)]
struct Checks {
    failed: bool,
}

impl Checks {
    fn that(&mut self, what: &str, holds: bool) {
        println!("{} {what}", if holds { "ok  " } else { "FAIL" });
        self.failed |= !holds;
    }

    /// Two runs may differ by a few times what two equal ones do.
    fn close(&mut self, what: &str, difference: f64, noise: f64) {
        self.that(&format!("{what}: {difference:.2e} (noise {noise:.2e})"), difference <= (10.0 * noise).max(1e-2));
    }
}

/// `x + conv(x)`, then blocks of attention and a feed-forward layer.
#[derive(Debug)]
struct Toy {
    on: Torch,
    conv: Projection,
    /// To queries, keys, values, out, and the two layers of the feed-forward part, block by block.
    layers: Vec<Projection>,
    broken: Option<u64>,
}

fn trainer(device: Device, options: TrainOptions, broken: Option<u64>) -> Result<Trainer<Toy>> {
    let on = Torch { device, kind: Kind::BFloat16 };
    let mut select = |_: &Projection| Some(Target::default());
    Trainer::new(&on, Toy::new(on, broken)?, &mut select, options)
}

impl Toy {
    fn new(on: Torch, broken: Option<u64>) -> Result<Self> {
        let width = WIDTH as usize;
        let shapes =
            [[width, width], [width, width], [width, width], [width, width], [4 * width, width], [width, 4 * width]];
        let mut tensors = Vec::new();
        let mut draw = Draw::new(11, Purpose::Init, 1, 0);
        let mut add = |name: String, shape: &[usize]| -> Result<()> {
            let fan_in: usize = shape[1..].iter().product();
            tensors.push((name, random::uniform(&mut draw, shape, (fan_in as f64).powf(-0.5))?));
            Ok(())
        };
        add("conv.weight".to_owned(), &[width, width, 3, 3])?;
        let blocks = if on.device == Device::Cpu { 1 } else { 12 };
        for block in 0..blocks {
            for (layer, shape) in shapes.iter().enumerate() {
                add(format!("blocks.{block}.{layer}.weight"), shape)?;
            }
        }
        let weights = Weights::from_tensors(tensors);
        let root = weights.root(&on);
        let geometry = ConvGeometry { stride: [1, 1], padding: [1, 1], dilation: [1, 1] };
        let conv = Projection::conv2d(&(&root / "conv"), [width, width, 3, 3], geometry, false)?;
        let mut layers = Vec::new();
        for block in 0..blocks {
            for (layer, shape) in shapes.iter().enumerate() {
                layers.push(Projection::linear(&(&root / "blocks" / block / layer), *shape, false)?);
            }
        }
        Ok(Self { on, conv, layers, broken })
    }

    fn normed(x: &Tensor) -> Result<Tensor> {
        Ok(x.f_layer_norm([WIDTH], None::<&Tensor>, None::<&Tensor>, 1e-5, true)?)
    }
}

impl Model for Toy {
    fn loss(&self, inputs: &[Tensor]) -> Result<Tensor> {
        let x = inputs[0].f_add(&self.conv.forward(&inputs[0])?)?; // [b, width, h, w]
        let mut x = x.f_flatten(2, 3)?.f_transpose(1, 2)?; // [b, tokens, width]
        for block in self.layers.chunks(6) {
            let normed = Self::normed(&x)?;
            let split = |y: Tensor| Ok::<_, lora_torch::Error>(y.f_unflatten(2, [HEADS, -1])?.f_transpose(1, 2)?);
            let [q, k, v] = [
                split(block[0].forward(&normed)?)?,
                split(block[1].forward(&normed)?)?,
                split(block[2].forward(&normed)?)?,
            ];
            let attended =
                Tensor::f_scaled_dot_product_attention(&q, &k, &v, None::<&Tensor>, 0.0, false, None, false)?;
            x = x.f_add(&block[3].forward(&attended.f_transpose(1, 2)?.f_flatten(2, 3)?)?)?;
            let hidden = block[4].forward(&Self::normed(&x)?)?.f_gelu("none")?;
            x = x.f_add(&block[5].forward(&hidden)?)?;
        }
        let wanted = inputs[1].f_flatten(2, 3)?.f_transpose(1, 2)?;
        Ok(x.f_to_kind(Kind::Float)?.f_mse_loss(&wanted.f_to_kind(Kind::Float)?, tch::Reduction::Mean)?)
    }

    fn projections(&mut self) -> Vec<&mut Projection> {
        std::iter::once(&mut self.conv).chain(&mut self.layers).collect()
    }
}

impl Objective for Toy {
    fn batch(&self, step: u64, micro: u64) -> Result<Batch> {
        let small = if self.on.device == Device::Cpu { 4 } else { 16 };
        let side = if step.is_multiple_of(2) { small } else { small + small / 2 }; // two buckets
        let mut draw = Draw::new(3, Purpose::Noise, step, micro as u32);
        let mut x = random::normal(&mut draw, &[2, WIDTH as usize, side, side])?;
        if self.broken == Some(step) {
            x = x.f_mul_scalar(f64::NAN)?;
        }
        let wanted = x.f_roll([1], [1])?.f_tanh()?;
        let kind = self.on.kind;
        Ok(Batch { bucket: side as u64, inputs: vec![x.f_to_kind(kind)?, wanted.f_to_kind(kind)?], examples: 2 })
    }
}
