//! Another rank for adapters that are there already: the leading singular triplets of their update.
//!
//! A low-rank update is cut without forming it ([`ProductSvd`]): exact, and the best that any adapter of that rank can be
//! (Eckart and Young 1936). Other families go through their ΔW and come out as plain LoRA; of DoRA the direction is cut and
//! the magnitudes stay. The new scale is 1: what it was is folded into the factors.

use std::num::NonZeroUsize;

use crate::{
    Adapter, AnyAdapter, Array, Backend, Cpu, Draw, Error, Purpose, Result,
    adapter::{Direction, Dora, Lora},
    backend::decompose::{ProductSvd, is_worth_searching, leading_of_finite, not_finite, power_to_one, svd},
    format::{AdaptedModule, Component},
};

/// How much of an update is kept.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Cut {
    /// The most triplets that are kept.
    pub rank: Option<NonZeroUsize>,
    /// Share of `‖ΔW‖²` that is enough, 0 to 1: the smallest rank that reaches it is taken.
    pub energy: Option<f64>,
}

impl Cut {
    /// A fixed rank.
    pub fn rank(rank: NonZeroUsize) -> Self {
        Self { rank: Some(rank), energy: None }
    }

    /// The smallest rank that keeps a share of the energy.
    ///
    /// # Errors
    /// If `energy` is no share above 0.
    pub fn energy(energy: f64) -> Result<Self> {
        match energy > 0.0 && energy <= 1.0 {
            true => Ok(Self { rank: None, energy: Some(energy) }),
            false => Err(Error::Config { option: "energy", reason: format!("{energy} is no share between 0 and 1") }),
        }
    }

    /// The smallest rank that keeps enough of `total = ‖ΔW‖²` with these singular values, at least 1; `None` if they do
    /// not reach it and a higher rank is allowed.
    fn count(&self, values: &[f64], total: f64) -> Option<usize> {
        let most = self.rank.map_or(usize::MAX, NonZeroUsize::get);
        let enough = self.energy.map(|energy| {
            if energy >= 1.0 {
                // All of it is every value that is no rounding; whether more follow is known once there is one that is.
                let largest = values.first().copied().unwrap_or(0.0);
                return values.iter().position(|value| *value <= 1e-8 * largest).map(|count| count.max(1));
            }
            let wanted = energy * total * (1.0 - 1e-9);
            let mut sum = 0.0;
            let reached = values.iter().position(|value| {
                sum += value * value;
                sum >= wanted
            });
            reached.map(|at| at + 1)
        });
        match enough {
            None => Some(most.min(values.len()).max(1)),
            Some(Some(count)) => Some(count.min(most)),
            Some(None) if values.len() >= most => Some(most),
            Some(None) => None,
        }
    }
}

/// What became of one module.
#[derive(Debug, Clone)]
pub struct Resized {
    /// The module with its new adapter; the old one where there was nothing to cut.
    pub module: AdaptedModule,
    /// What was done.
    pub outcome: Outcome,
}

/// What was done with one module.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Outcome {
    /// Cut to a rank.
    Cut {
        /// The rank before, where the family has one.
        from: Option<usize>,
        /// The rank now.
        to: usize,
        /// Share of `‖ΔW‖²` that is left; of DoRA, of its direction's.
        energy: f64,
    },
    /// As it was: it is no wider than was asked for.
    Narrow {
        /// Its rank.
        rank: usize,
    },
    /// As it was: a difference of a norm or a bias has no rank.
    NoRank,
}

