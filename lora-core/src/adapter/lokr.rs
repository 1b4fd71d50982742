//! LoKr: `ΔW = scale · w1 ⊗ w2` (Yeh et al. 2023, arXiv 2309.14859, §3.3; LyCORIS, peft).
//!
//! `ΔW[o1·O2 + o2, i1·I2 + i2, ·] = w1[o1, i1] · w2[o2, i2, ·]`, `w1` `[O1, I1]`, `w2` `[O2, I2]` or `[O2, I2, kh, kw]`.
//! How `out` and `in` are split depends on options that no file stores, so all sizes are read from the tensors. LyCORIS
//! takes scale 1 where both factors are whole, peft does not: whoever builds the adapter decides the scale.

use super::{Adapter, Geometry, Layer, Part, shape};
use crate::{AdapterConfig, Backend, ConvGeometry, Draw, Error, Result};

/// A Kronecker product of two factors.
#[derive(Debug, Clone)]
pub struct Lokr<T> {
    /// `[O1, I1]`; never with a core.
    pub w1: KronFactor<T>,
    /// `[O2, I2]` or `[O2, I2, kh, kw]`.
    pub w2: KronFactor<T>,
    /// What multiplies the product.
    pub scale: f64,
}

/// One of the two factors, itself whole or of low rank.
#[derive(Debug, Clone)]
pub enum KronFactor<T> {
    /// As it is.
    Whole(T),
    /// `a · b`: `a` `[O, rank]`, `b` `[rank, I·kh·kw]`.
    Product {
        /// `lokr_w1_a` or `lokr_w2_a`.
        a: T,
        /// `lokr_w1_b` or `lokr_w2_b`.
        b: T,
    },
    /// `Σ_pq a[p,o] · core[p,q,·] · b[q,i]`: `a` `[rank, O]`, `b` `[rank, I]`.
    Tucker {
        /// `lokr_t2`, `[rank, rank, kh, kw]`.
        core: T,
        /// `lokr_w2_a`.
        a: T,
        /// `lokr_w2_b`.
        b: T,
    },
}

impl<T> KronFactor<T> {
    /// The factor as a matrix `[O, I·kh·kw]`.
    fn matrix<B: Backend<Tensor = T>>(&self, on: &B) -> Result<T> {
        match self {
            Self::Whole(whole) => shape::flat(on, whole),
            Self::Product { a, b } => on.matmul(a, b),
            Self::Tucker { core, a, b } => shape::tucker(on, core, a, b),
        }
    }

    fn map<U>(
        &self,
        [whole, part_a, part_b, part_core]: [Part; 4],
        change: &mut dyn FnMut(Part, &T) -> Result<U>,
    ) -> Result<KronFactor<U>> {
        Ok(match self {
            Self::Whole(factor) => KronFactor::Whole(change(whole, factor)?),
            Self::Product { a, b } => KronFactor::Product { a: change(part_a, a)?, b: change(part_b, b)? },
            Self::Tucker { core, a, b } => {
                KronFactor::Tucker { a: change(part_a, a)?, b: change(part_b, b)?, core: change(part_core, core)? }
            }
        })
    }

    fn list(&self, [whole, part_a, part_b, part_core]: [Part; 4]) -> Vec<(Part, &T)> {
        match self {
            Self::Whole(factor) => vec![(whole, factor)],
            Self::Product { a, b } => vec![(part_a, a), (part_b, b)],
            Self::Tucker { core, a, b } => vec![(part_a, a), (part_b, b), (part_core, core)],
        }
    }
}

/// The roles of the first factor's tensors; no trainer writes a core for it, so none can be read back.
const FIRST: [Part; 4] = [Part::KronW1, Part::KronW1A, Part::KronW1B, Part::KronT1];
const SECOND: [Part; 4] = [Part::KronW2, Part::KronW2A, Part::KronW2B, Part::KronT2];

impl<T> Lokr<T> {
    pub(super) fn map<U>(&self, change: &mut dyn FnMut(Part, &T) -> Result<U>) -> Result<Lokr<U>> {
        Ok(Lokr { w1: self.w1.map(FIRST, change)?, w2: self.w2.map(SECOND, change)?, scale: self.scale })
    }

    /// `[out, in·kh·kw]` from `w1` `[O1, I1]` and `w2` `[O2, I2·kh·kw]`.
    fn kronecker<B: Backend<Tensor = T>>(on: &B, w1: &T, w2: &T) -> Result<T> {
        let (first, second) = (on.shape(w1), on.shape(w2));
        let (&[o1, i1], &[o2, i2]) = (&first[..], &second[..]) else {
            return Err(Error::Shapes { operation: "kronecker", shapes: vec![first, second] });
        };
        let w1 = on.reshape(w1, &[o1, 1, i1, 1])?;
        let w2 = on.reshape(w2, &[1, o2, 1, i2])?;
        on.reshape(&on.mul(&w1, &w2)?, &[o1 * o2, i1 * i2])
    }
}

