//! How large the updates of an adapter file are, module by module, without a base.
//!
//! Read by the same reader as everything else, against the base that the file implies. What multiplies the weight does not say
//! how wide it is, and need not: a weight of any width shows how far it is turned.

use rayon::prelude::*;

use super::{TensorFile, adapter_stream, alone::looked_at_base, names::Place, sorted_keys::SortedKeys};
use crate::{
    AnyAdapter, Array, Part, Result, UpdateSize,
    adapter::{Idle, Loha, oft},
    format::{Key, Role, header::count},
};

/// A module of a file, measured.
#[derive(Debug)]
pub struct Measured {
    /// The module, as the file spells it.
    pub name: String,
    /// How large its update is: `None` where the file alone does not tell (DoRA, GLoRA, a bias), or telling would take long
    /// ([`measure`]); an error where its tensors make no adapter.
    pub size: Result<Option<UpdateSize>>,
    /// Why it changes nothing, if it does not.
    pub idle: Option<Idle>,
}

/// Measures every module of an adapter file, on all cores.
///
/// Families are left out that would take longer than a look at a file should: LoHa of a high rank, OFT and BOFT of large blocks.
///
/// # Errors
/// If the file as a whole cannot be read as an adapter.
pub fn measure(file: &TensorFile) -> Result<Vec<Measured>> {
    let base = looked_at_base(file);
    let sorted = SortedKeys::of(file, &base)?;
    // Of two cores, products make 10¹¹ multiplications a second and the elimination that turns take 10⁹.
    let (skips_loha, skips_turns) = (loha_work(file) > 10_000_000_000, turn_work(file) > 100_000_000);
    let is_skipped = |adapter: &AnyAdapter<Array>| match adapter {
        AnyAdapter::Loha(_) => skips_loha,
        AnyAdapter::Oft(_) | AnyAdapter::Boft(_) => skips_turns,
        _ => false,
    };
    let measured = |place: &Place| -> Result<(Option<UpdateSize>, Option<Idle>)> {
        let mut one = adapter_stream::empty();
        sorted.assemble(file, &base, place, &mut one)?;
        let wanted = one.modules.iter().map(|module| &module.adapter).filter(|adapter| !is_skipped(adapter));
        let sizes = wanted.map(AnyAdapter::update_size).collect::<Result<Vec<_>>>()?;
        Ok((sizes.into_iter().flatten().next(), one.idle()))
    };
    let places: Vec<&Place> = sorted.places().collect();
    let named = |place: &&Place| {
        let (size, idle) = match measured(place) {
            Ok((size, idle)) => (Ok(size), idle),
            Err(error) => (Err(error), None),
        };
        Measured { name: place.1.clone(), size, idle }
    };
    Ok(places.par_iter().map(named).collect())
}

/// Multiplications that all LoHa of a file take; a core makes little difference.
fn loha_work(file: &TensorFile) -> usize {
    let shape = |key: &str| file.info(key).map(|info| info.shape.as_slice()).unwrap_or_default();
    let work = |name: &str| {
        let key = Key::parse(name).filter(|key| key.role == Role::Factor(Part::HadaW1B))?;
        let other = |suffix: &str| shape(&format!("{}.hada_{suffix}", key.module));
        let (&[rank, inner, ..], &[first, last, ..], &[second, ..]) = (shape(name), other("w1_a"), other("w2_b"))
        else {
            return None;
        };
        let (out, kernel) = match other("t1") {
            [_, _, kernel @ ..] => (last, count(kernel)),
            _ => (first, 1),
        };
        Some(Loha::size_work([out, inner.saturating_mul(kernel)], [rank, second]))
    };
    file.names().filter_map(work).fold(0, usize::saturating_add)
}

