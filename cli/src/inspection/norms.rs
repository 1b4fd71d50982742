//! How large the update of an adapter file is, without forming it.
//!
//! `‖B·A‖² = Σ (BᵀB ⊙ AAᵀ)`: two products of size rank × rank a module, so that files of hundreds of megabytes take a
//! moment. Families other than plain low-rank products count only for whether their numbers are finite.

use std::collections::BTreeMap;

use lora_core::{Array, Backend as _, Cpu, Part, Result, format::Role, format::TensorFile};
use serde::Serialize;

use super::{Configs, Module};

/// How large the update is.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Strength {
    /// Mean Frobenius norm of ΔW over the measured modules.
    pub mean_norm: f64,
    /// The largest of them.
    pub largest_norm: f64,
    /// The module that has it, as the file spells it.
    pub largest_module: String,
    /// Modules that were measured: linear and convolutional LoRA.
    pub measured: usize,
    /// Tensors that hold NaN or infinity.
    pub not_finite: Vec<String>,
}

/// Measures the low-rank modules of a file; `None` if it has none that can be measured, and nothing broken.
pub(super) fn strength(
    file: &TensorFile,
    modules: &BTreeMap<&str, Module<'_>>,
    configs: &Configs,
) -> Result<Option<Strength>> {
    let mut norms: Vec<(f64, &str)> = Vec::new();
    let mut not_finite = Vec::new();
    for (name, module) in modules {
        let get = |part| module.roles.get(&Role::Factor(part)).copied();
        let (Some(down), Some(up)) = (get(Part::Down), get(Part::Up)) else { continue };
        let (down_values, up_values) = (file.array(down)?, file.array(up)?);
        for (key, array) in [(down, &down_values), (up, &up_values)] {
            if array.values.iter().any(|value| !value.is_finite()) {
                not_finite.push(key.to_owned());
            }
        }
        if get(Part::Mid).is_some() || module.roles.contains_key(&Role::DoraScale) {
            continue;
        }
        let rank = down_values.shape.first().copied().unwrap_or(0);
        let scale = match module.roles.get(&Role::Alpha) {
            Some(key) => file.doubles(key)?.first().map(|alpha| alpha / rank as f64),
            None => configs.alpha(name, rank).map(|(_, scale)| scale),
        };
        let scale = scale.unwrap_or(1.0);
        if let Some(key) = module.roles.get(&Role::Alpha).filter(|_| !scale.is_finite()) {
            not_finite.push((*key).to_owned());
        }
        if let Some(norm) = product_norm(&down_values, &up_values)?.map(|norm| norm * scale.abs())
            && norm.is_finite()
        {
            norms.push((norm, name));
        }
    }
    if norms.is_empty() && not_finite.is_empty() {
        return Ok(None);
    }
    let (largest_norm, largest) = norms.iter().copied().max_by(|a, b| a.0.total_cmp(&b.0)).unwrap_or((0.0, ""));
    Ok(Some(Strength {
        mean_norm: norms.iter().map(|(norm, _)| norm).sum::<f64>() / norms.len().max(1) as f64,
        largest_norm,
        largest_module: largest.to_owned(),
        measured: norms.len(),
        not_finite,
    }))
}

/// `‖B·A‖` of factors `A` `[rank, ...]` and `B` `[out, rank, 1...]`; `None` if they are no such pair.
fn product_norm(down: &Array, up: &Array) -> Result<Option<f64>> {
    let Some((&rank, inputs)) = down.shape.split_first() else { return Ok(None) };
    let outputs = up.shape.first().copied().unwrap_or(0);
    if rank == 0 || up.values.len() != outputs * rank {
        return Ok(None);
    }
    let down = Cpu.reshape(down, &[rank, inputs.iter().product()])?;
    let up = Cpu.transpose(&Cpu.reshape(up, &[outputs, rank])?)?; // [rank, out]
    let down = Cpu.linear(&down, &down)?; // [rank, rank]
    let up = Cpu.linear(&up, &up)?; // [rank, rank]
    let products = down.values.iter().zip(&up.values).map(|(a, b)| f64::from(*a) * f64::from(*b));
    // A sum that is no number must stay one: `max` would hide it.
    let sum: f64 = products.sum();
    Ok(Some(if sum < 0.0 { 0.0 } else { sum.sqrt() }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_norm_of_a_product_needs_no_product() {
        let down = Cpu.tensor(&[1.0, 2.0, -1.0, 0.5, 0.25, 3.0], &[2, 3]).unwrap();
        let up = Cpu.tensor(&[1.0, -2.0, 0.5, 4.0], &[2, 2]).unwrap();
        let product = Cpu.matmul(&up, &down).unwrap();
        let direct = product.values.iter().map(|value| f64::from(value * value)).sum::<f64>().sqrt();
        assert!((product_norm(&down, &up).unwrap().unwrap() - direct).abs() < 1e-5);
    }
}
