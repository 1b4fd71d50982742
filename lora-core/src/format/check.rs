//! What every module of an adapter file comes to on a base: it fits and acts, changes nothing, or does not fit.
//!
//! Reads as [`AdapterFile::of`] does, but keeps no numbers, and does not stop at the first module of another shape.

use rayon::prelude::*;

use super::{
    AdapterFile, BaseModel, Component, Fault, Misfit, TensorFile, adapter_stream, names::Place, sorted_keys::SortedKeys,
};
use crate::{Error, Result, adapter::Idle};

/// An adapter file, checked against a base module by module.
#[derive(Debug)]
pub struct Check {
    /// What is known of the file: keys, warnings, metadata, but no modules and no whole tensors.
    pub file: AdapterFile,
    /// The modules of the base that it has keys for.
    pub modules: Vec<CheckedModule>,
}

/// What a file has for one module.
#[derive(Debug)]
pub struct CheckedModule {
    /// The part of the model.
    pub component: Component,
    /// The module's path in the base.
    pub path: String,
    /// How many keys of the file are for it.
    pub keys: usize,
    /// What they come to.
    pub outcome: Outcome,
    /// The rank that the configuration gives it and that of the tensors, where they differ.
    pub ranks: Option<[usize; 2]>,
}

/// What the tensors of a module come to.
#[derive(Debug)]
pub enum Outcome {
    /// They fit, and change it.
    Acts,
    /// They fit, and change nothing.
    Idle(Idle),
    /// They do not fit it.
    Misfit(Box<Misfit>),
}

impl CheckedModule {
    /// Why it changes nothing, if it fits and does not.
    pub fn idle(&self) -> Option<Idle> {
        match self.outcome {
            Outcome::Idle(idle) => Some(idle),
            _ => None,
        }
    }
}

impl Check {
    /// Checks a file against a base; a configuration is looked for beside the file.
    ///
    /// # Errors
    /// As [`AdapterFile::of`], but for modules of other shapes.
    pub fn of(file: &TensorFile, base: &BaseModel) -> Result<Self> {
        let sorted = SortedKeys::of(file, base)?;
        let places: Vec<&Place> = sorted.places().collect();
        let checked: Vec<Result<_>> = places.par_iter().map(|place| checked(&sorted, file, base, place)).collect();
        let mut check = Self { file: sorted.found.clone(), modules: Vec::new() };
        for checked in checked {
            let (module, mut read) = checked?;
            check.file.warnings.append(&mut read.warnings);
            check.modules.push(module);
        }
        Ok(check)
    }

    /// The modules that do not fit.
    pub fn misfits(&self) -> impl Iterator<Item = (&CheckedModule, &Misfit)> {
        self.modules.iter().filter_map(|module| match &module.outcome {
            Outcome::Misfit(misfit) => Some((module, &**misfit)),
            _ => None,
        })
    }

    /// The modules that fit and change nothing.
    pub fn idle(&self) -> impl Iterator<Item = (&CheckedModule, Idle)> {
        self.modules.iter().filter_map(|module| Some((module, module.idle()?)))
    }

    /// How many keys take part.
    pub fn applied(&self) -> usize {
        self.file.applied() - self.misfits().map(|(module, _)| module.keys).sum::<usize>()
    }
}

fn checked(
    sorted: &SortedKeys,
    file: &TensorFile,
    base: &BaseModel,
    place: &Place,
) -> Result<(CheckedModule, AdapterFile)> {
    let mut read = adapter_stream::empty();
    let outcome = match sorted.assemble(file, base, place, &mut read) {
        Ok(()) => read.idle().map_or(Outcome::Acts, Outcome::Idle),
        Err(Error::File { path, fault }) => match *fault {
            Fault::Misfit(misfit) => Outcome::Misfit(misfit),
            fault => return Err(Error::File { path, fault: Box::new(fault) }),
        },
        Err(other) => return Err(other),
    };
    let rank = read.modules.first().and_then(|module| module.adapter.rank());
    let ranks = sorted.configured_rank(place).zip(rank).filter(|(configured, rank)| configured != rank);
    let (component, path) = place.clone();
    let ranks = ranks.map(|(configured, rank)| [configured, rank]);
    Ok((CheckedModule { component, path, keys: sorted.keys_of(place), outcome, ranks }, read))
}

impl AdapterFile {
    /// Why none of its modules changes anything; `None` if one does, or a tensor is brought whole.
    pub(super) fn idle(&self) -> Option<Idle> {
        let mut reasons = self.modules.iter().map(|module| module.adapter.idle());
        let first = reasons.next()??;
        (self.replacements.is_empty() && reasons.all(|idle| idle.is_some())).then_some(first)
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, path::Path};

    use super::*;
    use crate::format::{Dtype, TensorData, tensors_to_bytes};

    fn file(tensors: &[(&str, &[usize], f32)]) -> TensorFile {
        let data = |(name, shape, value): &(&str, &[usize], f32)| {
            let values = vec![*value; shape.iter().product()];
            ((*name).to_owned(), TensorData::from_f32(Dtype::F32, *shape, &values).unwrap())
        };
        let path = Path::new("adapter.safetensors");
        let bytes = tensors_to_bytes(path, &tensors.iter().map(data).collect::<Vec<_>>(), &BTreeMap::new()).unwrap();
        TensorFile::from_bytes(path, bytes).unwrap()
    }

    #[test]
    fn every_module_is_accounted_for() {
        let module = |name: &str| (Component::Unet, format!("{name}.weight"), vec![6, 8]);
        let base = BaseModel::from_shapes(["a", "b", "c"].map(module));
        let check = Check::of(
            &file(&[
                ("unet.a.lora_A.weight", &[2, 8], 1.0),
                ("unet.a.lora_B.weight", &[6, 2], 1.0),
                ("unet.b.lora_A.weight", &[2, 8], 1.0),
                ("unet.b.lora_B.weight", &[6, 2], 0.0),
                ("unet.c.lora_A.weight", &[2, 9], 1.0),
                ("unet.c.lora_B.weight", &[6, 2], 1.0),
                ("unet.d.lora_B.weight", &[6, 2], 1.0),
            ]),
            &base,
        )
        .unwrap();
        assert!(matches!(check.modules[0].outcome, Outcome::Acts));
        let idle: Vec<_> = check.idle().map(|(module, idle)| (&*module.path, idle)).collect();
        assert_eq!(idle, [("b", Idle::Up)]);
        let misfits: Vec<_> =
            check.misfits().map(|(_, misfit)| (&*misfit.key, &*misfit.shape, &*misfit.base)).collect();
        assert_eq!(misfits, [("unet.c.lora_A.weight", &[2, 9][..], &[6, 8][..])]);
        assert_eq!((check.applied(), check.file.keys, check.file.unapplied.len()), (4, 7, 1));
    }
}
