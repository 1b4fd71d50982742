//! What does one sampling step of the tiny Stable Diffusion cost, bare and with adapters beside the weights?
//!
//! A step is a call of the UNet on the prompt and the empty prompt together, guidance, and the sampler's arithmetic. One
//! picture of 128×128 pixels, 32-bit floats on the CPU. Merged adapters cost what `bare` costs.

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use lora_benches::{attention, lora, normal, tiny_unet};
use lora_core::{Adapter, AnyAdapter, Draw, Purpose};
use lora_diffusion::{
    Result,
    schedule::{
        Prediction, ScheduleConfig,
        sampler::{Sampler, SamplerKind},
    },
    unet::Unet,
};
use lora_torch::Torch;
use tch::Tensor;

const RANK: usize = 16;
const GUIDANCE: f64 = 2.5;

fn sampling_step(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("tiny-sd, 128 px, guidance");
    let _no_grad = tch::no_grad_guard();
    for adapters in [0, 1, 3] {
        let unet = adapted(adapters).expect("the tiny base lies in assets/");
        for kind in [SamplerKind::Ddim, SamplerKind::DpmPp2m] {
            let name = if adapters == 0 { "bare".into() } else { format!("{adapters} adapters of rank {RANK}") };
            let (latent, context) = inputs().expect("memory for the inputs");
            group.bench_function(BenchmarkId::new(kind.name(), name), |bencher| {
                bencher.iter(|| step(&unet, kind, &latent, &context).expect("a step that fits"));
            });
        }
    }
}

/// The first step of a run of 30.
fn step(unet: &Unet, kind: SamplerKind, latent: &Tensor, context: &Tensor) -> Result<Tensor> {
    let schedule = ScheduleConfig::stable_diffusion(Prediction::Epsilon);
    let mut sampler = Sampler::new(kind, &schedule, 30)?;
    let x = sampler.scale_input(0, latent)?;
    let time = Tensor::f_from_slice(&[sampler.timesteps()[0] as f32; 2])?;
    let noise = unet.forward(&Tensor::f_cat(&[&x, &x], 0)?, &time, context, None)?.f_chunk(2, 0)?;
    let guided = &noise[0] + (&noise[1] - &noise[0]) * GUIDANCE;
    sampler.step(0, latent, &guided, None)
}

fn inputs() -> Result<(Tensor, Tensor)> {
    Ok((normal(1, &[1, 4, 16, 16])?, normal(2, &[2, 77, 160])?))
}

/// The bundled UNet with a number of fresh adapters in every attention projection.
fn adapted(adapters: u64) -> Result<Unet> {
    let (mut unet, _) = tiny_unet(&Torch::CPU)?;
    for seed in 0..adapters {
        for projection in attention(&mut unet)? {
            let mut draw = Draw::new(seed, Purpose::Init, 0, 0);
            projection.attach(AnyAdapter::init(&Torch::CPU, &projection.weight()?, &lora(RANK)?, &mut draw)?, 1.0);
        }
    }
    Ok(unet)
}

criterion_group!(benches, sampling_step);
criterion_main!(benches);
