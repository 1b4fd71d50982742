//! A backend on `ndarray`, written as plainly as that crate allows: the trait fits a stranger's tensors.

use lora_core::{Backend, ConvGeometry, Error, Result};
use ndarray::{ArrayD, Axis, Ix2, Ix4, IxDyn, Slice, Zip};

/// The backend whose tensors are `ArrayD<f32>`.
pub(crate) struct Ndarray;

impl Backend for Ndarray {
    type Tensor = ArrayD<f32>;

    fn tensor(&self, values: &[f32], shape: &[usize]) -> Result<ArrayD<f32>> {
        ArrayD::from_shape_vec(IxDyn(shape), values.to_vec()).map_err(|_| misfit("tensor", &[&[values.len()], shape]))
    }

    fn values(&self, tensor: &ArrayD<f32>) -> Result<Vec<f32>> {
        Ok(tensor.iter().copied().collect())
    }

    fn shape(&self, tensor: &ArrayD<f32>) -> Vec<usize> {
        tensor.shape().to_vec()
    }

    fn reshape(&self, tensor: &ArrayD<f32>, shape: &[usize]) -> Result<ArrayD<f32>> {
        self.tensor(&self.values(tensor)?, shape)
    }

    fn permute(&self, tensor: &ArrayD<f32>, axes: &[usize]) -> Result<ArrayD<f32>> {
        let mut sorted = axes.to_vec();
        sorted.sort_unstable();
        if !sorted.into_iter().eq(0..tensor.ndim()) {
            return Err(misfit("permute", &[tensor.shape(), axes]));
        }
        Ok(tensor.clone().permuted_axes(IxDyn(axes)))
    }

    fn narrow(&self, tensor: &ArrayD<f32>, axis: usize, start: usize, length: usize) -> Result<ArrayD<f32>> {
        if axis >= tensor.ndim() || start + length > tensor.shape()[axis] {
            return Err(misfit("narrow", &[tensor.shape(), &[axis, start, length]]));
        }
        Ok(tensor.slice_axis(Axis(axis), Slice::from(start..start + length)).to_owned())
    }

    fn concat(&self, tensors: &[ArrayD<f32>], axis: usize) -> Result<ArrayD<f32>> {
        let views: Vec<_> = tensors.iter().map(|tensor| tensor.view()).collect();
        let shapes: Vec<_> = tensors.iter().map(|tensor| tensor.shape()).collect();
        ndarray::concatenate(Axis(axis), &views).map_err(|_| misfit("concat", &shapes))
    }

    fn add(&self, left: &ArrayD<f32>, right: &ArrayD<f32>) -> Result<ArrayD<f32>> {
        both("add", left, right, |a, b| a + b)
    }

    fn sub(&self, left: &ArrayD<f32>, right: &ArrayD<f32>) -> Result<ArrayD<f32>> {
        both("sub", left, right, |a, b| a - b)
    }

    fn mul(&self, left: &ArrayD<f32>, right: &ArrayD<f32>) -> Result<ArrayD<f32>> {
        both("mul", left, right, |a, b| a * b)
    }

    fn div(&self, left: &ArrayD<f32>, right: &ArrayD<f32>) -> Result<ArrayD<f32>> {
        both("div", left, right, |a, b| a / b)
    }

    fn scale(&self, tensor: &ArrayD<f32>, factor: f64) -> Result<ArrayD<f32>> {
        Ok(tensor * factor as f32)
    }

    fn matmul(&self, left: &ArrayD<f32>, right: &ArrayD<f32>) -> Result<ArrayD<f32>> {
        let misfit = || misfit("matmul", &[left.shape(), right.shape()]);
        let ([batch @ .., m, k], [other @ .., l, n]) = (left.shape(), right.shape()) else {
            return Err(misfit());
        };
        if batch != other || k != l {
            return Err(misfit());
        }
        let count: usize = batch.iter().product();
        let lefts = self.reshape(left, &[count, *m, *k])?;
        let rights = self.reshape(right, &[count, *k, *n])?;
        let mut values = Vec::with_capacity(count * m * n);
        for (left, right) in lefts.outer_iter().zip(rights.outer_iter()) {
            let (left, right) = (left.into_dimensionality::<Ix2>(), right.into_dimensionality::<Ix2>());
            values.extend(left.map_err(|_| misfit())?.dot(&right.map_err(|_| misfit())?).iter());
        }
        self.tensor(&values, &[batch, &[*m, *n]].concat())
    }

