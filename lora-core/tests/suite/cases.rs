//! Adapters of every family with values from a seed, none of them zero and no scale 1, on the layer that they fit.

use lora_core::{
    AnyAdapter, Array, ConvGeometry, Draw, Geometry, Purpose,
    adapter::{
        Axis, Boft, Cayley, Direction, Dora, Full, Glora, GloraOrder, Ia3, Ia3Kind, KronFactor, Loha, Lokr, Lora, Oft,
        OftSide, Start, StrengthRule,
    },
};
use proptest::prelude::*;

/// A layer and the numbers that its adapter is made from.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shape {
    /// Output channels, a multiple of 4.
    pub(crate) out: usize,
    /// Input channels, a multiple of 4.
    pub(crate) input: usize,
    /// `None` on a linear layer.
    pub(crate) conv: Option<(usize, ConvGeometry)>,
    /// Rank of all factors.
    pub(crate) rank: usize,
    /// What multiplies the factors' product.
    pub(crate) scale: f64,
    /// Whether the layer has a bias.
    pub(crate) has_bias: bool,
    /// Values, and which variant of a family is made.
    pub(crate) seed: u64,
}

/// Linear layers and convolutions of all geometries that models use.
pub(crate) fn shapes() -> impl Strategy<Value = Shape> {
    let conv = prop_oneof![
        Just(None),
        (1..=2usize, 0..=1usize, 1..=2usize, prop_oneof![Just(1usize), Just(3)]).prop_map(
            |(stride, padding, dilation, kernel)| {
                let geometry =
                    ConvGeometry { stride: [stride, 1], padding: [padding; 2], dilation: [dilation, dilation] };
                Some((kernel, geometry))
            }
        )
    ];
    let sizes = (1..=4usize, 1..=3usize, conv, 1..=4usize);
    (sizes, prop_oneof![Just(0.4), Just(-1.7), Just(2.5)], any::<bool>(), any::<u64>()).prop_map(
        |((out, input, conv, rank), scale, has_bias, seed)| Shape {
            out: 4 * out,
            input: 4 * input,
            conv,
            rank,
            scale,
            has_bias,
            seed,
        },
    )
}

/// Values in the order in which they are asked for.
pub(crate) struct Values(Draw);

impl Values {
    /// Those of one shape and purpose.
    pub(crate) fn of(shape: Shape, sample: u32) -> Self {
        Self(Draw::new(shape.seed, Purpose::Init, 0, sample))
    }

    /// Normal numbers.
    pub(crate) fn array(&mut self, shape: &[usize], deviation: f64) -> Array {
        Array::new(shape, self.0.normal(shape.iter().product(), deviation)).unwrap()
    }

    /// One of two.
    pub(crate) fn choose<T>(&mut self, first: T, second: T) -> T {
        if self.0.below(2) == 0 { first } else { second }
    }
}

impl Shape {
    /// How the layer applies its weight.
    pub(crate) fn geometry(self) -> Geometry {
        self.conv.map_or(Geometry::Linear, |(_, geometry)| Geometry::Conv(geometry))
    }

    /// The axes of the weight.
    pub(crate) fn weight(self) -> Vec<usize> {
        [&[self.out, self.input], &self.kernel()[..]].concat()
    }

    fn kernel(self) -> Vec<usize> {
        self.conv.map_or(vec![], |(kernel, _)| vec![kernel, kernel])
    }

    fn columns(self) -> usize {
        self.weight()[1..].iter().product()
    }

    /// `[first, second]` and as many unit axes as the kernel has.
    fn point(self, first: usize, second: usize) -> Vec<usize> {
        [&[first, second], &vec![1; self.kernel().len()][..]].concat()
    }
}

fn plain(shape: Shape, values: &mut Values) -> Lora<Array> {
    let down = [&[shape.rank, shape.input], &shape.kernel()[..]].concat();
    Lora::new(values.array(&down, 0.5), values.array(&shape.point(shape.out, shape.rank), 0.5), shape.scale)
}

