//! Strangers' factors: any shape ends in a result or an error. The checks are the families', so one backend is enough, and
//! libtorch takes 10 ms to word an error.

use lora_core::{Adapter, Backend, Layer, Result};

use super::{
    cases::Family,
    families::{Case, each_case},
};

/// With any factor in any other shape, on a base of any other shape, every function ends
/// in a result or an error.
pub(crate) fn any_shape_gives_a_result_or_an_error<B: Backend>(on: &B, family: Family) {
    each_case(|shape| {
        let case = Case::new(on, shape, family);
        let y = case.layer_output(on, &case.weight, case.bias.as_ref());
        let count = Adapter::<B>::factors(&case.adapter).len();
        for (wrong, how) in (0..=count).flat_map(|wrong| (0..MISSHAPES).map(move |how| (wrong, how))) {
            let mut index = 0;
            let adapter = case.adapter.map(&mut |_, factor| {
                index += 1;
                if index - 1 == wrong { misshapen(on, factor, how) } else { on.share(factor) }
            });
            let weight = if wrong == count { misshapen(on, &case.weight, how) } else { on.share(&case.weight) };
            let (adapter, weight) = (adapter.unwrap(), weight.unwrap());
            let layer = Layer { weight: &weight, bias: case.bias.as_ref(), geometry: shape.geometry() };
            // Some of them fit all the same: what counts is that none panics, and that what fits gives a weight.
            if let Ok(merged) = adapter.merge(on, &weight, 0.7) {
                assert_eq!(on.shape(&merged), on.shape(&weight));
            }
            let _ = adapter.merge_bias(on, case.bias.as_ref(), 0.7);
            let _ = adapter.forward(on, &layer, &case.x, &y, 0.7);
        }
    });
}

const MISSHAPES: usize = 7;

/// Ones in a shape near that of `tensor`.
fn misshapen<B: Backend>(on: &B, tensor: &B::Tensor, how: usize) -> Result<B::Tensor> {
    let mut shape = on.shape(tensor);
    match how {
        0 => shape.clear(),
        1 => shape.reverse(),
        2 => shape[0] += 1,
        3 => shape[0] = 0,
        4 => shape.push(2),
        5 => drop(shape.pop()),
        _ => *shape.last_mut().unwrap() += 1,
    }
    on.tensor(&vec![1.0; shape.iter().product()], &shape)
}
