//! The leading singular triplets of a matrix `A`, by a randomised block Krylov method.
//!
//! Subspace iteration (Halko, Martinsson and Tropp 2011, arXiv 0909.4061, algorithm 4.4) multiplies some vectors by `A·Aᵀ`
//! again and again and keeps the last. Here all that came before is kept as well, since its products were paid for (Musco and
//! Musco 2015, arXiv 1504.05477, algorithm 2):
//!
//! ```text
//! U₀ = orth(A·Ω)      Wⱼ = Aᵀ·Uⱼ      Uⱼ₊₁ = orth(A·orth(Wⱼ), of U₀ … Uⱼ)
//! ```
//!
//! With `U = [U₀ U₁ …]` the triplets are those of the small `Uᵀ·A = [W₀ W₁ …]ᵀ`, which is there already: no product is made for
//! the end alone. For the same error it takes two thirds of the products of subspace iteration, and where many triplets are
//! wanted less. Vectors lie one a row and are multiplied sixteen or more at a time, the width of a register; they are made
//! orthonormal through their Gram matrix in `f64`, since reflections take longer than the products of a small matrix.

use faer::{Accum, Mat, MatMut, MatRef, Par, Side, linalg::matmul::matmul};

use super::{
    Array,
    decompose::{Svd, decomposed, lengths, not_finite, power_to_one},
    gram::gram_in_f64,
    product_svd::{array_product, eigen},
};
use crate::{Draw, Result};

/// The first `count` singular triplets of `matrix` `[m, n]`, at most `min(m, n)`.
///
/// Many times as fast as [`svd`](super::decompose::svd) where `count` is small. What is left of the matrix is at most 1 % more
/// than without the true triplets, also where the values hardly fall; triplets of nearly equal values may be mixed, and
/// those that the matrix has not are zeros. The same `draw` gives the same result.
///
/// # Errors
/// As [`svd`](super::decompose::svd).
pub fn leading(matrix: &Array, count: usize, draw: &mut Draw) -> Result<Svd> {
    // Among numbers, squares of `f32` do not leave the range of `f64`.
    let norm = matrix.norm();
    if !norm.is_finite() {
        return Err(not_finite());
    }
    match power_to_one(norm) {
        None => leading_of_finite(matrix, count, draw),
        Some(power) => {
            let near_one = matrix.values.iter().map(|value| value * power).collect();
            leading_of_finite(&Array::new(matrix.shape.clone(), near_one)?, count, draw)?.divided(power)
        }
    }
}

/// [`leading`] of a matrix whose numbers somebody has looked at and brought near 1: that takes a tenth of the time of finding
/// a few triplets.
pub(crate) fn leading_of_finite(matrix: &Array, count: usize, draw: &mut Draw) -> Result<Svd> {
    let (rows, columns) = lengths("svd", matrix)?;
    let view = MatRef::from_row_major_slice(&matrix.values, rows, columns);
    if rows <= columns {
        return leading_of_wide(view, count, draw);
    }
    let Svd { left, values, right } = leading_of_wide(view.transpose(), count, draw)?;
    Ok(Svd { left: turned(&right), values, right: turned(&left) })
}

/// Whether [`leading`] finds `count` triplets of `matrix` sooner than a decomposition of the whole, as it does while it looks
/// through no more than half of all vectors.
pub(crate) fn is_worth_searching(matrix: &Array, count: usize) -> bool {
    let (block, blocks) = blocks(count);
    let shorter = matrix.shape.iter().min().copied().unwrap_or(0);
    block.saturating_mul(blocks).saturating_mul(2) <= shorter
}

/// Vectors in a block, and how many blocks there are.
///
/// Measured with 1 to 20 % of the triplets of matrices 640 and 1280 high whose values fall as powers of their place from 0
/// (random numbers) to −1: 0.9 % more error at most, at power 0; 0.4 % at power −1/2.
fn blocks(count: usize) -> (usize, usize) {
    let block = count.saturating_mul(3).div_ceil(4).max(1).next_multiple_of(16);
    (block, if block >= count { 3 } else { 4 })
}

