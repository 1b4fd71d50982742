//! Walking over row-major arrays: strides, stretched axes, rows in order.

use super::misfit;
use crate::{Array, Result};

/// `operation` element by element; axes are aligned at the end, and an axis of length 1 (or none) is stretched.
pub(super) fn stretch(
    operation: &'static str,
    left: &Array,
    right: &Array,
    combine: impl Fn(f32, f32) -> f32,
) -> Result<Array> {
    if left.shape == right.shape {
        let values = left.values.iter().zip(&right.values).map(|(a, b)| combine(*a, *b)).collect();
        return Ok(Array { shape: left.shape.clone(), values });
    }
    let axes = left.shape.len().max(right.shape.len());
    let length = |shape: &[usize], axis: usize| (axis + shape.len()).checked_sub(axes).map_or(1, |axis| shape[axis]);
    let mut shape = Vec::with_capacity(axes);
    for axis in 0..axes {
        shape.push(match (length(&left.shape, axis), length(&right.shape, axis)) {
            (a, b) if a == b => a,
            (1, b) => b,
            (a, 1) => a,
            _ => return Err(misfit(operation, &[&left.shape, &right.shape])),
        });
    }
    let steps = [stretched_strides(&left.shape, axes), stretched_strides(&right.shape, axes)];
    let mut values = Vec::with_capacity(shape.iter().product());
    for_each_row(&shape, &[&steps[0], &steps[1]], |starts, length, inner| {
        let row =
            (0..length).map(|i| combine(left.values[starts[0] + i * inner[0]], right.values[starts[1] + i * inner[1]]));
        values.extend(row);
    });
    Array::new(shape, values)
}

/// Visits the rows (last axis) of `shape` in order, with each operand's offset at the row and its step inside it.
pub(super) fn for_each_row(shape: &[usize], steps: &[&[usize]], mut visit: impl FnMut(&[usize], usize, &[usize])) {
    let Some((&length, outer)) = shape.split_last() else {
        return visit(&vec![0; steps.len()], 1, &vec![0; steps.len()]); // a scalar is one row of one value
    };
    if shape.contains(&0) {
        return;
    }
    let inner: Vec<usize> = steps.iter().map(|steps| steps[outer.len()]).collect();
    let mut index = vec![0; outer.len()];
    let mut starts = vec![0; steps.len()];
    loop {
        visit(&starts, length, &inner);
        // Counts up like an odometer: the last axis that has room moves on, those behind it start over.
        let Some(axis) = (0..outer.len()).rev().find(|axis| index[*axis] + 1 < outer[*axis]) else {
            return;
        };
        index[axis] += 1;
        index[axis + 1..].fill(0);
        for (start, steps) in starts.iter_mut().zip(steps) {
            *start = index.iter().zip(*steps).map(|(i, step)| i * step).sum();
        }
    }
}

pub(super) fn strides(shape: &[usize]) -> Vec<usize> {
    let mut strides = vec![1; shape.len()];
    for axis in (1..shape.len()).rev() {
        strides[axis - 1] = strides[axis] * shape[axis];
    }
    strides
}

/// Strides of `shape` seen with `axes` axes: 0 where an axis is stretched or missing.
pub(super) fn stretched_strides(shape: &[usize], axes: usize) -> Vec<usize> {
    let mut stretched = vec![0; axes - shape.len()];
    stretched
        .extend(strides(shape).into_iter().zip(shape).map(|(stride, length)| if *length == 1 { 0 } else { stride }));
    stretched
}

/// The sizes before, at and after `axis`.
pub(super) fn around(shape: &[usize], axis: usize) -> [usize; 3] {
    [shape[..axis].iter().product(), shape[axis], shape[axis + 1..].iter().product()]
}