fn cored(shape: Shape, values: &mut Values) -> Lora<Array> {
    let mid = [&[shape.rank, shape.rank], &shape.kernel()[..]].concat();
    Lora {
        down: values.array(&shape.point(shape.rank, shape.input), 0.5),
        mid: Some(values.array(&mid, 0.5)),
        ..plain(shape, values)
    }
}

fn started(shape: Shape, values: &mut Values) -> Lora<Array> {
    let Lora { down, up, .. } = plain(shape, values);
    Lora { start: Some(Start { down, up }), ..plain(shape, values) }
}

fn hadamard(shape: Shape, values: &mut Values) -> Loha<Array> {
    let (rank, out, columns) = (shape.rank, shape.out, shape.columns());
    Loha {
        w1_a: values.array(&[out, rank], 0.6),
        w1_b: values.array(&[rank, columns], 0.6),
        w2_a: values.array(&[out, rank], 0.6),
        w2_b: values.array(&[rank, columns], 0.6),
        t1: None,
        t2: None,
        scale: shape.scale,
    }
}

/// Kronecker factors of sizes from the seed: whole, of low rank, or with a core.
struct Split {
    first: [usize; 2],
    second: [usize; 2],
}

impl Split {
    fn of(shape: Shape, values: &mut Values) -> Self {
        let first = [values.choose(2, 4), values.choose(2, 4)];
        Self { first, second: [shape.out / first[0], shape.input / first[1]] }
    }

    fn whole(&self, shape: Shape, values: &mut Values) -> [KronFactor<Array>; 2] {
        let second = [&self.second, &shape.kernel()[..]].concat();
        [KronFactor::Whole(values.array(&self.first, 0.7)), KronFactor::Whole(values.array(&second, 0.7))]
    }

    fn product(rows: usize, columns: usize, rank: usize, values: &mut Values) -> KronFactor<Array> {
        KronFactor::Product { a: values.array(&[rows, rank], 0.7), b: values.array(&[rank, columns], 0.7) }
    }

    fn second_product(&self, shape: Shape, values: &mut Values) -> KronFactor<Array> {
        let columns = self.second[1] * shape.kernel().iter().product::<usize>();
        Self::product(self.second[0], columns, shape.rank, values)
    }
}

fn dora(direction: Direction<Array>, shape: Shape, values: &mut Values) -> AnyAdapter<Array> {
    let (axis, unit) = values.choose((Axis::Output, 0), (Axis::Input, 1));
    let mut magnitude_shape = vec![1; shape.weight().len()];
    magnitude_shape[unit] = shape.weight()[unit];
    let mut magnitude = values.array(&magnitude_shape, 0.5);
    magnitude.values.iter_mut().for_each(|value| *value += 2.0);
    let rule = values.choose(StrengthRule::Interpolate, StrengthRule::KeepMagnitudes);
    AnyAdapter::Dora(Dora { direction, magnitude, axis, rule })
}

/// Makes an adapter for a shape.
pub(crate) type Family = fn(Shape, &mut Values) -> AnyAdapter<Array>;

pub(crate) fn lora(shape: Shape, values: &mut Values) -> AnyAdapter<Array> {
    AnyAdapter::Lora(plain(shape, values))
}

pub(crate) fn lora_with_bias(shape: Shape, values: &mut Values) -> AnyAdapter<Array> {
    let up_bias = Some(values.array(&[shape.out], 1.0));
    AnyAdapter::Lora(Lora { up_bias, ..plain(shape, values) })
}

pub(crate) fn lora_with_start(shape: Shape, values: &mut Values) -> AnyAdapter<Array> {
    AnyAdapter::Lora(started(shape, values))
}

pub(crate) fn tucker(shape: Shape, values: &mut Values) -> AnyAdapter<Array> {
    AnyAdapter::Lora(cored(shape, values))
}

