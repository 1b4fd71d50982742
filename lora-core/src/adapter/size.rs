//! How large an update is, without forming it where that can be helped.
//!
//! Products are measured by their Gram matrices ([`product_norm`]). A Kronecker product is as large as its factors together. Of
//! a product element by element, `P ⊙ Q = (a·b) ⊙ (c·d)` as of LoHa, the norm is that of a plain product of longer factors, whose
//! columns are those of `a` times those of `c`; where it is shorter to form the matrix, that is done some rows at a time. What
//! only turns or stretches the weight has no norm of its own: a random weight is turned, which has no direction that it prefers.

use std::borrow::Cow;

use faer::{Accum, Mat, MatMut, MatRef, Par, linalg::matmul::matmul};

use super::{Adapter, AnyAdapter, Axis, KronFactor, Loha, Lora, OftSide, Part, oft, shape};
use crate::{Array, Backend, Cpu, Draw, Error, Purpose, Result, backend::decompose::product_norm};

/// How large an update is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum UpdateSize {
    /// `‖ΔW‖`, the Frobenius norm.
    Norm(f64),
    /// `‖ΔW‖ / ‖W‖` for a random `W`: of what multiplies the weight (OFT, BOFT, (IA)³).
    Share(f64),
}

/// Rows or columns of the random weights.
const PROBES: usize = 16;

impl AnyAdapter<Array> {
    /// How large the update of the weight is at strength 1; `None` where it depends on the numbers of the base weight (DoRA,
    /// GLoRA) or is of a bias alone.
    ///
    /// # Errors
    /// If the factors do not fit each other.
    pub fn update_size(&self) -> Result<Option<UpdateSize>> {
        let norm = match self {
            Self::Lora(lora) => self.norm_in_range(lora.scale)?,
            Self::Loha(loha) => self.norm_in_range(loha.scale)?,
            Self::Lokr(lokr) => self.norm_in_range(lokr.scale)?,
            Self::Full(full) => match &full.diff {
                Some(diff) => diff.norm(),
                None => return Ok(None),
            },
            Self::Dora(_) | Self::Glora(_) => return Ok(None),
            Self::Ia3(_) | Self::Oft(_) | Self::Boft(_) => {
                return self.share().map(|share| Some(UpdateSize::Share(share)));
            }
        };
        Ok(Some(UpdateSize::Norm(norm)))
    }

    /// `scale · ‖product of the factors‖`, whatever the size of the numbers: where the sums, which are in `f32`, may have left
    /// its range, the product is that of the factors divided by their largest numbers.
    fn norm_in_range(&self, scale: f64) -> Result<f64> {
        let norm = self.product_norm()?;
        if (1e-12..1e15).contains(&norm) {
            return Ok(scale.abs() * norm);
        }
        // A start is no factor of one product: as longer factors it is.
        let whole = match self {
            Self::Lora(lora) if lora.start.is_some() => Self::Lora(lora.widened(&Cpu)?),
            _ => self.clone(),
        };
        let mut size = 1.0;
        let divided = whole.map(&mut |part, factor| {
            let largest = factor.values.iter().fold(0.0_f32, |most, value| most.max(value.abs()));
            if largest == 0.0 || part == Part::UpBias {
                return Ok(factor.clone());
            }
            size *= f64::from(largest);
            Array::new(factor.shape.clone(), factor.values.iter().map(|value| value / largest).collect())
        })?;
        Ok(scale.abs() * size * divided.product_norm()?)
    }

    /// The norm of the product of the factors, of families that are one; 0 of the others.
    fn product_norm(&self) -> Result<f64> {
        match self {
            Self::Lora(lora) => lora_norm(lora),
            Self::Loha(loha) => loha_norm(loha),
            Self::Lokr(lokr) => Ok(factor_norm(&lokr.w1)? * factor_norm(&lokr.w2)?),
            _ => Ok(0.0),
        }
    }

