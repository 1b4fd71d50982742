//! What the products of a matrix with its own transpose tell: norms and triplets of a product that is never formed.

use faer::{
    Accum, Mat, MatMut, MatRef, Par,
    linalg::matmul::triangular::{BlockStructure, matmul},
    prelude::ReborrowMut as _,
    traits::RealField,
    unzip, zip,
};

use super::{
    Array,
    decompose::{lengths, power_to_one},
};
use crate::{Error, Result};

/// `‖left · right‖`, the Frobenius norm, of two factors `[m, r]` · `[r, n]`, in `O((m + n)·r²)`.
///
/// It is `Σ (leftᵀ·left ⊙ right·rightᵀ)`, in `f32` where the squares of the factors are in its range: good to about six digits
/// unless the factors cancel each other.
///
/// # Errors
/// If the factors do not fit or one is empty.
pub fn product_norm(left: &Array, right: &Array) -> Result<f64> {
    let [rows, rank, columns] = lengths_of_product(left, right)?;
    let gram = |factor: &Array, view: MatRef<'_, f32>| match power_to_one(factor.norm()) {
        None => widened(gram(view).as_ref()),
        Some(_) => gram_in_f64(view),
    };
    let left = gram(left, MatRef::from_row_major_slice(&left.values, rows, rank).transpose());
    let right = gram(right, MatRef::from_row_major_slice(&right.values, rank, columns));
    let products =
        (0..rank).flat_map(|column| left.col(column).iter().zip(right.col(column).iter()).map(|(a, b)| a * b));
    Ok(products.sum::<f64>().max(0.0).sqrt())
}

fn widened(matrix: MatRef<'_, f32>) -> Mat<f64> {
    Mat::from_fn(matrix.nrows(), matrix.ncols(), |row, column| f64::from(matrix[(row, column)]))
}

/// `[m, r, n]` of two factors `[m, r]` and `[r, n]`.
pub(super) fn lengths_of_product(left: &Array, right: &Array) -> Result<[usize; 3]> {
    let ((rows, rank), (right_rank, columns)) = (lengths("product", left)?, lengths("product", right)?);
    match rank == right_rank {
        true => Ok([rows, rank, columns]),
        false => Err(Error::Shapes { operation: "product", shapes: vec![left.shape.clone(), right.shape.clone()] }),
    }
}

/// `matrix · matrixᵀ` of `matrix` `[r, n]`: one half is computed, the other is its mirror.
fn gram(matrix: MatRef<'_, f32>) -> Mat<f32> {
    let mut gram = Mat::zeros(matrix.nrows(), matrix.nrows());
    add_lower_half(gram.as_mut(), matrix);
    mirror(gram.as_mut());
    gram
}

/// [`gram`] in `f64`. A part of the columns is widened at a time, so that it stays in the cache.
pub(super) fn gram_in_f64(matrix: MatRef<'_, f32>) -> Mat<f64> {
    const COLUMNS: usize = 256;
    let mut gram = Mat::zeros(matrix.nrows(), matrix.nrows());
    // In the order in which the numbers lie.
    let by_column = matrix.row_stride() == 1;
    let mut wide = if by_column { Mat::zeros(matrix.nrows(), COLUMNS) } else { Mat::zeros(COLUMNS, matrix.nrows()) };
    let mut wide = if by_column { wide.as_mut() } else { wide.as_mut().transpose_mut() };
    for start in (0..matrix.ncols()).step_by(COLUMNS) {
        let some = matrix.subcols(start, COLUMNS.min(matrix.ncols() - start));
        let mut wide = wide.rb_mut().subcols_mut(0, some.ncols());
        zip!(wide.rb_mut(), some).for_each(|unzip!(wide, narrow)| *wide = f64::from(*narrow));
        add_lower_half(gram.as_mut(), wide.as_ref());
    }
    mirror(gram.as_mut());
    gram
}

/// Adds the lower half of `matrix · matrixᵀ`.
fn add_lower_half<T: RealField>(gram: MatMut<'_, T>, matrix: MatRef<'_, T>) {
    let (half, whole) = (BlockStructure::TriangularLower, BlockStructure::Rectangular);
    matmul(gram, half, Accum::Add, matrix, whole, matrix.transpose(), whole, T::one(), Par::Seq);
}

fn mirror<T: Copy>(mut matrix: MatMut<'_, T>) {
    for column in 1..matrix.ncols() {
        for row in 0..column {
            matrix[(row, column)] = matrix[(column, row)];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Backend, Cpu, backend::testing::numbers};

    #[test]
    fn the_norm_of_a_product_needs_no_product() {
        for [m, r, n] in [[1, 1, 1], [5, 8, 30], [70, 40, 90]] {
            let (left, right) = (numbers(0, &[m, r]), numbers(1, &[r, n]));
            let product = Cpu.matmul(&left, &right).unwrap();
            let direct = product.values.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>().sqrt();
            let norm = product_norm(&left, &right).unwrap();
            assert!((norm / direct - 1.0).abs() < 1e-5, "{norm} instead of {direct}");
        }
        assert!(product_norm(&numbers(0, &[3, 2]), &numbers(1, &[3, 2])).is_err());
        let [left, right] = [Array::full([30, 4], 1e25), Array::full([4, 50], 1e-24)];
        let norm = product_norm(&left, &right).unwrap();
        assert!((norm / (40.0 * 1500.0_f64.sqrt()) - 1.0).abs() < 1e-5, "{norm}");
    }

    #[test]
    fn both_halves_of_a_gram_matrix_are_there() {
        let matrix = numbers(2, &[33, 7]);
        let direct = Cpu.matmul(&matrix, &Cpu.transpose(&matrix).unwrap()).unwrap();
        let gram = gram(MatRef::from_row_major_slice(&matrix.values, 33, 7));
        for (index, want) in direct.values.iter().enumerate() {
            assert!((gram[(index / 33, index % 33)] - want).abs() < 1e-5);
        }
        let long = numbers(3, &[3, 700]);
        let (narrow, wide) = {
            let view = MatRef::from_row_major_slice(&long.values, 3, 700);
            (super::gram(view), gram_in_f64(view))
        };
        assert!((0..9).all(|at| (f64::from(narrow[(at / 3, at % 3)]) - wide[(at / 3, at % 3)]).abs() < 1e-3));
    }
}
