//! Real adapter files with something broken at random: the answer is a reading or an error, never a panic, and what was
//! read merges or is refused.

use std::{collections::BTreeMap, path::Path};

use lora_core::format::{AdapterFile, BaseModel, Dtype, Strengths, TensorData, TensorFile, merge, write_tensors};
use proptest::prelude::*;

/// Files of every family, and their bases.
const CASES: [(&str, &str); 17] = [
    ("kohya_sd15_locon", "sd15"),
    ("kohya_oft", "sd15"),
    ("lycoris_locon_tucker", "sd15"),
    ("lycoris_dora_in", "sd15"),
    ("lycoris_loha_tucker", "sd15"),
    ("lycoris_loha_dora", "sd15"),
    ("lycoris_lokr_tucker", "sd15"),
    ("lycoris_lokr_both", "sd15"),
    ("lycoris_glora", "sd15"),
    ("lycoris_full", "sd15"),
    ("lycoris_norm", "sd15"),
    ("lycoris_ia3_in", "sd15"),
    ("lycoris_boft_rescaled", "sd15"),
    ("lycoris_oft_rescaled", "sd15"),
    ("diffusers_sd15_dora", "sd15"),
    ("peft_embedding_dora/adapter", "llama"),
    ("peft_oft_neumann/adapter", "llama"),
];

#[derive(Debug, Clone)]
enum Mutation {
    Drop(prop::sample::Index),
    Reshape(prop::sample::Index, Vec<usize>),
    Retype(prop::sample::Index, Dtype),
    Rename(prop::sample::Index, prop::sample::Index),
}

fn mutation() -> impl Strategy<Value = Mutation> {
    let index = any::<prop::sample::Index>;
    prop_oneof![
        index().prop_map(Mutation::Drop),
        (index(), prop::collection::vec(0_usize..14, 0..5)).prop_map(|(index, shape)| Mutation::Reshape(index, shape)),
        (index(), prop::sample::select(Dtype::ALL.to_vec())).prop_map(|(index, dtype)| Mutation::Retype(index, dtype)),
        (index(), index()).prop_map(|(from, to)| Mutation::Rename(from, to)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn a_broken_file_is_read_or_refused((case, name) in prop::sample::select(CASES.to_vec()), mutations in prop::collection::vec(mutation(), 1..4)) {
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/formats");
        let base = BaseModel::open(&fixtures.join("bases").join(name)).unwrap();
        let folder = fixtures.join(case);
        let file = if folder.join("adapter.safetensors").is_file() { "adapter.safetensors" } else { "adapter_model.safetensors" };
        let original = TensorFile::read(&folder.join(file)).unwrap();
        let mut tensors: BTreeMap<String, (Dtype, Vec<usize>)> = original
            .names()
            .map(|name| (name.to_owned(), (original.info(name).unwrap().dtype, original.info(name).unwrap().shape.clone())))
            .collect();
        for mutation in mutations {
            let name = |tensors: &BTreeMap<String, _>, index: prop::sample::Index| {
                (!tensors.is_empty()).then(|| tensors.keys().nth(index.index(tensors.len())).unwrap().clone())
            };
            match mutation {
                Mutation::Drop(index) => if let Some(name) = name(&tensors, index) {
                    tensors.remove(&name);
                },
                Mutation::Reshape(index, shape) => if let Some(name) = name(&tensors, index) {
                    tensors.get_mut(&name).unwrap().1 = shape;
                },
                Mutation::Retype(index, dtype) => if let Some(name) = name(&tensors, index) {
                    tensors.get_mut(&name).unwrap().0 = dtype;
                },
                // The suffix of one key under the module of another.
                Mutation::Rename(from, to) => if let (Some(from), Some(to)) = (name(&tensors, from), name(&tensors, to)) {
                    let (module, suffix) = (to.split_once('.').unwrap().0, from.split_once('.').unwrap().1);
                    let moved = format!("{module}.{suffix}");
                    let tensor = tensors.remove(&from).unwrap();
                    tensors.insert(moved, tensor);
                },
            }
        }
        let written: Vec<(String, TensorData<'static>)> = tensors
            .into_iter()
            .filter_map(|(name, (dtype, shape))| {
                // Small finite numbers in every type.
                let bytes = vec![0x11; dtype.bytes_of(&shape)?];
                Some((name, TensorData::new(dtype, shape, bytes).unwrap()))
            })
            .collect();
        let out = tempfile::tempdir().unwrap();
        let path = out.path().join(file);
        write_tensors(&path, &written, original.metadata()).unwrap();
        let config = folder.join("adapter_config.json");
        if config.is_file() {
            std::fs::copy(config, out.path().join("adapter_config.json")).unwrap();
        }
        match AdapterFile::read(&path, &base) {
            Ok(adapter) => {
                prop_assert_eq!(adapter.applied() + adapter.unapplied.len() + adapter.embeddings.len(), adapter.keys);
                let strengths = Strengths::all(0.5);
                let merged = merge(&mut |component, name| base.read(component, name), &[(&adapter, &strengths)]);
                // What passed the checks of the reader fits; numbers may still have no inverse.
                if let Err(error) = merged {
                    prop_assert!(matches!(error, lora_core::Error::Numeric { .. }), "{}", error);
                }
            }
            Err(error) => prop_assert!(error.to_string().contains(file), "{}", error),
        }
    }
}
