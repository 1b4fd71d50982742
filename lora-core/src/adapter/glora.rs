//! GLoRA as LyCORIS writes it: `ΔW = scale · (B-product + W · A-product)` (Chavan et al. 2023, arXiv 2306.07967, eq. 10).
//!
//! `W · A` contracts the input axis and keeps the kernel axes. ΔW depends on `W`: the order of adapters matters.

use super::{Adapter, Part, shape};
use crate::{AdapterConfig, Backend, Draw, Error, Result};

/// Two low-rank products, one of which multiplies the base weight.
#[derive(Debug, Clone)]
pub struct Glora<T> {
    /// `[in, rank]`; older files `[rank, in]`. Unit kernel axes allowed here and below.
    pub a1: T,
    /// `[rank, in]`; older files `[in, rank]`.
    pub a2: T,
    /// `[out, rank]`; older files `[rank, in·kh·kw]`.
    pub b1: T,
    /// `[rank, in·kh·kw]`; older files `[out, rank]`.
    pub b2: T,
    /// Which of the two ways the factors lie.
    pub order: GloraOrder,
    /// What multiplies the sum.
    pub scale: f64,
}

/// In which order the factors are multiplied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GloraOrder {
    /// `b1·b2 + W·a1·a2`: LyCORIS today.
    Current,
    /// `b2·b1 + W·a2·a1`: files of before.
    Older,
}

impl<T> Glora<T> {
    pub(super) fn map<U>(&self, change: &mut dyn FnMut(Part, &T) -> Result<U>) -> Result<Glora<U>> {
        Ok(Glora {
            a1: change(Part::GloraA1, &self.a1)?,
            a2: change(Part::GloraA2, &self.a2)?,
            b1: change(Part::GloraB1, &self.b1)?,
            b2: change(Part::GloraB2, &self.b2)?,
            order: self.order,
            scale: self.scale,
        })
    }
}

impl<B: Backend> Adapter<B> for Glora<B::Tensor> {
    /// Not trained here.
    fn init(_on: &B, _base: &B::Tensor, _config: &AdapterConfig, _draw: &mut Draw) -> Result<Self> {
        Err(super::init::not_trained("GLoRA"))
    }

    fn scale(&self) -> f64 {
        self.scale
    }

    fn delta(&self, on: &B, base: &B::Tensor) -> Result<B::Tensor> {
        let (a_left, a_right, b_left, b_right) = match self.order {
            GloraOrder::Current => (&self.a1, &self.a2, &self.b1, &self.b2),
            GloraOrder::Older => (&self.a2, &self.a1, &self.b2, &self.b1),
        };
        let shape = on.shape(base);
        let &[out, input, ref kernel @ ..] = &shape[..] else {
            return Err(Error::Shapes { operation: "GLoRA", shapes: vec![shape] });
        };
        let k: usize = kernel.iter().product();
        let added = on.matmul(&shape::flat(on, b_left)?, &shape::flat(on, b_right)?)?;
        let turned = on.permute(&on.reshape(base, &[out, input, k])?, &[0, 2, 1])?; // [out, k, in]
        let narrow = on.matmul(&on.reshape(&turned, &[out * k, input])?, &shape::flat(on, a_left)?)?;
        let scaled = on.matmul(&narrow, &shape::flat(on, a_right)?)?; // [out·k, in]
        let scaled = on.permute(&on.reshape(&scaled, &[out, k, input])?, &[0, 2, 1])?; // [out, in, k]
        let sum = on.add(&on.reshape(&added, &shape)?, &on.reshape(&scaled, &shape)?)?;
        on.scale(&sum, self.scale)
    }

    fn factors(&self) -> Vec<(Part, &B::Tensor)> {
        vec![(Part::GloraA1, &self.a1), (Part::GloraA2, &self.a2), (Part::GloraB1, &self.b1), (Part::GloraB2, &self.b2)]
    }
}
