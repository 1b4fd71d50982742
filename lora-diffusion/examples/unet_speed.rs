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
        let start = Clock::now();
        drop(tch::no_grad(|| unet.forward(&x, &t, &context, None))?);
        let forward = start.elapsed();
        let start = Clock::now();
        let output = unet.forward(&x, &t, &context, None)?;
        let loss = output.f_mse_loss(&noise, tch::Reduction::Mean)?;
        let gradients = Tensor::f_run_backward(&[loss], &factors, false, false)?;
        if round >= 3 {
            times[0].push(forward);
            times[1].push(start.elapsed());
        }
        assert_eq!(gradients.len(), factors.len(), "every factor has a gradient");
    }
    for (what, times) in ["forward", "forward and backward"].iter().zip(&mut times) {
        let mut of = |clock: usize| {
            times.sort_by(|a: &[f64; 2], b| a[clock].total_cmp(&b[clock]));
            (times[times.len() / 2][clock], times[0][clock])
        };
        let ((wall, least_wall), (cpu, least_cpu)) = (of(0), of(1));
        println!("{what}: {wall:.1} ms (least {least_wall:.1}), processor {cpu:.1} ms (least {least_cpu:.1})");
    }
    Ok(())
}

/// Time on the wall, and time on processors (Linux), which other programs disturb less.
struct Clock(Instant, f64);

impl Clock {
    fn now() -> Self {
        Self(Instant::now(), Self::processor())
    }

    /// Milliseconds of both.
    fn elapsed(&self) -> [f64; 2] {
        [self.0.elapsed().as_secs_f64() * 1e3, Self::processor() - self.1]
    }

    fn processor() -> f64 {
        let threads = std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
        let nanoseconds = threads.filter_map(|thread| {
            let text = std::fs::read_to_string(thread.path().join("schedstat")).ok()?;
            text.split(' ').next()?.parse::<f64>().ok()
        });
        nanoseconds.sum::<f64>() / 1e6
    }
}

/// Puts a fresh adapter on every attention layer; its factors are what gradients are taken for.
fn train_attention(unet: &mut Unet) -> Result<Vec<Tensor>, Box<dyn Error>> {
    let rank = NonZeroUsize::new(8).ok_or("rank 0")?;
    let config = AdapterConfig::new(Method::Lora, rank, 8.0)?;
    let mut factors = Vec::new();
    let attention = unet.projections().into_iter().filter(|projection| projection.path().contains(".to_"));
    for (i, projection) in attention.enumerate() {
        let mut draw = Draw::new(0, Purpose::Init, 0, i as u32);
        let adapter = AnyAdapter::init(&projection.backend(), &projection.weight()?, &config, &mut draw)?;
        let adapter = adapter.map(&mut |_, factor: &Tensor| Ok(factor.set_requires_grad(true)))?;
        factors.extend(Adapter::<Torch>::factors(&adapter).into_iter().map(|(_, factor)| factor.shallow_clone()));
        projection.set_trained(Some(adapter));
    }
    Ok(factors)
}
