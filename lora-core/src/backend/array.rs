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

    /// The Euclidean norm of all values, summed in `f64`.
    pub fn norm(&self) -> f64 {
        // Eight sums at a time: each would wait for itself alone.
        let mut sums = [0.0_f64; 8];
        let eights = self.values.chunks_exact(sums.len());
        let rest: f64 = eights.remainder().iter().map(|value| f64::from(*value).powi(2)).sum();
        for eight in eights {
            sums.iter_mut().zip(eight).for_each(|(sum, value)| *sum += f64::from(*value).powi(2));
        }
        (sums.iter().sum::<f64>() + rest).sqrt()
    }

    /// `[n, n]`, ones on the diagonal.
    pub fn identity(n: usize) -> Self {
        let mut identity = Self::full([n, n], 0.0);
        identity.values.iter_mut().step_by(n + 1).for_each(|value| *value = 1.0);
        identity
    }
}
