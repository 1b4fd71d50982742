//! Loaded adapters on a model: files and their dialects are [`lora_core::format`]'s business, layers are projections.

use std::{collections::BTreeMap, path::PathBuf};

use lora_core::{
    Backend,
    format::{AdapterFile, Component, Strengths},
};

use crate::{Error, Projection, Result};

/// Adapter files on a model, which can be turned up, down and off without anything being read again.
#[derive(Debug)]
pub struct Attachments {
    files: Vec<AttachedFile>,
    /// The number that the projections know the first of them by.
    first: usize,
}

#[derive(Debug)]
struct AttachedFile {
    path: PathBuf,
    /// What of it has no place beside a layer: it may be there as long as it has no strength.
    homeless: Vec<(Component, String)>,
}

/// Puts adapters beside the projections of a base (all its components together), those without strength too.
///
/// # Errors
/// If an adapter with a strength belongs to no projection: differences of norms and embeddings, and tensors that a file
/// brings whole, can only be merged into the base.
pub fn attach<'a>(
    projections: impl IntoIterator<Item = &'a mut Projection>,
    adapters: &[(&AdapterFile, &Strengths)],
) -> Result<Attachments> {
    let mut places: BTreeMap<(Option<Component>, String), &mut Projection> = projections
        .into_iter()
        .map(|projection| ((projection.component(), projection.path().to_owned()), projection))
        .collect();
    let first = places.values().map(|place| place.next_file()).max().unwrap_or(0);
    let mut files = Vec::new();
    for (number, (file, strengths)) in adapters.iter().enumerate() {
        let whole = file.replacements.iter().map(|new| (new.component, new.tensor.clone()));
        let mut attached = AttachedFile { path: file.path.clone(), homeless: whole.collect() };
        for module in &file.modules {
            if !places.contains_key(&(Some(module.component), module.path.clone())) {
                attached.homeless.push((module.component, module.path.clone()));
            }
        }
        attached.check(strengths)?;
        for module in &file.modules {
            let Some(place) = places.get_mut(&(Some(module.component), module.path.clone())) else { continue };
            let on = place.backend();
            let adapter = module.adapter.map(&mut |_, array| on.tensor(&array.values, &array.shape))?;
            place.attach_from(first + number, adapter, strengths.of(module.component, &module.path));
        }
        files.push(attached);
    }
    Ok(Attachments { files, first })
}

impl Attachments {
    /// Sets the strengths of all files, in the order in which they were attached, on the model that they were attached to;
    /// one that is at 0 costs memory and nothing else.
    ///
    /// # Errors
    /// If what a file has a strength for can only be merged into the base; nothing is changed then.
    pub fn set<'a>(
        &self,
        projections: impl IntoIterator<Item = &'a mut Projection>,
        strengths: &[Strengths],
    ) -> Result<()> {
        for (file, strengths) in self.files.iter().zip(strengths) {
            file.check(strengths)?;
        }
        for projection in projections {
            let Some(component) = projection.component() else { continue };
            for (number, strengths) in strengths.iter().enumerate() {
                let strength = strengths.of(component, projection.path());
                projection.set_strength(self.first + number, strength);
            }
        }
        Ok(())
    }
}

impl AttachedFile {
    fn check(&self, strengths: &Strengths) -> Result<()> {
        match self.homeless.iter().find(|(component, name)| strengths.of(*component, name) != 0.0) {
            Some((_, name)) => Err(Error::NotAttachable { path: self.path.clone(), name: name.clone() }),
            None => Ok(()),
        }
    }
}
