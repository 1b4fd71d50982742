//! Loaded adapters on a base: beside its layers, or merged into its weights before they are loaded.
//!
//! Beside costs a little in every step and can be taken off again; merged costs nothing afterwards. Both give the same
//! pictures. Files and their dialects are [`lora_core::format`]'s business.

use std::collections::BTreeMap;

use lora_core::{
    Backend,
    format::{AdapterFile, BaseModel, Changed, Component, Strengths, merge},
};
use lora_torch::Projection;

use crate::{Error, Result};

/// Puts adapters beside the projections of a base (those of its UNet and text encoders together).
///
/// # Errors
/// If an adapter belongs to no projection: differences of norms and embeddings, and tensors that a file brings whole, can
/// only be [merged](merge_into).
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

/// The tensors of a base that adapters change, in f32, for [`BaseFiles::change`](crate::BaseFiles::change).
///
/// # Errors
/// If a tensor cannot be read, or an adapter was read against another base.
pub fn merge_into(base: &BaseModel, adapters: &[(&AdapterFile, &Strengths)]) -> Result<Changed> {
    Ok(merge(&mut |component, name| base.read(component, name), adapters)?)
}
