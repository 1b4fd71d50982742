//! A matrix times one vector on the CPU, with the matrix in the kind in which it is stored and all sums in 32 bits.
//!
//! Continuing a text reads every weight once an id, so that memory is what it waits for: weights in 16 bits, widened on the
//! way, are read in half the time of their copies in 32, with the same products. libtorch has no such product.

#![expect(unsafe_code, reason = "code for wider registers may only be called where the processor has them")]

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

use half::{bf16, f16};

use crate::memory::Numbers;

/// `y = W·x` for `weight` `[y.len(), x.len()]`.
///
/// # Panics
/// If the sizes do not fit.
pub fn product(weight: Numbers<'_>, x: &[f32], y: &mut [f32]) {
    assert_eq!(weight.len(), x.len() * y.len(), "a matrix of {} by {}", y.len(), x.len());
    if x.is_empty() {
        return y.fill(0.0);
    }
    match weight {
        Numbers::F32(weight) => dispatched(weight, x, y),
        Numbers::Bf16(weight) => dispatched(weight, x, y),
        Numbers::F16(weight) => dispatched(weight, x, y),
    }
}

/// `y += Σ x[i] · W[i]` over the rows of `weight` `[x.len(), y.len()]`.
///
/// # Panics
/// If the sizes do not fit.
pub fn add_combination(weight: &[f32], x: &[f32], y: &mut [f32]) {
    assert_eq!(weight.len(), x.len() * y.len(), "a matrix of {} by {}", x.len(), y.len());
    if y.is_empty() {
        return;
    }
    for (row, factor) in weight.chunks_exact(y.len()).zip(x) {
        for (y, weight) in y.iter_mut().zip(row) {
            *y += factor * weight;
        }
    }
}

/// A number that is stored in some kind and computed with in 32 bits.
trait Stored: Copy {
    fn widened(self) -> f32;

    /// Sixteen of them.
    #[cfg(target_arch = "x86_64")]
    unsafe fn load_512(from: *const Self) -> __m512;

    /// Eight of them.
    #[cfg(target_arch = "x86_64")]
    unsafe fn load_256(from: *const Self) -> __m256;
}

impl Stored for f32 {
    fn widened(self) -> f32 {
        self
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f")]
    unsafe fn load_512(from: *const Self) -> __m512 {
        // SAFETY: the caller has sixteen numbers there.
        unsafe { _mm512_loadu_ps(from) }
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn load_256(from: *const Self) -> __m256 {
        // SAFETY: the caller has eight numbers there.
        unsafe { _mm256_loadu_ps(from) }
    }
}

impl Stored for bf16 {
    fn widened(self) -> f32 {
        self.to_f32()
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f")]
    unsafe fn load_512(from: *const Self) -> __m512 {
        // SAFETY: the caller has sixteen numbers there.
        let bits = unsafe { _mm256_loadu_si256(from.cast()) };
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(bits)))
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn load_256(from: *const Self) -> __m256 {
        // SAFETY: the caller has eight numbers there.
        let bits = unsafe { _mm_loadu_si128(from.cast()) };
        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(bits)))
    }
}

impl Stored for f16 {
    fn widened(self) -> f32 {
        self.to_f32()
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f")]
    unsafe fn load_512(from: *const Self) -> __m512 {
        // SAFETY: the caller has sixteen numbers there.
        _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(from.cast()) })
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn load_256(from: *const Self) -> __m256 {
        // SAFETY: the caller has eight numbers there.
        _mm256_cvtph_ps(unsafe { _mm_loadu_si128(from.cast()) })
    }
}

fn dispatched<S: Stored>(weight: &[S], x: &[f32], y: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: the processor has it.
            return unsafe { product_512(weight, x, y) };
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c") {
            // SAFETY: the processor has all three.
            return unsafe { product_256(weight, x, y) };
        }
    }
    product_plain(weight, x, y);
}

