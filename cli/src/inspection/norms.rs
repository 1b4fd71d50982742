//! How large the updates of an adapter file are: those of [`measure`], summed up.

use lora_core::{
    Error, UpdateSize,
    adapter::Idle,
    format::{Fault, TensorFile, measure},
};
use serde::Serialize;

/// How large the update is.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Strength {
    /// Mean Frobenius norm of ΔW over the measured modules.
    pub mean_norm: f64,
    /// The largest of them.
    pub largest_norm: f64,
    /// The module that has it, as the file spells it.
    pub largest_module: String,
    /// Modules whose norm was measured: all families whose update is a fixed matrix.
    pub measured: usize,
    /// Of families that multiply the weight (OFT, BOFT, (IA)³).
    pub turned: Option<Turned>,
    /// Modules of which the file alone does not tell (DoRA, GLoRA, unconverted PiSSA, a bias), or would not soon (LoHa of a high rank,
    /// OFT and BOFT of large blocks).
    pub unmeasured: usize,
    /// Tensors that hold NaN or infinity, one a module.
    pub not_finite: Vec<String>,
    /// Modules whose tensors make no adapter: halves of different ranks, half of a pair.
    pub broken: Vec<String>,
}

/// By how much weights are turned or stretched: `‖ΔW‖ / ‖W‖` of a weight that prefers no direction.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Turned {
    /// The mean over the measured modules.
    pub mean_share: f64,
    /// The largest of them.
    pub largest_share: f64,
    /// The module that has it, as the file spells it.
    pub largest_module: String,
    /// Modules that were measured.
    pub measured: usize,
}

/// Measures the modules of a file and finds those that change nothing; `None` if it cannot be read as an adapter at all.
pub(super) fn strength(file: &TensorFile) -> Option<(Strength, Vec<(String, Idle)>)> {
    let modules = measure(file).ok()?;
    let idle = modules.iter().filter_map(|module| Some((module.name.clone(), module.idle?))).collect();
    let (mut norms, mut shares) = (Vec::new(), Vec::new());
    let mut strength = Strength::default();
    for module in &modules {
        let name = &module.name;
        match &module.size {
            Ok(Some(UpdateSize::Norm(norm))) if norm.is_finite() => norms.push((*norm, name)),
            Ok(Some(UpdateSize::Share(share))) if share.is_finite() => shares.push((*share, name)),
            Ok(_) => strength.unmeasured += 1,
            Err(error) => match fault(error) {
                Some(Fault::NotFinite { key, .. }) => strength.not_finite.push(key.clone()),
                Some(Fault::Unsupported { .. } | Fault::NeedsBase { .. }) => strength.unmeasured += 1,
                _ => strength.broken.push(name.clone()),
            },
        }
    }
    if let Some((mean, largest, module)) = summed_up(&norms) {
        (strength.mean_norm, strength.largest_norm) = (mean, largest);
        strength.largest_module = module.clone();
        strength.measured = norms.len();
    }
    strength.turned = summed_up(&shares).map(|(mean_share, largest_share, module)| Turned {
        mean_share,
        largest_share,
        largest_module: module.clone(),
        measured: shares.len(),
    });
    Some((strength, idle))
}

/// The mean, the largest, and whose it is.
fn summed_up<'a>(sizes: &[(f64, &'a String)]) -> Option<(f64, f64, &'a String)> {
    let (largest, module) = sizes.iter().copied().max_by(|a, b| a.0.total_cmp(&b.0))?;
    Some((sizes.iter().map(|(size, _)| size).sum::<f64>() / sizes.len() as f64, largest, module))
}

fn fault(error: &Error) -> Option<&Fault> {
    match error {
        Error::File { fault, .. } => Some(fault),
        _ => None,
    }
}