impl<B: Backend> Adapter<B> for Lokr<B::Tensor> {
    fn init(on: &B, base: &B::Tensor, config: &AdapterConfig, draw: &mut Draw) -> Result<Self> {
        super::init::lokr(on, base, config, draw)
    }

    fn scale(&self) -> f64 {
        self.scale
    }

    fn delta(&self, on: &B, base: &B::Tensor) -> Result<B::Tensor> {
        // The kernel axes lie behind the input axis in both factor and weight, so that the product of the matrices is
        // the weight in order.
        let w1 = on.scale(&self.w1.matrix(on)?, self.scale)?;
        shape::laid_as(on, Self::kronecker(on, &w1, &self.w2.matrix(on)?)?, base)
    }

    /// `(w1 ⊗ w2) · x = w2 · X · w1ᵀ` with `x` folded to `X` `[I1, I2]`: two small layers instead of ΔW.
    fn forward(
        &self,
        on: &B,
        layer: &Layer<'_, B::Tensor>,
        x: &B::Tensor,
        y: &B::Tensor,
        strength: f64,
    ) -> Result<B::Tensor> {
        if strength == 0.0 {
            return on.share(y);
        }
        let w1 = self.w1.matrix(on)?;
        let change = match layer.geometry {
            Geometry::Linear => self.linear(on, &w1, x)?,
            Geometry::Conv(geometry) => self.conv(on, &w1, layer.weight, geometry, x)?,
        };
        on.add(y, &on.scale(&on.reshape(&change, &on.shape(y))?, strength * self.scale)?)
    }

    fn factors(&self) -> Vec<(Part, &B::Tensor)> {
        let mut factors = self.w1.list(FIRST);
        factors.extend(self.w2.list(SECOND));
        factors
    }
}

impl<T> Lokr<T> {
    /// `x` `[.., I1·I2]` → `[n, O1, O2]`.
    fn linear<B: Backend<Tensor = T>>(&self, on: &B, w1: &T, x: &T) -> Result<T> {
        let (o1, i1) = pair(on, w1)?;
        let size: usize = on.shape(x).iter().product();
        let width = on.shape(x).last().copied().unwrap_or(1);
        let (n, i2) = (size / width.max(1), width / i1.max(1));
        let x = on.reshape(x, &[n * i1, i2])?;
        let inner = match &self.w2 {
            KronFactor::Product { a, b } => on.linear(&on.linear(&x, b)?, a)?,
            factor => on.linear(&x, &factor.matrix(on)?)?,
        }; // [n·I1, O2]
        let (_, o2) = pair(on, &inner)?;
        let turned = on.permute(&on.reshape(&inner, &[n, i1, o2])?, &[0, 2, 1])?; // [n, O2, I1]
        let outer = on.linear(&turned, w1)?; // [n, O2, O1]
        on.permute(&on.reshape(&outer, &[n, o2, o1])?, &[0, 2, 1])
    }

    /// `x` `[b, I1·I2, h, w]` → `[b, O1, O2, h', w']`.
    fn conv<B: Backend<Tensor = T>>(&self, on: &B, w1: &T, base: &T, geometry: ConvGeometry, x: &T) -> Result<T> {
        let (o1, i1) = pair(on, w1)?;
        let (shape, base) = (on.shape(x), on.shape(base));
        let (&[batch, channels, h, w], &[_, _, kh, kw]) = (&shape[..], &base[..]) else {
            return Err(Error::Shapes { operation: "LoKr on a convolution", shapes: vec![shape, base] });
        };
        let i2 = channels / i1.max(1);
        let x = on.reshape(x, &[batch * i1, i2, h, w])?;
        let kernel = |matrix: &T| on.reshape(matrix, &[pair(on, matrix)?.0, i2, kh, kw]);
        let inner = match &self.w2 {
            KronFactor::Product { a, b } => {
                on.conv2d(&on.conv2d(&x, &kernel(b)?, geometry)?, &shape::as_point(on, a)?, ConvGeometry::POINTWISE)?
            }
            factor => on.conv2d(&x, &kernel(&factor.matrix(on)?)?, geometry)?,
        }; // [b·I1, O2, h', w']
        let [o2, h, w] = [1, 2, 3].map(|axis| on.shape(&inner)[axis]);
        let turned = on.permute(&on.reshape(&inner, &[batch, i1, o2 * h * w])?, &[1, 0, 2])?; // [I1, b, O2·h'·w']
        let outer = on.matmul(w1, &on.reshape(&turned, &[i1, batch * o2 * h * w])?)?; // [O1, b·O2·h'·w']
        on.permute(&on.reshape(&outer, &[o1, batch, o2 * h * w])?, &[1, 0, 2])
    }
}

/// The two lengths of a matrix.
fn pair<B: Backend>(on: &B, matrix: &B::Tensor) -> Result<(usize, usize)> {
    let shape = on.shape(matrix);
    match shape[..] {
        [rows, columns] => Ok((rows, columns)),
        _ => Err(Error::Shapes { operation: "Kronecker factor", shapes: vec![shape] }),
    }
}
