//! LoHa: `ΔW = scale · (w1_a·w1_b) ⊙ (w2_a·w2_b)` (Hyeon-Woo et al. 2021, arXiv 2108.06098, eq. 4; LyCORIS, peft).
//!
//! With Tucker cores each half is `Σ_pq w_a[p,o] · t[p,q,·] · w_b[q,i]`. Whether a half has a core decides how its `w_a`
//! lies, since the shapes alone cannot (`r = out`). The scale applies once: LyCORIS' own merge applies it twice, its
//! forward pass, peft and ComfyUI once.

use super::{Adapter, Part, shape};
use crate::{AdapterConfig, Backend, Draw, Result};

/// Two low-rank products, multiplied element by element.
#[derive(Debug, Clone)]
pub struct Loha<T> {
    /// `[out, rank]`; `[rank, out]` with [`t1`](Self::t1).
    pub w1_a: T,
    /// `[rank, in·kh·kw]`; `[rank, in]` with [`t1`](Self::t1).
    pub w1_b: T,
    /// As [`w1_a`](Self::w1_a).
    pub w2_a: T,
    /// As [`w1_b`](Self::w1_b).
    pub w2_b: T,
    /// The Tucker core of the first half, `[rank, rank, kh, kw]`.
    pub t1: Option<T>,
    /// The Tucker core of the second half, `[rank, rank, kh, kw]`.
    pub t2: Option<T>,
    /// What multiplies the product.
    pub scale: f64,
}

impl<T> Loha<T> {
    pub(super) fn map<U>(&self, change: &mut dyn FnMut(Part, &T) -> Result<U>) -> Result<Loha<U>> {
        Ok(Loha {
            w1_a: change(Part::HadaW1A, &self.w1_a)?,
            w1_b: change(Part::HadaW1B, &self.w1_b)?,
            w2_a: change(Part::HadaW2A, &self.w2_a)?,
            w2_b: change(Part::HadaW2B, &self.w2_b)?,
            t1: self.t1.as_ref().map(|core| change(Part::HadaT1, core)).transpose()?,
            t2: self.t2.as_ref().map(|core| change(Part::HadaT2, core)).transpose()?,
            scale: self.scale,
        })
    }
}

impl<B: Backend> Adapter<B> for Loha<B::Tensor> {
    fn init(on: &B, base: &B::Tensor, config: &AdapterConfig, draw: &mut Draw) -> Result<Self> {
        super::init::loha(on, base, config, draw)
    }

    fn scale(&self) -> f64 {
        self.scale
    }

    fn delta(&self, on: &B, base: &B::Tensor) -> Result<B::Tensor> {
        let half = |a: &B::Tensor, b: &B::Tensor, core: &Option<B::Tensor>| match core {
            None => on.matmul(a, b),
            Some(core) => shape::tucker(on, core, a, b),
        };
        let first = half(&self.w1_a, &self.w1_b, &self.t1)?; // [out, in·kh·kw]
        let second = half(&self.w2_a, &self.w2_b, &self.t2)?;
        shape::laid_as(on, on.scale(&on.mul(&first, &second)?, self.scale)?, base)
    }

    fn factors(&self) -> Vec<(Part, &B::Tensor)> {
        let mut factors = vec![
            (Part::HadaW1A, &self.w1_a),
            (Part::HadaW1B, &self.w1_b),
            (Part::HadaW2A, &self.w2_a),
            (Part::HadaW2B, &self.w2_b),
        ];
        factors.extend(self.t1.iter().map(|core| (Part::HadaT1, core)));
        factors.extend(self.t2.iter().map(|core| (Part::HadaT2, core)));
        factors
    }
}
