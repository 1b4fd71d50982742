//! Tensors from counter-based randomness: the same numbers on every device and in every run.
//!
//! Numbers are drawn on the host, where they cost microseconds, since a captured CUDA graph or a device's own generator
//! would make a resumed run another run.

use lora_core::Draw;
use tch::{Kind, Tensor};

use crate::{Result, Torch, backend::signed};

/// Normal numbers of mean 0 and deviation 1, on the host in 32 bits.
pub fn normal(draw: &mut Draw, shape: &[usize]) -> Result<Tensor> {
    filled(&draw.normal(shape.iter().product(), 1.0), shape)
}

/// Numbers that are uniform in `-bound..bound`, on the host in 32 bits.
pub fn uniform(draw: &mut Draw, shape: &[usize], bound: f64) -> Result<Tensor> {
    filled(&draw.uniform(shape.iter().product(), bound), shape)
}

/// [`normal`] on a device and in a kind.
pub fn normal_on(on: &Torch, draw: &mut Draw, shape: &[usize]) -> Result<Tensor> {
    Ok(normal(draw, shape)?.f_to_device(on.device)?.f_to_kind(on.kind)?)
}

/// Whole numbers in `0..below`, `[count]`, 64 bits.
///
/// # Panics
/// If `below` is 0.
pub fn integers(draw: &mut Draw, count: usize, below: u32) -> Result<Tensor> {
    let values: Vec<i64> = (0..count).map(|_| i64::from(draw.below(below))).collect();
    Ok(Tensor::f_from_slice(&values)?)
}

fn filled(values: &[f32], shape: &[usize]) -> Result<Tensor> {
    Ok(Tensor::f_from_slice(values)?.f_view(signed(shape).as_slice())?.f_to_kind(Kind::Float)?)
}

#[cfg(test)]
mod tests {
    use lora_core::Purpose;

    use super::*;

    #[test]
    fn a_tensor_is_a_function_of_its_counters() {
        let noise = |step| normal(&mut Draw::new(1, Purpose::Noise, step, 0), &[2, 3, 4]).unwrap();
        assert_eq!(noise(5), noise(5));
        assert_ne!(noise(5), noise(6));
        assert_eq!(noise(5).size(), [2, 3, 4]);
    }

    #[test]
    fn integers_stay_below_their_bound() {
        let drawn = integers(&mut Draw::new(1, Purpose::Timestep, 0, 0), 500, 7).unwrap();
        let values: Vec<i64> = Vec::try_from(drawn).unwrap();
        assert!(values.iter().all(|v| (0..7).contains(v)) && (0..7).all(|v| values.contains(&v)));
    }
}