/// [`leading`] of a matrix `[m, n]` that is not higher than wide: most vectors are of the shorter side.
fn leading_of_wide(matrix: MatRef<'_, f32>, wanted: usize, draw: &mut Draw) -> Result<Svd> {
    // What is less than rounding leaves of a product is no direction of the matrix.
    const NOTHING: f64 = 1e-6;
    let (rows, columns) = (matrix.nrows(), matrix.ncols());
    let (block, blocks) = blocks(wanted.min(rows));
    let width = (block * blocks).min(rows);
    let mut basis = Mat::<f32>::zeros(width, rows); // Uᵀ
    let mut small = Mat::<f32>::zeros(width, columns); // Uᵀ·A
    let first = block.min(width);
    let start = draw.uniform(first * columns, 1.0);
    let mut next = product(MatRef::from_column_major_slice(&start, first, columns), matrix.transpose()); // Ωᵀ·Aᵀ
    let (mut found, mut size) = (0, f64::INFINITY);
    loop {
        next = without(next, basis.as_ref().subrows(0, found));
        if found > 0 && f64::from(next.norm_l2()) <= NOTHING * size {
            break;
        }
        // Once leaves as much of the old vectors as rounding hid, twice leaves none.
        next = without(orthonormal(next.as_ref()), basis.as_ref().subrows(0, found));
        next = orthonormal(next.as_ref());
        let count = next.nrows();
        basis.as_mut().subrows_mut(found, count).copy_from(&next);
        multiply(small.as_mut().subrows_mut(found, count), next.as_ref(), matrix);
        let image = small.as_ref().subrows(found, count);
        found += count;
        if found == width {
            break;
        }
        // Orthonormal in between, or the next product would lose what is small.
        let image = orthonormal(image);
        next = product(image.as_ref().subrows(0, block.min(width - found)), matrix.transpose());
        size = f64::from(next.norm_l2());
    }
    triplets(basis.as_ref().subrows(0, found), small.as_ref().subrows(0, found), wanted.min(rows))
}

/// The first triplets of `A` in the space of orthonormal `basis` `[k, m]`, `small = basis·A` `[k, n]`; beyond `k` they are zeros.
fn triplets(basis: MatRef<'_, f32>, small: MatRef<'_, f32>, wanted: usize) -> Result<Svd> {
    let (width, count) = (small.nrows(), wanted.min(small.nrows()));
    let (vectors, squares) = eigen(gram_in_f64(small).as_ref())?;
    let back = |left: MatRef<'_, f32>| array_product(basis.transpose(), left, parallelism());
    // Squares keep half of the digits: too few if the last values that are wanted are nothing beside the first.
    let svd = if count == 0 || squares[count - 1] <= 1e-12 * squares[0] {
        let Svd { left, mut values, mut right } = decomposed(small)?;
        values.values.truncate(count);
        right.values.truncate(count * small.ncols());
        Svd {
            left: back(MatRef::from_row_major_slice(&left.values, width, left.shape[1]).subcols(0, count)),
            values: Array::new([count], values.values)?,
            right: Array::new([count, small.ncols()], right.values)?,
        }
    } else {
        let values: Vec<f64> = squares[..count].iter().map(|square| square.sqrt()).collect();
        let left = Mat::from_fn(width, count, |row, column| vectors[(row, column)] as f32);
        let right = Mat::from_fn(count, width, |row, column| (vectors[(column, row)] / values[row]) as f32);
        Svd {
            left: back(left.as_ref()),
            values: Array::new([count], values.iter().map(|value| *value as f32).collect())?,
            right: array_product(right.as_ref(), small, parallelism()),
        }
    };
    Ok(filled_up(svd, wanted))
}

