//! What is taken out of a merged model is what was merged into it.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    collections::BTreeMap,
    num::NonZeroUsize,
    path::{Path, PathBuf},
};

use lora_core::{
    Adapter, Array, Backend, Cpu,
    extract::{ExtractError, Extracted, Extraction, extract},
    format::{AdapterFile, BaseModel, Component, Dtype, Strengths, TensorData, merge, write_tensors},
    resize::{Cut, Search},
};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/formats")
}

/// The model with some tensors changed, as one file a component, in `dtype`.
fn write_model(folder: &Path, base: &BaseModel, changed: &BTreeMap<(Component, String), Array>, dtype: Dtype) {
    std::fs::create_dir_all(folder).unwrap();
    for component in base.components() {
        let tensors: Vec<(String, TensorData<'_>)> = base
            .tensors(component)
            .map(|(name, _, _)| {
                let array = match changed.get(&(component, name.to_owned())) {
                    Some(array) => array.clone(),
                    None => base.read(component, name).unwrap().unwrap(),
                };
                (name.to_owned(), TensorData::from_f32(dtype, &*array.shape, &array.values).unwrap())
            })
            .collect();
        write_tensors(&folder.join(format!("{}.safetensors", component.name())), &tensors, &BTreeMap::new()).unwrap();
    }
}

fn rank(rank: usize, search: Search) -> Extraction {
    let cut = Cut::rank(NonZeroUsize::new(rank).unwrap());
    Extraction { linear: cut, kernels: cut, search }
}

fn extracted(base: &BaseModel, tuned: &Path, extraction: Extraction) -> Result<Extracted, ExtractError> {
    extract(base, &BaseModel::open(tuned).unwrap(), extraction, &|_, _| ())
}

fn norm(array: &Array) -> f32 {
    array.values.iter().map(|value| value * value).sum::<f32>().sqrt()
}

#[test]
fn an_adapter_comes_back_out_of_the_model_that_it_was_merged_into() {
    let base = BaseModel::open(&fixtures().join("bases/sd15")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let case = fixtures().join("kohya_sd15_locon/adapter.safetensors");
    let file = AdapterFile::read(&case, &base).unwrap();
    let changed = merge(&mut |component, name| base.read(component, name), &[(&file, &Strengths::all(1.0))]).unwrap();
    write_model(folder.path(), &base, &changed, Dtype::F32);
    for search in [Search::Randomised, Search::Whole] {
        let result = extracted(&base, folder.path(), rank(8, search)).unwrap();
        assert_eq!((result.modules.len(), result.left_out.len()), (file.modules.len(), 0));
        assert!(result.unchanged > 0 && result.missing.is_empty());
        for module in &file.modules {
            let same = |found: &&lora_core::extract::ExtractedModule| {
                (found.module.component, &found.module.path) == (module.component, &module.path)
            };
            let found = result.modules.iter().find(same).unwrap();
            let zero = Array::full(module.weight.clone(), 0.0);
            let [want, got] =
                [&module.adapter, &found.module.adapter].map(|adapter| adapter.delta(&Cpu, &zero).unwrap());
            let error = norm(&Cpu.sub(&want, &got).unwrap()) / norm(&want);
            assert!(error < 1e-4, "{} {error}", module.path);
            assert!(found.energy > 0.9999 && found.relative > 0.0);
        }
    }
}

#[test]
fn what_has_no_place_in_a_low_rank_file_is_named_and_rounding_is_no_difference() {
    let base = BaseModel::open(&fixtures().join("bases/sd15")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    write_model(&folder.path().join("half"), &base, &BTreeMap::new(), Dtype::F16);
    let result = extracted(&base, &folder.path().join("half"), rank(2, Search::Randomised)).unwrap();
    assert_eq!((result.modules.len(), result.left_out.len()), (0, 0));

    let norm = (Component::Unet, "conv_norm_out.weight".to_owned());
    let table = (Component::TextEncoder, "text_model.embeddings.token_embedding.weight".to_owned());
    let bias = (Component::Unet, "conv_in.bias".to_owned());
    let changed: BTreeMap<_, _> = [norm, table, bias]
        .into_iter()
        .map(|place| {
            let array = base.read(place.0, &place.1).unwrap().unwrap();
            let values = array.values.iter().map(|value| value + 0.125).collect();
            (place, Array { values, ..array })
        })
        .collect();
    write_model(&folder.path().join("norm"), &base, &changed, Dtype::F32);
    let result = extracted(&base, &folder.path().join("norm"), rank(2, Search::Randomised)).unwrap();
    let mut names: Vec<_> = result.left_out.iter().map(|left| left.tensor.clone()).collect();
    names.sort();
    assert!(result.modules.is_empty() && result.left_out.iter().all(|left| left.relative > 0.0));
    assert_eq!(names, ["conv_in.bias", "conv_norm_out.weight", "text_model.embeddings.token_embedding.weight"]);
}

#[test]
fn models_that_are_not_the_same_are_refused_with_what_differs() {
    let base = BaseModel::open(&fixtures().join("bases/sd15")).unwrap();
    let other = extracted(&base, &fixtures().join("bases/sdxl"), rank(2, Search::Randomised)).unwrap_err();
    assert!(matches!(other, ExtractError::Families { .. }), "{other}");
    let folder = tempfile::tempdir().unwrap();
    let place = (Component::Unet, "conv_in.weight".to_owned());
    let smaller = Cpu.narrow(&base.read(place.0, &place.1).unwrap().unwrap(), 0, 0, 4).unwrap();
    write_model(folder.path(), &base, &BTreeMap::from([(place, smaller)]), Dtype::F32);
    let error = extracted(&base, folder.path(), rank(2, Search::Randomised)).unwrap_err();
    assert!(error.to_string().starts_with("unet.conv_in.weight is ["), "{error}");
}