/// One row after the other, for processors whose registers are not asked for by name.
fn product_plain<S: Stored>(weight: &[S], x: &[f32], y: &mut [f32]) {
    const LANES: usize = 8;
    let (x_blocks, x_rest) = x.as_chunks::<LANES>();
    for (y, row) in y.iter_mut().zip(weight.chunks_exact(x.len())) {
        let (blocks, rest) = row.as_chunks::<LANES>();
        let mut lanes = [0.0f32; LANES];
        for (block, x) in blocks.iter().zip(x_blocks) {
            for ((lane, weight), x) in lanes.iter_mut().zip(block).zip(x) {
                *lane += weight.widened() * x;
            }
        }
        *y = lanes.iter().sum::<f32>() + dot(rest, x_rest);
    }
}

/// A product of few numbers.
fn dot<S: Stored>(left: &[S], right: &[f32]) -> f32 {
    left.iter().zip(right).map(|(left, right)| left.widened() * right).sum()
}

/// The loop over registers of one size: four rows at a time, so that a number of `x` is loaded once for all of them.
macro_rules! product_by_registers {
    ($name:ident, $features:literal, $lanes:literal, $load:ident, $load_x:ident, $zero:ident, $add:ident, $sum:path) => {
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = $features)]
        fn $name<S: Stored>(weight: &[S], x: &[f32], y: &mut [f32]) {
            #[target_feature(enable = $features)]
            fn sums<S: Stored, const N: usize>(rows: [&[S]; N], x: &[f32]) -> [f32; N] {
                let whole = x.len() / $lanes * $lanes;
                let rows = rows.map(|row| row.split_at(whole));
                let (x, x_rest) = x.split_at(whole);
                let mut totals = [$zero(); N];
                for start in (0..whole).step_by($lanes) {
                    // SAFETY: every slice has as many numbers from `start` on, for `whole` is a multiple of them.
                    unsafe {
                        let x = $load_x(x.as_ptr().add(start));
                        for (total, (row, _)) in totals.iter_mut().zip(&rows) {
                            *total = $add(S::$load(row.as_ptr().add(start)), x, *total);
                        }
                    }
                }
                let mut sums = [0.0; N];
                for ((sum, total), (_, rest)) in sums.iter_mut().zip(totals).zip(rows) {
                    *sum = $sum(total) + dot(rest, x_rest);
                }
                sums
            }

            let inner = x.len();
            let mut fours = y.chunks_exact_mut(4);
            let mut rows = weight.chunks_exact(inner);
            for y in fours.by_ref() {
                let four = [(); 4].map(|()| rows.next().unwrap_or_default());
                y.copy_from_slice(&sums(four, x));
            }
            for (y, row) in fours.into_remainder().iter_mut().zip(rows) {
                [*y] = sums([row], x);
            }
        }
    };
}

product_by_registers!(
    product_512,
    "avx512f",
    16,
    load_512,
    _mm512_loadu_ps,
    _mm512_setzero_ps,
    _mm512_fmadd_ps,
    _mm512_reduce_add_ps
);
product_by_registers!(
    product_256,
    "avx2,fma,f16c",
    8,
    load_256,
    _mm256_loadu_ps,
    _mm256_setzero_ps,
    _mm256_fmadd_ps,
    sum_256
);

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
fn sum_256(lanes: __m256) -> f32 {
    let mut numbers = [0.0f32; 8];
    // SAFETY: there is room for eight numbers.
    unsafe { _mm256_storeu_ps(numbers.as_mut_ptr(), lanes) };
    numbers.iter().sum()
}

#[cfg(test)]
mod tests {
    use lora_core::{Draw, Purpose};
    use tch::{Kind, Tensor};

    use super::*;
    use crate::random;

    /// 32-bit sums of up to 130 terms of size 1 in another order.
    const TOLERANCE: f64 = 1e-4;

