//! How much faster is the randomised decomposition of `lora extract` than the whole one, and how much worse? On matrices of
//! SDXL's shapes, a folded 3×3 convolution among them, whose singular values fall off as differences of tuned models do, or
//! more slowly, which is the hard case; as many at once as there are cores, as `lora extract` has them. And how exact is
//! `lora resize`?
//!
//!     cargo run --release -p lora-core --example decompositions

#![expect(clippy::print_stdout, reason = "its answer is what it prints")]

use std::{num::NonZeroUsize, time::Instant};

use faer::{Mat, MatRef};
use lora_core::{
    Adapter, Array, Backend, Cpu, Draw, Error, Lora, Purpose, Result,
    resize::{Cut, Search, cut_difference, cut_product},
};
use rayon::prelude::*;

const RANK: usize = 32;
const RUNS: usize = 3;

/// Rows, columns, and what has that shape.
const SHAPES: [(usize, usize, &str); 6] = [
    (640, 640, "attention, 640 wide"),
    (1280, 1280, "attention, 1280 wide"),
    (1280, 2048, "keys of the text"),
    (1280, 5120, "feed-forward"),
    (640, 640 * 9, "3×3 convolution"),
    (1280, 1280 * 9, "3×3 convolution"),
];

fn main() -> Result<()> {
    let (cores, mut worst) = (rayon::current_num_threads(), (f64::INFINITY, f64::NEG_INFINITY));
    println!("what, shape, values fall as, whole, randomised, times as fast, more error");
    let (mut all_whole, mut all_randomised) = (0.0, 0.0);
    for (rows, columns, what) in SHAPES {
        for (power, name) in [(0.5, "1/√i"), (1.0, "1/i")] {
            let matrix = falling(rows, columns, power)?;
            let (whole, best) = timed(&matrix, Search::Whole)?;
            let (randomised, found) = timed(&matrix, Search::Randomised)?;
            let more = 100.0 * (off(&found, &matrix)? / off(&best, &matrix)? - 1.0);
            let times = whole / randomised;
            println!("{what}, {rows}x{columns}, {name}, {whole:.3} s, {randomised:.3} s, {times:.1}, {more:+.3} %");
            worst = (worst.0.min(times), worst.1.max(more));
            all_whole += whole;
            all_randomised += randomised;
        }
    }
    let times = all_whole / all_randomised;
    println!("all, {cores} at once: {all_whole:.2} s, {all_randomised:.2} s, {times:.1} times as fast");
    println!("at least {:.1} times as fast, at most {:+.2} % more error", worst.0, worst.1);
    for (rows, rank, columns) in [(1280, 128, 640), (1280, 128, 5120)] {
        let (up, down) = (numbers(1, &[rows, rank]), numbers(2, &[rank, columns]));
        let start = Instant::now();
        let (cut, _, _) = cut_product(&up, &down, &[rows, columns], rank_32())?;
        let seconds = start.elapsed().as_secs_f64();
        let off = distance_to_the_best(&up, &down, &cut)?;
        println!("resize of {rows}x{columns} from {rank} to {RANK}: {seconds:.4} s, {off:.1e} from the best in f64");
    }
    Ok(())
}

fn rank_32() -> Cut {
    Cut::rank(NonZeroUsize::new(RANK).unwrap_or(NonZeroUsize::MIN))
}

/// Seconds for one matrix where every core has its own, the shortest of some runs, and what comes out.
fn timed(matrix: &Array, search: Search) -> Result<(f64, Lora<Array>)> {
    let cores = rayon::current_num_threads();
    let (mut shortest, mut lora) = (f64::INFINITY, None);
    for _ in 0..RUNS {
        let matrices = vec![matrix.clone(); cores];
        let start = Instant::now();
        let found: Vec<Lora<Array>> = matrices
            .into_par_iter()
            .map(|matrix| Ok(cut_difference(matrix, rank_32(), search)?.0))
            .collect::<Result<_>>()?;
        shortest = shortest.min(start.elapsed().as_secs_f64() / cores as f64);
        lora = found.into_iter().next();
    }
    let reason = "there is no core to run it".to_owned();
    Ok((shortest, lora.ok_or(Error::Numeric { operation: "svd", reason })?))
}

/// A random matrix whose singular values go about as `1/index^power`.
fn falling(rows: usize, columns: usize, power: f32) -> Result<Array> {
    let inner = rows.min(columns);
    let fall = (1..=inner).map(|index| (index as f32).powf(-power)).collect();
    let left = Cpu.mul(&numbers(3, &[rows, inner]), &Array::new([1, inner], fall)?)?;
    Cpu.matmul(&left, &numbers(4, &[inner, columns]))
}

fn numbers(sample: u32, shape: &[usize]) -> Array {
    let values = Draw::new(1, Purpose::Noise, 0, sample).normal(shape.iter().product(), 1.0);
    Array { shape: shape.to_vec(), values }
}

/// `‖up·down − matrix‖`.
fn off(lora: &Lora<Array>, matrix: &Array) -> Result<f64> {
    Ok(Cpu.sub(&lora.delta(&Cpu, matrix)?, matrix)?.norm())
}

/// How far a cut of `up · down` is from the best of its rank, which a decomposition of the product in `f64` gives.
fn distance_to_the_best(up: &Array, down: &Array, cut: &Lora<Array>) -> Result<f64> {
    let wide = |array: &Array| {
        let matrix = MatRef::from_row_major_slice(&array.values, array.shape[0], array.shape[1]);
        Mat::from_fn(matrix.nrows(), matrix.ncols(), |row, column| f64::from(matrix[(row, column)]))
    };
    let failed = |error| Error::Numeric { operation: "svd", reason: format!("{error:?}") };
    let svd = (wide(up) * wide(down)).thin_svd().map_err(failed)?;
    let some = |side: MatRef<'_, f64>| side.subcols(0, RANK).to_owned();
    let best = some(svd.U()) * svd.S().column_vector().subrows(0, RANK).as_diagonal() * some(svd.V()).transpose();
    Ok((wide(&cut.up) * wide(&cut.down) - &best).norm_l2() / best.norm_l2())
}