pub(crate) fn dora_over_lora(shape: Shape, values: &mut Values) -> AnyAdapter<Array> {
    dora(Direction::Lora(plain(shape, values)), shape, values)
}

pub(crate) fn dora_over_started_lora(shape: Shape, values: &mut Values) -> AnyAdapter<Array> {
    dora(Direction::Lora(started(shape, values)), shape, values)
}

pub(crate) fn dora_over_tucker(shape: Shape, values: &mut Values) -> AnyAdapter<Array> {
    dora(Direction::Lora(cored(shape, values)), shape, values)
}

pub(crate) fn dora_over_loha(shape: Shape, values: &mut Values) -> AnyAdapter<Array> {
    dora(Direction::Loha(hadamard(shape, values)), shape, values)
}

pub(crate) fn dora_over_lokr(shape: Shape, values: &mut Values) -> AnyAdapter<Array> {
    let split = Split::of(shape, values);
    let [w1, _] = split.whole(shape, values);
    dora(Direction::Lokr(Lokr { w1, w2: split.second_product(shape, values), scale: shape.scale }), shape, values)
}

pub(crate) fn loha(shape: Shape, values: &mut Values) -> AnyAdapter<Array> {
    AnyAdapter::Loha(hadamard(shape, values))
}

pub(crate) fn tucker_loha(shape: Shape, values: &mut Values) -> AnyAdapter<Array> {
    let rank = shape.rank;
    let core = [&[rank, rank], &shape.kernel()[..]].concat();
    AnyAdapter::Loha(Loha {
        w1_a: values.array(&[rank, shape.out], 0.7),
        w1_b: values.array(&[rank, shape.input], 0.7),
        w2_a: values.array(&[rank, shape.out], 0.7),
        w2_b: values.array(&[rank, shape.input], 0.7),
        t1: Some(values.array(&core, 0.7)),
        t2: Some(values.array(&core, 0.7)),
        scale: shape.scale,
    })
}

pub(crate) fn lokr_whole(shape: Shape, values: &mut Values) -> AnyAdapter<Array> {
    let [w1, w2] = Split::of(shape, values).whole(shape, values);
    AnyAdapter::Lokr(Lokr { w1, w2, scale: shape.scale })
}

pub(crate) fn lokr_product(shape: Shape, values: &mut Values) -> AnyAdapter<Array> {
    let split = Split::of(shape, values);
    let [w1, _] = split.whole(shape, values);
    AnyAdapter::Lokr(Lokr { w1, w2: split.second_product(shape, values), scale: shape.scale })
}

pub(crate) fn lokr_two_products(shape: Shape, values: &mut Values) -> AnyAdapter<Array> {
    let split = Split::of(shape, values);
    let w1 = Split::product(split.first[0], split.first[1], shape.rank, values);
    AnyAdapter::Lokr(Lokr { w1, w2: split.second_product(shape, values), scale: shape.scale })
}

pub(crate) fn lokr_tucker(shape: Shape, values: &mut Values) -> AnyAdapter<Array> {
    let split = Split::of(shape, values);
    let [w1, _] = split.whole(shape, values);
    let w2 = KronFactor::Tucker {
        core: values.array(&[&[shape.rank, shape.rank], &shape.kernel()[..]].concat(), 0.7),
        a: values.array(&[shape.rank, split.second[0]], 0.7),
        b: values.array(&[shape.rank, split.second[1]], 0.7),
    };
    AnyAdapter::Lokr(Lokr { w1, w2, scale: shape.scale })
}

pub(crate) fn glora(shape: Shape, values: &mut Values) -> AnyAdapter<Array> {
    let b2 = [&[shape.rank, shape.input], &shape.kernel()[..]].concat();
    AnyAdapter::Glora(Glora {
        a1: values.array(&shape.point(shape.input, shape.rank), 0.5),
        a2: values.array(&shape.point(shape.rank, shape.input), 0.5),
        b1: values.array(&shape.point(shape.out, shape.rank), 0.5),
        b2: values.array(&b2, 0.5),
        order: GloraOrder::Current,
        scale: shape.scale,
    })
}

