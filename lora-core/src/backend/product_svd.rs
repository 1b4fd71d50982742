//! The singular value decomposition of a product of two narrow factors, without the product.
//!
//! With `B = Q·R` and `Aᵀ = P·S`, `B·A = Q·(R·Sᵀ)·Pᵀ`, and the singular values are those of the small core `R·Sᵀ`: exact, in
//! `O((m + n)·r²)`. The core is decomposed in `f64`. One product uses one core of the machine: there are hundreds in a file,
//! and whoever has them all spreads them.

use faer::{
    Conj, Mat, MatRef, Par,
    diag::Diag,
    dyn_stack::{MemBuffer, MemStack},
    linalg::{
        householder,
        qr::no_pivoting::factor,
        svd::{self, ComputeSvdVectors},
    },
};

use super::{
    Array,
    decompose::{lengths, not_converged, not_finite, row_major},
};
use crate::{Error, Result};

/// The singular values of a product, and as many of its triplets as are asked for.
#[derive(Debug)]
pub struct ProductSvd {
    left: Qr,
    right: Qr,
    core_left: Mat<f64>,
    core_right: Mat<f64>,
    values: Vec<f64>,
}

impl ProductSvd {
    /// Decomposes `left` `[m, r]` · `right` `[r, n]`.
    ///
    /// # Errors
    /// If the factors are empty, not finite or do not fit, or the iteration does not converge.
    pub fn of(left: &Array, right: &Array) -> Result<Self> {
        let ((rows, rank), (right_rank, columns)) = (lengths("svd", left)?, lengths("svd", right)?);
        if rank != right_rank {
            let shapes = vec![left.shape.clone(), right.shape.clone()];
            return Err(Error::Shapes { operation: "svd of a product", shapes });
        }
        let finite = |array: &Array| array.values.iter().all(|value| value.is_finite());
        if !finite(left) || !finite(right) {
            return Err(not_finite());
        }
        let left = Qr::of(MatRef::from_row_major_slice(&left.values, rows, rank));
        let right = Qr::of(MatRef::from_row_major_slice(&right.values, rank, columns).transpose());
        let (upper, lower) = (left.r(), right.r());
        let mut core = Mat::zeros(upper.nrows(), lower.nrows());
        faer::linalg::matmul::matmul(
            core.as_mut(),
            faer::Accum::Replace,
            upper.as_ref(),
            lower.transpose(),
            1.0,
            Par::Seq,
        );
        let (core_left, core_right, values) = thin_svd(core.as_ref())?;
        Ok(Self { left, right, core_left, core_right, values })
    }

    /// All singular values, largest first; at most as many as the factors are narrow.
    pub fn values(&self) -> &[f64] {
        &self.values
    }

    /// Two factors `[m, k]`, `[k, n]` whose product has the first `count` triplets, `k` of them at most as many as there
    /// are values; each takes the square root of the values, so that neither outgrows a narrow type before the other.
    pub fn balanced(&self, count: usize) -> (Array, Array) {
        let count = count.min(self.values.len());
        let rooted = |core: &Mat<f64>| {
            Mat::from_fn(core.nrows(), count, |row, column| (core[(row, column)] * self.values[column].sqrt()) as f32)
        };
        let left = self.left.q_times(rooted(&self.core_left).as_ref()); // [m, k]
        let right = self.right.q_times(rooted(&self.core_right).as_ref()); // [n, k]
        (row_major(left.as_ref()), row_major(right.transpose()))
    }
}

/// A QR decomposition whose `Q` is kept as the reflections that make it.
#[derive(Debug)]
struct Qr {
    /// `R` on and above the diagonal, the reflections below.
    packed: Mat<f32>,
    coefficients: Mat<f32>,
}

impl Qr {
    fn of(matrix: MatRef<'_, f32>) -> Self {
        let (rows, columns) = (matrix.nrows(), matrix.ncols());
        let block = factor::recommended_block_size::<f32>(rows, columns);
        let mut packed = matrix.to_owned();
        let mut coefficients = Mat::zeros(block, rows.min(columns));
        let scratch = factor::qr_in_place_scratch::<f32>(rows, columns, block, Par::Seq, Default::default());
        let mut memory = MemBuffer::new(scratch);
        let stack = MemStack::new(&mut memory);
        factor::qr_in_place(packed.as_mut(), coefficients.as_mut(), Par::Seq, stack, Default::default());
        Self { packed, coefficients }
    }

