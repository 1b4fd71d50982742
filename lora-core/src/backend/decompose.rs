//! Decompositions of matrices on the host, by faer: what some starts, `extract` and `resize` are made of.

use faer::MatRef;

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

/// The singular value decomposition of `matrix` `[m, n]`, `k = min(m, n)`.
///
/// # Errors
/// If `matrix` is not a matrix, or the iteration does not converge (values that are not finite).
pub fn svd(matrix: &Array) -> Result<Svd> {
    let (rows, columns) = lengths("svd", matrix)?;
    let svd = MatRef::from_row_major_slice(&matrix.values, rows, columns)
        .thin_svd()
        .map_err(|error| Error::Numeric { operation: "svd", reason: format!("{error:?}") })?;
    let values: Vec<f32> = svd.S().column_vector().iter().copied().collect();
    Ok(Svd {
        left: row_major(svd.U()),
        values: Array::new([values.len()], values)?,
        right: row_major(svd.V().transpose()),
    })
}

/// `matrix` `[m, n]` as `Q · R`: `Q` `[m, k]` with orthonormal columns, `R` `[k, n]` upper triangular, `k = min(m, n)`.
///
/// # Errors
/// If `matrix` is not a matrix.
pub fn qr(matrix: &Array) -> Result<(Array, Array)> {
    let (rows, columns) = lengths("qr", matrix)?;
    let qr = MatRef::from_row_major_slice(&matrix.values, rows, columns).qr();
    Ok((row_major(qr.compute_thin_Q().as_ref()), row_major(qr.thin_R())))
}

fn lengths(operation: &'static str, matrix: &Array) -> Result<(usize, usize)> {
    match matrix.shape[..] {
        [rows, columns] => Ok((rows, columns)),
        _ => Err(Error::Shapes { operation, shapes: vec![matrix.shape.clone()] }),
    }
}

fn row_major(matrix: MatRef<'_, f32>) -> Array {
    let values =
        (0..matrix.nrows()).flat_map(|row| (0..matrix.ncols()).map(move |column| matrix[(row, column)])).collect();
    Array { shape: vec![matrix.nrows(), matrix.ncols()], values }
}