/// Cuts one adapter.
///
/// `base` gives the weights of the base for the families whose update is a function of them; where it gives none, zeros of
/// the weight's shape are taken, which is right for all others.
///
/// # Errors
/// What `base` returns, and a decomposition that fails.
pub fn resize(
    module: AdaptedModule,
    base: &dyn Fn(Component, &str) -> Result<Option<Array>>,
    cut: Cut,
) -> Result<Resized> {
    let weight = &module.weight;
    let dense = |adapter: &AnyAdapter<Array>| {
        let base = base(module.component, &format!("{}.weight", module.path))?;
        let difference = adapter.delta(&Cpu, &base.unwrap_or_else(|| Array::full(weight.clone(), 0.0)))?;
        cut_difference(difference, cut, Search::Randomised)
    };
    let ((mut lora, to, energy), from) = match &module.adapter {
        AnyAdapter::Full(full) if full.diff.is_none() || weight.len() < 2 => {
            return Ok(Resized { module, outcome: Outcome::NoRank });
        }
        AnyAdapter::Lora(lora) | AnyAdapter::Dora(Dora { direction: Direction::Lora(lora), .. }) => {
            let (up, down) = factors(lora, weight)?;
            let rank = up.shape[1];
            if cut.energy.is_none() && cut.rank.is_some_and(|most| rank <= most.get()) && lora.mid.is_none() {
                return Ok(Resized { module, outcome: Outcome::Narrow { rank } });
            }
            let cut = cut_product(&up, &down, weight, cut)?;
            let up_bias = lora.up_bias.as_ref().map(|bias| Cpu.scale(bias, lora.scale)).transpose()?;
            ((Lora { up_bias, ..cut.0 }, cut.1, cut.2), Some(rank))
        }
        AnyAdapter::Dora(Dora { direction: Direction::Loha(loha), .. }) => {
            (dense(&AnyAdapter::Loha(loha.clone()))?, None)
        }
        AnyAdapter::Dora(Dora { direction: Direction::Lokr(lokr), .. }) => {
            (dense(&AnyAdapter::Lokr(lokr.clone()))?, None)
        }
        other => (dense(other)?, None),
    };
    let adapter = match &module.adapter {
        AnyAdapter::Dora(dora) => AnyAdapter::Dora(Dora { direction: Direction::Lora(lora), ..dora.clone() }),
        // A full difference may have one of the bias beside it, which a file holds as what the factors add to it.
        AnyAdapter::Full(full) => {
            lora.up_bias = full.diff_bias.clone();
            AnyAdapter::Lora(lora)
        }
        _ => AnyAdapter::Lora(lora),
    };
    Ok(Resized { module: AdaptedModule { adapter, ..module }, outcome: Outcome::Cut { from, to, energy } })
}

/// Cuts the product of two factors `up` `[out, rank]` · `down` `[rank, in·kh·kw]`, scale and all: a plain LoRA of scale 1,
/// its `down` shaped for a weight of the shape `weight`, its rank and the share of the energy that it keeps.
///
/// # Errors
/// If the factors do not fit or are not finite.
pub fn cut_product(up: &Array, down: &Array, weight: &[usize], cut: Cut) -> Result<(Lora<Array>, usize, f64)> {
    let product = ProductSvd::of(up, down)?;
    let values = product.values();
    let total: f64 = squares(values);
    let count = cut.count(values, total).unwrap_or(values.len());
    let (up, down) = product.balanced(count);
    let energy = share(squares(&values[..count.min(values.len())]), total);
    Ok((shaped(up, down, weight)?, count.min(values.len()), energy))
}

/// How the triplets of a matrix that is no product are found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Search {
    /// By a randomised search ([`leading`](crate::backend::decompose::leading)), for more and more triplets until enough of the energy is found; small matrices, and
    /// those of which much is wanted, are decomposed whole. The same every time.
    Randomised,
    /// By decomposing the whole.
    Whole,
}