    /// `R`, `[min(m, n), n]`.
    fn r(&self) -> Mat<f64> {
        let entry = |row, column| if row <= column { f64::from(self.packed[(row, column)]) } else { 0.0 };
        Mat::from_fn(self.coefficients.ncols(), self.packed.ncols(), entry)
    }

    /// `Q · matrix` for a matrix of at most as many rows as `Q` has columns.
    fn q_times(&self, matrix: MatRef<'_, f32>) -> Mat<f32> {
        let (rows, columns) = (self.packed.nrows(), matrix.ncols());
        let mut output = Mat::zeros(rows, columns);
        output.as_mut().subrows_mut(0, matrix.nrows()).copy_from(matrix);
        let block = self.coefficients.nrows();
        let scratch =
            householder::apply_block_householder_sequence_on_the_left_in_place_scratch::<f32>(rows, block, columns);
        let mut memory = MemBuffer::new(scratch);
        householder::apply_block_householder_sequence_on_the_left_in_place_with_conj(
            self.packed.as_ref().subcols(0, self.coefficients.ncols()),
            self.coefficients.as_ref(),
            Conj::No,
            output.as_mut(),
            Par::Seq,
            MemStack::new(&mut memory),
        );
        output
    }
}

/// `U`, `V` and the values of a small matrix, on one core.
fn thin_svd(matrix: MatRef<'_, f64>) -> Result<(Mat<f64>, Mat<f64>, Vec<f64>)> {
    let (rows, columns) = (matrix.nrows(), matrix.ncols());
    let size = rows.min(columns);
    let (mut left, mut right, mut values) = (Mat::zeros(rows, size), Mat::zeros(columns, size), Diag::zeros(size));
    let thin = ComputeSvdVectors::Thin;
    let mut memory = MemBuffer::new(svd::svd_scratch::<f64>(rows, columns, thin, thin, Par::Seq, Default::default()));
    svd::svd(
        matrix,
        values.as_mut(),
        Some(left.as_mut()),
        Some(right.as_mut()),
        Par::Seq,
        MemStack::new(&mut memory),
        Default::default(),
    )
    .map_err(|_| not_converged("it did not converge"))?;
    let values = values.column_vector().iter().copied().collect();
    Ok((left, right, values))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Backend, Cpu, Draw, Purpose, backend::decompose::svd};

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

    #[test]
    fn the_triplets_of_a_product_need_no_product() {
        for [m, r, n] in [[40, 6, 30], [5, 8, 30], [30, 8, 5], [3, 3, 3], [1, 1, 1]] {
            let (left, right) = (numbers(6, &[m, r]), numbers(7, &[r, n]));
            let product = Cpu.matmul(&left, &right).unwrap();
            let (whole, few) = (svd(&product).unwrap(), ProductSvd::of(&left, &right).unwrap());
            for (got, want) in few.values().iter().zip(&whole.values.values) {
                assert!((*got as f32 - want).abs() < 1e-4, "{got} and {want}");
            }
            let (up, down) = few.balanced(usize::MAX);
            close(&Cpu.matmul(&up, &down).unwrap(), &product, 1e-4);
            let (up, down) = few.balanced(1);
            assert_eq!((up.shape, down.shape), (vec![m, 1], vec![1, n]));
        }
        let zero = ProductSvd::of(&Array::full([4, 2], 0.0), &numbers(8, &[2, 5])).unwrap();
        assert!(zero.values().iter().all(|value| *value == 0.0));
        assert!(zero.balanced(2).0.values.iter().all(|value| *value == 0.0));
        assert!(ProductSvd::of(&numbers(6, &[4, 2]), &numbers(7, &[3, 5])).is_err());
        assert!(ProductSvd::of(&Array::full([4, 2], f32::NAN), &numbers(7, &[2, 5])).is_err());
    }
}
