//! What an adapted linear layer costs on the CPU, forward and backward, beside the layer without an adapter.
//!
//! ```text
//! cargo run --release -p lora-torch --example adapted_linear            # threads: --example adapted_linear -- 2
//! ```
//! `[1024, 320] → 320`, rank 8, 32 bits: the size of a to_q of Stable Diffusion's first block.
#![expect(clippy::print_stdout, reason = "an example talks to people")]

use std::{num::NonZeroUsize, time::Instant};

use lora_core::{AnyAdapter, Draw, Geometry, Purpose, adapter::Lora};
use lora_torch::{Projection, Result, random, use_threads};
use tch::Tensor;

fn main() -> Result<()> {
    let threads = std::env::args().nth(1).and_then(|threads| threads.parse().ok()).unwrap_or(NonZeroUsize::MIN);
    use_threads(Some(threads));
    let mut draw = Draw::new(1, Purpose::Init, 0, 0);
    let mut drawn = |shape: &[usize], bound| random::uniform(&mut draw, shape, bound);
    let mut layer = Projection::new("to_q", drawn(&[320, 320], 0.1)?, Some(drawn(&[320], 1.0)?), Geometry::Linear)?;
    let x = drawn(&[1024, 320], 1.0)?.f_set_requires_grad(true)?;
    let down = drawn(&[8, 320], 0.1)?.f_set_requires_grad(true)?;
    let up = drawn(&[8, 320], 0.1)?.f_transpose(0, 1)?.f_set_requires_grad(true)?; // as the arena keeps it
    for round in 0..3 {
        layer.set_trained(None);
        let bare = fastest(|| step(&layer, &x, &[&x]))?;
        let lora = Lora::new(down.shallow_clone(), up.shallow_clone(), 0.5);
        layer.set_trained(Some(AnyAdapter::Lora(lora)));
        let adapted = fastest(|| step(&layer, &x, &[&x, &down, &up]))?;
        println!("round {round}: bare {bare:.1} µs, adapted {adapted:.1} µs, {threads} thread(s)");
    }
    Ok(())
}

fn step(layer: &Projection, x: &Tensor, leaves: &[&Tensor]) -> Result<()> {
    let loss = layer.forward(x)?.f_sum(None)?;
    Tensor::f_run_backward(&[&loss], leaves, false, false)?;
    Ok(())
}

/// The shortest of 300 runs after 50, in microseconds: what other programs on the machine disturb least.
fn fastest(mut run: impl FnMut() -> Result<()>) -> Result<f64> {
    let mut times = Vec::new();
    for _ in 0..350 {
        let start = Instant::now();
        run()?;
        times.push(start.elapsed().as_secs_f64() * 1e6);
    }
    Ok(times[50..].iter().copied().fold(f64::INFINITY, f64::min))
}