/// As many triplets as are wanted: zeros after those that are there.
fn filled_up(svd: Svd, count: usize) -> Svd {
    let Svd { left, mut values, mut right } = svd;
    let (found, columns) = (values.values.len(), right.shape[1]);
    if found == count {
        return Svd { left, values, right };
    }
    let zeros = vec![0.0; count - found];
    let rows = left.values.chunks_exact(found).flat_map(|row| row.iter().chain(&zeros).copied());
    let left = Array { shape: vec![left.shape[0], count], values: rows.collect() };
    values.values.resize(count, 0.0);
    right.values.resize(count * columns, 0.0);
    (values.shape, right.shape) = (vec![count], vec![count, columns]);
    Svd { left, values, right }
}

/// `vectors` without what they have of orthonormal ones.
fn without(mut vectors: Mat<f32>, others: MatRef<'_, f32>) -> Mat<f32> {
    if others.nrows() > 0 {
        let shares = product(vectors.as_ref(), others.transpose());
        matmul(vectors.as_mut(), Accum::Add, shares.as_ref(), others, -1.0, parallelism());
    }
    vectors
}

/// Rows that span the same and are orthonormal as far as `f32` goes, or nearly so if they leaned on each other before.
fn orthonormal(rows: MatRef<'_, f32>) -> Mat<f32> {
    // With less between the most and the least of them, a product of rounded numbers would be left with nothing.
    const LEANING: f64 = 1e-5;
    let reflected = || rows.transpose().qr().compute_thin_Q().transpose().to_owned();
    let Ok(factor) = gram_in_f64(rows).llt(Side::Lower) else { return reflected() };
    let lower = factor.L();
    let pivots = || (0..lower.nrows()).map(|index| lower[(index, index)]);
    let (least, most) = (pivots().fold(f64::INFINITY, f64::min), pivots().fold(0.0, f64::max));
    if least.is_nan() || least <= LEANING * most {
        return reflected();
    }
    let mut inverse = Mat::<f64>::identity(lower.nrows(), lower.nrows());
    lower.solve_lower_triangular_in_place(inverse.as_mut());
    let inverse = Mat::from_fn(inverse.nrows(), inverse.ncols(), |row, column| inverse[(row, column)] as f32);
    product(inverse.as_ref(), rows)
}

fn product(left: MatRef<'_, f32>, right: MatRef<'_, f32>) -> Mat<f32> {
    let mut output = Mat::zeros(left.nrows(), right.ncols());
    multiply(output.as_mut(), left, right);
    output
}

fn multiply(output: MatMut<'_, f32>, left: MatRef<'_, f32>, right: MatRef<'_, f32>) {
    matmul(output, Accum::Replace, left, right, 1.0, parallelism());
}

/// All cores, unless the caller has given each of them something to do.
fn parallelism() -> Par {
    if rayon::current_thread_index().is_some() { Par::Seq } else { Par::rayon(0) }
}

