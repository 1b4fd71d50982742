//! The plain reference backend: row-major `f32` arrays on the host, no gradients.
//!
//! Clarity before speed, but nothing is quadratic where it need not be: products go to faer's kernels, convolutions to a
//! product with the unfolded input, sums (norms, LU) are carried in `f64`. Every operation checks its shapes.

mod eliminate;
mod walk;
mod window;

use faer::{Accum, MatMut, MatRef, Par, linalg::matmul::matmul as product};

use self::{
    eliminate::eliminate,
    walk::{around, for_each_row, stretch, stretched_strides, strides},
    window::Window,
};
use super::{Array, Backend, ConvGeometry};
use crate::{Error, Result};

/// The backend whose tensors are [`Array`]s.
#[derive(Debug, Clone, Copy, Default)]
pub struct Cpu;

impl Backend for Cpu {
    type Tensor = Array;

    fn tensor(&self, values: &[f32], shape: &[usize]) -> Result<Array> {
        Array::new(shape, values.to_vec())
    }

    fn values(&self, tensor: &Array) -> Result<Vec<f32>> {
        Ok(tensor.values.clone())
    }

    fn shape(&self, tensor: &Array) -> Vec<usize> {
        tensor.shape.clone()
    }

    fn sqrt(&self, tensor: &Array) -> Result<Array> {
        let values = tensor.values.iter().map(|value| value.sqrt()).collect();
        Ok(Array { shape: tensor.shape.clone(), values })
    }

    fn reshape(&self, tensor: &Array, shape: &[usize]) -> Result<Array> {
        Array::new(shape, tensor.values.clone())
    }

    fn permute(&self, tensor: &Array, axes: &[usize]) -> Result<Array> {
        let mut seen = vec![false; tensor.shape.len()];
        let is_order = axes.len() == seen.len()
            && axes.iter().all(|axis| seen.get_mut(*axis).is_some_and(|seen| !std::mem::replace(seen, true)));
        if !is_order {
            return Err(misfit("permute", &[&tensor.shape, axes]));
        }
        let strides = strides(&tensor.shape);
        let shape: Vec<usize> = axes.iter().map(|axis| tensor.shape[*axis]).collect();
        let steps: Vec<usize> = axes.iter().map(|axis| strides[*axis]).collect();
        let mut values = Vec::with_capacity(tensor.values.len());
        for_each_row(&shape, &[&steps], |starts, length, inner| {
            let row = (0..length).map(|i| tensor.values[starts[0] + i * inner[0]]);
            values.extend(row);
        });
        Array::new(shape, values)
    }

    fn narrow(&self, tensor: &Array, axis: usize, start: usize, length: usize) -> Result<Array> {
        let fits = tensor.shape.get(axis).is_some_and(|n| start.checked_add(length).is_some_and(|end| end <= *n));
        if !fits {
            return Err(misfit("narrow", &[&tensor.shape, &[axis, start, length]]));
        }
        let [outer, n, inner] = around(&tensor.shape, axis);
        let mut values = Vec::with_capacity(outer * length * inner);
        for block in 0..outer {
            let first = (block * n + start) * inner;
            values.extend_from_slice(&tensor.values[first..first + length * inner]);
        }
        let mut shape = tensor.shape.clone();
        shape[axis] = length;
        Array::new(shape, values)
    }

    fn concat(&self, tensors: &[Array], axis: usize) -> Result<Array> {
        let shapes: Vec<&[usize]> = tensors.iter().map(|tensor| tensor.shape.as_slice()).collect();
        let Some(first) = tensors.first().filter(|first| axis < first.shape.len()) else {
            return Err(misfit("concat", &shapes));
        };
        let mut shape = first.shape.clone();
        shape[axis] = 0;
        for tensor in tensors {
            let fits = tensor.shape.len() == shape.len()
                && tensor.shape.iter().zip(&shape).enumerate().all(|(i, (a, b))| i == axis || a == b);
            if !fits {
                return Err(misfit("concat", &shapes));
            }
            shape[axis] += tensor.shape[axis];
        }
        let [outer, _, inner] = around(&shape, axis);
        let mut values = Vec::with_capacity(shape.iter().product());
        for block in 0..outer {
            for tensor in tensors {
                let size = tensor.shape[axis] * inner;
                values.extend_from_slice(&tensor.values[block * size..(block + 1) * size]);
            }
        }
        Array::new(shape, values)
    }

