//! Every operation of a backend against the reference, on shapes that adapters use and on those that must be refused.

use lora_core::{Array, Backend, ConvGeometry, Cpu, Draw, Purpose, Result};

use super::families::{close, done};

/// Every operation gives what [`Cpu`] gives.
pub(crate) fn match_the_reference<B: Backend>(on: &B, tolerance: f32) {
    let check = Check { on, tolerance };
    let (a, b) = (numbers(1, &[2, 3, 4]), numbers(2, &[2, 3, 4]));
    check.one("share", &a, Backend::share, Backend::share);
    check.one("detach", &a, Backend::detach, Backend::detach);
    check.one("reshape", &a, |on, a| on.reshape(a, &[6, 4]), |on, a| on.reshape(a, &[6, 4]));
    for axes in [[0, 1, 2], [2, 0, 1], [0, 2, 1], [1, 2, 0]] {
        check.one("permute", &a, |on, a| on.permute(a, &axes), |on, a| on.permute(a, &axes));
    }
    check.one("permute, then reshape", &a, turned, turned);
    for (axis, start, length) in [(0, 1, 1), (1, 0, 2), (2, 1, 3)] {
        let narrowed = |name: &str| {
            check.one(name, &a, |on, a| on.narrow(a, axis, start, length), |on, a| on.narrow(a, axis, start, length));
        };
        narrowed("narrow");
    }
    for other in [b, numbers(3, &[1, 3, 1]), numbers(4, &[4]), numbers(5, &[2, 1, 1])] {
        check.two("add", [&a, &other], Backend::add, Backend::add);
        check.two("sub", [&a, &other], Backend::sub, Backend::sub);
        check.two("mul", [&a, &other], Backend::mul, Backend::mul);
        check.two("div", [&a, &other], Backend::div, Backend::div);
        check.two("add, the other way", [&other, &a], Backend::add, Backend::add);
        check.two("div, the other way", [&other, &a], Backend::div, Backend::div);
    }
    check.one("scale", &a, |on, a| on.scale(a, -1.5), |on, a| on.scale(a, -1.5));
    check.one("sqrt", &squared(&a), Backend::sqrt, Backend::sqrt);
    check.two("concat", [&a, &numbers(6, &[2, 5, 4])], |on, a, b| joined(on, a, b, 1), |on, a, b| joined(on, a, b, 1));
    for axes in [&[0usize, 1, 2][..], &[1, 2], &[0, 2], &[2]] {
        check.one("norm", &a, |on, a| on.norm(a, axes), |on, a| on.norm(a, axes));
    }
    for (left, right) in
        [(&[3usize, 5][..], &[5usize, 2][..]), (&[2, 3, 5], &[2, 5, 4]), (&[2, 2, 3, 1], &[2, 2, 1, 4])]
    {
        let pair = [&numbers(7, left), &numbers(8, right)];
        check.two("matmul", pair, Backend::matmul, Backend::matmul);
    }
    check.one("transpose", &numbers(9, &[3, 5]), Backend::transpose, Backend::transpose);
    check.two("linear", [&a, &numbers(10, &[5, 4])], Backend::linear, Backend::linear);
    onto(&check, &numbers(11, &[2, 3, 5]), &a, &numbers(12, &[5, 4]));
    convolutions(&check);
    for shape in [&[1usize, 1][..], &[5, 5], &[2, 3, 3]] {
        let right = [&shape[..shape.len() - 1], &[2]].concat();
        let pair = [&numbers(13, shape), &numbers(14, &right)];
        check.two("solve", pair, Backend::solve, Backend::solve);
    }
    // A matrix that needs its rows exchanged.
    let swapped = Array::new([2, 2], vec![0.0, 2.0, 3.0, 1.0]).unwrap();
    check.two("solve with a zero pivot", [&swapped, &numbers(15, &[2, 1])], Backend::solve, Backend::solve);
}

