//! `speed [8b] [--batch N] [--length N] [--rank N] [--steps N] [--qkvo] [--recompute] [--bf16] [--cuda] [--threads N]
//! [--lanes N] [--trained N] [--narrow] [--nf4 | --nf4-double] [--eager]`: how long a training step takes, and a generated id. Of
//! `assets/tiny-llm`, or with drawn weights of Llama 3 8B's shape, in 4 bits if asked. A lane is a thread with a model of
//! its own.

#![expect(clippy::print_stdout, reason = "a program that reports on its standard output")]

use std::{num::NonZeroUsize, path::Path, time::Instant};

use lora_core::{AdapterConfig, Draw, Method, Purpose, format::Component};
use lora_llm::{
    BaseFiles, Decoder, Example, LlmConfig,
    example::Padding,
    generate::{GenerateOptions, Sampling, generate},
    objective::{LanguageObjective, LanguageOptions, TrainingSet},
};
use lora_torch::{
    Target, Torch, TrainOptions, Trainer, Weights,
    cuda::Cuda,
    nf4::{self, Scheme},
    optimizer::OptimizerConfig,
    schedule::Schedule,
};
use tch::{Device, Kind};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let asked = |name: &str| arguments.iter().any(|argument| argument == name);
    let number = |name: &str, otherwise: usize| -> usize {
        let at = arguments.iter().position(|argument| argument == name);
        at.and_then(|at| arguments.get(at + 1)?.parse().ok()).unwrap_or(otherwise)
    };
    let large = asked("8b");
    let (batch, length) =
        (number("--batch", if large { 1 } else { 16 }), number("--length", if large { 2048 } else { 32 }));
    let (rank, steps) = (number("--rank", if large { 16 } else { 8 }), number("--steps", 30) as u64);
    lora_torch::use_threads(NonZeroUsize::new(number("--threads", 2)));
    let device = if asked("--cuda") { Device::Cuda(0) } else { Device::Cpu };
    let on = Torch::open(device, if asked("--bf16") { Kind::BFloat16 } else { Kind::Float })?;
    let scheme = match (asked("--nf4"), asked("--nf4-double")) {
        (_, true) => Some(Scheme::Nf4Double),
        (nf4, false) => nf4.then_some(Scheme::Nf4),
    };
    let start = Instant::now();
    let mut decoders = if large {
        let weights = Weights::drawn().of(Component::LanguageModel).quantised(scheme);
        vec![Decoder::new(&weights.root(&on), &LlmConfig::llama3_8b())?]
    } else {
        let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/tiny-llm");
        let mut files = BaseFiles::find(&tiny)?;
        files.quantise = scheme;
        let mut decoders = files.load_decoders(&on, 1 + number("--lanes", 0))?;
        if asked("--narrow") {
            decoders[0] = files.load_for_answers(&on)?;
        }
        decoders
    };
    let decoder = decoders.remove(0);
    let words = decoder.config().vocab_size as u32;
    println!("built in {:.2} s", start.elapsed().as_secs_f64());

    if !large {
        let options = GenerateOptions { sampling: Sampling::GREEDY, max_tokens: 400, stop: Vec::new() };
        generate(&decoder, &[1, 2, 3], &options)?;
        let start = Instant::now();
        let count = generate(&decoder, &[1, 2, 3], &options)?.len();
        println!("{:.3} ms an id", start.elapsed().as_secs_f64() * 1e3 / count as f64);
    }

    let trained = number("--trained", length);
    let examples = (0..4 * batch as u64).map(|number| {
        let mut draw = Draw::new(1, Purpose::Token, number, 0);
        let ids = (0..length).map(|_| draw.below(words)).collect();
        Example { ids, trained: (0..length).map(|at| at + trained >= length).collect() }
    });
    let source = TrainingSet::new(examples.collect(), &decoder, 1, batch, 1, None)?;
    let padding = Padding { multiple: 1, packed: false };
    let options = LanguageOptions { accumulation: 1, recompute: asked("--recompute"), padding };
    let objective = LanguageObjective::new(decoder, source, options).with_replicas(decoders);
    let options = TrainOptions {
        seed: 1,
        steps: steps + 3,
        accumulation: 1,
        adapter: AdapterConfig::new(Method::Lora, NonZeroUsize::new(rank).ok_or("rank 0")?, 2.0 * rank as f64)?,
        optimizer: OptimizerConfig::ADAMW,
        rate: 2e-4,
        up_rate: 1.0,
        schedule: Schedule::default(),
        clip: Some(1.0),
        ema: None,
        graphs: !asked("--eager"),
    };
    let all = !asked("--qkvo");
    let mut select = |projection: &lora_torch::Projection| {
        let path = projection.path();
        (path != "lm_head" && (all || path.contains("self_attn"))).then(Target::default)
    };
    let mut trainer = Trainer::new(&on, objective, &mut select, options)?;
    let mut times = Vec::new();
    let mut last = None;
    for step in 0..steps + 3 {
        let start = Instant::now();
        for report in trainer.step()? {
            last = Some(report);
        }
        if let (Device::Cuda(index), true) = (device, step >= 2) {
            Cuda::load(index)?.synchronize()?;
        }
        if step >= 3 {
            times.push(start.elapsed().as_secs_f64() * 1e3);
        }
    }
    times.sort_by(f64::total_cmp);
    let median = times[times.len() / 2];
    let rate = (batch * length) as f64 / median * 1e3;
    println!(
        "{median:.2} ms a step (least {:.2}), {rate:.0} tokens/s, {} trained",
        times[0],
        trainer.trainable_parameters()
    );
    println!("{last:?} {:?}", trainer.graphs());
    if let Some(reason) = nf4::kernel_fault() {
        println!("4 bits without a kernel: {reason}");
    }
    if let Device::Cuda(index) = device {
        println!("{:?}", Cuda::load(index)?.memory()?);
    }
    Ok(())
}
