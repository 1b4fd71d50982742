//! Merging adapters into base weights, in memory: the plain form that every faster way is measured against.
//!
//! Each weight is widened to `f32`, the adapters are applied in the given order in `f32`, and whoever stores the result
//! rounds it once (`docs/formats.md` §9).

use std::collections::BTreeMap;

use super::{AdaptedModule, AdapterFile, Component, Replacement, strength::Strengths};
use crate::{Adapter, AnyAdapter, Array, Backend, Cpu, Error, Result};

/// The tensors that adapters change, by component and name, in `f32`.
pub type Changed = BTreeMap<(Component, String), Array>;

/// The weights and biases of a base after some adapters.
///
/// `read` gives a tensor of the base by component and name, `None` if there is none of that name. Adapters of strength 0
/// and scale 0 leave no trace: what no adapter changes is not in the result.
///
/// # Errors
/// What `read` returns, and shapes that do not fit: an adapter that was read against another base.
pub fn merge(
    read: &mut dyn FnMut(Component, &str) -> Result<Option<Array>>,
    adapters: &[(&AdapterFile, &Strengths)],
) -> Result<Changed> {
    let parts: Vec<_> =
        adapters.iter().map(|(file, strengths)| (&*file.modules, &*file.replacements, *strengths)).collect();
    merge_parts(read, &parts)
}

/// Adapters and whole tensors of one file, and how strongly they act.
pub(super) type Acting<'a> = (&'a [AdaptedModule], &'a [Replacement], &'a Strengths);

/// [`merge`] of what was taken out of files.
pub(super) fn merge_parts(
    read: &mut dyn FnMut(Component, &str) -> Result<Option<Array>>,
    adapters: &[Acting<'_>],
) -> Result<Changed> {
    let mut changed = Changed::new();
    for (modules, replacements, strengths) in adapters {
        let replace = |changed: &mut Changed, read: &mut dyn FnMut(_, &str) -> _, under_adapters| {
            let mut wanted_now = replacements.iter().filter(|new| new.under_adapters == under_adapters);
            wanted_now.try_for_each(|new| match strength_of_tensor(strengths, new) != 0.0 {
                true => put(changed, read, new),
                false => Ok(()),
            })
        };
        replace(&mut changed, read, true)?;
        for module in *modules {
            let strength = strengths.of(module.component, &module.path);
            if strength != 0.0 && does_something(&module.adapter) {
                apply(&mut changed, read, module.component, &module.path, &module.adapter, strength)?;
            }
        }
        replace(&mut changed, read, false)?;
    }
    Ok(changed)
}

/// The strength of the module that a whole tensor belongs to.
pub(super) fn strength_of_tensor(strengths: &Strengths, new: &Replacement) -> f64 {
    let path = new.tensor.rsplit_once('.').map_or(&*new.tensor, |(path, _)| path);
    strengths.of(new.component, path)
}

/// One adapter on one module.
fn apply(
    changed: &mut Changed,
    read: &mut dyn FnMut(Component, &str) -> Result<Option<Array>>,
    component: Component,
    path: &str,
    adapter: &AnyAdapter<Array>,
    strength: f64,
) -> Result<()> {
    let (weight_name, bias_name) = (format!("{path}.weight"), format!("{path}.bias"));
    let mut now = |name: &String| match changed.get(&(component, name.clone())) {
        Some(array) => Ok(Some(array.clone())),
        None => read(component, name),
    };
    let misfit = || Error::Shapes { operation: "merge of a module that the base lacks", shapes: Vec::new() };
    let weight = now(&weight_name)?.ok_or_else(misfit)?;
    if touches_weight(adapter) {
        let merged = adapter.merge(&Cpu, &weight, strength)?;
        changed.insert((component, weight_name), merged);
    }
    let mut now = |name: &String| match changed.get(&(component, name.clone())) {
        Some(array) => Ok(Some(array.clone())),
        None => read(component, name),
    };
    let bias = now(&bias_name)?;
    if let Some(change) = adapter.bias_change(&Cpu, bias.as_ref(), strength)? {
        let merged = match &bias {
            Some(bias) => Cpu.add(bias, &Cpu.reshape(&change, &bias.shape)?)?,
            None => change,
        };
        changed.insert((component, bias_name), merged);
    }
    Ok(())
}

/// Whether the adapter changes the weight: some change the bias alone.
pub(super) fn touches_weight(adapter: &AnyAdapter<Array>) -> bool {
    !matches!(adapter, AnyAdapter::Full(full) if full.diff.is_none())
}

/// Puts a whole tensor, or rows of one, in place.
fn put(
    changed: &mut Changed,
    read: &mut dyn FnMut(Component, &str) -> Result<Option<Array>>,
    new: &Replacement,
) -> Result<()> {
    let place = (new.component, new.tensor.clone());
    let Some(rows) = &new.rows else {
        let now = match changed.get(&place) {
            Some(_) => None,
            None => read(new.component, &new.tensor)?,
        };
        // Tables under an adapter are normally the base's own: then nothing has changed.
        if now.as_ref() != Some(&new.value) {
            changed.insert(place, new.value.clone());
        }
        return Ok(());
    };
    let now = match changed.remove(&place) {
        Some(array) => Some(array),
        None => read(new.component, &new.tensor)?,
    };
    let misfit = || Error::Shapes { operation: "rows of a table", shapes: vec![new.value.shape.clone()] };
    let mut table = now.ok_or_else(misfit)?;
    let width = new.value.shape.get(1).copied().filter(|width| *width > 0).ok_or_else(misfit)?;
    for (row, values) in rows.iter().zip(new.value.values.chunks(width)) {
        table.values.get_mut(row * width..(row + 1) * width).ok_or_else(misfit)?.copy_from_slice(values);
    }
    changed.insert(place, table);
    Ok(())
}

/// Whether the adapter has any effect: a scale of 0 takes everything away, except from magnitudes.
pub(super) fn does_something(adapter: &AnyAdapter<Array>) -> bool {
    match adapter {
        AnyAdapter::Lora(_) | AnyAdapter::Loha(_) | AnyAdapter::Lokr(_) | AnyAdapter::Glora(_) => {
            Adapter::<Cpu>::scale(adapter) != 0.0
        }
        _ => true,
    }
}
