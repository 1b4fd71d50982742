//! Tensors as files and the reference backend hold them: a shape and its values.

use crate::{Error, Result};

/// A row-major array of real numbers on the host.
#[derive(Debug, Clone, PartialEq)]
pub struct Array {
    /// The length of every axis.
    pub shape: Vec<usize>,
    /// As many values as the product of the shape, last axis fastest.
    pub values: Vec<f32>,
}

impl Array {
    /// An array of `shape` from its values in row-major order.
    ///
    /// # Errors
    /// If there are more or fewer values than the shape says.
    pub fn new(shape: impl Into<Vec<usize>>, values: Vec<f32>) -> Result<Self> {
        let shape = shape.into();
        if shape.iter().try_fold(1usize, |size, length| size.checked_mul(*length)) != Some(values.len()) {
            return Err(Error::Shapes { operation: "array", shapes: vec![shape, vec![values.len()]] });
        }
        Ok(Self { shape, values })
    }

    /// An array whose values are all `value`.
    pub fn full(shape: impl Into<Vec<usize>>, value: f32) -> Self {
        let shape = shape.into();
        let values = vec![value; shape.iter().product()];
        Self { shape, values }
    }

    /// Whether no value is NaN or infinite.
    pub fn is_finite(&self) -> bool {
        // Without an early end the compiler looks at many at a time, and nearly all arrays are.
        self.values.iter().fold(true, |finite, value| finite & value.is_finite())
    }

    /// The Euclidean norm of all values, to six digits at least.
    pub fn norm(&self) -> f64 {
        // Sixteen squares in each of sixteen `f32`, then on in `f64`: four times as fast as `f64` throughout.
        let (lanes, rest) = self.values.as_chunks::<16>();
        let block = |lanes: &[[f32; 16]]| {
            let mut sums = [0.0_f32; 16];
            for lane in lanes {
                sums.iter_mut().zip(lane).for_each(|(sum, value)| *sum += value * value);
            }
            sums.iter().map(|sum| f64::from(*sum)).sum::<f64>()
        };
        let exact = |values: &[f32]| values.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>();
        let squared = lanes.chunks(16).map(block).sum::<f64>() + exact(rest);
        // Squares of very large and very small numbers need the range of `f64`.
        let is_within = (1e-20..1e30).contains(&squared);
        if is_within { squared.sqrt() } else { exact(&self.values).sqrt() }
    }

    /// `[n, n]`, ones on the diagonal.
    pub fn identity(n: usize) -> Self {
        let mut identity = Self::full([n, n], 0.0);
        identity.values.iter_mut().step_by(n + 1).for_each(|value| *value = 1.0);
        identity
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_norm_has_six_digits_whatever_the_size_of_the_numbers() {
        for (count, size) in [(1, 3.0_f32), (1000, 1.0), (70_000, 1e-3), (300, 1e-30), (300, 1e30), (5, 0.0)] {
            let values: Vec<f32> =
                (0..count).map(|index| ((index * 7919 % 1009) as f32 / 504.5 - 1.0) * size).collect();
            let exact = values.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>().sqrt();
            let norm = Array { shape: vec![count], values }.norm();
            assert!((norm - exact).abs() <= 1e-6 * exact, "{norm} instead of {exact}");
        }
        assert!(!Array::full([3], f32::NAN).norm().is_finite() && !Array::full([3], f32::INFINITY).norm().is_finite());
    }
}
