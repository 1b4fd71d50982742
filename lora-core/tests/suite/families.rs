//! What holds for every family: merging changes the speed and never the answer, and strength 0 is the base.

use lora_core::{Adapter, AnyAdapter, Array, Backend, Cpu, Layer, Result};
use proptest::test_runner::{Config, RngSeed, TestRunner};

use super::cases::{Family, Shape, Values, shapes};

/// Negative, zero, small, whole and more than whole.
const STRENGTHS: [f64; 5] = [-0.8, 0.0, 0.3, 1.0, 1.6];

/// `forward` gives what the layer with merged weight and bias gives, and that is not what the base gives.
pub(crate) fn adapted_equals_merged<B: Backend>(on: &B, tolerance: f32, family: Family) {
    each_case(|shape| {
        let case = Case::new(on, shape, family);
        let y = case.layer_output(on, &case.weight, case.bias.as_ref());
        for strength in STRENGTHS {
            let layer = Layer { weight: &case.weight, bias: case.bias.as_ref(), geometry: shape.geometry() };
            let adapted = case.adapter.forward(on, &layer, &case.x, &y, strength).unwrap();
            let weight = case.adapter.merge(on, &case.weight, strength).unwrap();
            let bias = case.adapter.merge_bias(on, case.bias.as_ref(), strength).unwrap();
            let merged = case.layer_output(on, &weight, bias.as_ref());
            close(on, &adapted, &host(on, &merged), tolerance, &format!("{shape:?} at {strength}"));
            let change = largest(host(on, &merged).values.iter().zip(host(on, &y).values).map(|(a, b)| a - b));
            assert!(strength == 0.0 || change > 1e-4, "{shape:?} at {strength}: the adapter does nothing");
        }
    });
}

/// At strength 0 weight, bias and output are the base's, bit for bit.
pub(crate) fn strength_zero_changes_nothing<B: Backend>(on: &B, family: Family) {
    each_case(|shape| {
        let case = Case::new(on, shape, family);
        let y = case.layer_output(on, &case.weight, case.bias.as_ref());
        let layer = Layer { weight: &case.weight, bias: case.bias.as_ref(), geometry: shape.geometry() };
        let bits = |tensor: &B::Tensor| host(on, tensor).values.into_iter().map(f32::to_bits).collect::<Vec<_>>();
        assert_eq!(bits(&case.adapter.forward(on, &layer, &case.x, &y, 0.0).unwrap()), bits(&y));
        assert_eq!(bits(&case.adapter.merge(on, &case.weight, 0.0).unwrap()), bits(&case.weight));
        let bias = case.adapter.merge_bias(on, case.bias.as_ref(), 0.0).unwrap();
        assert_eq!(bias.as_ref().map(bits), case.bias.as_ref().map(bits));
    });
}

/// The merged weight and bias are those of the reference backend, and the factors keep their roles on the way there.
pub(crate) fn merge_matches_the_reference<B: Backend>(on: &B, tolerance: f32, family: Family) {
    each_case(|shape| {
        let case = Case::new(on, shape, family);
        let Case { adapter, weight, bias, .. } = Case::new(&Cpu, shape, family);
        let parts = |factors: Vec<_>| factors.into_iter().map(|(part, _)| part).collect::<Vec<_>>();
        assert_eq!(parts(Adapter::<B>::factors(&case.adapter)).len(), Adapter::<Cpu>::factors(&adapter).len());
        for strength in STRENGTHS {
            let expected = adapter.merge(&Cpu, &weight, strength).unwrap();
            let name = format!("{shape:?} at {strength}");
            close(on, &case.adapter.merge(on, &case.weight, strength).unwrap(), &expected, tolerance, &name);
            let expected = adapter.merge_bias(&Cpu, bias.as_ref(), strength).unwrap();
            let actual = case.adapter.merge_bias(on, case.bias.as_ref(), strength).unwrap();
            assert_eq!(expected.is_some(), actual.is_some(), "{name}");
            if let (Some(expected), Some(actual)) = (expected, actual) {
                close(on, &actual, &expected, tolerance, &name);
            }
        }
    });
}

/// An adapter on its layer, with an input.
pub(super) struct Case<B: Backend> {
    shape: Shape,
    pub(super) adapter: AnyAdapter<B::Tensor>,
    pub(super) weight: B::Tensor,
    pub(super) bias: Option<B::Tensor>,
    pub(super) x: B::Tensor,
}

impl<B: Backend> Case<B> {
    pub(super) fn new(on: &B, shape: Shape, family: Family) -> Self {
        let mut values = Values::of(shape, 0);
        let put = |array: &Array| on.tensor(&array.values, &array.shape);
        let adapter = family(shape, &mut values).map(&mut |_, array| put(array)).unwrap();
        let mut layer = Values::of(shape, 1);
        let weight = put(&layer.array(&shape.weight(), 1.0)).unwrap();
        let bias = shape.has_bias.then(|| put(&layer.array(&[shape.out], 1.0)).unwrap());
        let x = match shape.conv {
            None => layer.array(&[2, 3, shape.input], 1.0),
            Some(_) => layer.array(&[2, shape.input, 7, 6], 1.0),
        };
        Self { shape, adapter, weight, bias, x: put(&x).unwrap() }
    }

    pub(super) fn layer_output(&self, on: &B, weight: &B::Tensor, bias: Option<&B::Tensor>) -> B::Tensor {
        let y = self.shape.geometry().apply(on, &self.x, weight).unwrap();
        let Some(bias) = bias else { return y };
        let over: &[usize] = if self.shape.conv.is_some() { &[self.shape.out, 1, 1] } else { &[self.shape.out] };
        on.add(&y, &on.reshape(bias, over).unwrap()).unwrap()
    }
}

/// Runs a check on the same cases on every machine and every backend.
pub(super) fn each_case(check: impl Fn(Shape)) {
    let config = Config { cases: 48, rng_seed: RngSeed::Fixed(7), failure_persistence: None, ..Config::default() };
    let outcome = TestRunner::new(config).run(&shapes(), |shape| {
        check(shape);
        Ok(())
    });
    outcome.unwrap_or_else(|error| panic!("{error}"));
}

/// A tensor on the host.
pub(crate) fn host<B: Backend>(on: &B, tensor: &B::Tensor) -> Array {
    Array::new(on.shape(tensor), on.values(tensor).unwrap()).unwrap()
}

/// Fails unless `actual` has the shape and, within `tolerance` of its largest value, the values of `expected`.
#[track_caller]
pub(crate) fn close<B: Backend>(on: &B, actual: &B::Tensor, expected: &Array, tolerance: f32, name: &str) {
    let actual = host(on, actual);
    assert_eq!(actual.shape, expected.shape, "{name}");
    let error = largest(actual.values.iter().zip(&expected.values).map(|(a, b)| a - b));
    let size = largest(expected.values.iter().copied()).max(1.0);
    assert!(error <= tolerance * size, "{name}: off by {error}, values up to {size}");
}

/// NaN if there is one.
fn largest(values: impl Iterator<Item = f32>) -> f32 {
    values.map(f32::abs).fold(0.0, |a, b| if a >= b { a } else { b })
}

/// The result of an operation, or a panic that says which one failed.
#[track_caller]
pub(crate) fn done<T>(result: Result<T>, name: &str) -> T {
    result.unwrap_or_else(|error| panic!("{name}: {error:?}"))
}