    fn add(&self, left: &Array, right: &Array) -> Result<Array> {
        stretch("add", left, right, |a, b| a + b)
    }

    fn sub(&self, left: &Array, right: &Array) -> Result<Array> {
        stretch("sub", left, right, |a, b| a - b)
    }

    fn mul(&self, left: &Array, right: &Array) -> Result<Array> {
        stretch("mul", left, right, |a, b| a * b)
    }

    fn div(&self, left: &Array, right: &Array) -> Result<Array> {
        stretch("div", left, right, |a, b| a / b)
    }

    fn scale(&self, tensor: &Array, factor: f64) -> Result<Array> {
        let factor = factor as f32;
        Ok(Array { shape: tensor.shape.clone(), values: tensor.values.iter().map(|value| value * factor).collect() })
    }

    fn matmul(&self, left: &Array, right: &Array) -> Result<Array> {
        let ([batch @ .., m, k], [right_batch @ .., right_k, n]) = (&left.shape[..], &right.shape[..]) else {
            return Err(misfit("matmul", &[&left.shape, &right.shape]));
        };
        if batch != right_batch || k != right_k {
            return Err(misfit("matmul", &[&left.shape, &right.shape]));
        }
        let (m, k, n) = (*m, *k, *n);
        let mut output = Array::full([batch, &[m, n]].concat(), 0.0);
        for i in 0..batch.iter().product() {
            multiply(
                MatMut::from_row_major_slice_mut(&mut output.values[i * m * n..(i + 1) * m * n], m, n),
                Accum::Replace,
                MatRef::from_row_major_slice(&left.values[i * m * k..(i + 1) * m * k], m, k),
                MatRef::from_row_major_slice(&right.values[i * k * n..(i + 1) * k * n], k, n),
                1.0,
            );
        }
        Ok(output)
    }

    fn conv2d(&self, input: &Array, weight: &Array, geometry: ConvGeometry) -> Result<Array> {
        let (&[batch, channels, height, width], &[out, weight_channels, kh, kw]) =
            (&input.shape[..], &weight.shape[..])
        else {
            return Err(misfit("conv2d", &[&input.shape, &weight.shape]));
        };
        let window = Window::new(geometry, [height, width], [kh, kw])
            .filter(|_| channels == weight_channels)
            .ok_or_else(|| misfit("conv2d", &[&input.shape, &weight.shape]))?;
        let [oh, ow] = window.output;
        let (rows, positions) = (channels * kh * kw, oh * ow);
        let mut output = Array::full([batch, out, oh, ow], 0.0);
        let mut unfolded = vec![0.0; rows * positions]; // [in·kh·kw, h'·w']
        for i in 0..batch {
            let size = channels * height * width;
            window.unfold(&input.values[i * size..(i + 1) * size], channels, &mut unfolded);
            multiply(
                MatMut::from_row_major_slice_mut(
                    &mut output.values[i * out * positions..(i + 1) * out * positions],
                    out,
                    positions,
                ),
                Accum::Replace,
                MatRef::from_row_major_slice(&weight.values, out, rows),
                MatRef::from_row_major_slice(&unfolded, rows, positions),
                1.0,
            );
        }
        Ok(output)
    }

    fn norm(&self, tensor: &Array, axes: &[usize]) -> Result<Array> {
        if axes.iter().any(|axis| *axis >= tensor.shape.len()) {
            return Err(misfit("norm", &[&tensor.shape, axes]));
        }
        let mut shape = tensor.shape.clone();
        axes.iter().for_each(|axis| shape[*axis] = 1);
        let into = stretched_strides(&shape, tensor.shape.len());
        let mut sums = vec![0.0f64; shape.iter().product()];
        let mut at = 0;
        for_each_row(&tensor.shape, &[&into], |starts, length, inner| {
            for (i, value) in tensor.values[at..at + length].iter().enumerate() {
                sums[starts[0] + i * inner[0]] += f64::from(*value).powi(2);
            }
            at += length;
        });
        Array::new(shape, sums.into_iter().map(|sum| sum.sqrt() as f32).collect())
    }

