//! First values of the trained families; ΔW is zero in all of them.
//!
//! `A` of LoRA is uniform in ±1/√fan-in: what `kaiming_uniform_(a=√5)` of torch comes to, and so what kohya, peft and
//! LyCORIS draw. The other families start as LyCORIS starts them.

use super::{KronFactor, Loha, Lokr, Lora, Start};
use crate::{
    AdapterConfig, Array, Backend, Draw, Error, Init, Result, ScaleRule,
    backend::decompose::{Svd, is_worth_searching, leading, qr, svd},
};

/// Two factors whose product, or what it has grown by, is zero.
pub(super) fn lora<B: Backend>(
    on: &B,
    base: &B::Tensor,
    config: &AdapterConfig,
    draw: &mut Draw,
) -> Result<Lora<B::Tensor>> {
    let size = Size::of(on, base)?;
    let (rank, fan_in, scale) = (config.rank.get(), size.columns(), config.scale());
    // It is kept beside the factors, so that even an approximate one takes exactly itself out.
    if let Some(start) = start(on, base, config.init, rank, scale, Some(draw))? {
        let fresh = Lora::new(on.share(&start.down)?, on.share(&start.up)?, scale);
        return Ok(Lora { start: Some(start), ..fresh });
    }
    let down = match config.init {
        Init::Gaussian => draw.normal(rank * fan_in, 1.0 / rank as f64),
        _ => draw.uniform(rank * fan_in, bound(fan_in)),
    };
    let down = on.tensor(&down, &size.down(rank))?;
    let up = on.tensor(&vec![0.0; size.out * rank], &size.up(rank))?;
    Ok(Lora::new(down, up, scale))
}

/// The factors that PiSSA and OLoRA take out of the base weight; `None` for starts that draw at random.
///
/// With a `draw`, PiSSA may look for the leading triplets only; without, they are the exact ones.
pub(super) fn start<B: Backend>(
    on: &B,
    base: &B::Tensor,
    init: Init,
    rank: usize,
    scale: f64,
    draw: Option<&mut Draw>,
) -> Result<Option<Start<B::Tensor>>> {
    let size = Size::of(on, base)?;
    let most = size.out.min(size.columns());
    let matrix = || Array::new([size.out, size.columns()], on.values(base)?);
    let (down, up) = match init {
        Init::Kaiming | Init::Gaussian => return Ok(None),
        _ if rank > most => {
            let reason = format!("{rank} is more than the base weight has ({most}), which init {init:?} starts from");
            return Err(Error::Config { option: "rank", reason });
        }
        Init::Pissa => {
            let matrix = matrix()?;
            let found = match draw {
                Some(draw) if is_worth_searching(&matrix, rank) => leading(&matrix, rank, draw)?,
                _ => svd(&matrix)?,
            };
            pissa(&found, rank, scale)?
        }
        Init::Olora => olora(&matrix()?, rank)?,
    };
    Ok(Some(Start { down: on.tensor(&down, &size.down(rank))?, up: on.tensor(&up, &size.up(rank))? }))
}

/// The second half begins at zero (`w2_a`), the others are normal: deviation 0.1 for `w1_a`, 1 for both `b`.
pub(super) fn loha<B: Backend>(
    on: &B,
    base: &B::Tensor,
    config: &AdapterConfig,
    draw: &mut Draw,
) -> Result<Loha<B::Tensor>> {
    let size = Size::of(on, base)?;
    let (rank, out, columns) = (config.rank.get(), size.out, size.columns());
    Ok(Loha {
        w1_a: on.tensor(&draw.normal(out * rank, 0.1), &[out, rank])?,
        w1_b: on.tensor(&draw.normal(rank * columns, 1.0), &[rank, columns])?,
        w2_a: on.tensor(&vec![0.0; out * rank], &[out, rank])?,
        w2_b: on.tensor(&draw.normal(rank * columns, 1.0), &[rank, columns])?,
        t1: None,
        t2: None,
        scale: config.scale(),
    })
}

