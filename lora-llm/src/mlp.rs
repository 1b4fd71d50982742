//! The gated MLP of a layer: SwiGLU (Shazeer 2020, arXiv 2002.05202, eq. 6).

use lora_torch::{Projection, Scope};
use tch::Tensor;

use crate::{LlmConfig, Result};

#[derive(Debug)]
pub(crate) struct Mlp {
    pub(crate) gate: Projection,
    pub(crate) up: Projection,
    pub(crate) down: Projection,
}

impl Mlp {
    pub(crate) fn new(scope: &Scope<'_>, config: &LlmConfig) -> Result<Self> {
        let (width, inner, bias) = (config.hidden_size, config.intermediate_size, config.mlp_bias);
        Ok(Self {
            gate: Projection::linear(&(scope / "gate_proj"), [inner, width], bias)?,
            up: Projection::linear(&(scope / "up_proj"), [inner, width], bias)?,
            down: Projection::linear(&(scope / "down_proj"), [width, inner], bias)?,
        })
    }

    /// `[rows, d]` → the same.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (mut gate, up) = (self.gate.forward(x)?, self.up.forward(x)?); // [rows, inner] each
        let gated = match gate.requires_grad() || up.requires_grad() {
            true => gate.f_silu()?.f_mul(&up)?,
            false => {
                let _ = gate.f_silu_()?.f_mul_(&up)?;
                gate
            }
        };
        Ok(self.down.forward(&gated)?)
    }

    pub(crate) fn projections(&self) -> [&Projection; 3] {
        [&self.gate, &self.up, &self.down]
    }

    pub(crate) fn projections_mut(&mut self) -> [&mut Projection; 3] {
        [&mut self.gate, &mut self.up, &mut self.down]
    }
}
