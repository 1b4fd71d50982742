//! How much faster is the randomised decomposition of `lora extract` than the whole one, and how much worse? On matrices of
//! SDXL's shapes whose singular values fall off slowly, which is the hard case; and how exact is `lora resize`?
//!
//!     cargo run --release -p lora-core --example decompositions

#![expect(clippy::print_stdout, reason = "its answer is what it prints")]

use std::{num::NonZeroUsize, time::Instant};

use lora_core::{
    Adapter, Array, Backend, Cpu, Draw, Purpose, Result,
    backend::decompose::svd,
    resize::{Cut, Search, cut_difference, cut_product},
};

const RANK: usize = 32;

fn main() -> Result<()> {
    let cut = Cut::rank(NonZeroUsize::new(RANK).unwrap_or(NonZeroUsize::MIN));
    println!("shape, whole, randomised, times as fast, error over the best possible");
    for shape in [[640, 640], [1280, 1280], [1280, 2048], [640, 2560]] {
        let matrix = slowly_falling(shape)?;
        let start = Instant::now();
        let (best, _, _) = cut_difference(&matrix, cut, Search::Whole)?;
        let whole = start.elapsed().as_secs_f64();
        let start = Instant::now();
        let (found, _, _) = cut_difference(&matrix, cut, Search::Randomised)?;
        let randomised = start.elapsed().as_secs_f64();
        let error = |lora: &lora_core::Lora<Array>| {
            Ok::<_, lora_core::Error>(norm(&Cpu.sub(&lora.delta(&Cpu, &matrix)?, &matrix)?))
        };
        let excess = error(&found)? / error(&best)? - 1.0;
        let times = whole / randomised;
        println!("{shape:?}, {whole:.3} s, {randomised:.3} s, {times:.1}, {:+.3} %", 100.0 * excess);
    }
    let (up, down) = (numbers(1, &[1280, 128]), numbers(2, &[128, 640]));
    let start = Instant::now();
    let (cut, _, _) = cut_product(&up, &down, &[1280, 640], cut)?;
    let seconds = start.elapsed().as_secs_f64();
    let product = Cpu.matmul(&up, &down)?;
    let whole = svd(&product)?;
    let left = Cpu.mul(
        &Cpu.narrow(&whole.left, 1, 0, RANK)?,
        &Cpu.narrow(&Cpu.reshape(&whole.values, &[1, 640])?, 1, 0, RANK)?,
    )?;
    let best = Cpu.matmul(&left, &Cpu.narrow(&whole.right, 0, 0, RANK)?)?;
    let off = norm(&Cpu.sub(&cut.delta(&Cpu, &product)?, &best)?) / norm(&best);
    println!("resize of [1280, 640] from rank 128 to {RANK}: {seconds:.4} s, {off:.1e} from the SVD of the product");
    Ok(())
}

/// A random matrix whose singular values go as `1/√index`.
fn slowly_falling([rows, columns]: [usize; 2]) -> Result<Array> {
    let inner = rows.min(columns);
    let fall = (1..=inner).map(|index| 1.0 / (index as f32).sqrt()).collect();
    let left = Cpu.mul(&numbers(3, &[rows, inner]), &Array::new([1, inner], fall)?)?;
    Cpu.matmul(&left, &numbers(4, &[inner, columns]))
}

fn numbers(sample: u32, shape: &[usize]) -> Array {
    let values = Draw::new(1, Purpose::Noise, 0, sample).normal(shape.iter().product(), 1.0);
    Array { shape: shape.to_vec(), values }
}

fn norm(array: &Array) -> f64 {
    array.values.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>().sqrt()
}
