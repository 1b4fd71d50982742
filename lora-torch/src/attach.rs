//! Loaded adapters on a model: files and their dialects are [`lora_core::format`]'s business, layers are projections.

use std::collections::BTreeMap;

use lora_core::{
    Backend,
    format::{AdapterFile, Component, Strengths},
};

use crate::{Error, Projection, Result};

/// Puts adapters beside the projections of a base (all its components together).
///
/// # Errors
/// If an adapter belongs to no projection: differences of norms and embeddings, and tensors that a file brings whole, can
/// only be merged into the base.
pub fn attach<'a>(
    projections: impl IntoIterator<Item = &'a mut Projection>,
    adapters: &[(&AdapterFile, &Strengths)],
) -> Result<()> {
    let mut places: BTreeMap<(Option<Component>, String), &mut Projection> = projections
        .into_iter()
        .map(|projection| ((projection.component(), projection.path().to_owned()), projection))
        .collect();
    for (file, strengths) in adapters {
        let refused = |name: String| Error::NotAttachable { path: file.path.clone(), name };
        if let Some(whole) = file.replacements.iter().find(|new| strengths.of(new.component, &new.tensor) != 0.0) {
            return Err(refused(whole.tensor.clone()));
        }
        for module in &file.modules {
            let strength = strengths.of(module.component, &module.path);
            if strength == 0.0 {
                continue;
            }
            let Some(place) = places.get_mut(&(Some(module.component), module.path.clone())) else {
                return Err(refused(module.path.clone()));
            };
            let on = place.backend();
            let adapter = module.adapter.map(&mut |_, array| on.tensor(&array.values, &array.shape))?;
            place.attach(adapter, strength);
        }
    }
    Ok(())
}