/// Shapes that do not fit together give errors, not panics.
pub(crate) fn refuse_misfits<B: Backend>(on: &B) {
    let tensor = |shape: &[usize]| done(on.tensor(&numbers(1, shape).values, shape), "tensor");
    let (matrix, other) = (tensor(&[2, 3]), tensor(&[2, 5]));
    let point = ConvGeometry::POINTWISE;
    let refused: [(&str, Result<B::Tensor>); 11] = [
        ("tensor", on.tensor(&[1.0, 2.0], &[3])),
        ("reshape", on.reshape(&matrix, &[4, 2])),
        ("permute", on.permute(&matrix, &[0, 0])),
        ("narrow", on.narrow(&matrix, 1, 2, 2)),
        ("concat", on.concat(&[tensor(&[2, 3]), tensor(&[3, 3])], 1)),
        ("add", on.add(&matrix, &other)),
        ("matmul", on.matmul(&matrix, &other)),
        ("linear", on.linear(&matrix, &other)),
        ("conv2d", on.conv2d(&tensor(&[1, 2, 3, 3]), &tensor(&[1, 3, 1, 1]), point)),
        ("conv2d, window too large", on.conv2d(&tensor(&[1, 2, 3, 3]), &tensor(&[1, 2, 5, 5]), point)),
        ("solve", on.solve(&matrix, &other)),
    ];
    for (name, result) in refused {
        assert!(result.is_err(), "{name} accepted shapes that do not fit");
    }
}

/// A backend beside the reference.
struct Check<'a, B> {
    on: &'a B,
    tolerance: f32,
}

impl<B: Backend> Check<'_, B> {
    fn put(&self, array: &Array) -> B::Tensor {
        done(self.on.tensor(&array.values, &array.shape), "tensor")
    }

    fn one(
        &self,
        name: &str,
        a: &Array,
        ours: impl Fn(&B, &B::Tensor) -> Result<B::Tensor>,
        reference: impl Fn(&Cpu, &Array) -> Result<Array>,
    ) {
        let actual = done(ours(self.on, &self.put(a)), name);
        close(self.on, &actual, &done(reference(&Cpu, a), name), self.tolerance, name);
    }

    fn two(
        &self,
        name: &str,
        [a, b]: [&Array; 2],
        ours: impl Fn(&B, &B::Tensor, &B::Tensor) -> Result<B::Tensor>,
        reference: impl Fn(&Cpu, &Array, &Array) -> Result<Array>,
    ) {
        let actual = done(ours(self.on, &self.put(a), &self.put(b)), name);
        close(self.on, &actual, &done(reference(&Cpu, a, b), name), self.tolerance, name);
    }
}

fn onto<B: Backend>(check: &Check<'_, B>, y: &Array, x: &Array, weight: &Array) {
    let (on, y_there) = (check.on, check.put(y));
    let actual = done(on.linear_onto(&y_there, &check.put(x), &check.put(weight), -0.7), "linear_onto");
    let expected = done(Cpu.linear_onto(y, x, weight, -0.7), "linear_onto");
    close(on, &actual, &expected, check.tolerance, "linear_onto");
    close(on, &y_there, y, 0.0, "linear_onto changed its argument");
}

fn convolutions<B: Backend>(check: &Check<'_, B>) {
    for (stride, padding, dilation, kernel) in [
        ([1, 1], [0, 0], [1, 1], [1, 1]),
        ([1, 1], [1, 1], [1, 1], [3, 3]),
        ([2, 2], [1, 1], [1, 1], [3, 3]),
        ([2, 1], [1, 2], [2, 1], [3, 2]),
    ] {
        let geometry = ConvGeometry { stride, padding, dilation };
        let pair = [&numbers(16, &[2, 3, 6, 5]), &numbers(17, &[4, 3, kernel[0], kernel[1]])];
        let name = format!("conv2d {geometry:?}");
        check.two(&name, pair, |on, x, w| on.conv2d(x, w, geometry), |on, x, w| on.conv2d(x, w, geometry));
    }
}

/// A view that is not row-major in memory on backends with strides.
fn turned<B: Backend>(on: &B, tensor: &B::Tensor) -> Result<B::Tensor> {
    on.reshape(&on.permute(tensor, &[2, 1, 0])?, &[4, 6])
}

fn joined<B: Backend>(on: &B, first: &B::Tensor, second: &B::Tensor, axis: usize) -> Result<B::Tensor> {
    on.concat(&[on.share(first)?, on.share(second)?], axis)
}

fn squared(array: &Array) -> Array {
    Array::new(array.shape.clone(), array.values.iter().map(|value| value * value).collect()).unwrap()
}

fn numbers(sample: u32, shape: &[usize]) -> Array {
    let values = Draw::new(11, Purpose::Init, 0, sample).normal(shape.iter().product(), 1.0);
    Array::new(shape, values).unwrap()
}
