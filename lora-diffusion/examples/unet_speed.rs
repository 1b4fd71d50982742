//! How long the UNet of a base takes: forward, and forward with backward to rank-8 adapters on all attention layers.
//!
//! `cargo run --release -p lora-diffusion --example unet_speed [BASE] [BATCH] [THREADS] [ROUNDS]`

#![expect(clippy::print_stdout, reason = "a program that reports on its standard output")]

use std::{error::Error, num::NonZeroUsize, path::PathBuf, time::Instant};

use lora_core::{Adapter, AdapterConfig, AnyAdapter, Draw, Method, Purpose};
use lora_diffusion::{BaseFiles, unet::Unet};
use lora_torch::{Projections, Torch};
use tch::{Device, Kind, Tensor};

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let base = PathBuf::from(arguments.next().unwrap_or_else(|| "assets/tiny-sd".into()));
    let mut number = |default| arguments.next().map_or(Ok(default), |text| text.parse::<usize>());
    let (batch, threads, rounds) = (number(4)?, number(2)?, number(20)?);
    tch::set_num_threads(i32::try_from(threads)?);

    let files = BaseFiles::find(&base)?;
    let mut unet = files.load_unet(&Torch::CPU)?;
    let factors = train_attention(&mut unet)?;

    let side = files.unet.sample_size as i64;
    let normal = |shape: &[i64]| Tensor::f_randn(shape, (Kind::Float, Device::Cpu));
    let x = normal(&[batch as i64, files.unet.in_channels as i64, side, side])?;
    let noise = normal(&x.size())?;
    let context = normal(&[batch as i64, 77, files.unet.cross_attention_dim as i64])?;
    let t = Tensor::f_from_slice(&(0..batch).map(|i| 37.0 + 200.0 * i as f32).collect::<Vec<_>>())?;

    let mut times = [const { Vec::new() }; 2];
    for round in 0..rounds + 3 {
        let start = Instant::now();
        drop(tch::no_grad(|| unet.forward(&x, &t, &context, None))?);
        let forward = start.elapsed();
        let start = Instant::now();
        let output = unet.forward(&x, &t, &context, None)?;
        let loss = output.f_mse_loss(&noise, tch::Reduction::Mean)?;
        let gradients = Tensor::f_run_backward(&[loss], &factors, false, false)?;
        if round >= 3 {
            times[0].push(forward.as_secs_f64() * 1e3);
            times[1].push(start.elapsed().as_secs_f64() * 1e3);
        }
        assert_eq!(gradients.len(), factors.len(), "every factor has a gradient");
    }
    for (what, times) in ["forward", "forward and backward"].iter().zip(&mut times) {
        times.sort_by(f64::total_cmp);
        println!("{what}: median {:.1} ms, least {:.1} ms", times[times.len() / 2], times[0]);
    }
    Ok(())
}

/// Puts a fresh adapter on every attention layer; its factors are what gradients are taken for.
fn train_attention(unet: &mut Unet) -> Result<Vec<Tensor>, Box<dyn Error>> {
    let rank = NonZeroUsize::new(8).ok_or("rank 0")?;
    let config = AdapterConfig::new(Method::Lora, rank, 8.0)?;
    let mut factors = Vec::new();
    let attention = unet.projections().into_iter().filter(|projection| projection.path().contains(".to_"));
    for (i, projection) in attention.enumerate() {
        let mut draw = Draw::new(0, Purpose::Init, 0, i as u32);
        let adapter = AnyAdapter::init(&projection.backend(), projection.weight(), &config, &mut draw)?;
        let adapter = adapter.map(&mut |_, factor: &Tensor| Ok(factor.set_requires_grad(true)))?;
        factors.extend(Adapter::<Torch>::factors(&adapter).into_iter().map(|(_, factor)| factor.shallow_clone()));
        projection.set_trained(Some(adapter));
    }
    Ok(factors)
}
