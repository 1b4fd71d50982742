//! How large the update of an adapter file is, without forming it.
//!
//! By [`product_norm`], module by module on all cores, so that files of hundreds of megabytes take a moment. Families other than plain low-rank products count only for whether their numbers are finite.

use std::collections::BTreeMap;

use lora_core::{Array, Part, Result, backend::decompose::product_norm, format::Role, format::TensorFile};
use rayon::prelude::*;
use serde::Serialize;

use super::{Module, OutsideAlpha};

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

/// Measures the low-rank modules of a file; `None` if it has none.
pub(super) fn strength(
    file: &TensorFile,
    modules: &BTreeMap<&str, Module<'_>>,
    outside: OutsideAlpha,
) -> Result<Option<Strength>> {
    let measured: Vec<Measured<'_>> =
        modules.par_iter().map(|(name, module)| measure(file, name, module, outside)).collect::<Result<_>>()?;
    let not_finite = measured.iter().flat_map(|module| &module.not_finite).map(|key| (*key).to_owned()).collect();
    let norms: Vec<(f64, &str)> = measured.iter().filter_map(|module| Some((module.norm?, module.name))).collect();
    let Some((largest_norm, largest)) = norms.iter().copied().max_by(|a, b| a.0.total_cmp(&b.0)) else {
        return Ok(None);
    };
    Ok(Some(Strength {
        mean_norm: norms.iter().map(|(norm, _)| norm).sum::<f64>() / norms.len() as f64,
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

fn measure<'a>(file: &TensorFile, name: &'a str, module: &Module<'a>, outside: OutsideAlpha) -> Result<Measured<'a>> {
    let mut measured = Measured { name, norm: None, not_finite: Vec::new() };
    let get = |part| module.roles.get(&Role::Factor(part)).copied();
    let (Some(down_key), Some(up_key)) = (get(Part::Down), get(Part::Up)) else { return Ok(measured) };
    let (down, up) = (file.array(down_key)?, file.array(up_key)?);
    measured
        .not_finite
        .extend([(down_key, &down), (up_key, &up)].iter().filter(|(_, a)| !a.is_finite()).map(|(key, _)| *key));
    if get(Part::Mid).is_some() || module.roles.contains_key(&Role::DoraScale) {
        return Ok(measured);
    }
    let rank = down.shape.first().copied().unwrap_or(0);
    let alpha = match module.roles.get(&Role::Alpha) {
        Some(key) => file.doubles(key)?.first().copied(),
        None => outside.alpha,
    };
    let divisor = if outside.rank_stabilised { (rank as f64).sqrt() } else { rank as f64 };
    let scale = alpha.map_or(1.0, |alpha| alpha / divisor);
    measured.norm = norm(down, up)?.map(|norm| norm * scale.abs());
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