fn turned(matrix: &Array) -> Array {
    let (rows, columns) = (matrix.shape[0], matrix.shape[1]);
    let values = (0..columns).flat_map(|column| (0..rows).map(move |row| matrix.values[row * columns + column]));
    Array { shape: vec![columns, rows], values: values.collect() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Backend, Cpu, Error, Purpose,
        backend::{
            decompose::svd,
            testing::{close, numbers},
        },
    };

    fn draw() -> Draw {
        Draw::new(3, Purpose::Sketch, 0, 0)
    }

    fn multiplied(svd: &Svd) -> Array {
        let (up, down) = svd.balanced(usize::MAX, 1.0);
        Cpu.matmul(&up, &down).unwrap()
    }

    /// The first triplets of a decomposition.
    fn cut(whole: &Svd, count: usize) -> Svd {
        Svd {
            left: Cpu.narrow(&whole.left, 1, 0, count).unwrap(),
            values: Cpu.narrow(&whole.values, 0, 0, count).unwrap(),
            right: Cpu.narrow(&whole.right, 0, 0, count).unwrap(),
        }
    }

    #[test]
    fn the_leading_triplets_are_those_of_the_whole_decomposition() {
        // Rank 3 with well separated values, and noise a hundred times as small.
        let strong = Cpu.matmul(&numbers(2, &[40, 3]), &numbers(3, &[3, 60])).unwrap();
        let matrix = Cpu.add(&strong, &Cpu.scale(&numbers(4, &[40, 60]), 0.01).unwrap()).unwrap();
        let best = cut(&svd(&matrix).unwrap(), 3);
        let few = leading(&matrix, 3, &mut draw()).unwrap();
        close(&few.values, &best.values, 1e-3);
        close(&multiplied(&few), &multiplied(&best), 1e-3);
        let all = leading(&matrix, 99, &mut draw()).unwrap();
        assert_eq!(
            (&*all.values.shape, &*all.left.shape, &*all.right.shape),
            (&[40][..], &[40, 40][..], &[40, 60][..])
        );
        close(&multiplied(&all), &matrix, 1e-4);
        // The same of the matrix turned over.
        let turned = leading(&Cpu.transpose(&matrix).unwrap(), 3, &mut draw()).unwrap();
        close(&Cpu.transpose(&multiplied(&turned)).unwrap(), &multiplied(&best), 1e-3);
    }

    #[test]
    fn a_matrix_that_has_fewer_triplets_than_are_wanted_comes_back_whole() {
        let strong = Cpu.matmul(&numbers(2, &[90, 3]), &numbers(3, &[3, 120])).unwrap();
        for matrix in [strong, Array::full([90, 120], 0.0), Array::full([70, 70], 1.0)] {
            let exact = leading(&matrix, 5, &mut draw()).unwrap();
            close(&multiplied(&exact), &matrix, 1e-3);
            for side in [Cpu.transpose(&exact.left).unwrap(), exact.right] {
                close(&Cpu.matmul(&side, &Cpu.transpose(&side).unwrap()).unwrap(), &Array::identity(5), 1e-4);
            }
            // More than the space that was found has.
            let many = leading(&matrix, 60, &mut draw()).unwrap();
            assert_eq!((&many.left.shape[1], &many.right.shape[0]), (&60, &60));
            close(&multiplied(&many), &matrix, 1e-3);
        }
    }

    /// The promise of [`leading`], on values that do not fall at all beyond chance, fall slowly, and fall as fast as to leave
    /// the last of those wanted a hundred-thousandth of the first.
    #[test]
    fn what_is_left_is_at_most_one_percent_more_than_it_must_be() {
        const MOST: f64 = 1.01;
        type Fall = fn(usize) -> f32;
        let falls: [(&str, Fall); 4] = [
            ("not at all", |_| 1.0),
            ("1/√i", |index| (index as f32 + 1.0).powf(-0.5)),
            ("1/i", |index| 1.0 / (index as f32 + 1.0)),
            ("0.8ⁱ", |index| 0.8_f32.powi(index as i32)),
        ];
        for (rows, columns) in [(200, 260), (300, 180)] {
            let inner = rows.min(columns);
            for (name, fall) in falls {
                let falling = Array::new([1, inner], (0..inner).map(fall).collect()).unwrap();
                let left = Cpu.mul(&numbers(5, &[rows, inner]), &falling).unwrap();
                let matrix = Cpu.matmul(&left, &numbers(6, &[inner, columns])).unwrap();
                let whole = svd(&matrix).unwrap();
                for count in [1, 7, 16, 24, 32, 40, 51] {
                    let off = |svd: &Svd| Cpu.sub(&multiplied(svd), &matrix).unwrap().norm();
                    let (best, got) = (off(&cut(&whole, count)), off(&leading(&matrix, count, &mut draw()).unwrap()));
                    assert!(got <= best * MOST, "{rows}x{columns}, {name}, {count}: {got} and at best {best}");
                }
            }
        }
    }

    #[test]
    fn values_that_are_not_finite_are_refused() {
        let mut matrix = numbers(5, &[3, 3]);
        matrix.values[4] = f32::NAN;
        assert!(matches!(leading(&matrix, 1, &mut draw()), Err(Error::Numeric { .. })));
    }
}
