//! The families that promise not to form ΔW keep it: no tensor of a forward pass is as large as the base weight.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::cell::RefCell;

use lora_core::{
    Adapter, AdapterConfig, AnyAdapter, Array, Backend, ConvGeometry, Cpu, Draw, Geometry, Init, Layer, Method, Part,
    Purpose, Result,
};

const POINTWISE: Geometry = Geometry::Conv(ConvGeometry::POINTWISE);

#[test]
fn the_forward_pass_never_forms_the_delta() {
    for method in [Method::Lora, Method::RsLora, Method::Dora, Method::Lokr] {
        assert!(largest_of_forward(method, Init::Kaiming, Geometry::Linear) < 60 * 64, "{method:?}, linear");
        assert!(largest_of_forward(method, Init::Kaiming, POINTWISE) < 60 * 64, "{method:?}, conv");
    }
    for init in [Init::Pissa, Init::Olora] {
        assert!(largest_of_forward(Method::Lora, init, Geometry::Linear) < 60 * 64, "{init:?}");
    }
}

/// So that the test above can fail: LoHa has to form it, and the watch sees that.
#[test]
fn the_watch_sees_a_delta_where_there_is_one() {
    assert!(largest_of_forward(Method::Loha, Init::Kaiming, Geometry::Linear) >= 60 * 64);
}

/// Elements of the largest tensor made while an adapter of a `[60, 64]` weight runs on a few rows.
fn largest_of_forward(method: Method, init: Init, geometry: Geometry) -> usize {
    let numbers = |sample, shape: &[usize]| {
        let values = Draw::new(1, Purpose::Noise, 0, sample).normal(shape.iter().product(), 1.0);
        Array::new(shape, values).unwrap()
    };
    let is_conv = geometry == POINTWISE;
    let weight = numbers(1, if is_conv { &[60, 64, 1, 1] } else { &[60, 64] });
    let x = numbers(2, if is_conv { &[1, 64, 2, 2] } else { &[4, 64] });
    let bias = numbers(3, &[60]);
    let config = AdapterConfig { init, ..AdapterConfig::new(method, 2.try_into().unwrap(), 3.0).unwrap() };
    let fresh = AnyAdapter::init(&Cpu, &weight, &config, &mut Draw::new(2, Purpose::Init, 0, 0)).unwrap();
    let moved = |part: Part, factor: &Array| {
        let values = factor.values.iter().map(|value| if part.is_frozen() { *value } else { value + 0.1 }).collect();
        Array::new(factor.shape.clone(), values)
    };
    let adapter = fresh.map(&mut |part, factor| moved(part, factor)).unwrap();
    let y = geometry.apply(&Cpu, &x, &weight).unwrap();
    let layer = Layer { weight: &weight, bias: Some(&bias), geometry };
    let watch = Watch::default();
    let output = adapter.forward(&watch, &layer, &x, &y, 0.7).unwrap();
    assert_eq!(output, adapter.forward(&Cpu, &layer, &x, &y, 0.7).unwrap());
    watch.largest.into_inner()
}

/// [`Cpu`], keeping the size of the largest tensor that an operation made. Views of what was there do not count.
#[derive(Default)]
struct Watch {
    largest: RefCell<usize>,
}

impl Watch {
    fn seen(&self, result: Result<Array>) -> Result<Array> {
        if let Ok(array) = &result {
            let mut largest = self.largest.borrow_mut();
            *largest = largest.max(array.values.len());
        }
        result
    }
}

impl Backend for Watch {
    type Tensor = Array;

    fn tensor(&self, values: &[f32], shape: &[usize]) -> Result<Array> {
        self.seen(Cpu.tensor(values, shape))
    }

    fn values(&self, tensor: &Array) -> Result<Vec<f32>> {
        Cpu.values(tensor)
    }

    fn shape(&self, tensor: &Array) -> Vec<usize> {
        Cpu.shape(tensor)
    }

    fn reshape(&self, tensor: &Array, shape: &[usize]) -> Result<Array> {
        Cpu.reshape(tensor, shape)
    }

    fn permute(&self, tensor: &Array, axes: &[usize]) -> Result<Array> {
        Cpu.permute(tensor, axes)
    }

    fn narrow(&self, tensor: &Array, axis: usize, start: usize, length: usize) -> Result<Array> {
        Cpu.narrow(tensor, axis, start, length)
    }

    fn concat(&self, tensors: &[Array], axis: usize) -> Result<Array> {
        self.seen(Cpu.concat(tensors, axis))
    }

    fn add(&self, left: &Array, right: &Array) -> Result<Array> {
        self.seen(Cpu.add(left, right))
    }

    fn sub(&self, left: &Array, right: &Array) -> Result<Array> {
        self.seen(Cpu.sub(left, right))
    }

    fn mul(&self, left: &Array, right: &Array) -> Result<Array> {
        self.seen(Cpu.mul(left, right))
    }

    fn div(&self, left: &Array, right: &Array) -> Result<Array> {
        self.seen(Cpu.div(left, right))
    }

    fn scale(&self, tensor: &Array, factor: f64) -> Result<Array> {
        self.seen(Cpu.scale(tensor, factor))
    }

    fn matmul(&self, left: &Array, right: &Array) -> Result<Array> {
        self.seen(Cpu.matmul(left, right))
    }

    fn conv2d(&self, input: &Array, weight: &Array, geometry: ConvGeometry) -> Result<Array> {
        self.seen(Cpu.conv2d(input, weight, geometry))
    }

    fn norm(&self, tensor: &Array, axes: &[usize]) -> Result<Array> {
        self.seen(Cpu.norm(tensor, axes))
    }

    fn solve(&self, matrix: &Array, right: &Array) -> Result<Array> {
        self.seen(Cpu.solve(matrix, right))
    }

    fn linear(&self, input: &Array, weight: &Array) -> Result<Array> {
        self.seen(Cpu.linear(input, weight))
    }

    fn linear_onto(&self, y: &Array, x: &Array, weight: &Array, factor: f64) -> Result<Array> {
        self.seen(Cpu.linear_onto(y, x, weight, factor))
    }
}
