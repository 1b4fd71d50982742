//! What does a training step of the tiny Stable Diffusion cost, and how much of it is the frozen forward pass?
//!
//! LoRA in every attention projection, AdamW, clipping: what `benches/peers/train.py` does with diffusers + peft, from
//! latents and text embeddings on. 32-bit floats on the CPU.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use lora_benches::{NoisePrediction, lora, tiny_unet, trainer};
use lora_torch::{Model as _, Objective as _, Torch};

fn training_step(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("tiny-sd, 128 px");
    for (batch, rank) in [(1, 8), (4, 8), (4, 16)] {
        let name = format!("batch {batch}, rank {rank}");
        group.throughput(Throughput::Elements(batch as u64));
        let (unet, config) = tiny_unet(&Torch::CPU).expect("the tiny base lies in assets/");
        let objective = NoisePrediction::new(unet, &config, batch).expect("memory for the inputs");
        let inputs = objective.batch(0, 0).expect("a batch").inputs;
        group.bench_function(BenchmarkId::new("frozen forward pass", &name), |bencher| {
            let _no_grad = tch::no_grad_guard();
            bencher.iter(|| objective.loss(&inputs).expect("a loss"));
        });
        let mut trainer = trainer(&Torch::CPU, objective, lora(rank).expect("a rank"), true).expect("targets");
        group.bench_function(BenchmarkId::new("whole step", &name), |bencher| {
            bencher.iter(|| trainer.step().expect("a step"));
        });
    }
}

criterion_group!(benches, training_step);
criterion_main!(benches);
