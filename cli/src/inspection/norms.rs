//! How large the update of an adapter file is, without forming it.
//!
//! By [`product_norm`], module by module on all cores, so that files of hundreds of megabytes take a moment. Families other than plain low-rank products count only for whether their numbers are finite.

use std::collections::BTreeMap;

use lora_core::{Array, Part, Result, backend::decompose::product_norm, format::Role, format::TensorFile};
use rayon::prelude::*;
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
    let measured: Vec<Measured<'_>> =
        modules.par_iter().map(|(name, module)| measure(file, name, module, configs)).collect::<Result<_>>()?;
    let not_finite: Vec<String> =
        measured.iter().flat_map(|module| &module.not_finite).map(|key| (*key).to_owned()).collect();
    let norms: Vec<(f64, &str)> = measured.iter().filter_map(|module| Some((module.norm?, module.name))).collect();
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

/// What the numbers of one module tell.
struct Measured<'a> {
    name: &'a str,
    /// Of ΔW, where the module is a plain product.
    norm: Option<f64>,
    not_finite: Vec<&'a str>,
}

fn measure<'a>(file: &TensorFile, name: &'a str, module: &Module<'a>, configs: &Configs) -> Result<Measured<'a>> {
    let mut measured = Measured { name, norm: None, not_finite: Vec::new() };
    let get = |part| module.roles.get(&Role::Factor(part)).copied();
    let (Some(down_key), Some(up_key)) = (get(Part::Down), get(Part::Up)) else { return Ok(measured) };
    let (down, up) = (file.array(down_key)?, file.array(up_key)?);
    measured
        .not_finite
        .extend([(down_key, &down), (up_key, &up)].iter().filter(|(_, a)| !a.is_finite()).map(|(key, _)| *key));
    if !measured.not_finite.is_empty() || get(Part::Mid).is_some() || module.roles.contains_key(&Role::DoraScale) {
        return Ok(measured);
    }
    let rank = down.shape.first().copied().unwrap_or(0);
    let scale = match module.roles.get(&Role::Alpha) {
        Some(key) => file.doubles(key)?.first().map(|alpha| alpha / rank as f64),
        None => configs.alpha(name, rank).map(|(_, scale)| scale),
    };
    let scale = scale.unwrap_or(1.0);
    if let Some(key) = module.roles.get(&Role::Alpha).filter(|_| !scale.is_finite()) {
        measured.not_finite.push(key);
    }
    measured.norm = norm(down, up)?.map(|norm| norm * scale.abs()).filter(|norm| norm.is_finite());
    Ok(measured)
}

/// `‖B·A‖` of factors `A` `[rank, ...]` and `B` `[out, rank, 1...]`; `None` if they are no such pair.
fn norm(down: Array, up: Array) -> Result<Option<f64>> {
    let Some((&rank, inputs)) = down.shape.split_first() else { return Ok(None) };
    let (outputs, inputs) = (up.shape.first().copied().unwrap_or(0), inputs.iter().product());
    if rank == 0 || down.values.is_empty() || up.values.is_empty() || up.values.len() != outputs * rank {
        return Ok(None);
    }
    product_norm(&Array::new([outputs, rank], up.values)?, &Array::new([rank, inputs], down.values)?).map(Some)
}