/// Cuts a whole difference, in the layout of the weight: a plain LoRA of scale 1, its rank and the share of `‖ΔW‖²` that it
/// keeps.
///
/// # Errors
/// If the decomposition fails.
pub fn cut_difference(difference: Array, cut: Cut, search: Search) -> Result<(Lora<Array>, usize, f64)> {
    let Array { shape: weight, values } = difference;
    let rows = weight.first().copied().unwrap_or(1).max(1);
    let mut matrix = Array::new([rows, values.len() / rows], values)?;
    let norm = matrix.norm();
    if !norm.is_finite() {
        return Err(not_finite());
    }
    let power = power_to_one(norm);
    if let Some(power) = power {
        matrix.values.iter_mut().for_each(|value| *value *= power);
    }
    let power = power.map_or(1.0, f64::from);
    let total = (norm * power).powi(2);
    let mut wanted = cut.rank.map_or(32, NonZeroUsize::get);
    let mut draw = Draw::new(0, Purpose::Sketch, 0, 0);
    loop {
        let whole = search == Search::Whole || !is_worth_searching(&matrix, wanted);
        let found = if whole { svd(&matrix)? } else { leading_of_finite(&matrix, wanted, &mut draw)? };
        let values: Vec<f64> = found.values.values.iter().map(|value| f64::from(*value)).collect();
        let count = match cut.count(&values, total) {
            Some(count) => count.min(values.len()),
            None if whole => values.len(),
            None => {
                wanted *= 2;
                continue;
            }
        };
        let (up, down) = found.balanced(count, power);
        return Ok((shaped(up, down, &weight)?, count, share(squares(&values[..count]), total)));
    }
}

/// Two factors `[out, rank]`, `[rank, in·kh·kw]` of an update without a start: scale in the first, a core in the second.
///
/// # Errors
/// If the factors do not fit.
pub fn factors(lora: &Lora<Array>, weight: &[usize]) -> Result<(Array, Array)> {
    let joined = lora.start.is_some().then(|| lora.widened(&Cpu)).transpose()?;
    let lora = joined.as_ref().unwrap_or(lora);
    // Arrays are large and many: their shape changes, they do not.
    let flat = |array: Array| {
        let first = array.shape.first().copied().unwrap_or(1).max(1);
        Array::new([first, array.values.len() / first], array.values)
    };
    let up = flat(Cpu.scale(&lora.up, lora.scale)?)?;
    let down = match &lora.mid {
        None => flat(lora.down.clone())?,
        Some(mid) => {
            // The core and the factor behind it are the update of a layer whose outputs are the core's.
            let rank = up.shape[1];
            let shape: Vec<usize> = std::iter::once(rank).chain(weight.iter().skip(1).copied()).collect();
            let inner = Lora { mid: Some(mid.clone()), ..Lora::new(lora.down.clone(), Array::identity(rank), 1.0) };
            flat(inner.delta(&Cpu, &Array::full(shape, 0.0))?)?
        }
    };
    Ok((up, down))
}

/// A pair in the layout of a weight: `down` `[rank, in, kh, kw]`, `up` `[out, rank, 1, 1]`.
fn shaped(up: Array, down: Array, weight: &[usize]) -> Result<Lora<Array>> {
    let rank = down.shape[0];
    let down_shape: Vec<usize> = std::iter::once(rank).chain(weight.iter().skip(1).copied()).collect();
    let up_shape: Vec<usize> = [up.shape[0], rank].into_iter().chain(weight.iter().skip(2).map(|_| 1)).collect();
    Ok(Lora::new(Array::new(down_shape, down.values)?, Array::new(up_shape, up.values)?, 1.0))
}

fn squares(values: &[f64]) -> f64 {
    values.iter().map(|value| value * value).sum()
}

