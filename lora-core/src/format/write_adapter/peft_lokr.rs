//! What a peft configuration must say so that peft builds LoKr factors of the shapes that there are.
//!
//! peft stores no shapes: it derives them from `decompose_factor`, `decompose_both` and the rank (`tuners/lokr/layer.py`).
//! Adapters of LyCORIS with other splits cannot be said.

use crate::{
    Array,
    adapter::{KronFactor, Lokr},
    format::header::count,
};

/// One LoKr adapter by its shapes.
pub(super) struct Shape {
    out: usize,
    input: usize,
    w1: [usize; 2],
    /// The rank of the first factor, where it is a product.
    w1_rank: Option<usize>,
    w2: [usize; 2],
    w2_rank: Option<usize>,
}

impl Shape {
    /// The shapes of an adapter on a weight `[out, in, ..]`; `None` for one with a core.
    pub(super) fn of(lokr: &Lokr<Array>, weight: &[usize]) -> Option<Self> {
        let &[out, input, ref kernel @ ..] = weight else { return None };
        let kernel = count(kernel);
        let size = |factor: &KronFactor<Array>| match factor {
            KronFactor::Whole(whole) => Some(([*whole.shape.first()?, *whole.shape.get(1)?], None)),
            KronFactor::Product { a, b } => Some(([*a.shape.first()?, *b.shape.get(1)?], Some(*b.shape.first()?))),
            KronFactor::Tucker { .. } => None,
        };
        let ((w1, w1_rank), (mut w2, w2_rank)) = (size(&lokr.w1)?, size(&lokr.w2)?);
        if w2_rank.is_some() {
            w2[1] /= kernel; // `[rank, in·kh·kw]`
        }
        Some(Self { out, input, w1, w1_rank, w2, w2_rank })
    }

    /// The rank under which peft keeps whole what is whole here.
    pub(super) fn rank(&self) -> usize {
        self.w2_rank.or(self.w1_rank).unwrap_or_else(|| self.w2[0].max(self.w2[1]))
    }

    fn is_built_by(&self, factor: i64, both: bool) -> bool {
        let ((o1, o2), (i1, i2)) = (split(self.out, factor), split(self.input, factor));
        let small = |rank: usize, size: [usize; 2]| 2 * rank < size[0].max(size[1]);
        let w1_is_product = both && small(self.rank(), self.w1);
        (self.w1, self.w2) == ([o1, i1], [o2, i2])
            && self.w1_rank.is_some() == w1_is_product
            && self.w2_rank.is_some() == small(self.rank(), self.w2)
            && self.w1_rank.is_none_or(|rank| rank == self.rank())
    }
}

/// `decompose_factor` and `decompose_both` that build all of them; `None` if there are none.
pub(super) fn options(shapes: &[Shape]) -> Option<(i64, bool)> {
    let own = shapes.iter().flat_map(|shape| shape.w1).map(|length| length as i64);
    let mut factors: Vec<i64> = std::iter::once(-1).chain(own).collect();
    factors.dedup();
    let candidates = factors.into_iter().flat_map(|factor| [(factor, false), (factor, true)]);
    candidates.into_iter().find(|(factor, both)| shapes.iter().all(|shape| shape.is_built_by(*factor, *both)))
}

/// How peft cuts a dimension in two: by the factor if it divides, else as evenly as a first part up to it allows.
fn split(dimension: usize, factor: i64) -> (usize, usize) {
    let limit = usize::try_from(factor).unwrap_or(dimension);
    if factor > 0 && dimension.is_multiple_of(limit) {
        return (limit, dimension / limit);
    }
    let first = (1..=dimension.isqrt()).rev().find(|size| dimension.is_multiple_of(*size) && *size <= limit);
    let first = first.unwrap_or(1);
    (first, dimension / first)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dimensions_are_cut_as_the_examples_of_peft_show() {
        assert_eq!(split(256, -1), (16, 16));
        assert_eq!(split(128, -1), (8, 16));
        assert_eq!(split(127, -1), (1, 127));
        assert_eq!(split(128, 4), (4, 32));
        assert_eq!(split(36, 5), (4, 9));
    }
}