/// The first factor is whole, the second of the configured rank where that is worth it, and zero.
pub(super) fn lokr<B: Backend>(
    on: &B,
    base: &B::Tensor,
    config: &AdapterConfig,
    draw: &mut Draw,
) -> Result<Lokr<B::Tensor>> {
    let size = Size::of(on, base)?;
    let rank = config.rank.get();
    let wanted = config.factor.map(|factor| factor.get());
    let ((o1, o2), (i1, i2)) = (split(size.out, wanted), split(size.input, wanted));
    let w1 = KronFactor::Whole(on.tensor(&draw.uniform(o1 * i1, bound(i1)), &[o1, i1])?);
    // LyCORIS' threshold; where both factors are whole there is no rank to divide alpha by.
    if 2 * rank >= o2.max(i2) {
        let shape = [&[o2, i2], &size.kernel[..]].concat();
        let zeros = vec![0.0; shape.iter().product()];
        return Ok(Lokr { w1, w2: KronFactor::Whole(on.tensor(&zeros, &shape)?), scale: 1.0 });
    }
    let columns = i2 * size.kernel.iter().product::<usize>();
    let w2 = KronFactor::Product {
        a: on.tensor(&draw.uniform(o2 * rank, bound(rank)), &[o2, rank])?,
        b: on.tensor(&vec![0.0; rank * columns], &[rank, columns])?,
    };
    Ok(Lokr { w1, w2, scale: ScaleRule::Rank.scale(config.alpha, rank) })
}

/// The error of a family that loads and merges but has no start.
pub(super) fn not_trained(family: &'static str) -> Error {
    Error::Config { option: "method", reason: format!("{family} adapters load and merge, but are not trained here") }
}

/// `dimension` as `(small, large)`: the wanted size where it divides, else the split nearest to a square whose smaller
/// half is at most the wanted size (any size if none is wanted). LyCORIS' `factorization`.
fn split(dimension: usize, wanted: Option<usize>) -> (usize, usize) {
    if let Some(wanted) = wanted.filter(|wanted| dimension.is_multiple_of(*wanted)) {
        let other = dimension / wanted;
        return (wanted.min(other), wanted.max(other));
    }
    let limit = wanted.unwrap_or(dimension);
    let small =
        (1..=dimension.isqrt()).rev().find(|size| dimension.is_multiple_of(*size) && *size <= limit).unwrap_or(1);
    (small, dimension / small.max(1))
}

/// `A = √S·Vᵀ`, `B = U·√S` of the leading singular triplets, divided so that `scale·B·A` is their product.
fn pissa(svd: &Svd, rank: usize, scale: f64) -> Result<(Vec<f32>, Vec<f32>)> {
    if scale <= 0.0 {
        let reason = format!("a PiSSA start needs a positive scale, not {scale}");
        return Err(Error::Config { option: "alpha", reason });
    }
    let (up, down) = svd.balanced(rank, scale);
    Ok((down.values, up.values))
}

/// `A` the first rows of `R`, `B` the first columns of `Q`, of `W = Q·R`.
fn olora(base: &Array, rank: usize) -> Result<(Vec<f32>, Vec<f32>)> {
    let (q, r) = qr(base)?;
    let up = q.values.chunks_exact(q.shape[1]).flat_map(|row| row[..rank].to_vec()).collect();
    Ok((r.values[..rank * r.shape[1]].to_vec(), up))
}

/// ±1/√fan-in.
fn bound(fan_in: usize) -> f64 {
    1.0 / (fan_in as f64).sqrt()
}

/// The axes of a base weight by name.
struct Size {
    out: usize,
    input: usize,
    kernel: Vec<usize>,
}