    /// What it does to a random weight, as a share of its norm.
    fn share(&self) -> Result<f64> {
        let rows = |length: usize| [length, PROBES];
        let columns = |length: usize| [PROBES, length];
        let shape = match self {
            Self::Ia3(ia3) if ia3.axis == Axis::Input => columns(ia3.vector.values.len()),
            Self::Ia3(ia3) => rows(ia3.vector.values.len()),
            Self::Oft(adapter) => match (adapter.side, &adapter.blocks.shape[..]) {
                (OftSide::Rows { .. }, [count, size, _]) => rows(count * size),
                (OftSide::Columns(_), [count, packed]) => columns(count * oft::block_size(*packed).unwrap_or(0)),
                (_, shape) => return Err(Error::Shapes { operation: "OFT blocks", shapes: vec![shape.to_vec()] }),
            },
            // Of blocks without numbers the other axes may be of any length.
            Self::Boft(adapter) if adapter.blocks.values.is_empty() => return Ok(0.0),
            Self::Boft(adapter) => rows(adapter.blocks.shape.iter().skip(1).take(2).product()),
            _ => return Ok(0.0),
        };
        let values = Draw::new(0, Purpose::Sketch, 0, 0).normal(shape.iter().product(), 1.0);
        let weight = Array::new(shape, values)?;
        let size = weight.norm();
        Ok(if size > 0.0 { self.delta(&Cpu, &weight)?.norm() / size } else { 0.0 })
    }
}

impl Loha<Array> {
    /// How many multiplications [`update_size`](AnyAdapter::update_size) takes for halves `[out, rank]`, `[rank, inner]`.
    pub(crate) fn size_work([out, inner]: [usize; 2], [first, second]: [usize; 2]) -> usize {
        by_pairs([out, inner], [first, second]).min(by_rows([out, inner], [first, second]))
    }
}

fn by_pairs([out, inner]: [usize; 2], ranks: [usize; 2]) -> usize {
    // The products of wider factors' columns take many times the memory of the factors.
    const WIDEST: usize = 24;
    if ranks.iter().any(|rank| *rank > WIDEST) {
        return usize::MAX;
    }
    let [first, second] = ranks.map(pairs);
    out.saturating_add(inner).saturating_mul(first).saturating_mul(second)
}

fn by_rows([out, inner]: [usize; 2], [first, second]: [usize; 2]) -> usize {
    out.saturating_mul(inner).saturating_mul(first.saturating_add(second).saturating_add(3))
}

/// How many products two columns out of `rank` have.
fn pairs(rank: usize) -> usize {
    rank.saturating_mul(rank.saturating_add(1)) / 2
}

fn lora_norm(lora: &Lora<Array>) -> Result<f64> {
    let lora = if lora.start.is_some() { &lora.widened(&Cpu)? } else { lora };
    let (up, down) = (folded(&lora.up)?, folded(&lora.down)?);
    let down = match &lora.mid {
        Some(core) => Cow::Owned(with_core(core, &down)?),
        None => down,
    };
    product_norm(&up, &down)
}

/// `[first, rest]`; matrices, which nearly all factors are, as they lie.
fn folded(factor: &Array) -> Result<Cow<'_, Array>> {
    match factor.shape.len() {
        2 => Ok(Cow::Borrowed(factor)),
        _ => shape::flat(&Cpu, factor).map(Cow::Owned),
    }
}

fn factor_norm(factor: &KronFactor<Array>) -> Result<f64> {
    match factor {
        KronFactor::Whole(whole) => Ok(whole.norm()),
        KronFactor::Product { a, b } => product_norm(a, b),
        KronFactor::Tucker { core, a, b } => product_norm(&Cpu.transpose(a)?, &with_core(core, b)?),
    }
}

/// A core `[p, q, ..]` and the factor `[q, i]` behind it as one factor `[p, i·..]`.
fn with_core(core: &Array, input: &Array) -> Result<Array> {
    let rank = core.shape.first().copied().unwrap_or(0);
    shape::tucker(&Cpu, core, &Array::identity(rank), input)
}