    fn solve(&self, matrix: &Array, right: &Array) -> Result<Array> {
        let ([batch @ .., n, columns], [right_batch @ .., rows, m]) = (&matrix.shape[..], &right.shape[..]) else {
            return Err(misfit("solve", &[&matrix.shape, &right.shape]));
        };
        if batch != right_batch || n != columns || n != rows {
            return Err(misfit("solve", &[&matrix.shape, &right.shape]));
        }
        let (n, m) = (*n, *m);
        let mut values = Vec::with_capacity(right.values.len());
        for i in 0..batch.iter().product() {
            let wide = |values: &[f32]| values.iter().map(|value| f64::from(*value)).collect::<Vec<_>>();
            let mut lu = wide(&matrix.values[i * n * n..(i + 1) * n * n]);
            let mut x = wide(&right.values[i * n * m..(i + 1) * n * m]);
            eliminate(&mut lu, &mut x, n, m)?;
            values.extend(x.into_iter().map(|value| value as f32));
        }
        Array::new(right.shape.clone(), values)
    }

    fn linear(&self, input: &Array, weight: &Array) -> Result<Array> {
        let ([batch @ .., _], &[out, _]) = (&input.shape[..], &weight.shape[..]) else {
            return Err(misfit("linear", &[&input.shape, &weight.shape]));
        };
        let mut output = Array::full([batch, &[out]].concat(), 0.0);
        linear_into(&mut output, input, weight, 1.0)?;
        Ok(output)
    }

    fn linear_onto(&self, y: &Array, x: &Array, weight: &Array, factor: f64) -> Result<Array> {
        let mut output = y.clone();
        linear_into(&mut output, x, weight, factor)?;
        Ok(output)
    }
}

/// `output += factor · (input · weightᵀ)`.
fn linear_into(output: &mut Array, input: &Array, weight: &Array, factor: f64) -> Result<()> {
    let ([batch @ .., width], &[out, weight_width], [rows @ .., output_width]) =
        (&input.shape[..], &weight.shape[..], &output.shape[..])
    else {
        return Err(misfit("linear", &[&input.shape, &weight.shape, &output.shape]));
    };
    if batch != rows || *width != weight_width || *output_width != out {
        return Err(misfit("linear", &[&input.shape, &weight.shape, &output.shape]));
    }
    let rows: usize = batch.iter().product();
    multiply(
        MatMut::from_row_major_slice_mut(&mut output.values, rows, out),
        Accum::Add,
        MatRef::from_row_major_slice(&input.values, rows, weight_width),
        MatRef::from_row_major_slice(&weight.values, out, weight_width).transpose(),
        factor as f32,
    );
    Ok(())
}

/// faer's product; threads only where the work outweighs waking them.
fn multiply(output: MatMut<'_, f32>, accumulate: Accum, left: MatRef<'_, f32>, right: MatRef<'_, f32>, factor: f32) {
    const WORTH_THREADS: usize = 1 << 20;
    let work = left.nrows().saturating_mul(left.ncols()).saturating_mul(right.ncols());
    let threads = if work < WORTH_THREADS { Par::Seq } else { Par::rayon(0) };
    product(output, accumulate, left, right, factor, threads);
}