impl Size {
    fn of<B: Backend>(on: &B, base: &B::Tensor) -> Result<Self> {
        let shape = on.shape(base);
        match shape[..] {
            [out, input, ref kernel @ ..] if !shape.contains(&0) => Ok(Self { out, input, kernel: kernel.to_vec() }),
            _ => Err(Error::Shapes { operation: "a fresh adapter", shapes: vec![shape] }),
        }
    }

    /// The shape of `A`.
    fn down(&self, rank: usize) -> Vec<usize> {
        [&[rank, self.input], &self.kernel[..]].concat()
    }

    /// The shape of `B`.
    fn up(&self, rank: usize) -> Vec<usize> {
        [&[self.out, rank], &vec![1; self.kernel.len()][..]].concat()
    }

    /// `in·kh·kw`.
    fn columns(&self) -> usize {
        self.input * self.kernel.iter().product::<usize>()
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroUsize;

    use super::*;
    use crate::{Adapter, Cpu, Method, Purpose};

    fn config(method: Method, rank: usize, factor: Option<usize>) -> AdapterConfig {
        let config = AdapterConfig::new(method, NonZeroUsize::new(rank).unwrap(), 2.0).unwrap();
        AdapterConfig { factor: factor.and_then(NonZeroUsize::new), ..config }
    }

    fn draw() -> Draw {
        Draw::new(1, Purpose::Init, 0, 0)
    }

    /// Root of the mean square, and the largest magnitude.
    fn spread(array: &Array) -> (f64, f64) {
        let values = || array.values.iter().map(|value| f64::from(*value));
        let squares: f64 = values().map(|value| value * value).sum();
        ((squares / array.values.len() as f64).sqrt(), values().fold(0.0, |most, value| most.max(value.abs())))
    }

    #[test]
    fn a_is_uniform_within_the_inverse_root_of_its_fan_in() {
        let base = Array::full([64, 40, 3, 3], 1.0);
        let lora = Lora::init(&Cpu, &base, &config(Method::Lora, 16, None), &mut draw()).unwrap();
        let bound = 1.0 / 360f64.sqrt();
        let (deviation, most) = spread(&lora.down);
        assert!(most <= bound && most > 0.999 * bound, "{most} of {bound}");
        assert!((deviation / (bound / 3f64.sqrt()) - 1.0).abs() < 0.03, "{deviation}");
        assert_eq!((lora.down.shape, lora.up.shape), (vec![16, 40, 3, 3], vec![64, 16, 1, 1]));
    }

    #[test]
    fn gaussian_has_the_deviation_of_peft() {
        let gaussian = AdapterConfig { init: Init::Gaussian, ..config(Method::Lora, 8, None) };
        let lora = Lora::init(&Cpu, &Array::full([64, 640], 1.0), &gaussian, &mut draw()).unwrap();
        assert!((spread(&lora.down).0 * 8.0 - 1.0).abs() < 0.05);
    }

    #[test]
    fn loha_has_the_deviations_of_lycoris() {
        let loha =
            Loha::init(&Cpu, &Array::full([320, 320], 1.0), &config(Method::Loha, 16, None), &mut draw()).unwrap();
        let deviations = [&loha.w1_a, &loha.w1_b, &loha.w2_b].map(|factor| spread(factor).0);
        for (deviation, expected) in deviations.into_iter().zip([0.1, 1.0, 1.0]) {
            assert!((deviation / expected - 1.0).abs() < 0.05, "{deviation}, not {expected}");
        }
    }

    /// A weight, rank and wanted factor; the shapes and scale that LyCORIS 4.1.3 makes of them with alpha 2.
    #[test]
    fn lokr_has_the_shapes_and_scale_of_lycoris() {
        type Row<'a> = (&'a [usize], usize, Option<usize>, [usize; 2], &'a [&'a [usize]], f64);
        let rows: [Row<'_>; 7] = [
            (&[320, 320], 4, None, [16, 16], &[&[20, 4], &[4, 20]], 0.5),
            (&[320, 320], 16, None, [16, 16], &[&[20, 20]], 1.0),
            (&[1280, 320], 16, None, [32, 16], &[&[40, 16], &[16, 20]], 0.125),
            (&[320, 1280], 8, Some(4), [4, 4], &[&[80, 8], &[8, 320]], 0.25),
            (&[96, 12], 4, Some(8), [8, 3], &[&[12, 4], &[4, 4]], 0.5),
            (&[320, 640, 3, 3], 4, None, [16, 20], &[&[20, 4], &[4, 288]], 0.5),
            (&[320, 4, 3, 3], 16, None, [16, 2], &[&[20, 2, 3, 3]], 1.0),
        ];
        for (base, rank, factor, w1, w2, scale) in rows {
            let config = config(Method::Lokr, rank, factor);
            let lokr = Lokr::init(&Cpu, &Array::full(base, 1.0), &config, &mut draw()).unwrap();
            let KronFactor::Whole(first) = &lokr.w1 else { panic!("the first factor is whole") };
            let second: Vec<&[usize]> = match &lokr.w2 {
                KronFactor::Whole(whole) => vec![&whole.shape],
                KronFactor::Product { a, b } => vec![&a.shape, &b.shape],
                KronFactor::Tucker { .. } => panic!("no core is trained"),
            };
            assert_eq!(
                (first.shape.as_slice(), second.as_slice(), lokr.scale),
                (&w1[..], w2, scale),
                "{base:?} {rank}"
            );
        }
    }

    #[test]
    fn a_start_needs_as_many_directions_as_its_rank() {
        for init in [Init::Pissa, Init::Olora] {
            let config = AdapterConfig { init, ..config(Method::Lora, 9, None) };
            let error = Lora::init(&Cpu, &Array::full([8, 12], 1.0), &config, &mut draw()).unwrap_err();
            assert!(matches!(error, Error::Config { option: "rank", .. }), "{error}");
        }
    }

    /// A search for the leading triplets finds what the whole decomposition has, where the weight has a spectrum at all.
    #[test]
    fn a_searched_start_is_the_exact_one() {
        let base = Array::new([120, 100], draw().normal(120 * 100, 0.01)).unwrap();
        let strong =
            [[120, 2], [2, 100]].map(|shape| Array::new(shape, draw().normal(shape[0] * shape[1], 1.0)).unwrap());
        let base = Cpu.add(&base, &Cpu.matmul(&strong[0], &strong[1]).unwrap()).unwrap();
        let product = |start: Option<Start<Array>>| {
            let start = start.unwrap();
            Cpu.matmul(&start.up, &start.down).unwrap()
        };
        let exact = product(start(&Cpu, &base, Init::Pissa, 2, 0.5, None).unwrap());
        let searched = product(start(&Cpu, &base, Init::Pissa, 2, 0.5, Some(&mut draw())).unwrap());
        assert!(spread(&Cpu.sub(&exact, &searched).unwrap()).1 < 1e-3 * spread(&exact).1);
    }

    /// What LyCORIS 4.1.3 gives (its own doc is wrong about 360 without a wanted size).
    #[test]
    fn dimensions_split_as_in_lycoris() {
        let table = [
            (127, [(1, 127), (1, 127), (1, 127), (1, 127), (1, 127)]),
            (128, [(8, 16), (2, 64), (4, 32), (8, 16), (8, 16)]),
            (250, [(10, 25), (2, 125), (2, 125), (5, 50), (10, 25)]),
            (360, [(18, 20), (2, 180), (4, 90), (8, 45), (15, 24)]),
            (512, [(16, 32), (2, 256), (4, 128), (8, 64), (16, 32)]),
            (1024, [(32, 32), (2, 512), (4, 256), (8, 128), (16, 64)]),
        ];
        for (dimension, expected) in table {
            let wanted = [None, Some(2), Some(4), Some(8), Some(16)];
            assert_eq!(wanted.map(|wanted| split(dimension, wanted)), expected, "{dimension}");
        }
    }
}
