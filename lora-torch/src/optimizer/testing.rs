//! One test for all rules: twenty steps against the formula in 64 bits, with two learning rates, a clipped step, and a
//! broken step that must not change a bit.

use lora_core::{Draw, Purpose};
use tch::{Device, Kind, Tensor};

use super::{OptimizerConfig, Update};
use crate::arena::Arena;

/// Shapes of the factors, with their groups. None fills its padding; the first is kept turned over.
pub(super) const SHAPES: [(&[i64], usize); 3] = [(&[5, 4], 0), (&[6], 1), (&[2, 3, 3, 2], 0)];

/// The learning rate of group 1 is this many times that of group 0.
const SECOND_RATE: f64 = 0.5;

/// 32-bit arithmetic over twenty steps, relative to the largest change and to parameters of size 1.
const TOLERANCE: f64 = 2e-5;

/// A rule as its paper writes it; all slices hold the factors one after the other without padding.
pub(super) trait Reference {
    fn step(&mut self, parameters: &mut [f64], gradient: &[f64], rates: &[f64]);
}

pub(super) fn check(config: OptimizerConfig, rate: f64, reference: &mut dyn Reference) {
    let mut draw = Draw::new(3, Purpose::Init, 0, 0);
    let counts: Vec<usize> = SHAPES.iter().map(|(shape, _)| shape.iter().product::<i64>() as usize).collect();
    let total = counts.iter().sum();
    let start = draw.normal(total, 1.0);
    let mut expected: Vec<f64> = start.iter().map(|v| f64::from(*v)).collect();
    let rates: Vec<f64> = SHAPES
        .iter()
        .zip(&counts)
        .flat_map(|((_, group), count)| vec![if *group == 1 { rate * SECOND_RATE } else { rate }; *count])
        .collect();

    let _no_grad = tch::no_grad_guard();
    let arena = Arena::new(
        Device::Cpu,
        &shaped(&start).iter().zip(SHAPES).map(|(tensor, (_, group))| (tensor, group)).collect::<Vec<_>>(),
    )
    .unwrap();
    let mut rule = config.build(&arena).unwrap();
    for step in 0..20 {
        let gradient: Vec<f64> =
            draw.normal(total, 0.3).iter().zip(&start).map(|(g, s)| f64::from(*g + 0.2 * *s)).collect();
        let divisor = if step == 7 { 2.5 } else { 1.0 };
        if step == 11 {
            let before = snapshot(&arena, rule.as_ref());
            apply(rule.as_mut(), &arena, &vec![f64::NAN; total], rate, 1.0, true);
            assert_eq!(before, snapshot(&arena, rule.as_ref()), "a broken step changed something");
        }
        apply(rule.as_mut(), &arena, &gradient, rate, divisor, false);
        let clipped: Vec<f64> = gradient.iter().map(|g| g / divisor).collect();
        reference.step(&mut expected, &clipped, &rates);
    }
    let actual = flat(&arena.split(&arena.values().unwrap()).unwrap());
    let error = actual.iter().zip(&expected).map(|(a, e)| (a - e).abs()).fold(0.0, f64::max);
    let moved = expected.iter().zip(&start).map(|(e, s)| (e - f64::from(*s)).abs()).fold(0.0, f64::max);
    assert!(error < TOLERANCE * moved.max(1.0) && moved > 100.0 * TOLERANCE, "error {error:e}, moved {moved:e}");
}

fn apply(rule: &mut dyn super::Rule, arena: &Arena, gradient: &[f64], rate: f64, divisor: f64, broken: bool) {
    let scalar = |value: f64, kind| Tensor::f_full([1], value, (kind, Device::Cpu)).unwrap();
    let flat_gradient = arena.zeros().unwrap();
    let values: Vec<f32> = gradient.iter().map(|g| *g as f32).collect();
    for (mut place, part) in arena.split(&flat_gradient).unwrap().into_iter().zip(shaped(&values)) {
        place.f_copy_(&part).unwrap();
    }
    rule.step(&Update {
        parameters: &arena.values().unwrap(),
        gradient: &flat_gradient,
        groups: arena.groups(),
        rates: &[scalar(rate, Kind::Double), scalar(rate * SECOND_RATE, Kind::Double)],
        divisor: &scalar(divisor, Kind::Float),
        broken: &scalar(f64::from(u8::from(broken)), Kind::Float),
    })
    .unwrap();
}

fn shaped(values: &[f32]) -> Vec<Tensor> {
    let counts: Vec<i64> = SHAPES.iter().map(|(shape, _)| shape.iter().product()).collect();
    let parts = Tensor::f_from_slice(values).unwrap().f_split_with_sizes(&counts, 0).unwrap();
    parts.iter().zip(SHAPES).map(|(part, (shape, _))| part.f_view(shape).unwrap()).collect()
}

fn flat(tensors: &[Tensor]) -> Vec<f64> {
    tensors.iter().flat_map(|tensor| crate::backend::host_values(tensor).unwrap()).map(f64::from).collect()
}

fn snapshot(arena: &Arena, rule: &dyn super::Rule) -> Vec<u32> {
    let state = rule.state().into_iter().map(|(_, tensor)| tensor.shallow_clone());
    let all: Vec<Tensor> = state.chain([arena.values().unwrap()]).collect();
    all.iter().flat_map(|tensor| crate::backend::host_values(tensor).unwrap()).map(f32::to_bits).collect()
}