    fn drawn(sample: u32, shape: &[usize]) -> Tensor {
        random::normal(&mut Draw::new(1, Purpose::Init, 5, sample), shape).unwrap()
    }

    #[test]
    fn products_equal_those_of_libtorch_in_every_kind_and_size() {
        for (out, inner) in [(1, 1), (3, 5), (4, 16), (7, 33), (9, 130), (16, 64)] {
            let x = drawn(1, &[inner]);
            for kind in [Kind::Float, Kind::BFloat16, Kind::Half] {
                let weight = drawn(0, &[out, inner]).to_kind(kind);
                let expected = weight.to_kind(Kind::Float).mv(&x);
                let mut y = vec![f32::NAN; out];
                product(Numbers::of(&weight).unwrap(), Numbers::of(&x).unwrap().floats().unwrap(), &mut y);
                let error = (Tensor::from_slice(&y) - expected).abs().max().double_value(&[]);
                assert!(error < TOLERANCE, "{out} by {inner} in {kind:?}: {error}");
            }
        }
    }

    #[test]
    fn every_number_of_16_bits_is_widened_as_it_is() {
        let bits: Vec<u16> = (0..=u16::MAX).collect();
        let brains: Vec<bf16> = bits.iter().map(|bits| bf16::from_bits(*bits)).collect();
        let halves: Vec<f16> = bits.iter().map(|bits| f16::from_bits(*bits)).collect();
        /// A column of each number among zeros, times one.
        fn widened<S: Stored>(numbers: &[S], zero: S) -> Vec<f32> {
            let weight: Vec<S> =
                numbers.iter().flat_map(|number| [[*number].as_slice(), &[zero; 15]].concat()).collect();
            let mut y = vec![0.0; numbers.len()];
            dispatched(&weight, &[1.0; 16], &mut y);
            y
        }
        let same = |ours: f32, theirs: f32| ours == theirs || ours.is_nan() && theirs.is_nan();
        for (number, widened) in brains.iter().zip(widened(&brains, bf16::ZERO)) {
            assert!(same(widened, number.to_f32()), "{widened} and {number}");
        }
        for (number, widened) in halves.iter().zip(widened(&halves, f16::ZERO)) {
            assert!(same(widened, number.to_f32()), "{widened} and {number}");
        }
    }

    #[test]
    fn all_loops_say_the_same() {
        let (weight, x) = (drawn(0, &[9, 77]), drawn(1, &[77]));
        let floats = |tensor| Numbers::of(tensor).unwrap().floats().unwrap();
        type Product = fn(&[f32], &[f32], &mut [f32]);
        let loops: [Product; 3] = [
            product_plain,
            #[cfg(target_arch = "x86_64")]
            |weight, x, y| {
                if is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
                {
                    // SAFETY: the processor has all three.
                    return unsafe { product_256(weight, x, y) };
                }
                product_plain(weight, x, y);
            },
            dispatched,
        ];
        let results = loops.map(|product| {
            let mut y = vec![0.0; 9];
            product(floats(&weight), floats(&x), &mut y);
            y
        });
        let expected = Vec::<f32>::try_from(weight.mv(&x)).unwrap();
        for result in results {
            assert!(result.iter().zip(&expected).all(|(left, right)| f64::from((left - right).abs()) < TOLERANCE));
        }
    }

    #[test]
    fn a_combination_of_rows_is_the_product_with_the_transposed_matrix() {
        let (weight, x) = (drawn(0, &[5, 7]), drawn(1, &[5]));
        let mut y = vec![1.0; 7];
        let floats = |tensor| Numbers::of(tensor).unwrap().floats().unwrap();
        add_combination(floats(&weight), floats(&x), &mut y);
        let expected = weight.transpose(0, 1).mv(&x) + 1.0;
        assert!((Tensor::from_slice(&y) - expected).abs().max().double_value(&[]) < TOLERANCE);
    }
}
