//! What the tests of this folder share.

use super::Array;
use crate::{Draw, Purpose};

/// Normal numbers, other ones for each `sample`.
pub(super) fn numbers(sample: u32, shape: &[usize]) -> Array {
    let values = Draw::new(2, Purpose::Noise, 0, sample).normal(shape.iter().product(), 1.0);
    Array { shape: shape.to_vec(), values }
}

/// Fails unless the shapes are equal and no two values further apart than `tolerance`.
#[track_caller]
pub(super) fn close(actual: &Array, expected: &Array, tolerance: f32) {
    assert_eq!(actual.shape, expected.shape);
    let error = actual.values.iter().zip(&expected.values).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(error < tolerance, "off by {error}");
}
