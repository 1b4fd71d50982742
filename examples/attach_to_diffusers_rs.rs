//! LoRA on the cross-attention of an unmodified diffusers-rs UNet: trained, merged into it, taken out again.
//!
//! The UNet knows nothing of adapters: `Host` writes `W + ΔW` into its variables before each forward pass, recorded, so that
//! gradients reach the factors. `tests/diffusers_rs.rs` compares those with our own UNet's.
#![expect(clippy::print_stdout, reason = "an example shows what came out")]

use std::num::NonZeroUsize;

use anyhow::Result;
use diffusers::models::unet_2d::UNet2DConditionModel;
use lora_core::{AdapterConfig, Draw, Geometry, Method, Purpose, format::Component, target::Targets};
use lora_examples::{CONTEXT, tiny_unet};
use lora_torch::{
    Batch, Host, Model, Objective, Projection, Projections, Target, Torch, TrainOptions, Trainer,
    optimizer::OptimizerConfig, random, schedule::Schedule,
};
use tch::{Device, Reduction, Tensor, nn};

const TIMESTEP: f64 = 321.0;

/// The foreign model and what it is to learn: the noise in four latents.
struct Denoising {
    unet: UNet2DConditionModel,
    host: Host,
    latents: Tensor,
    context: Tensor,
    noise: Tensor,
}

impl Model for Denoising {
    fn loss(&self, inputs: &[Tensor]) -> lora_torch::Result<Tensor> {
        self.host.write()?;
        let predicted = self.unet.forward(&inputs[0], TIMESTEP, &inputs[1]);
        Ok(predicted.f_mse_loss(&inputs[2], Reduction::Mean)?)
    }

    fn projections(&mut self) -> Vec<&mut Projection> {
        self.host.projections()
    }
}

impl Objective for Denoising {
    fn batch(&self, _step: u64, _micro: u64) -> lora_torch::Result<Batch> {
        let inputs = [&self.latents, &self.context, &self.noise].map(Tensor::shallow_clone).into();
        Ok(Batch { bucket: 0, inputs, examples: 4 })
    }
}

fn main() -> Result<()> {
    let store = nn::VarStore::new(Device::Cpu);
    let unet = tiny_unet(store.root());
    let targets = Targets::parse(["cross-attention"])?;
    let host = Host::new(store.variables(), &mut |path, _| {
        targets.matches(Component::Unet, path, false).then_some(Geometry::Linear)
    })?;
    let drawn = |sample, shape: &[usize]| random::normal(&mut Draw::new(7, Purpose::Sample, 0, sample), shape);
    let task = Denoising {
        unet,
        host,
        latents: drawn(0, &[4, 4, 8, 8])?,
        context: drawn(1, &[4, 16, CONTEXT as usize])?,
        noise: drawn(2, &[4, 4, 8, 8])?,
    };
    let options = TrainOptions {
        seed: 42,
        steps: 100,
        accumulation: 1,
        adapter: AdapterConfig::new(Method::Lora, const { NonZeroUsize::new(4).expect("not 0") }, 4.0)?,
        optimizer: OptimizerConfig::ADAMW,
        rate: 1e-2,
        up_rate: 1.0,
        schedule: Schedule::default(),
        clip: Some(1.0),
        ema: None,
        graphs: false,
    };
    let mut trainer = Trainer::new(&Torch::CPU, task, &mut |_| Some(Target::default()), options)?;
    println!("{} modules, {} trained numbers", trainer.modules(), trainer.trainable_parameters());
    while !trainer.is_finished() {
        for report in trainer.step()?.iter().filter(|report| report.step % 20 == 1 || report.step == 100) {
            println!("step {:3}  loss {:.4}", report.step, report.loss);
        }
    }

    // Merging: the trained adapters at strength 1, written without gradients. The UNet is then an ordinary one.
    let adapters = trainer.adapters(false)?;
    let task = trainer.objective();
    let _no_grad = tch::no_grad_guard();
    let loss = |task: &Denoising| {
        task.unet.forward(&task.latents, TIMESTEP, &task.context).mse_loss(&task.noise, Reduction::Mean)
    };
    for (projection, trained) in task.host.projections().into_iter().zip(adapters) {
        projection.attach(trained.adapter, 1.0);
    }
    task.host.write()?;
    println!("merged into the UNet: loss {:.4}", loss(task).double_value(&[]));
    task.host.restore()?;
    println!("taken out again:      loss {:.4}", loss(task).double_value(&[]));
    Ok(())
}