fn loha_norm(loha: &Loha<Array>) -> Result<f64> {
    let half = |a: &Array, b: &Array, core: &Option<Array>| match core {
        Some(core) => Ok((Cpu.transpose(a)?, with_core(core, b)?)),
        None => Ok((a.clone(), b.clone())),
    };
    let (a, b) = half(&loha.w1_a, &loha.w1_b, &loha.t1)?; // [out, r], [r, inner]
    let (c, d) = half(&loha.w2_a, &loha.w2_b, &loha.t2)?;
    let shapes = || vec![a.shape.clone(), b.shape.clone(), c.shape.clone(), d.shape.clone()];
    let (&[out, first], &[second, inner]) = (&a.shape[..], &d.shape[..]) else {
        return Err(Error::Shapes { operation: "LoHa", shapes: shapes() });
    };
    if b.shape != [first, inner] || c.shape != [out, second] {
        return Err(Error::Shapes { operation: "LoHa", shapes: shapes() });
    }
    let sizes = ([out, inner], [first, second]);
    let squared = match by_pairs(sizes.0, sizes.1) <= by_rows(sizes.0, sizes.1) {
        true => norm_by_pairs([&a, &b], [&c, &d]),
        false => norm_by_rows([&a, &b], [&c, &d])?,
    };
    Ok(squared.max(0.0).sqrt())
}

/// `‖(a·b) ⊙ (c·d)‖²` as the sum over all pairs of columns of `a` and of `c`, and of rows of `b` and `d`.
fn norm_by_pairs([a, b]: [&Array; 2], [c, d]: [&Array; 2]) -> f64 {
    let view = |array: &Array| {
        Mat::from_fn(array.shape[0], array.shape[1], |row, column| array.values[row * array.shape[1] + column])
    };
    let [left, right] = [(view(a), view(c)), (view(b).transpose().to_owned(), view(d).transpose().to_owned())].map(
        |(first, second)| {
            let (first, second) = (products_of_columns(first.as_ref()), products_of_columns(second.as_ref()));
            let mut grams = Mat::<f32>::zeros(first.ncols(), second.ncols());
            matmul(grams.as_mut(), Accum::Replace, first.transpose(), second.as_ref(), 1.0, Par::Seq);
            grams
        },
    );
    // A pair of two different columns is there twice.
    let times =
        |rank: usize| (0..rank).flat_map(|one| (0..=one).map(move |other| if one == other { 1.0 } else { 2.0 }));
    let (first, second): (Vec<f64>, Vec<f64>) = (times(a.shape[1]).collect(), times(c.shape[1]).collect());
    let mut sum = 0.0;
    for (column, second) in second.iter().enumerate() {
        for (row, first) in first.iter().enumerate() {
            sum += first * second * f64::from(left[(row, column)]) * f64::from(right[(row, column)]);
        }
    }
    sum
}

/// The products of every two columns, element by element: `[n, r]` → `[n, r·(r + 1)/2]`.
fn products_of_columns(matrix: MatRef<'_, f32>) -> Mat<f32> {
    let chosen: Vec<(usize, usize)> =
        (0..matrix.ncols()).flat_map(|one| (0..=one).map(move |other| (one, other))).collect();
    Mat::from_fn(matrix.nrows(), chosen.len(), |row, column| {
        let (one, other) = chosen[column];
        matrix[(row, one)] * matrix[(row, other)]
    })
}

