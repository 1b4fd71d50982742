//! Gradients of the trained families through libtorch: the forward pass that never forms ΔW against the merged weight,
//! which forms it, and DoRA against its paper. In 64 bits, so that only the mathematics can differ.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use lora_core::{
    Adapter, AdapterConfig, AnyAdapter, ConvGeometry, Draw, Geometry, Init, Layer, Method, Part, Purpose,
    adapter::{Direction, Dora},
};
use lora_torch::Torch;
use tch::{Device, Kind, Tensor};

const ON: Torch = Torch { device: Device::Cpu, kind: Kind::Double };
/// 64-bit sums in another order.
const TOLERANCE: f64 = 1e-11;

const CONV: Geometry = Geometry::Conv(ConvGeometry { stride: [2, 1], padding: [1, 1], dilation: [1, 1] });

#[test]
fn gradients_are_those_of_the_merged_weight() {
    for method in [Method::Lora, Method::RsLora, Method::Dora, Method::Loha, Method::Lokr] {
        for (geometry, shape, x) in
            [(Geometry::Linear, vec![12, 8], vec![2, 5, 8]), (CONV, vec![12, 8, 3, 3], vec![2, 8, 6, 5])]
        {
            same_gradients(method, Init::Kaiming, geometry, &shape, &x);
        }
    }
    same_gradients(Method::Lora, Init::Pissa, Geometry::Linear, &[12, 8], &[5, 8]);
    same_gradients(Method::Dora, Init::Olora, Geometry::Linear, &[12, 8], &[5, 8]);
}

/// `‖V‖` counts as a constant (arXiv 2402.09353, §4.3): written out here with a detached norm.
#[test]
fn the_norm_of_dora_is_a_constant() {
    let weight = normal(1, &[12, 8]);
    let adapter = trained(Method::Dora, Init::Kaiming, &weight);
    let AnyAdapter::Dora(Dora { direction: Direction::Lora(lora), magnitude, .. }) = &adapter else {
        panic!("{adapter:?}")
    };
    let x = normal(2, &[5, 8]);
    let y = x.linear::<Tensor>(&weight, None);
    let layer = Layer { weight: &weight, bias: None, geometry: Geometry::Linear };
    let ours = gradients(&adapter, &adapter.forward(&ON, &layer, &x, &y, 1.0).unwrap());

    let v = &weight + lora.up.matmul(&lora.down) * lora.scale;
    let norm = v.detach().norm_scalaropt_dim(2.0, [1i64].as_slice(), true);
    let written_out = x.linear::<Tensor>(&(&v * magnitude / &norm), None);
    agree(&ours, &gradients(&adapter, &written_out), "DoRA");

    let flowing = x.linear::<Tensor>(&(&v * magnitude / v.norm_scalaropt_dim(2.0, [1i64].as_slice(), true)), None);
    let difference = (&ours[0].1 - &gradients(&adapter, &flowing)[0].1).abs().max().double_value(&[]);
    assert!(difference > 1e-3, "the norm makes no difference here, so nothing was shown");
}

#[track_caller]
fn same_gradients(method: Method, init: Init, geometry: Geometry, shape: &[i64], x: &[i64]) {
    let (weight, bias, x) = (normal(1, shape), normal(3, &[shape[0]]), normal(2, x));
    let adapter = trained(method, init, &weight);
    let apply = |weight: &Tensor| match geometry {
        Geometry::Linear => x.linear(weight, Some(&bias)),
        Geometry::Conv(_) => x.conv2d(weight, Some(&bias), [2, 1], [1, 1], [1, 1], 1),
    };
    let layer = Layer { weight: &weight, bias: Some(&bias), geometry };
    for strength in [1.0, 0.6] {
        let adapted = adapter.forward(&ON, &layer, &x, &apply(&weight), strength).unwrap();
        let merged = apply(&adapter.merge(&ON, &weight, strength).unwrap());
        let name = format!("{method:?} {init:?} {geometry:?} at {strength}");
        agree(&gradients(&adapter, &adapted), &gradients(&adapter, &merged), &name);
    }
}

/// A fresh adapter whose trained tensors have all moved, and record gradients.
fn trained(method: Method, init: Init, weight: &Tensor) -> AnyAdapter<Tensor> {
    let config = AdapterConfig { init, ..AdapterConfig::new(method, 2.try_into().unwrap(), 3.0).unwrap() };
    let fresh = AnyAdapter::init(&ON, weight, &config, &mut Draw::new(4, Purpose::Init, 0, 0)).unwrap();
    let mut sample = 10;
    fresh
        .map(&mut |part: Part, tensor: &Tensor| {
            sample += 1;
            let moved = tensor + normal(sample, &tensor.size()) * 0.3;
            Ok(if part.is_frozen() { tensor.shallow_clone() } else { moved.detach().set_requires_grad(true) })
        })
        .unwrap()
}

/// The gradient of every trained tensor for a loss that weighs each output differently.
fn gradients(adapter: &AnyAdapter<Tensor>, output: &Tensor) -> Vec<(Part, Tensor)> {
    let loss = (output * normal(5, &output.size())).sum(Kind::Double);
    let factors: Vec<_> =
        Adapter::<Torch>::factors(adapter).into_iter().filter(|(part, _)| !part.is_frozen()).collect();
    let inputs: Vec<&Tensor> = factors.iter().map(|(_, factor)| *factor).collect();
    let gradients = Tensor::f_run_backward(&[&loss], &inputs, true, false).unwrap();
    factors.iter().map(|(part, _)| *part).zip(gradients).collect()
}

#[track_caller]
fn agree(ours: &[(Part, Tensor)], expected: &[(Part, Tensor)], name: &str) {
    for ((part, ours), (_, expected)) in ours.iter().zip(expected) {
        let size = expected.abs().max().double_value(&[]);
        let error = (ours - expected).abs().max().double_value(&[]);
        assert!(size > 1e-6, "{name}: {part:?} has no gradient");
        assert!(error <= TOLERANCE * size.max(1.0), "{name}: {part:?} off by {error} of {size}");
    }
}

fn normal(sample: u32, shape: &[i64]) -> Tensor {
    let values = Draw::new(6, Purpose::Noise, 0, sample).normal(shape.iter().product::<i64>() as usize, 1.0);
    Tensor::from_slice(&values).to_kind(Kind::Double).view(shape)
}
