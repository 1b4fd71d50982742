//! Decompositions of matrices on the host, by faer: what some starts, `extract` and `resize` are made of.

use faer::{Mat, MatRef, Side};

pub use super::{gram::product_norm, product_svd::ProductSvd};

use super::{Array, gram::gram_in_f64, product_svd::eigen};
use crate::{Draw, Error, Result};

/// The leading singular triplets of a matrix: `left · diag(values) · right`.
#[derive(Debug, Clone)]
pub struct Svd {
    /// `[m, k]`, orthonormal columns.
    pub left: Array,
    /// `[k]`, largest first.
    pub values: Array,
    /// `[k, n]`, orthonormal rows.
    pub right: Array,
}

/// The singular value decomposition of `matrix` `[m, n]`, `k = min(m, n)`.
///
/// # Errors
/// If `matrix` is not a matrix or is empty, or the iteration does not converge (values that are not finite).
pub fn svd(matrix: &Array) -> Result<Svd> {
    let (rows, columns) = lengths("svd", matrix)?;
    decomposed(MatRef::from_row_major_slice(&matrix.values, rows, columns))
}

/// The first `count` singular triplets of `matrix` `[m, n]`, at most `min(m, n)`, by randomised subspace iteration with
/// eight vectors to spare and four iterations.
///
/// Many times as fast as [`svd`] where `count` is small, and as good wherever the values fall off; triplets of nearly
/// equal values may be mixed. The same `draw` gives the same result.
///
/// # Errors
/// As [`svd`].
pub fn leading(matrix: &Array, count: usize, draw: &mut Draw) -> Result<Svd> {
    leading_with(matrix, count, Sketch { spare: 8, iterations: 4 }, draw)
}

/// How carefully the range of a matrix is searched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sketch {
    /// Start vectors beyond the triplets that are asked for.
    pub spare: usize,
    /// Passes of subspace iteration, each two products with the matrix.
    pub iterations: usize,
}

/// [`leading`] with another [`Sketch`]: Halko, Martinsson and Tropp 2011 (arXiv 0909.4061), algorithms 4.4 and 5.1.
///
/// # Errors
/// As [`svd`].
pub fn leading_with(matrix: &Array, count: usize, sketch: Sketch, draw: &mut Draw) -> Result<Svd> {
    let (rows, columns) = lengths("svd", matrix)?;
    if !matrix.is_finite() {
        return Err(not_finite());
    }
    let view = MatRef::from_row_major_slice(&matrix.values, rows, columns);
    if rows <= columns {
        return leading_of_wide(view, count, sketch, draw);
    }
    let Svd { left, values, right } = leading_of_wide(view.transpose(), count, sketch, draw)?;
    let turned =
        |side: &Array| row_major(MatRef::from_row_major_slice(&side.values, side.shape[0], side.shape[1]).transpose());
    Ok(Svd { left: turned(&right), values, right: turned(&left) })
}

/// [`leading_with`] of a matrix that is not higher than wide: orthonormal bases are wanted on the shorter side alone.
fn leading_of_wide(matrix: MatRef<'_, f32>, count: usize, sketch: Sketch, draw: &mut Draw) -> Result<Svd> {
    let (rows, columns) = (matrix.nrows(), matrix.ncols());
    let width = (count + sketch.spare).min(rows);
    let count = count.min(width);
    let start = draw.normal(columns * width, 1.0);
    let mut range = orthonormal(matrix * MatRef::from_row_major_slice(&start, columns, width)); // [m, width]
    for _ in 0..sketch.iterations {
        let turned = conditioned(matrix.transpose() * &range); // [n, width]
        range = orthonormal(matrix * turned);
    }
    let small = range.transpose() * matrix; // [width, n]
    let (vectors, squares) = eigen(gram_in_f64(small.as_ref()).as_ref())?;
    // Squares keep half of the digits: too few if the last values that are wanted are nothing beside the first.
    if count == 0 || squares[count - 1] <= 1e-12 * squares[0] {
        let Svd { left, values, right } = decomposed(small.as_ref())?;
        let left = &range * MatRef::from_row_major_slice(&left.values, width, width).subcols(0, count);
        let (values, right) = (values.values[..count].to_vec(), right.values[..count * columns].to_vec());
        return Ok(Svd {
            left: row_major(left.as_ref()),
            values: Array::new([count], values)?,
            right: Array::new([count, columns], right)?,
        });
    }
    let values: Vec<f64> = squares[..count].iter().map(|square| square.sqrt()).collect();
    let left = Mat::from_fn(width, count, |row, column| vectors[(row, column)] as f32);
    let right = Mat::from_fn(width, count, |row, column| (vectors[(row, column)] / values[column]) as f32);
    Ok(Svd {
        left: row_major((&range * left).as_ref()),
        values: Array::new([count], values.into_iter().map(|value| value as f32).collect())?,
        right: row_major((right.transpose() * small).as_ref()),
    })
}

