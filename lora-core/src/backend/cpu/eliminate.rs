//! Linear systems by elimination.

use crate::{Error, Result};

/// Solves `lu · x = x` in place by Gaussian elimination with row pivoting: `lu` `[n, n]`, `x` `[n, m]`.
pub(super) fn eliminate(lu: &mut [f64], x: &mut [f64], n: usize, m: usize) -> Result<()> {
    for column in 0..n {
        let pivot =
            (column..n).max_by(|a, b| lu[a * n + column].abs().total_cmp(&lu[b * n + column].abs())).unwrap_or(column);
        let value = lu[pivot * n + column];
        if value == 0.0 || !value.is_finite() {
            return Err(Error::Numeric { operation: "solve", reason: format!("no pivot in column {column} of {n}") });
        }
        if pivot != column {
            (0..n).for_each(|i| lu.swap(pivot * n + i, column * n + i));
            (0..m).for_each(|i| x.swap(pivot * m + i, column * m + i));
        }
        for row in column + 1..n {
            let factor = lu[row * n + column] / value;
            if factor != 0.0 {
                (column..n).for_each(|i| lu[row * n + i] -= factor * lu[column * n + i]);
                (0..m).for_each(|i| x[row * m + i] -= factor * x[column * m + i]);
            }
        }
    }
    for row in (0..n).rev() {
        for i in 0..m {
            let known: f64 = (row + 1..n).map(|column| lu[row * n + column] * x[column * m + i]).sum();
            x[row * m + i] = (x[row * m + i] - known) / lu[row * n + row];
        }
    }
    Ok(())
}
