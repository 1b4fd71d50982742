//! The singular value decomposition of a product of two narrow factors, without the product.
//!
//! With `BᵀB = F·Fᵀ` the product is `B·A = Q·(Fᵀ·A)` for a `Q` with orthonormal columns, so its left singular vectors and
//! squared values are the eigenvectors `U` and eigenvalues of the small `H = Fᵀ·(A·Aᵀ)·F = U·Σ²·Uᵀ`, and
//!
//! ```text
//! B·A = (B·A·Aᵀ·F·U·Σ⁻²) · (Uᵀ·Fᵀ·A)
//! ```
//!
//! whose parts for the largest values are all that is ever as long as a factor: `O((m + n)·r²)`, nearly all of it matrix
//! products. Squares take half of the digits of what they are made from, so whatever is small is `f64`: a value is lost if it
//! is below a ten-millionth of the largest, where the rounding of `f32` factors ends as well. Nothing is ever inverted but the
//! values themselves, so the long products at the end may be `f32`: their error is that of rounding `B` and `A`. One product
//! uses one core of the machine: there are hundreds in a file, and whoever has them all spreads them.

use faer::{
    Accum, Mat, MatMut, MatRef, Par,
    diag::Diag,
    dyn_stack::{MemBuffer, MemStack},
    linalg::{
        cholesky::llt_pivoting::factor as cholesky,
        evd::{self, ComputeEigenvectors},
        matmul::matmul,
    },
};

use super::{
    Array,
    decompose::{not_converged, not_finite},
    gram::{gram_in_f64, lengths_of_product},
};
use crate::Result;

/// Squared values below this share of the largest are rounding.
const ROUNDING: f64 = 1e-14;

/// The singular values of a product, and as many of its triplets as are asked for.
#[derive(Debug)]
pub struct ProductSvd<'a> {
    /// `B` `[m, r]`.
    left: &'a Array,
    /// `A` `[r, n]`.
    right: &'a Array,
    /// All of them, largest first.
    values: Vec<f64>,
    /// How many are above 0.
    count: usize,
    /// `F` `[r, c]`.
    factor: Mat<f64>,
    /// `A·Aᵀ·F` `[r, c]`.
    turned: Mat<f64>,
    /// `U` `[c, c]`.
    vectors: Mat<f64>,
}

impl<'a> ProductSvd<'a> {
    /// Decomposes `left` `[m, r]` · `right` `[r, n]`.
    ///
    /// # Errors
    /// If the factors are empty, not finite or do not fit, or the iteration does not converge.
    pub fn of(left: &'a Array, right: &'a Array) -> Result<Self> {
        let [rows, rank, columns] = lengths_of_product(left, right)?;
        if !left.is_finite() || !right.is_finite() {
            return Err(not_finite());
        }
        let left_gram = gram_in_f64(MatRef::from_row_major_slice(&left.values, rows, rank).transpose());
        let right_gram = gram_in_f64(MatRef::from_row_major_slice(&right.values, rank, columns));
        let factor = cholesky_factor(left_gram)?;
        let turned = product(right_gram.as_ref(), factor.as_ref());
        let (vectors, squares) = eigen(product(factor.transpose(), turned.as_ref()).as_ref())?;
        let rounding = ROUNDING.max(rank as f64 * f64::EPSILON) * squares.first().copied().unwrap_or(0.0);
        let count = squares.iter().take_while(|square| **square > rounding).count();
        let mut values: Vec<f64> = squares[..count].iter().map(|square| square.sqrt()).collect();
        values.resize(rank.min(rows).min(columns).max(count), 0.0);
        Ok(Self { left, right, values, count, factor, turned, vectors })
    }

    /// All singular values, largest first; at most as many as the factors are narrow, and 0 where they are rounding.
    pub fn values(&self) -> &[f64] {
        &self.values
    }