/// `matrix` `[m, n]` as `Q · R`: `Q` `[m, k]` with orthonormal columns, `R` `[k, n]` upper triangular, `k = min(m, n)`.
///
/// # Errors
/// If `matrix` is not a matrix or is empty.
pub fn qr(matrix: &Array) -> Result<(Array, Array)> {
    let (rows, columns) = lengths("qr", matrix)?;
    let qr = MatRef::from_row_major_slice(&matrix.values, rows, columns).qr();
    Ok((row_major(qr.compute_thin_Q().as_ref()), row_major(qr.thin_R())))
}

pub(super) fn not_finite() -> Error {
    Error::Numeric { operation: "svd", reason: "the matrix has values that are not finite".into() }
}

pub(super) fn not_converged(reason: impl Into<String>) -> Error {
    Error::Numeric { operation: "svd", reason: reason.into() }
}

fn decomposed(matrix: MatRef<'_, f32>) -> Result<Svd> {
    // faer reports failure to converge, but hands NaN through.
    if !matrix.is_all_finite() {
        return Err(not_finite());
    }
    let svd = matrix.thin_svd().map_err(|error| not_converged(format!("{error:?}")))?;
    let values: Vec<f32> = svd.S().column_vector().iter().copied().collect();
    let values = Array::new([values.len()], values)?;
    Ok(Svd { left: row_major(svd.U()), values, right: row_major(svd.V().transpose()) })
}

/// An orthonormal basis of the columns.
fn orthonormal(matrix: Mat<f32>) -> Mat<f32> {
    matrix.qr().compute_thin_Q()
}

/// A basis of the columns that is nearly orthonormal, so that the next product loses none of them, by matrix products alone;
/// by reflections where the columns all but depend on each other.
fn conditioned(matrix: Mat<f32>) -> Mat<f32> {
    let Ok(factor) = gram_in_f64(matrix.transpose()).llt(Side::Lower) else { return orthonormal(matrix) };
    let lower = factor.L();
    let mut inverse = Mat::<f64>::identity(lower.nrows(), lower.nrows());
    lower.solve_lower_triangular_in_place(inverse.as_mut());
    let inverse = Mat::from_fn(inverse.nrows(), inverse.ncols(), |row, column| inverse[(column, row)] as f32);
    matrix * inverse
}

pub(super) fn lengths(operation: &'static str, matrix: &Array) -> Result<(usize, usize)> {
    match matrix.shape[..] {
        [rows, columns] if rows > 0 && columns > 0 => Ok((rows, columns)),
        _ => Err(Error::Shapes { operation, shapes: vec![matrix.shape.clone()] }),
    }
}

