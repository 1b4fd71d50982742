//! An adapter for a model of your own: any `tch` model whose layers are `nn::linear` or `nn::conv2d`.
//!
//! A small network has learnt a sine. A LoRA of rank 2 on its middle layer teaches it a cosine; the network's own weights
//! stay as they were, and half the strength gives something in between.
#![expect(clippy::print_stdout, reason = "an example shows what came out")]

use anyhow::Result;
use lora_core::{AnyAdapter, Geometry, adapter::Lora};
use lora_torch::{Host, Projections};
use tch::{
    Device, Kind, Tensor,
    nn::{self, Module, OptimizerConfig},
};

fn main() -> Result<()> {
    tch::manual_seed(1);
    let store = nn::VarStore::new(Device::Cpu);
    let root = store.root();
    let network = nn::seq()
        .add(nn::linear(&root / "first", 1, 64, Default::default()))
        .add_fn(Tensor::tanh)
        .add(nn::linear(&root / "middle", 64, 64, Default::default()))
        .add_fn(Tensor::tanh)
        .add(nn::linear(&root / "last", 64, 1, Default::default()));
    let x = Tensor::linspace(-3.0, 3.0, 128, (Kind::Float, Device::Cpu)).unsqueeze(1); // [128, 1]
    let (sine, cosine) = (x.sin(), x.cos());
    let error = |wanted: &Tensor| (network.forward(&x) - wanted).square().mean(Kind::Float);

    let mut adam = nn::Adam::default().build(&store, 1e-2)?;
    for _ in 0..400 {
        adam.backward_step(&error(&sine));
    }
    report("the network alone", &error(&sine), &error(&cosine));

    // From here on the network's variables are frozen. The factors are variables of a store of their own, so that any
    // optimizer trains them.
    let mut host = Host::new(store.variables(), &mut |path, _| (path == "middle").then_some(Geometry::Linear))?;
    let factors = nn::VarStore::new(Device::Cpu);
    let down = factors.root().var("down", &[2, 64], nn::Init::Uniform { lo: -0.125, up: 0.125 });
    let up = factors.root().var("up", &[64, 2], nn::Init::Const(0.0)); // ΔW = 0: the network starts as it was
    let adapter = || AnyAdapter::Lora(Lora::new(down.shallow_clone(), up.shallow_clone(), 1.0));
    for projection in host.projections() {
        projection.set_trained(Some(adapter()));
    }
    let mut adam = nn::Adam::default().build(&factors, 1e-2)?;
    for _ in 0..400 {
        host.write()?;
        adam.backward_step(&error(&cosine));
    }

    let _no_grad = tch::no_grad_guard();
    for strength in [1.0, 0.5, 0.0] {
        for projection in host.projections() {
            projection.set_trained(None);
            projection.detach_all();
            projection.attach(adapter(), strength);
        }
        host.write()?;
        report(&format!("strength {strength}"), &error(&sine), &error(&cosine));
    }
    Ok(())
}

fn report(what: &str, sine: &Tensor, cosine: &Tensor) {
    println!(
        "{what:18} error {:.5} for the sine, {:.5} for the cosine",
        sine.double_value(&[]),
        cosine.double_value(&[])
    );
}
