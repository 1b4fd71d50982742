//! diffusers-rs and our own UNet, with the same weights and the same adapters, agree on outputs and on gradients.
//!
//! Two programs that share no line: one writes `W + ΔW` into the foreign model's variables, the other adds `B·A·x` to each
//! projection's output. Names need no table, since both use the checkpoint's.

use anyhow::Result;
use lora_core::{AnyAdapter, Draw, Geometry, Purpose, adapter::Lora, format::Component, target::Targets};
use lora_diffusion::{
    PerLevel,
    unet::{LevelKind, Unet, UnetConfig},
};
use lora_examples::{CONTEXT, tiny_unet};
use lora_torch::{Host, Projections, Torch, Weights, random};
use tch::{Device, Reduction, Tensor, nn};

const RANK: usize = 4;
const SCALE: f64 = 0.7;
/// 32-bit sums in another order, over some forty layers, relative to the largest value of each tensor. (diffusers-rs takes
/// softmax in 32 bits whatever it is given, so there is no 64-bit comparison.)
const TOLERANCE: f64 = 1e-4;

/// Ours, as [`tiny_unet`] builds theirs.
fn config() -> UnetConfig {
    UnetConfig {
        block_out_channels: vec![32, 64],
        down_block_types: vec![LevelKind::CrossAttention, LevelKind::Plain],
        up_block_types: vec![LevelKind::Plain, LevelKind::CrossAttention],
        layers_per_block: 1,
        cross_attention_dim: CONTEXT as usize,
        attention_head_dim: PerLevel::Same(4),
        ..UnetConfig::default()
    }
}

fn drawn(sample: u32, shape: &[usize], deviation: f64) -> Result<Tensor> {
    Ok(random::normal(&mut Draw::new(11, Purpose::Sample, 0, sample), shape)? * deviation)
}

/// `A` and `B` of every target, none of them zero, in the order of the projections.
fn put_adapters(model: &mut dyn Projections, targets: &Targets) -> Result<Vec<(String, [Tensor; 2])>> {
    let mut all = Vec::new();
    for projection in model.projections() {
        if !targets.matches(Component::Unet, projection.path(), projection.is_conv_with_kernel()) {
            continue;
        }
        let shape = projection.shape();
        // Drawn by name, so that the order of layers does not matter.
        let sample =
            projection.path().bytes().fold(17_u32, |hash, byte| hash.wrapping_mul(31).wrapping_add(byte.into()));
        let down = drawn(sample, &[RANK, shape[1] as usize], 0.3)?.set_requires_grad(true);
        let up = drawn(sample ^ 1, &[shape[0] as usize, RANK], 0.3)?.set_requires_grad(true);
        projection.set_trained(Some(AnyAdapter::Lora(Lora::new(down.shallow_clone(), up.shallow_clone(), SCALE))));
        all.push((projection.path().to_owned(), [down, up]));
    }
    all.sort_by(|(one, _), (other, _)| one.cmp(other));
    Ok(all)
}

fn assert_close(name: &str, ours: &Tensor, theirs: &Tensor) {
    let largest = theirs.abs().max().double_value(&[]);
    let difference = (ours - theirs).abs().max().double_value(&[]);
    assert!(largest > 0.0, "{name} is zero and compares nothing");
    assert!(difference <= TOLERANCE * largest, "{name}: differs by {difference:e}, largest value {largest:e}");
}

#[test]
fn gradients_of_a_diffusers_rs_unet_equal_those_of_our_own() -> Result<()> {
    let store = nn::VarStore::new(Device::Cpu);
    let theirs = tiny_unet(store.root());
    let weights =
        Weights::from_tensors(store.variables().into_iter().map(|(name, tensor)| (name, tensor.detach().copy())));
    let mut ours = Unet::new(&weights.root(&Torch::CPU), &config())?;
    assert_eq!(weights.unused(), Vec::<&str>::new());

    let targets = Targets::parse(["cross-attention"])?;
    let mut host = Host::new(store.variables(), &mut |path, _| {
        targets.matches(Component::Unet, path, false).then_some(Geometry::Linear)
    })?;
    let theirs_factors = put_adapters(&mut host, &targets)?;
    let our_factors = put_adapters(&mut ours, &targets)?;
    assert!(our_factors.len() >= 4 * 3, "to_q, to_k, to_v and to_out of every cross-attention");
    assert_eq!(our_factors.len(), theirs_factors.len());

    let (x, noise) = (drawn(1, &[2, 4, 8, 8], 1.0)?, drawn(2, &[2, 4, 8, 8], 1.0)?);
    let context = drawn(3, &[2, 16, CONTEXT as usize], 1.0)?;
    let timestep = 321.0;

    host.write()?;
    let their_output = theirs.forward(&x, timestep, &context);
    their_output.mse_loss(&noise, Reduction::Mean).backward();
    let our_output = ours.forward(&x, &Tensor::from_slice(&[timestep as f32; 2]), &context, None)?;
    our_output.mse_loss(&noise, Reduction::Mean).backward();

    assert_close("output", &our_output, &their_output);
    for ((name, ours), (their_name, theirs)) in our_factors.iter().zip(&theirs_factors) {
        assert_eq!(name, their_name);
        for (part, ours, theirs) in [("down", &ours[0], &theirs[0]), ("up", &ours[1], &theirs[1])] {
            assert_close(&format!("gradient of {part} of {name}"), &ours.grad(), &theirs.grad());
        }
    }

    host.restore()?;
    let _no_grad = tch::no_grad_guard();
    for projection in ours.projections() {
        projection.set_trained(None);
    }
    let bare = ours.forward(&x, &Tensor::from_slice(&[timestep as f32; 2]), &context, None)?;
    assert_close("output without adapters", &bare, &theirs.forward(&x, timestep, &context));
    assert!((bare - our_output).abs().max().double_value(&[]) > 1e-3, "the adapters changed nothing");
    Ok(())
}