/// `‖(a·b) ⊙ (c·d)‖²`, the matrix formed some rows at a time.
fn norm_by_rows([a, b]: [&Array; 2], [c, d]: [&Array; 2]) -> Result<f64> {
    const ROWS: usize = 32;
    let (out, inner) = (a.shape[0], b.shape[1]);
    let (mut first, mut second) = (vec![0.0_f32; ROWS * inner], vec![0.0_f32; ROWS * inner]);
    let mut sum = 0.0;
    for start in (0..out).step_by(ROWS) {
        let count = ROWS.min(out - start);
        for (output, left, right) in [(&mut first, a, b), (&mut second, c, d)] {
            let rank = left.shape[1];
            let rows = MatRef::from_row_major_slice(&left.values[start * rank..(start + count) * rank], count, rank);
            let right = MatRef::from_row_major_slice(&right.values, rank, inner);
            let output = MatMut::from_row_major_slice_mut(&mut output[..count * inner], count, inner);
            matmul(output, Accum::Replace, rows, right, 1.0, Par::Seq);
        }
        first.iter_mut().zip(&second).take(count * inner).for_each(|(first, second)| *first *= second);
        sum += Array::new([count, inner], first[..count * inner].to_vec())?.norm().powi(2);
    }
    Ok(sum)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::{Boft, Cayley, Full, Ia3, Ia3Kind, Lokr, Oft, Start};

    /// The sums are in `f32`, of terms that cancel little.
    const TOLERANCE: f64 = 1e-5;
    /// Sixteen random rows of a few dozen numbers stand for all.
    const CHANCE: f64 = 0.1;

    fn numbers(sample: u32, shape: &[usize]) -> Array {
        let values = Draw::new(6, Purpose::Noise, 0, sample).normal(shape.iter().product(), 0.3);
        Array::new(shape, values).unwrap()
    }

    #[track_caller]
    fn check(adapter: AnyAdapter<Array>, weight: &[usize]) {
        let formed = adapter.delta(&Cpu, &Array::full(weight, 0.0)).unwrap().norm();
        let Some(UpdateSize::Norm(norm)) = adapter.update_size().unwrap() else { panic!("no norm") };
        assert!((norm / formed - 1.0).abs() < TOLERANCE, "{norm} instead of {formed}");
    }

    #[test]
    fn the_norm_of_every_product_is_that_of_the_formed_update() {
        let lora = Lora::new(numbers(1, &[4, 6, 3, 3]), numbers(2, &[5, 4, 1, 1]), -0.5);
        check(AnyAdapter::Lora(lora.clone()), &[5, 6, 3, 3]);
        let start = Start { down: numbers(3, &[4, 6, 3, 3]), up: numbers(4, &[5, 4, 1, 1]) };
        check(AnyAdapter::Lora(Lora { start: Some(start), ..lora }), &[5, 6, 3, 3]);
        let core = Lora {
            mid: Some(numbers(5, &[4, 3, 3, 3])),
            ..Lora::new(numbers(6, &[3, 6, 1, 1]), numbers(7, &[5, 4, 1, 1]), 2.0)
        };
        check(AnyAdapter::Lora(core), &[5, 6, 3, 3]);
        let whole = |shape: &[usize]| KronFactor::Whole(numbers(8, shape));
        let product = KronFactor::Product { a: numbers(9, &[7, 2]), b: numbers(10, &[2, 36]) };
        let tucker =
            KronFactor::Tucker { core: numbers(11, &[2, 2, 3, 3]), a: numbers(12, &[2, 7]), b: numbers(13, &[2, 4]) };
        for w2 in [whole(&[7, 4, 3, 3]), product, tucker] {
            check(AnyAdapter::Lokr(Lokr { w1: whole(&[3, 2]), w2, scale: -0.7 }), &[21, 8, 3, 3]);
        }
        let full = Full { diff: Some(numbers(14, &[5, 6])), diff_bias: None };
        check(AnyAdapter::Full(full), &[5, 6]);
    }

    #[test]
    fn a_norm_has_its_digits_whatever_the_size_of_the_factors() {
        let plain = [numbers(1, &[2, 6]), numbers(2, &[5, 2])];
        let norm = |adapter: AnyAdapter<Array>| match adapter.update_size() {
            Ok(Some(UpdateSize::Norm(norm))) => norm,
            other => panic!("{other:?}"),
        };
        let lora = |size: f32| {
            let [down, up] = plain.clone().map(|factor| Cpu.scale(&factor, f64::from(size)).unwrap());
            norm(AnyAdapter::Lora(Lora::new(down, up, 0.5)))
        };
        for size in [1e30_f32, 1e-18, 1e-30] {
            let expected = lora(1.0) * f64::from(size).powi(2);
            assert!((lora(size) / expected - 1.0).abs() < TOLERANCE, "{} instead of {expected}", lora(size));
        }
        let loha = |size: f64| {
            let half = |at: u32, shape: &[usize]| Cpu.scale(&numbers(at, shape), size).unwrap();
            let (w1_a, w1_b, w2_a, w2_b) = (half(1, &[5, 2]), half(2, &[2, 6]), half(3, &[5, 2]), half(4, &[2, 6]));
            norm(AnyAdapter::Loha(Loha { w1_a, w1_b, w2_a, w2_b, t1: None, t2: None, scale: 1.0 }))
        };
        assert!((loha(1e20) / (loha(1.0) * 1e80) - 1.0).abs() < TOLERANCE);
        assert_eq!(norm(AnyAdapter::Lora(Lora::new(plain[0].clone(), Array::full([5, 2], 0.0), 1.0))), 0.0);
    }

    #[test]
    fn the_norm_of_a_loha_is_found_both_ways() {
        for [out, inner, first, second] in [[5, 6, 1, 1], [40, 50, 2, 3], [70, 9, 6, 8], [1, 1, 3, 2]] {
            let (a, b) = (numbers(1, &[out, first]), numbers(2, &[first, inner]));
            let (c, d) = (numbers(3, &[out, second]), numbers(4, &[second, inner]));
            let pairs = norm_by_pairs([&a, &b], [&c, &d]);
            let rows = norm_by_rows([&a, &b], [&c, &d]).unwrap();
            assert!((pairs / rows - 1.0).abs() < TOLERANCE, "{pairs} and {rows}");
            let loha = Loha { w1_a: a, w1_b: b, w2_a: c, w2_b: d, t1: None, t2: None, scale: 0.5 };
            check(AnyAdapter::Loha(loha), &[out, inner]);
        }
        let cores = Loha {
            w1_a: numbers(1, &[2, 5]),
            w1_b: numbers(2, &[2, 6]),
            w2_a: numbers(3, &[2, 5]),
            w2_b: numbers(4, &[2, 6]),
            t1: Some(numbers(5, &[2, 2, 3, 3])),
            t2: Some(numbers(6, &[2, 2, 3, 3])),
            scale: 3.0,
        };
        check(AnyAdapter::Loha(cores), &[5, 6, 3, 3]);
    }

    #[test]
    fn what_turns_a_weight_is_measured_by_how_far() {
        let share = |adapter: AnyAdapter<Array>, weight: &[usize]| {
            let weight = numbers(9, weight);
            let formed = adapter.delta(&Cpu, &weight).unwrap().norm() / weight.norm();
            let Some(UpdateSize::Share(share)) = adapter.update_size().unwrap() else { panic!("no share") };
            assert!((share / formed - 1.0).abs() < CHANCE, "{share} instead of {formed}");
        };
        let rows = Oft { blocks: numbers(1, &[8, 4, 4]), rescale: None, side: OftSide::Rows { bound: None } };
        share(AnyAdapter::Oft(rows), &[32, 40]);
        let columns = Oft { blocks: numbers(2, &[8, 6]), rescale: None, side: OftSide::Columns(Cayley::Exact) };
        share(AnyAdapter::Oft(columns), &[40, 32]);
        share(AnyAdapter::Boft(Boft { blocks: numbers(3, &[2, 8, 4, 4]), rescale: None, bound: None }), &[32, 40]);
        for axis in [Axis::Input, Axis::Output] {
            share(AnyAdapter::Ia3(Ia3 { vector: numbers(4, &[32]), axis, kind: Ia3Kind::Offset }), &[32, 32]);
        }
    }
}