/// Multiplications that all turns of a file take: the cube of each block's side.
fn turn_work(file: &TensorFile) -> usize {
    let work = |name: &str| {
        let (role, shape) = (Key::parse(name)?.role, &file.info(name)?.shape);
        let side = match role {
            Role::Factor(Part::OftBlocks) => *shape.last()?,
            Role::PeftOft => oft::block_size(*shape.last()?)?,
            _ => return None,
        };
        let blocks = match role {
            Role::PeftOft => *shape.first()?,
            _ => count(&shape[..shape.len().saturating_sub(2)]),
        };
        Some(side.saturating_pow(3).saturating_mul(blocks))
    };
    file.names().filter_map(work).fold(0, usize::saturating_add)
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, path::Path};

    use super::*;
    use crate::{
        Backend, Cpu, Draw, Purpose,
        format::{Dtype, TensorData, tensors_to_bytes},
    };

    fn numbers(sample: u32, shape: &[usize]) -> Array {
        let values = Draw::new(7, Purpose::Noise, 0, sample).normal(shape.iter().product(), 0.2);
        Array { shape: shape.to_vec(), values }
    }

    fn file(tensors: &[(&str, Array)]) -> TensorFile {
        let data = tensors.iter().map(|(name, array)| {
            ((*name).to_owned(), TensorData::from_f32(Dtype::F32, &*array.shape, &array.values).unwrap())
        });
        let path = Path::new("adapter.safetensors");
        let bytes = tensors_to_bytes(path, &data.collect::<Vec<_>>(), &BTreeMap::new()).unwrap();
        TensorFile::from_bytes(path, bytes).unwrap()
    }

    #[test]
    fn modules_are_measured_under_the_names_that_the_file_gives_them() {
        let (down, up, w1, w2) = (numbers(1, &[2, 8]), numbers(2, &[6, 2]), numbers(3, &[2, 2]), numbers(4, &[3, 4]));
        let (blocks, magnitude) = (numbers(5, &[2, 4, 4]), numbers(6, &[6, 1]));
        let measured = measure(&file(&[
            ("lora_unet_a.lora_down.weight", down.clone()),
            ("lora_unet_a.lora_up.weight", up.clone()),
            ("lora_unet_a.alpha", Array::full([1], 1.0)),
            ("lora_unet_b.lokr_w1", w1.clone()),
            ("lora_unet_b.lokr_w2", w2.clone()),
            ("lora_unet_c.oft_blocks", blocks),
            ("lora_unet_d.lora_down.weight", down.clone()),
            ("lora_unet_d.lora_up.weight", up.clone()),
            ("lora_unet_d.dora_scale", magnitude),
            ("lora_unet_e.lora_down.weight", Array::full([2, 8], f32::NAN)),
            ("lora_unet_e.lora_up.weight", up.clone()),
        ]))
        .unwrap();
        let names: Vec<&str> = measured.iter().map(|module| &*module.name).collect();
        assert_eq!(names, ["lora_unet_a", "lora_unet_b", "lora_unet_c", "lora_unet_d", "lora_unet_e"]);
        let norm = |at: usize| match measured[at].size {
            Ok(Some(UpdateSize::Norm(norm))) => norm,
            ref other => panic!("{other:?}"),
        };
        let product = Cpu.matmul(&up, &down).unwrap().norm() / 2.0; // alpha 1, rank 2
        assert!((norm(0) / product - 1.0).abs() < 1e-5);
        assert!((norm(1) / (w1.norm() * w2.norm()) - 1.0).abs() < 1e-5);
        assert!(matches!(measured[2].size, Ok(Some(UpdateSize::Share(share))) if share > 0.1 && share < 2.0));
        assert!(matches!((&measured[3].size, &measured[4].size), (Ok(None), Err(_))));
    }

    #[test]
    fn what_would_take_long_is_left_out() {
        let half = |rank: usize| [numbers(1, &[900, rank]), numbers(2, &[rank, 900])];
        let loha = |rank: usize| {
            let [a, b] = half(rank);
            let name = |suffix: &str| format!("lora_unet_a.hada_{suffix}");
            let tensors = [("w1_a", &a), ("w1_b", &b), ("w2_a", &a), ("w2_b", &b)];
            let named: Vec<(String, Array)> = tensors.map(|(suffix, array)| (name(suffix), array.clone())).into();
            file(&named.iter().map(|(name, array)| (&**name, array.clone())).collect::<Vec<_>>())
        };
        assert_eq!(loha_work(&loha(4)), 1800 * 10 * 10);
        assert_eq!(loha_work(&loha(64)), 900 * 900 * (64 + 64 + 3));
        assert!(matches!(measure(&loha(4)).unwrap()[..], [Measured { size: Ok(Some(UpdateSize::Norm(_))), .. }]));
        let blocks = file(&[("lora_unet_a.oft_blocks", Array::full([1, 500, 500], 0.0))]);
        assert_eq!(turn_work(&blocks), 500 * 500 * 500);
        assert!(matches!(measure(&blocks).unwrap()[..], [Measured { size: Ok(None), .. }]));
    }
}