    /// Two factors `[m, k]`, `[k, n]` whose product has the first `count` triplets, `k` of them at most as many as there
    /// are values; each takes the square root of the values, so that neither outgrows a narrow type before the other.
    pub fn balanced(&self, count: usize) -> (Array, Array) {
        let count = count.min(self.values.len());
        let vectors = self.vectors.as_ref().subcols(0, count.min(self.count));
        // Triplets of value 0 are columns of zeros.
        let scaled = |basis: &Mat<f64>, power: i32| {
            let basis = product(basis.as_ref(), vectors);
            let scales: Vec<f64> = self.values.iter().map(|value| value.sqrt().powi(power)).collect();
            Mat::from_fn(basis.nrows(), count, |row, column| match column < basis.ncols() {
                true => (basis[(row, column)] * scales[column]) as f32,
                false => 0.0,
            })
        };
        let view = |array: &'a Array| MatRef::from_row_major_slice(&array.values, array.shape[0], array.shape[1]);
        let (up, down) = (scaled(&self.turned, -3), scaled(&self.factor, -1)); // [r, k] both
        let product = |left, right| array_product(left, right, Par::Seq);
        (product(view(self.left), up.as_ref()), product(down.transpose(), view(self.right)))
    }
}

/// `F` `[r, c]` with `F·Fᵀ = gram`, `c` its numerical rank: pivoted, since adapters may have columns that depend on others.
fn cholesky_factor(mut gram: Mat<f64>) -> Result<Mat<f64>> {
    let size = gram.nrows();
    if (0..size).all(|index| gram[(index, index)] == 0.0) {
        return Ok(Mat::zeros(size, 0));
    }
    let (mut order, mut inverse) = (vec![0_usize; size], vec![0_usize; size]);
    let scratch = cholesky::cholesky_in_place_scratch::<usize, f64>(size, Par::Seq, Default::default());
    let mut memory = MemBuffer::new(scratch);
    let stack = MemStack::new(&mut memory);
    let rank =
        cholesky::cholesky_in_place(gram.as_mut(), &mut order, &mut inverse, Par::Seq, stack, Default::default())
            .map_err(|_| not_converged("the product of a factor with itself has no root"))?
            .0
            .rank;
    // Row `inverse[i]` of the triangle belongs to row `i` of the matrix.
    Ok(Mat::from_fn(size, rank, |row, column| if column <= inverse[row] { gram[(inverse[row], column)] } else { 0.0 }))
}

/// Eigenvectors `[n, n]` and eigenvalues of a symmetric matrix, largest first.
pub(super) fn eigen(matrix: MatRef<'_, f64>) -> Result<(Mat<f64>, Vec<f64>)> {
    // Fourth powers of large factors are in the range of `f64`, their squares are not.
    const FAR: f64 = 200.0;
    let exponent = matrix.norm_max().log2().round();
    if exponent.is_finite() && exponent.abs() > FAR {
        let half = (-exponent / 2.0).exp2();
        let near_one = Mat::from_fn(matrix.nrows(), matrix.ncols(), |row, column| matrix[(row, column)] * half * half);
        let (vectors, mut values) = eigen(near_one.as_ref())?;
        values.iter_mut().for_each(|value| *value = *value / half / half);
        return Ok((vectors, values));
    }
    let size = matrix.nrows();
    let (mut vectors, mut values) = (Mat::zeros(size, size), Diag::zeros(size));
    if size == 0 {
        return Ok((vectors, Vec::new()));
    }
    let scratch = evd::self_adjoint_evd_scratch::<f64>(size, ComputeEigenvectors::Yes, Par::Seq, Default::default());
    let mut memory = MemBuffer::new(scratch);
    evd::self_adjoint_evd(
        matrix,
        values.as_mut(),
        Some(vectors.as_mut()),
        Par::Seq,
        MemStack::new(&mut memory),
        Default::default(),
    )
    .map_err(|_| not_converged("the iteration for its singular values does not converge"))?;
    let values = values.column_vector().iter().rev().copied().collect();
    Ok((vectors.reverse_cols().to_owned(), values))
}