fn misfit(operation: &'static str, shapes: &[&[usize]]) -> Error {
    Error::Shapes { operation, shapes: shapes.iter().map(|shape| shape.to_vec()).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn array(shape: &[usize], values: &[f32]) -> Array {
        Array::new(shape, values.to_vec()).unwrap()
    }

    #[test]
    fn an_array_has_as_many_values_as_its_shape_says() {
        assert!(Array::new([2, 3], vec![0.0; 6]).is_ok());
        assert!(Array::new([2, 3], vec![0.0; 5]).is_err());
        assert!(Array::new([usize::MAX, 2], vec![]).is_err());
        assert_eq!(Array::identity(2).values, [1.0, 0.0, 0.0, 1.0]);
        assert!(Array::identity(0).values.is_empty());
    }

    #[test]
    fn axes_of_length_one_and_missing_axes_are_stretched() {
        let column = array(&[2, 1], &[1.0, 2.0]);
        let row = array(&[3], &[10.0, 20.0, 30.0]);
        let sum = Cpu.add(&column, &row).unwrap();
        assert_eq!((sum.shape, sum.values), (vec![2, 3], vec![11.0, 21.0, 31.0, 12.0, 22.0, 32.0]));
        let scalar = array(&[], &[5.0]);
        assert_eq!(Cpu.sub(&row, &scalar).unwrap().values, [5.0, 15.0, 25.0]);
        assert_eq!(Cpu.mul(&Array::full([0, 3], 1.0), &row).unwrap().shape, [0, 3]);
    }

    #[test]
    fn axes_come_in_the_order_that_is_asked_for() {
        let permuted = Cpu.permute(&array(&[1, 2, 3], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]), &[2, 0, 1]).unwrap();
        assert_eq!((permuted.shape, permuted.values), (vec![3, 1, 2], vec![1.0, 4.0, 2.0, 5.0, 3.0, 6.0]));
    }

    /// A 2×2 kernel with stride 2 and padding 1 over a 2×2 picture: each window sees one corner.
    #[test]
    fn a_window_meets_padding_and_stride() {
        let picture = array(&[1, 1, 2, 2], &[1.0, 2.0, 3.0, 4.0]);
        let kernel = array(&[1, 1, 2, 2], &[10.0, 20.0, 30.0, 40.0]);
        let geometry = ConvGeometry { stride: [2, 2], padding: [1, 1], dilation: [1, 1] };
        let output = Cpu.conv2d(&picture, &kernel, geometry).unwrap();
        assert_eq!((output.shape, output.values), (vec![1, 1, 2, 2], vec![40.0, 60.0, 60.0, 40.0]));
        let no_step = ConvGeometry { stride: [0, 1], ..geometry };
        assert!(Cpu.conv2d(&picture, &kernel, no_step).is_err());
        assert!(Cpu.conv2d(&picture, &array(&[1, 1, 0, 2], &[]), geometry).is_err());
    }

    #[test]
    fn rows_are_exchanged_for_a_pivot_and_a_singular_matrix_is_an_error() {
        let right = array(&[2, 1], &[4.0, 5.0]);
        let solution = Cpu.solve(&array(&[2, 2], &[0.0, 2.0, 1.0, 1.0]), &right).unwrap();
        assert_eq!(solution.values, [3.0, 2.0]);
        let singular = array(&[2, 2], &[1.0, 2.0, 2.0, 4.0]);
        assert!(matches!(Cpu.solve(&singular, &right), Err(Error::Numeric { .. })));
    }

    #[test]
    fn the_norm_is_taken_over_the_named_axes_alone() {
        let norms = Cpu.norm(&array(&[2, 2], &[3.0, 4.0, 6.0, 8.0]), &[1]).unwrap();
        assert_eq!((norms.shape, norms.values), (vec![2, 1], vec![5.0, 10.0]));
        assert_eq!(Cpu.norm(&array(&[2, 2], &[3.0, 1.0, 4.0, 0.0]), &[0]).unwrap().values, [5.0, 1.0]);
    }

    #[test]
    fn a_linear_layer_adds_onto_what_is_there() {
        let x = array(&[1, 2], &[1.0, 2.0]);
        let weight = array(&[3, 2], &[1.0, 0.0, 0.0, 1.0, 1.0, 1.0]);
        assert_eq!(Cpu.linear(&x, &weight).unwrap().values, [1.0, 2.0, 3.0]);
        let y = array(&[1, 3], &[10.0, 10.0, 10.0]);
        assert_eq!(Cpu.linear_onto(&y, &x, &weight, -2.0).unwrap().values, [8.0, 6.0, 4.0]);
        assert!(Cpu.linear_onto(&x, &x, &weight, 1.0).is_err());
    }
}
