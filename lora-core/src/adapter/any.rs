//! One adapter of whichever family: what files hold and what models carry.

use super::{Adapter, Boft, Dora, Full, Glora, Ia3, Layer, Loha, Lokr, Lora, Oft, Part};
use crate::{AdapterConfig, Backend, Draw, Method, Result};

/// An adapter whose family is known at run time.
#[derive(Debug, Clone)]
pub enum AnyAdapter<T> {
    /// LoRA, LoCon, rsLoRA, Tucker.
    Lora(Lora<T>),
    /// DoRA over LoRA, LoHa or LoKr.
    Dora(Dora<T>),
    /// LoHa.
    Loha(Loha<T>),
    /// LoKr.
    Lokr(Lokr<T>),
    /// GLoRA.
    Glora(Glora<T>),
    /// Differences of a weight and a bias, also of norms.
    Full(Full<T>),
    /// (IA)³.
    Ia3(Ia3<T>),
    /// Block-diagonal OFT.
    Oft(Oft<T>),
    /// Butterfly OFT.
    Boft(Boft<T>),
}

/// Runs one expression on whichever family is there.
macro_rules! each {
    ($any:expr, $adapter:ident => $body:expr) => {
        match $any {
            AnyAdapter::Lora($adapter) => $body,
            AnyAdapter::Dora($adapter) => $body,
            AnyAdapter::Loha($adapter) => $body,
            AnyAdapter::Lokr($adapter) => $body,
            AnyAdapter::Glora($adapter) => $body,
            AnyAdapter::Full($adapter) => $body,
            AnyAdapter::Ia3($adapter) => $body,
            AnyAdapter::Oft($adapter) => $body,
            AnyAdapter::Boft($adapter) => $body,
        }
    };
}

impl<T> AnyAdapter<T> {
    /// The same adapter on other tensors: another backend, a copy, views of an arena.
    ///
    /// # Errors
    /// The first error of `change`.
    pub fn map<U>(&self, change: &mut dyn FnMut(Part, &T) -> Result<U>) -> Result<AnyAdapter<U>> {
        Ok(match self {
            Self::Lora(adapter) => AnyAdapter::Lora(adapter.map(change)?),
            Self::Dora(adapter) => AnyAdapter::Dora(adapter.map(change)?),
            Self::Loha(adapter) => AnyAdapter::Loha(adapter.map(change)?),
            Self::Lokr(adapter) => AnyAdapter::Lokr(adapter.map(change)?),
            Self::Glora(adapter) => AnyAdapter::Glora(adapter.map(change)?),
            Self::Full(adapter) => AnyAdapter::Full(adapter.map(change)?),
            Self::Ia3(adapter) => AnyAdapter::Ia3(adapter.map(change)?),
            Self::Oft(adapter) => AnyAdapter::Oft(adapter.map(change)?),
            Self::Boft(adapter) => AnyAdapter::Boft(adapter.map(change)?),
        })
    }
}

impl<B: Backend> Adapter<B> for AnyAdapter<B::Tensor> {
    fn init(on: &B, base: &B::Tensor, config: &AdapterConfig, draw: &mut Draw) -> Result<Self> {
        match config.method {
            Method::Lora | Method::RsLora => Lora::init(on, base, config, draw).map(Self::Lora),
            Method::Dora => Dora::init(on, base, config, draw).map(Self::Dora),
            Method::Loha => Loha::init(on, base, config, draw).map(Self::Loha),
            Method::Lokr => Lokr::init(on, base, config, draw).map(Self::Lokr),
        }
    }

    fn scale(&self) -> f64 {
        each!(self, adapter => Adapter::<B>::scale(adapter))
    }

    fn delta(&self, on: &B, base: &B::Tensor) -> Result<B::Tensor> {
        each!(self, adapter => adapter.delta(on, base))
    }

    fn change(&self, on: &B, base: &B::Tensor, strength: f64) -> Result<B::Tensor> {
        each!(self, adapter => adapter.change(on, base, strength))
    }

    fn bias_change(&self, on: &B, bias: Option<&B::Tensor>, strength: f64) -> Result<Option<B::Tensor>> {
        each!(self, adapter => adapter.bias_change(on, bias, strength))
    }

    fn merge(&self, on: &B, base: &B::Tensor, strength: f64) -> Result<B::Tensor> {
        each!(self, adapter => adapter.merge(on, base, strength))
    }

    fn forward(
        &self,
        on: &B,
        layer: &Layer<'_, B::Tensor>,
        x: &B::Tensor,
        y: &B::Tensor,
        strength: f64,
    ) -> Result<B::Tensor> {
        each!(self, adapter => adapter.forward(on, layer, x, y, strength))
    }

    fn factors(&self) -> Vec<(Part, &B::Tensor)> {
        each!(self, adapter => Adapter::<B>::factors(adapter))
    }
}
