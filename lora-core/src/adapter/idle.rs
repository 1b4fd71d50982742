//! Whether an adapter does anything at all, told by its scale and its factors, without their product.
//!
//! An adapter that was saved before its first step has `up` (or whatever starts there) all zeros, and looks as good as any.

use std::fmt;

use super::{AnyAdapter, Full, Ia3, Ia3Kind, KronFactor, Lora};
use crate::Array;

/// Why an adapter changes nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Idle {
    /// What multiplies the product is 0.
    Scale,
    /// `up` is all zeros.
    Up,
    /// `down` is all zeros.
    Down,
    /// Another factor of the product is all zeros.
    Factor,
    /// The difference is all zeros.
    Difference,
    /// What multiplies the weight multiplies by one.
    Identity,
}

impl AnyAdapter<Array> {
    /// Why it changes neither weight nor bias; `None` if it does, or if that depends on the base weight (DoRA).
    pub fn idle(&self) -> Option<Idle> {
        match self {
            Self::Lora(lora) => lora_idle(lora),
            Self::Loha(loha) if loha.scale == 0.0 => Some(Idle::Scale),
            Self::Loha(loha) => {
                let factors =
                    [&loha.w1_a, &loha.w1_b, &loha.w2_a, &loha.w2_b].into_iter().chain(&loha.t1).chain(&loha.t2);
                any_zero(factors)
            }
            Self::Lokr(lokr) if lokr.scale == 0.0 => Some(Idle::Scale),
            Self::Lokr(lokr) => any_zero(kron_factors(&lokr.w1).into_iter().chain(kron_factors(&lokr.w2))),
            Self::Glora(glora) => (glora.scale == 0.0).then_some(Idle::Scale),
            Self::Full(Full { diff, diff_bias }) => {
                diff.iter().chain(diff_bias).all(is_zero).then_some(Idle::Difference)
            }
            Self::Ia3(ia3) => is_one(ia3).then_some(Idle::Identity),
            Self::Oft(oft) => (oft.rescale.is_none() && is_zero(&oft.blocks)).then_some(Idle::Identity),
            Self::Boft(boft) => (boft.rescale.is_none() && is_zero(&boft.blocks)).then_some(Idle::Identity),
            // Magnitudes act on the base weight whatever the direction.
            Self::Dora(_) => None,
        }
    }
}

fn lora_idle(lora: &Lora<Array>) -> Option<Idle> {
    if lora.scale == 0.0 {
        return Some(Idle::Scale);
    }
    if lora.start.is_some() || lora.up_bias.as_ref().is_some_and(|bias| !is_zero(bias)) {
        return None;
    }
    if is_zero(&lora.up) {
        Some(Idle::Up)
    } else if is_zero(&lora.down) {
        Some(Idle::Down)
    } else {
        any_zero(&lora.mid)
    }
}

fn any_zero<'a>(factors: impl IntoIterator<Item = &'a Array>) -> Option<Idle> {
    factors.into_iter().any(is_zero).then_some(Idle::Factor)
}

fn kron_factors(factor: &KronFactor<Array>) -> Vec<&Array> {
    match factor {
        KronFactor::Whole(whole) => vec![whole],
        KronFactor::Product { a, b } => vec![a, b],
        KronFactor::Tucker { core, a, b } => vec![core, a, b],
    }
}

fn is_zero(array: &Array) -> bool {
    array.values.iter().all(|value| *value == 0.0)
}

fn is_one(ia3: &Ia3<Array>) -> bool {
    let nothing = match ia3.kind {
        Ia3Kind::Offset => 0.0,
        Ia3Kind::Factor => 1.0,
    };
    ia3.vector.values.iter().all(|value| *value == nothing)
}

impl fmt::Display for Idle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Scale => "alpha is 0",
            Self::Up => "up is all zeros",
            Self::Down => "down is all zeros",
            Self::Factor => "a factor is all zeros",
            Self::Difference => "the difference is all zeros",
            Self::Identity => "it multiplies by 1",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::{Axis, Boft, Direction, Dora, Loha, Lokr, StrengthRule};

    fn full(shape: &[usize], value: f32) -> Array {
        Array::full(shape, value)
    }

    /// `[rank 2, 3]` and `[4, rank 2]` of one number each.
    fn lora(down: f32, up: f32, scale: f64) -> Lora<Array> {
        Lora::new(full(&[2, 3], down), full(&[4, 2], up), scale)
    }

    #[test]
    fn the_reason_is_the_factor_that_is_zero() {
        let is = |lora: Lora<Array>| AnyAdapter::Lora(lora).idle();
        assert_eq!(is(lora(1.0, 1.0, 1.0)), None);
        assert_eq!(is(lora(1.0, -0.0, 1.0)), Some(Idle::Up));
        assert_eq!(is(lora(0.0, 1.0, 1.0)), Some(Idle::Down));
        assert_eq!(is(lora(1.0, 1.0, 0.0)), Some(Idle::Scale));
        assert_eq!(is(Lora { up_bias: Some(full(&[4], 1.0)), ..lora(1.0, 0.0, 1.0) }), None);
        let dora = |lora| Dora {
            direction: Direction::Lora(lora),
            magnitude: full(&[4], 1.0),
            axis: Axis::Output,
            rule: StrengthRule::Interpolate,
        };
        assert_eq!(AnyAdapter::Dora(dora(lora(1.0, 0.0, 1.0))).idle(), None, "magnitudes act by themselves");
    }

    #[test]
    fn other_families_are_told_as_well() {
        let (ones, zeros) = (full(&[2, 2], 1.0), full(&[2, 2], 0.0));
        let loha = |w2_a: &Array| {
            let [w1_a, w1_b, w2_b] = [ones.clone(), ones.clone(), ones.clone()];
            AnyAdapter::Loha(Loha { w1_a, w1_b, w2_a: w2_a.clone(), w2_b, t1: None, t2: None, scale: 1.0 }).idle()
        };
        assert_eq!((loha(&ones), loha(&zeros)), (None, Some(Idle::Factor)));
        let lokr = |b: &Array| {
            let w2 = KronFactor::Product { a: ones.clone(), b: b.clone() };
            AnyAdapter::Lokr(Lokr { w1: KronFactor::Whole(ones.clone()), w2, scale: 1.0 }).idle()
        };
        assert_eq!((lokr(&ones), lokr(&zeros)), (None, Some(Idle::Factor)));
        let diff = |diff: &Array| AnyAdapter::Full(Full { diff: Some(diff.clone()), diff_bias: None }).idle();
        assert_eq!((diff(&ones), diff(&zeros)), (None, Some(Idle::Difference)));
        let ia3 =
            |vector: &Array, kind| AnyAdapter::Ia3(Ia3 { vector: vector.clone(), axis: Axis::Input, kind }).idle();
        assert_eq!(ia3(&zeros, Ia3Kind::Offset), Some(Idle::Identity));
        assert_eq!(ia3(&zeros, Ia3Kind::Factor), None);
        assert_eq!(ia3(&ones, Ia3Kind::Factor), Some(Idle::Identity));
        let boft = Boft { blocks: full(&[1, 1, 2, 2], 0.0), rescale: None, bound: None };
        assert_eq!(AnyAdapter::Boft(boft).idle(), Some(Idle::Identity));
    }
}
