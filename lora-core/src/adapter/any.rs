//! One adapter of whichever family: what files hold and what models carry.

use super::{Adapter, Layer, Lora, Part};
use crate::{AdapterConfig, Backend, Draw, Method, Result};

/// An adapter whose family is known at run time.
#[derive(Debug, Clone)]
pub enum AnyAdapter<T> {
    /// LoRA, LoCon, rsLoRA, Tucker.
    Lora(Lora<T>),
}

/// Runs one expression on whichever family is there.
macro_rules! each {
    ($any:expr, $adapter:ident => $body:expr) => {
        match $any {
            AnyAdapter::Lora($adapter) => $body,
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
            Self::Lora(lora) => AnyAdapter::Lora(lora.map(change)?),
        })
    }
}

impl<B: Backend> Adapter<B> for AnyAdapter<B::Tensor> {
    fn init(on: &B, base: &B::Tensor, config: &AdapterConfig, draw: &mut Draw) -> Result<Self> {
        match config.method {
            Method::Lora | Method::RsLora => Lora::init(on, base, config, draw).map(Self::Lora),
            _ => Lora::init(on, base, config, draw).map(Self::Lora),
        }
    }

    fn scale(&self) -> f64 {
        each!(self, adapter => Adapter::<B>::scale(adapter))
    }

    fn delta(&self, on: &B, base: &B::Tensor) -> Result<B::Tensor> {
        each!(self, adapter => adapter.delta(on, base))
    }

    fn merge(&self, on: &B, base: &B::Tensor, strength: f64) -> Result<B::Tensor> {
        each!(self, adapter => adapter.merge(on, base, strength))
    }

    fn merge_bias(
        &self,
        on: &B,
        bias: Option<&B::Tensor>,
        weight: &B::Tensor,
        strength: f64,
    ) -> Result<Option<B::Tensor>> {
        each!(self, adapter => adapter.merge_bias(on, bias, weight, strength))
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