fn row_major(matrix: MatRef<'_, f32>) -> Array {
    let values =
        (0..matrix.nrows()).flat_map(|row| (0..matrix.ncols()).map(move |column| matrix[(row, column)])).collect();
    Array { shape: vec![matrix.nrows(), matrix.ncols()], values }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Backend, Cpu, Purpose};

    fn numbers(sample: u32, shape: &[usize]) -> Array {
        let values = Draw::new(2, Purpose::Noise, 0, sample).normal(shape.iter().product(), 1.0);
        Array::new(shape, values).unwrap()
    }

    #[track_caller]
    fn close(actual: &Array, expected: &Array, tolerance: f32) {
        assert_eq!(actual.shape, expected.shape);
        let error = actual.values.iter().zip(&expected.values).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(error < tolerance, "off by {error}");
    }

    /// `left · diag(values) · right`.
    fn product(svd: &Svd) -> Array {
        let count = svd.values.shape[0];
        let scaled = Cpu.mul(&svd.left, &Cpu.reshape(&svd.values, &[1, count]).unwrap()).unwrap();
        Cpu.matmul(&scaled, &svd.right).unwrap()
    }

    #[test]
    fn the_triplets_multiply_back_to_the_matrix() {
        for shape in [[7, 4], [4, 7], [5, 5], [1, 3]] {
            let (matrix, count) = (numbers(1, &shape), shape[0].min(shape[1]));
            let svd = svd(&matrix).unwrap();
            close(&product(&svd), &matrix, 1e-5);
            assert!(svd.values.values.is_sorted_by(|a, b| a >= b));
            let gram = Cpu.matmul(&svd.right, &Cpu.transpose(&svd.right).unwrap()).unwrap();
            close(&gram, &Array::identity(count), 1e-5);
            let (q, r) = qr(&matrix).unwrap();
            close(&Cpu.matmul(&q, &r).unwrap(), &matrix, 1e-5);
            assert!(r.values.chunks_exact(shape[1]).enumerate().all(|(row, r)| r[..row].iter().all(|r| *r == 0.0)));
        }
    }

    #[test]
    fn the_leading_triplets_are_those_of_the_whole_decomposition() {
        // Rank 3 with well separated values, and noise a hundred times as small.
        let strong = Cpu.matmul(&numbers(2, &[40, 3]), &numbers(3, &[3, 60])).unwrap();
        let matrix = Cpu.add(&strong, &Cpu.scale(&numbers(4, &[40, 60]), 0.01).unwrap()).unwrap();
        let whole = svd(&matrix).unwrap();
        let few = leading(&matrix, 3, &mut Draw::new(3, Purpose::Sketch, 0, 0)).unwrap();
        let cut = Svd {
            left: Cpu.narrow(&whole.left, 1, 0, 3).unwrap(),
            values: Cpu.narrow(&whole.values, 0, 0, 3).unwrap(),
            right: Cpu.narrow(&whole.right, 0, 0, 3).unwrap(),
        };
        close(&few.values, &cut.values, 1e-3);
        close(&product(&few), &product(&cut), 1e-3);
        let all = leading(&matrix, 99, &mut Draw::new(3, Purpose::Sketch, 0, 0)).unwrap();
        assert_eq!(
            (&*all.values.shape, &*all.left.shape, &*all.right.shape),
            (&[40][..], &[40, 40][..], &[40, 60][..])
        );
        // The same of the matrix turned over, and of one that has no more than three.
        let turned = leading(&Cpu.transpose(&matrix).unwrap(), 3, &mut Draw::new(3, Purpose::Sketch, 0, 0)).unwrap();
        close(&Cpu.transpose(&product(&turned)).unwrap(), &product(&cut), 1e-3);
        let exact = leading(&strong, 5, &mut Draw::new(3, Purpose::Sketch, 0, 0)).unwrap();
        close(&product(&exact), &strong, 1e-3);
        let gram = Cpu.matmul(&exact.right, &Cpu.transpose(&exact.right).unwrap()).unwrap();
        close(&gram, &Array::identity(5), 1e-4);
    }

    #[test]
    fn values_that_are_not_finite_are_refused() {
        let mut matrix = numbers(5, &[3, 3]);
        matrix.values[4] = f32::NAN;
        assert!(matches!(svd(&matrix), Err(Error::Numeric { .. })));
        assert!(matches!(leading(&matrix, 1, &mut Draw::new(3, Purpose::Sketch, 0, 0)), Err(Error::Numeric { .. })));
        assert!(matches!(qr(&Array::full([3], 1.0)), Err(Error::Shapes { .. })));
    }
}
