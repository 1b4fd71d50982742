//! How adapters start: nothing changes at first, and the factors are in a place from which they can learn.

use std::num::NonZeroUsize;

use lora_core::{
    Adapter, AdapterConfig, AnyAdapter, Array, Backend, ConvGeometry, Cpu, Draw, Error, Geometry, Init, Layer, Method,
    Part, Purpose,
    adapter::{Boft, Full, Glora, Ia3, Oft},
};

use super::families::{close, host};

const METHODS: [Method; 5] = [Method::Lora, Method::RsLora, Method::Dora, Method::Loha, Method::Lokr];

/// For every method and start, on linear layers and convolutions: ΔW is zero at first, some tensor is not, and moving the
/// zero ones makes a change.
pub(crate) fn change_nothing<B: Backend>(on: &B, tolerance: f32) {
    each_start(|base, config| change_nothing_on(on, tolerance, base, config));
}

/// The same draw gives the same factors as on the reference.
pub(crate) fn match_the_reference<B: Backend>(on: &B, tolerance: f32) {
    each_start(|shape, config| {
        let base = numbers(1, shape);
        let ours = fresh(on, &on.tensor(&base.values, shape).unwrap(), config);
        let reference = fresh(&Cpu, &base, config);
        let pairs = Adapter::<B>::factors(&ours).into_iter().zip(Adapter::<Cpu>::factors(&reference));
        for ((part, ours), (_, expected)) in pairs {
            close(on, ours, expected, tolerance, &format!("{config:?} on {shape:?}: {part:?}"));
        }
    });
}

fn each_start(check: impl Fn(&[usize], &AdapterConfig)) {
    for method in METHODS {
        for init in [Init::Kaiming, Init::Gaussian, Init::Pissa, Init::Olora] {
            for base in [&[12usize, 8][..], &[8, 12], &[8, 4, 3, 3], &[6, 8, 1, 1], &[32, 40]] {
                let config = AdapterConfig { init, ..AdapterConfig::new(method, rank(3), 7.0).unwrap() };
                if config.clone().checked().is_ok() {
                    check(base, &config);
                }
            }
        }
    }
}

fn fresh<B: Backend>(on: &B, base: &B::Tensor, config: &AdapterConfig) -> AnyAdapter<B::Tensor> {
    AnyAdapter::init(on, base, config, &mut Draw::new(5, Purpose::Init, 0, 9)).unwrap()
}

fn numbers(sample: u32, shape: &[usize]) -> Array {
    let values = Draw::new(3, Purpose::Noise, 0, sample).normal(shape.iter().product(), 1.0);
    Array::new(shape, values).unwrap()
}

fn change_nothing_on<B: Backend>(on: &B, tolerance: f32, shape: &[usize], config: &AdapterConfig) {
    let name = format!("{:?} {:?} on {shape:?}", config.method, config.init);
    let base = numbers(1, shape);
    let weight = on.tensor(&base.values, shape).unwrap();
    let fresh = fresh(on, &weight, config);
    close(on, &fresh.merge(on, &weight, 1.0).unwrap(), &base, tolerance, &name);

    let geometry = if shape.len() == 4 { Geometry::Conv(ConvGeometry::POINTWISE) } else { Geometry::Linear };
    let x_shape = if shape.len() == 4 { vec![2, shape[1], 5, 4] } else { vec![3, shape[1]] };
    let x = on.tensor(&numbers(2, &x_shape).values, &x_shape).unwrap();
    let y = geometry.apply(on, &x, &weight).unwrap();
    let layer = Layer { weight: &weight, bias: None, geometry };
    close(on, &fresh.forward(on, &layer, &x, &y, 1.0).unwrap(), &host(on, &y), tolerance, &name);

    let moved = fresh
        .map(&mut |part, tensor| {
            if part.is_frozen() {
                return on.share(tensor);
            }
            let values = on.values(tensor)?;
            on.tensor(&values.iter().map(|value| value + 0.05).collect::<Vec<_>>(), &on.shape(tensor))
        })
        .unwrap();
    let change = host(on, &moved.delta(on, &weight).unwrap());
    assert!(change.values.iter().all(|value| value.is_finite()), "{name}");
    assert!(change.values.iter().any(|value| value.abs() > 1e-4), "{name}: the moved adapter does nothing");

    for (part, factor) in Adapter::<B>::factors(&fresh) {
        let is_zero = host(on, factor).values.iter().all(|value| *value == 0.0);
        let starts_at_zero = match part {
            Part::Up => matches!(config.init, Init::Kaiming | Init::Gaussian),
            Part::HadaW2A | Part::KronW2 | Part::KronW2B => true,
            _ => false,
        };
        assert_eq!(is_zero, starts_at_zero, "{name}: {part:?}");
    }
}

/// Families that only load say so.
pub(crate) fn are_refused_where_nothing_trains<B: Backend>(on: &B) {
    let base = on.tensor(&[1.0; 16], &[4, 4]).unwrap();
    let config = AdapterConfig::new(Method::Lora, rank(2), 2.0).unwrap();
    let draw = || Draw::new(1, Purpose::Init, 0, 0);
    let refused = |result: Result<(), Error>| assert!(matches!(result, Err(Error::Config { option: "method", .. })));
    refused(Glora::init(on, &base, &config, &mut draw()).map(|_| ()));
    refused(Ia3::init(on, &base, &config, &mut draw()).map(|_| ()));
    refused(Oft::init(on, &base, &config, &mut draw()).map(|_| ()));
    refused(Boft::init(on, &base, &config, &mut draw()).map(|_| ()));
    let full = Full::init(on, &base, &config, &mut draw()).unwrap();
    assert_eq!(host(on, &full.delta(on, &base).unwrap()).values, vec![0.0; 16]);
}

fn rank(rank: usize) -> NonZeroUsize {
    NonZeroUsize::new(rank).unwrap()
}