pub(crate) fn older_glora(shape: Shape, values: &mut Values) -> AnyAdapter<Array> {
    let AnyAdapter::Glora(Glora { a1, a2, b1, b2, scale, .. }) = glora(shape, values) else {
        unreachable!("the line above makes a GLoRA")
    };
    AnyAdapter::Glora(Glora { a1: a2, a2: a1, b1: b2, b2: b1, order: GloraOrder::Older, scale })
}

pub(crate) fn full(shape: Shape, values: &mut Values) -> AnyAdapter<Array> {
    let diff_bias = Some(values.array(&[shape.out], 1.0));
    AnyAdapter::Full(Full { diff: Some(values.array(&shape.weight(), 1.0)), diff_bias })
}

pub(crate) fn ia3_offset(shape: Shape, values: &mut Values) -> AnyAdapter<Array> {
    let (axis, length) = values.choose((Axis::Output, shape.out), (Axis::Input, shape.input));
    AnyAdapter::Ia3(Ia3 { vector: values.array(&[1, length, 1, 1], 1.0), axis, kind: Ia3Kind::Offset })
}

pub(crate) fn ia3_factor(shape: Shape, values: &mut Values) -> AnyAdapter<Array> {
    let (axis, vector) = values.choose((Axis::Output, [shape.out, 1]), (Axis::Input, [1, shape.input]));
    AnyAdapter::Ia3(Ia3 { vector: values.array(&vector, 1.0), axis, kind: Ia3Kind::Factor })
}

fn rows(bound: Option<f64>, shape: Shape, values: &mut Values) -> AnyAdapter<Array> {
    let size = values.choose(2, 4);
    let rescale = Some(values.array(&[shape.out, 1], 1.0));
    AnyAdapter::Oft(Oft {
        blocks: values.array(&[shape.out / size, size, size], 0.4),
        rescale: values.choose(None, rescale),
        side: OftSide::Rows { bound },
    })
}

pub(crate) fn oft_rows(shape: Shape, values: &mut Values) -> AnyAdapter<Array> {
    rows(None, shape, values)
}

pub(crate) fn oft_bounded_rows(shape: Shape, values: &mut Values) -> AnyAdapter<Array> {
    rows(Some(0.3), shape, values)
}

fn columns(cayley: Cayley, is_shared: bool, shape: Shape, values: &mut Values) -> AnyAdapter<Array> {
    let size = values.choose(2, 4);
    let count = if is_shared { 1 } else { shape.columns() / size };
    let blocks = values.array(&[count, size * (size - 1) / 2], 0.3);
    AnyAdapter::Oft(Oft { blocks, rescale: None, side: OftSide::Columns(cayley) })
}

pub(crate) fn oft_columns_exact(shape: Shape, values: &mut Values) -> AnyAdapter<Array> {
    columns(Cayley::Exact, false, shape, values)
}

pub(crate) fn oft_columns_neumann(shape: Shape, values: &mut Values) -> AnyAdapter<Array> {
    let terms = values.choose(2, 5);
    columns(Cayley::Neumann(terms), false, shape, values)
}

pub(crate) fn oft_columns_shared(shape: Shape, values: &mut Values) -> AnyAdapter<Array> {
    columns(Cayley::Exact, true, shape, values)
}

pub(crate) fn boft(shape: Shape, values: &mut Values) -> AnyAdapter<Array> {
    let size = values.choose(2, 4);
    let stages = (0..).take_while(|stage| shape.out.is_multiple_of(size << stage)).count();
    let rescale = Some(values.array(&[shape.out], 1.0));
    AnyAdapter::Boft(Boft {
        blocks: values.array(&[stages, shape.out / size, size, size], 0.4),
        rescale: values.choose(None, rescale),
        bound: values.choose(None, Some(0.5)),
    })
}