fn product(left: MatRef<'_, f64>, right: MatRef<'_, f64>) -> Mat<f64> {
    let mut output = Mat::zeros(left.nrows(), right.ncols());
    matmul(output.as_mut(), Accum::Replace, left, right, 1.0, Par::Seq);
    output
}

pub(super) fn array_product(left: MatRef<'_, f32>, right: MatRef<'_, f32>, parallelism: Par) -> Array {
    let shape = vec![left.nrows(), right.ncols()];
    let mut values = vec![0.0; left.nrows() * right.ncols()];
    let view = MatMut::from_row_major_slice_mut(&mut values, left.nrows(), right.ncols());
    matmul(view, Accum::Replace, left, right, 1.0, parallelism);
    Array { shape, values }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Backend, Cpu,
        backend::{
            decompose::svd,
            testing::{close, numbers},
        },
    };

    #[test]
    fn the_triplets_of_a_product_need_no_product() {
        for [m, r, n] in [[40, 6, 30], [5, 8, 30], [30, 8, 5], [3, 3, 3], [1, 1, 1], [2, 150, 3]] {
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
        let (nothing, something) = (Array::full([4, 2], 0.0), numbers(8, &[2, 5]));
        let zero = ProductSvd::of(&nothing, &something).unwrap();
        assert!(zero.values().iter().all(|value| *value == 0.0));
        assert!(zero.balanced(2).0.values.iter().all(|value| *value == 0.0));
        assert!(ProductSvd::of(&numbers(6, &[4, 2]), &numbers(7, &[3, 5])).is_err());
        assert!(ProductSvd::of(&Array::full([4, 2], f32::NAN), &numbers(7, &[2, 5])).is_err());
    }

    /// How far the cut of a product is from the best of its rank, by a decomposition of the product in `f64`.
    fn distance_to_the_best(left: &Array, right: &Array, count: usize) -> f64 {
        let wide = |array: &Array| {
            Mat::from_fn(array.shape[0], array.shape[1], |row, column| {
                f64::from(array.values[row * array.shape[1] + column])
            })
        };
        let svd = (wide(left) * wide(right)).thin_svd().unwrap();
        let some = |side: MatRef<'_, f64>| side.subcols(0, count).to_owned();
        let best = some(svd.U()) * svd.S().column_vector().subrows(0, count).as_diagonal() * some(svd.V()).transpose();
        let (up, down) = ProductSvd::of(left, right).unwrap().balanced(count);
        (wide(&up) * wide(&down) - &best).norm_l2() / best.norm_l2()
    }

    #[test]
    fn a_cut_is_the_best_of_its_rank_however_the_values_fall_and_the_columns_lean() {
        const TOLERANCE: f64 = 1e-6; // the factors are rounded to f32
        let (rows, rank, columns) = (150, 24, 90);
        let (left, right) = (numbers(9, &[rows, rank]), numbers(10, &[rank, columns]));
        for fall in [0.99_f32, 0.7, 0.5] {
            let falling = Array::new([1, rank], (0..rank).map(|index| fall.powi(index as i32)).collect()).unwrap();
            let left = Cpu.mul(&left, &falling).unwrap();
            for count in [1, 8, 23] {
                let off = distance_to_the_best(&left, &right, count);
                assert!(off < TOLERANCE, "fall {fall}, rank {count}: {off:e}");
            }
        }
        // Columns that are nearly one another, and some that are.
        let mix = Cpu.add(&Array::full([rank, rank], 1.0), &Cpu.scale(&numbers(11, &[rank, rank]), 1e-2).unwrap());
        let mut leaning = Cpu.matmul(&left, &mix.unwrap()).unwrap();
        leaning.values.chunks_mut(rank).for_each(|row| row[3] = row[5]);
        for count in [1, 8, 16] {
            let off = distance_to_the_best(&leaning, &right, count);
            assert!(off < TOLERANCE, "leaning, rank {count}: {off:e}");
        }
    }
}