/// A share of a total; all of it where there is nothing.
fn share(part: f64, total: f64) -> f64 {
    if total > 0.0 { (part / total).min(1.0) } else { 1.0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        adapter::{Axis, Loha, StrengthRule},
        format::Dtype,
    };
    use proptest::prelude::*;

    fn numbers(sample: u32, shape: &[usize]) -> Array {
        let values = Draw::new(5, Purpose::Noise, 0, sample).normal(shape.iter().product(), 1.0);
        Array::new(shape, values).unwrap()
    }

    fn module(weight: &[usize], adapter: AnyAdapter<Array>) -> AdaptedModule {
        AdaptedModule {
            component: Component::Unet,
            path: "m".to_owned(),
            adapter,
            weight: weight.to_vec(),
            dtype: Dtype::F32,
            turned: false,
        }
    }

    fn no_base(_: Component, _: &str) -> Result<Option<Array>> {
        Ok(None)
    }

    fn resized(module: &AdaptedModule, cut: Cut) -> Resized {
        resize(module.clone(), &no_base, cut).unwrap()
    }

    fn delta(module: &AdaptedModule) -> Array {
        module.adapter.delta(&Cpu, &Array::full(module.weight.clone(), 0.0)).unwrap()
    }

    /// `‖a − b‖ / ‖b‖`.
    fn distance(a: &Array, b: &Array) -> f64 {
        assert_eq!(a.shape, b.shape);
        let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|value| value * value).sum::<f64>().sqrt();
        let off = norm(&mut a.values.iter().zip(&b.values).map(|(a, b)| f64::from(a - b)));
        off / norm(&mut b.values.iter().map(|b| f64::from(*b)))
    }

    fn rank(rank: usize) -> Cut {
        Cut::rank(NonZeroUsize::new(rank).unwrap())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn all_of_the_energy_is_the_same_update(
            seed in 0_u32..1000, out in 1_usize..20, inner in 1_usize..20, width in 1_usize..24, scale in -3.0_f64..3.0,
            kernel in 1_usize..4,
        ) {
            prop_assume!(scale.abs() > 0.01);
            let weight = [out, inner, kernel, kernel];
            let lora = Lora::new(
                numbers(seed, &[width, inner, kernel, kernel]), numbers(seed + 1000, &[out, width, 1, 1]), scale,
            );
            let module = module(&weight, AnyAdapter::Lora(lora));
            let result = resized(&module, Cut::energy(1.0).unwrap());
            prop_assert!(distance(&delta(&result.module), &delta(&module)) < 1e-5);
            let Outcome::Cut { from, to, energy } = result.outcome else { panic!() };
            prop_assert!(from == Some(width) && to <= width && energy > 1.0 - 1e-6);
        }

        #[test]
        fn a_cut_update_is_the_best_of_its_rank_and_says_how_good_it_is(
            seed in 0_u32..1000, width in 2_usize..12, to in 1_usize..11,
        ) {
            prop_assume!(to < width);
            let lora = Lora::new(numbers(seed, &[width, 30]), numbers(seed + 1000, &[20, width]), 0.25);
            let module = module(&[20, 30], AnyAdapter::Lora(lora));
            let result = resized(&module, rank(to));
            let (whole, cut) = (delta(&module), delta(&result.module));
            let values = svd(&whole).unwrap().values.values;
            let (kept, all): (f32, f32) =
                (values[..to].iter().map(|v| v * v).sum(), values.iter().map(|v| v * v).sum());
            let Outcome::Cut { energy, .. } = result.outcome else { panic!() };
            prop_assert!((energy - f64::from(kept / all)).abs() < 1e-4);
            prop_assert!((distance(&cut, &whole).powi(2) - (1.0 - energy)).abs() < 1e-4);
        }
    }

    #[test]
    fn the_scale_is_folded_and_the_smallest_sufficient_rank_is_taken() {
        // Singular values 4, 2, 1 at scale 1/2: energies 16, 4, 1.
        let up = Array::new([3, 3], vec![4.0, 0.0, 0.0, 0.0, 2.0, 0.0, 0.0, 0.0, 1.0]).unwrap();
        let module = module(&[3, 3], AnyAdapter::Lora(Lora::new(Array::identity(3), up, 0.5)));
        for (energy, expected) in [(0.5, 1), (16.0 / 21.0, 1), (0.77, 2), (20.0 / 21.0, 2), (0.96, 3), (1.0, 3)] {
            let result = resized(&module, Cut::energy(energy).unwrap());
            let Outcome::Cut { to, .. } = result.outcome else { panic!() };
            assert_eq!(to, expected, "{energy}");
            assert_eq!(Adapter::<Cpu>::scale(&result.module.adapter), 1.0);
        }
        let both = Cut { rank: NonZeroUsize::new(1), ..Cut::energy(0.99).unwrap() };
        assert!(matches!(resized(&module, both).outcome, Outcome::Cut { to: 1, .. }));
        assert!(matches!(resized(&module, rank(3)).outcome, Outcome::Narrow { rank: 3 }));
        assert!(Cut::energy(0.0).is_err() && Cut::energy(1.5).is_err() && Cut::energy(f64::NAN).is_err());
    }

    #[test]
    fn an_update_of_nothing_stays_nothing() {
        let lora = Lora::new(numbers(1, &[4, 6]), Array::full([5, 4], 0.0), 1.0);
        let result = resized(&module(&[5, 6], AnyAdapter::Lora(lora)), rank(2));
        assert_eq!(result.outcome, Outcome::Cut { from: Some(4), to: 2, energy: 1.0 });
        assert!(delta(&result.module).values.iter().all(|value| *value == 0.0));
    }

    #[test]
    fn cores_and_other_families_become_plain_pairs() {
        let tucker = Lora {
            mid: Some(numbers(3, &[4, 4, 3, 3])),
            ..Lora::new(numbers(1, &[4, 6, 1, 1]), numbers(2, &[5, 4, 1, 1]), 2.0)
        };
        let half = |sample| (numbers(sample, &[5, 2]), numbers(sample + 1, &[2, 54]));
        let ((w1_a, w1_b), (w2_a, w2_b)) = (half(4), half(6));
        let loha = Loha { w1_a, w1_b, w2_a, w2_b, t1: None, t2: None, scale: 0.5 };
        for adapter in [AnyAdapter::Lora(tucker), AnyAdapter::Loha(loha)] {
            let module = module(&[5, 6, 3, 3], adapter);
            let result = resized(&module, rank(5));
            let AnyAdapter::Lora(lora) = &result.module.adapter else { panic!() };
            assert_eq!((lora.mid.is_none(), lora.down.shape.get(1..).unwrap()), (true, &[6, 3, 3][..]));
            assert!(distance(&delta(&result.module), &delta(&module)) < 1e-5);
        }
    }

    #[test]
    fn magnitudes_stay_and_the_direction_is_cut() {
        let base = numbers(1, &[5, 6]);
        let lora = Lora::new(numbers(2, &[4, 6]), numbers(3, &[5, 4]), 1.0);
        let dora = Dora {
            direction: Direction::Lora(lora),
            magnitude: numbers(4, &[5, 1]),
            axis: Axis::Output,
            rule: StrengthRule::Interpolate,
        };
        let module = module(&[5, 6], AnyAdapter::Dora(dora));
        let result = resized(&module, Cut::energy(1.0).unwrap());
        let merged = |module: &AdaptedModule| module.adapter.merge(&Cpu, &base, 1.0).unwrap();
        assert!(distance(&merged(&result.module), &merged(&module)) < 1e-5);
    }

    #[test]
    fn a_randomised_cut_is_nearly_as_good_as_the_exact_one() {
        // Values that fall off slowly, as those of fine-tuned weights do.
        let (left, right) = (numbers(1, &[200, 150]), numbers(2, &[150, 300]));
        let fall: Vec<f32> = (1..=150).map(|index| 1.0 / (index as f32).sqrt()).collect();
        let left = Cpu.mul(&left, &Array::new([1, 150], fall).unwrap()).unwrap();
        let whole = Cpu.matmul(&left, &right).unwrap();
        let (lora, count, energy) = cut_difference(whole.clone(), rank(16), Search::Randomised).unwrap();
        let values = svd(&whole).unwrap().values.values;
        let tail: f32 = values[16..].iter().map(|value| value * value).sum();
        let best = f64::from(tail / values.iter().map(|value| value * value).sum::<f32>()).sqrt();
        let got = distance(&lora.delta(&Cpu, &whole).unwrap(), &whole);
        assert!(got < best * 1.01, "{got} and at best {best}");
        assert!(count == 16 && (energy.sqrt().mul_add(-energy.sqrt(), 1.0).sqrt() - got).abs() < 1e-2);
        let (_, count, energy) = cut_difference(whole, Cut::energy(0.9).unwrap(), Search::Randomised).unwrap();
        let exact = 1
            + (1..=150)
                .position(|k| {
                    values[..k].iter().map(|v| v * v).sum::<f32>() >= 0.9 * values.iter().map(|v| v * v).sum::<f32>()
                })
                .unwrap();
        assert!(energy >= 0.9 && count <= exact + 1, "{count} and exactly {exact}");
    }
}