    /// The definition, seven loops deep.
    fn conv2d(&self, input: &ArrayD<f32>, weight: &ArrayD<f32>, geometry: ConvGeometry) -> Result<ArrayD<f32>> {
        let misfit = || misfit("conv2d", &[input.shape(), weight.shape()]);
        let x = input.view().into_dimensionality::<Ix4>().map_err(|_| misfit())?;
        let w = weight.view().into_dimensionality::<Ix4>().map_err(|_| misfit())?;
        let ((batch, channels, height, width), (out, channels_of_weight, kh, kw)) = (x.dim(), w.dim());
        let ConvGeometry { stride, padding, dilation } = geometry;
        let positions = |length: usize, kernel: usize, axis: usize| {
            let room = (length + 2 * padding[axis]).checked_sub(dilation[axis] * (kernel - 1) + 1)?;
            Some(room / stride[axis] + 1)
        };
        let (oh, ow) = positions(height, kh, 0).zip(positions(width, kw, 1)).ok_or_else(misfit)?;
        if channels != channels_of_weight {
            return Err(misfit());
        }
        Ok(ArrayD::from_shape_fn(IxDyn(&[batch, out, oh, ow]), |at| {
            let mut sum = 0.0;
            for (c, ky, kx) in ndarray::indices((channels, kh, kw)) {
                let row = (at[2] * stride[0] + ky * dilation[0]).wrapping_sub(padding[0]);
                let column = (at[3] * stride[1] + kx * dilation[1]).wrapping_sub(padding[1]);
                sum += x.get((at[0], c, row, column)).map_or(0.0, |value| value * w[(at[1], c, ky, kx)]);
            }
            sum
        }))
    }

    fn norm(&self, tensor: &ArrayD<f32>, axes: &[usize]) -> Result<ArrayD<f32>> {
        if axes.iter().any(|axis| *axis >= tensor.ndim()) {
            return Err(misfit("norm", &[tensor.shape(), axes]));
        }
        let squares = tensor.mapv(|value| value * value);
        let sums = axes.iter().fold(squares, |sums, axis| sums.sum_axis(Axis(*axis)).insert_axis(Axis(*axis)));
        Ok(sums.mapv(f32::sqrt))
    }

    /// Gauss and Jordan on `[matrix | right]`.
    fn solve(&self, matrix: &ArrayD<f32>, right: &ArrayD<f32>) -> Result<ArrayD<f32>> {
        let misfit = || misfit("solve", &[matrix.shape(), right.shape()]);
        let ([batch @ .., n, columns], [other @ .., rows, m]) = (matrix.shape(), right.shape()) else {
            return Err(misfit());
        };
        if batch != other || n != columns || n != rows {
            return Err(misfit());
        }
        let (n, m, count) = (*n, *m, batch.iter().product::<usize>());
        let both = self.concat(&[matrix.clone(), right.clone()], batch.len() + 1)?;
        let mut both = both.into_shape_clone((count, n, n + m)).map_err(|_| misfit())?;
        for mut system in both.outer_iter_mut() {
            for column in 0..n {
                let pivot =
                    (column..n).max_by(|a, b| system[(*a, column)].abs().total_cmp(&system[(*b, column)].abs()));
                let pivot = pivot.filter(|pivot| system[(*pivot, column)] != 0.0).ok_or_else(misfit)?;
                (0..n + m).for_each(|i| system.swap((pivot, i), (column, i)));
                let head = system.row(column).to_owned() / system[(column, column)];
                for (row, mut values) in system.rows_mut().into_iter().enumerate() {
                    let factor = values[column];
                    if row == column {
                        values.assign(&head);
                    } else {
                        values.scaled_add(-factor, &head);
                    }
                }
            }
        }
        let solution = both.slice_axis(Axis(2), Slice::from(n..)).to_owned().into_dyn();
        self.reshape(&solution, right.shape())
    }
}

fn both(
    operation: &'static str,
    left: &ArrayD<f32>,
    right: &ArrayD<f32>,
    combine: impl Fn(f32, f32) -> f32,
) -> Result<ArrayD<f32>> {
    let axes = left.ndim().max(right.ndim());
    let length = |tensor: &ArrayD<f32>, axis: usize| {
        (axis + tensor.ndim()).checked_sub(axes).map_or(1, |axis| tensor.shape()[axis])
    };
    let shape: Vec<usize> = (0..axes).map(|axis| length(left, axis).max(length(right, axis))).collect();
    let misfit = || misfit(operation, &[left.shape(), right.shape()]);
    let left = left.broadcast(IxDyn(&shape)).ok_or_else(misfit)?;
    let right = right.broadcast(IxDyn(&shape)).ok_or_else(misfit)?;
    Ok(Zip::from(&left).and(&right).map_collect(|a, b| combine(*a, *b)))
}

fn misfit(operation: &'static str, shapes: &[&[usize]]) -> Error {
    Error::Shapes { operation, shapes: shapes.iter().map(|shape| shape.to_vec()).collect() }
}
