//! First values of the trained families; ΔW is zero in all of them.

use super::Lora;
use crate::{AdapterConfig, Backend, Draw, Error, Init, Result};

/// `A` at random, `B` zero, so that ΔW is zero.
pub(super) fn lora<B: Backend>(
    on: &B,
    base: &B::Tensor,
    config: &AdapterConfig,
    draw: &mut Draw,
) -> Result<Lora<B::Tensor>> {
    let shape = on.shape(base);
    let [out, ref inner @ ..] = shape[..] else {
        return Err(Error::Shapes { operation: "init", shapes: vec![shape] });
    };
    let rank = config.rank.get();
    let fan_in: usize = inner.iter().product();
    let mut down_shape = shape.clone();
    down_shape[0] = rank;
    let down = match config.init {
        Init::Gaussian => draw.normal(rank * fan_in, 1.0 / rank as f64),
        _ => draw.uniform(rank * fan_in, 1.0 / (fan_in as f64).sqrt()),
    };
    let mut up_shape = vec![1; shape.len()];
    (up_shape[0], up_shape[1]) = (out, rank);
    Ok(Lora::new(on.tensor(&down, &down_shape)?, on.tensor(&vec![0.0; out * rank], &up_shape)?, config.scale()))
}
