//! What does a LoRA beside a frozen linear layer cost, forward and with the backward pass, over the frozen layer alone?
//!
//! `adapted` keeps `W` and the factors apart; `merged` computes with one weight, as generation may. The backward pass
//! goes to the input and the two factors, never to the weight. Everything in 32-bit floats on the CPU.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use lora_benches::{LINEARS, LinearShape, lora, normal};
use lora_core::{Adapter, AnyAdapter, Draw, Purpose};
use lora_torch::{Projection, Result, Torch, Weights};
use tch::Tensor;

const RANK: usize = 16;

fn adapted_linear(criterion: &mut Criterion) {
    for shape in LINEARS {
        let mut group = criterion.benchmark_group(shape.name);
        group.throughput(Throughput::Elements((shape.tokens * shape.inner * shape.out) as u64)); // multiply-adds of the base
        let x = normal(1, &[shape.tokens, shape.inner]).expect("memory for the input").set_requires_grad(true);
        for (name, layer) in layers(shape).expect("memory for the layers") {
            group.bench_function(BenchmarkId::new("forward", name), |bencher| {
                bencher.iter(|| tch::no_grad(|| black_box(layer.forward(&x))).expect("shapes fit"));
            });
            group.bench_function(BenchmarkId::new("forward and backward", name), |bencher| {
                bencher
                    .iter(|| layer.forward(&x).and_then(|y| Ok(y.f_sum(y.kind())?.f_backward()?)).expect("shapes fit"));
            });
        }
    }
}

/// The same layer frozen, with a trained adapter beside it, and with the adapter merged into it.
fn layers(shape: LinearShape) -> Result<[(&'static str, Projection); 3]> {
    let weight = normal(2, &[shape.out, shape.inner])?;
    let layer = |weight: &Tensor| {
        let weights = Weights::from_tensors([("weight".to_owned(), weight.shallow_clone())]);
        Projection::linear(&weights.root(&Torch::CPU), [shape.out, shape.inner], false)
    };
    let fresh = AnyAdapter::init(&Torch::CPU, &weight, &lora(RANK)?, &mut Draw::new(3, Purpose::Init, 0, 0))?;
    let adapter = fresh.map(&mut |_, factor: &Tensor| {
        Ok(normal(4, &factor.size().iter().map(|n| *n as usize).collect::<Vec<_>>())
            .expect("memory for a factor")
            .set_requires_grad(true))
    })?;
    let merged = layer(&tch::no_grad(|| adapter.merge(&Torch::CPU, &weight, 1.0))?)?;
    let mut adapted = layer(&weight)?;
    adapted.set_trained(Some(adapter));
    Ok([("frozen", layer(&weight)?), ("adapted", adapted), ("merged", merged)])
}

criterion_group!(benches, adapted_linear);
criterion_main!(benches);
