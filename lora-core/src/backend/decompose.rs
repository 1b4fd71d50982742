//! Decompositions of matrices on the host, by faer: what some starts, `extract` and `resize` are made of.

use faer::{Mat, MatRef};

pub(crate) use super::leading::{is_worth_searching, leading_of_finite};
pub use super::{gram::product_norm, leading::leading, product_svd::ProductSvd};

use super::Array;
use crate::{Error, Result};

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

impl Svd {
    /// The triplets of a matrix from those of the matrix times `power`.
    ///
    /// # Errors
    /// If a value leaves the range of `f32`.
    pub(super) fn divided(mut self, power: f32) -> Result<Self> {
        self.values.values.iter_mut().for_each(|value| *value /= power);
        match self.values.is_finite() {
            true => Ok(self),
            false => Err(not_converged("its largest singular value is beyond the range of 32-bit numbers")),
        }
    }

    /// Two factors `up` `[m, k]`, `down` `[k, n]`, `k` at most `count`: `scale · up · down` has the first triplets. Each takes the
    /// square root of the values, so that neither outgrows a narrow type before the other.
    pub fn balanced(&self, count: usize, scale: f64) -> (Array, Array) {
        let (all, columns) = (self.values.values.len().max(1), self.right.shape.get(1).copied().unwrap_or(1).max(1));
        let count = count.min(self.values.values.len());
        let root = |value: &f32| (f64::from(value.max(0.0)) / scale).sqrt() as f32;
        let roots: Vec<f32> = self.values.values[..count].iter().map(root).collect();
        let mut up = Vec::with_capacity(self.left.values.len() / all * count);
        for row in self.left.values.chunks_exact(all) {
            up.extend(row.iter().zip(&roots).map(|(value, root)| value * root));
        }
        let mut down = Vec::with_capacity(count * columns);
        for (row, root) in self.right.values.chunks_exact(columns).zip(&roots) {
            down.extend(row.iter().map(|value| value * root));
        }
        let shaped = |first, second, values| Array { shape: vec![first, second], values };
        (shaped(self.left.values.len() / all, count, up), shaped(count, columns, down))
    }
}

/// The singular value decomposition of `matrix` `[m, n]`, `k = min(m, n)`.
///
/// # Errors
/// If `matrix` is not a matrix or is empty, has values that are not finite or a singular value beyond the range of `f32`, or
/// the iteration does not converge.
pub fn svd(matrix: &Array) -> Result<Svd> {
    let (rows, columns) = lengths("svd", matrix)?;
    decomposed(MatRef::from_row_major_slice(&matrix.values, rows, columns))
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

pub(crate) fn not_finite() -> Error {
    Error::Numeric { operation: "svd", reason: "it has values that are not finite".into() }
}

pub(super) fn not_converged(reason: impl Into<String>) -> Error {
    Error::Numeric { operation: "svd", reason: reason.into() }
}

pub(super) fn decomposed(matrix: MatRef<'_, f32>) -> Result<Svd> {
    // faer reports failure to converge, but hands NaN through.
    if !matrix.is_all_finite() {
        return Err(not_finite());
    }
    match power_to_one(f64::from(matrix.norm_max())) {
        None => decomposed_near_one(matrix),
        Some(power) => {
            let near_one = Mat::from_fn(matrix.nrows(), matrix.ncols(), |row, column| matrix[(row, column)] * power);
            decomposed_near_one(near_one.as_ref())?.divided(power)
        }
    }
}

fn decomposed_near_one(matrix: MatRef<'_, f32>) -> Result<Svd> {
    let svd =
        matrix.thin_svd().map_err(|_| not_converged("the iteration for its singular values does not converge"))?;
    let values: Vec<f32> = svd.S().column_vector().iter().copied().collect();
    let values = Array::new([values.len()], values)?;
    Ok(Svd { left: row_major(svd.U()), values, right: row_major(svd.V().transpose()) })
}

/// A power of two that brings numbers of that size near 1; `None` where they are near enough, or nothing.
///
/// Decompositions form fourth powers, which leave the range of `f32` from `1e9` on. A power of two changes no digit.
pub(crate) fn power_to_one(size: f64) -> Option<f32> {
    // Sixteen binary digits leave room for sums of many such powers.
    const NEAR: f64 = 16.0;
    let exponent = size.log2().round();
    (size > 0.0 && exponent.abs() > NEAR).then(|| (-exponent).clamp(-126.0, 126.0).exp2() as f32)
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
    use crate::{
        Backend, Cpu,
        backend::testing::{close, numbers},
    };

    #[test]
    fn the_triplets_multiply_back_to_the_matrix() {
        for shape in [[7, 4], [4, 7], [5, 5], [1, 3]] {
            let (matrix, count) = (numbers(1, &shape), shape[0].min(shape[1]));
            let svd = svd(&matrix).unwrap();
            for scale in [1.0, 0.25] {
                let (up, down) = svd.balanced(count, scale);
                close(&Cpu.scale(&Cpu.matmul(&up, &down).unwrap(), scale).unwrap(), &matrix, 1e-5);
            }
            assert!(svd.values.values.is_sorted_by(|a, b| a >= b));
            let gram = Cpu.matmul(&svd.right, &Cpu.transpose(&svd.right).unwrap()).unwrap();
            close(&gram, &Array::identity(count), 1e-5);
            let (q, r) = qr(&matrix).unwrap();
            close(&Cpu.matmul(&q, &r).unwrap(), &matrix, 1e-5);
            assert!(r.values.chunks_exact(shape[1]).enumerate().all(|(row, r)| r[..row].iter().all(|r| *r == 0.0)));
        }
    }

    #[test]
    fn finite_numbers_of_any_size_converge() {
        let matrix = numbers(2, &[24, 40]);
        let near_one = svd(&matrix).unwrap().values;
        for size in [1e-36, 1e-12, 1e12, 1e30] {
            let svd = svd(&Cpu.scale(&matrix, size).unwrap()).unwrap();
            close(&Cpu.scale(&svd.values, 1.0 / size).unwrap(), &near_one, 1e-4);
        }
        let mut spike = matrix;
        spike.values[77] = 3e38;
        let found = svd(&spike).unwrap();
        assert!((found.values.values[0] / 3e38 - 1.0).abs() < 1e-5, "{:?}", found.values.values);
        spike.values.fill(3e38);
        assert!(matches!(svd(&spike), Err(Error::Numeric { .. })), "its only value is 31 times as large");
    }

    #[test]
    fn values_that_are_not_finite_are_refused() {
        let mut matrix = numbers(5, &[3, 3]);
        matrix.values[4] = f32::NAN;
        assert!(matches!(svd(&matrix), Err(Error::Numeric { .. })));
        assert!(matches!(qr(&Array::full([3], 1.0)), Err(Error::Shapes { .. })));
    }
}
