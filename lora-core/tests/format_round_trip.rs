//! What is written reads back: real files through every dialect that can hold them, containers by property. Generated adapters
//! have a file of their own.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use lora_core::{
    Adapter, AnyAdapter, Array, Cpu, Part,
    adapter::OftSide,
    format::{
        AdaptedModule, AdapterFile, BaseModel, Component, Dialect, Dtype, Family, Header, TensorData, TensorFile,
        write_adapter, write_adapter_file, write_tensors,
    },
};
use proptest::prelude::*;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/formats")
}

fn base(name: &str) -> BaseModel {
    BaseModel::open(&fixtures().join("bases").join(name)).unwrap()
}

fn read(case: &str, base: &BaseModel) -> AdapterFile {
    let folder = fixtures().join(case);
    let path =
        if folder.join("adapter").is_dir() { folder.join("adapter") } else { folder.join("adapter.safetensors") };
    AdapterFile::read(&path, base).unwrap()
}

/// Writes modules and reads them back.
fn through(dialect: Dialect, modules: &[AdaptedModule], base: &BaseModel) -> AdapterFile {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("adapter.safetensors");
    write_adapter(&path, dialect, base.family(), modules, &BTreeMap::new(), None).unwrap();
    let file = AdapterFile::read(&path, base).unwrap();
    assert!(file.unapplied.is_empty(), "{:?}", file.unapplied);
    assert_eq!(file.dialect, dialect);
    file
}

/// What a set of modules adds to the weights of a base, by module.
fn changes(file: &AdapterFile, base: &BaseModel) -> BTreeMap<(Component, String), Vec<f32>> {
    let change = |module: &AdaptedModule| {
        let weight = base.read(module.component, &format!("{}.weight", module.path)).unwrap().unwrap();
        let merged = Adapter::<Cpu>::merge(&module.adapter, &Cpu, &weight, 1.0).unwrap();
        let change = merged.values.iter().zip(&weight.values).map(|(new, old)| new - old).collect();
        ((module.component, module.path.clone()), change)
    };
    file.modules.iter().map(change).collect()
}

/// sd-scripts reads a constraint of 0 as "never turn", every other spelling as "no constraint".
#[test]
fn a_block_that_never_turns_stays_so_in_every_spelling() {
    let base = base("sd15");
    let mut read = read("kohya_oft", &base);
    for module in &mut read.modules {
        let AnyAdapter::Oft(oft) = &mut module.adapter else { panic!("{:?}", module.adapter) };
        oft.side = OftSide::Rows { bound: Some(0.0) };
    }
    for dialect in [Dialect::Kohya, Dialect::Comfy] {
        let changes = changes(&through(dialect, &read.modules, &base), &base);
        assert_eq!(changes.len(), read.modules.len());
        assert!(changes.values().flatten().all(|change| *change == 0.0), "{dialect}");
    }
}

/// Keys without `base_model.model.`, in the file and beside the configuration that peft writes.
#[test]
fn a_configuration_counts_even_if_the_keys_have_lost_their_beginning() {
    let base = base("llama");
    let folder = fixtures().join("peft_rslora/adapter");
    let file = TensorFile::open(&folder.join("adapter_model.safetensors")).unwrap();
    let renamed = file.names().map(|name| {
        let info = file.info(name).unwrap();
        let data = TensorData::new(info.dtype, &*info.shape, file.bytes(name).unwrap().to_vec()).unwrap();
        (name.strip_prefix("base_model.model.").unwrap().to_owned(), data)
    });
    let stripped = tempfile::tempdir().unwrap();
    let path = stripped.path().join("adapter_model.safetensors");
    write_tensors(&path, &renamed.collect::<Vec<_>>(), &BTreeMap::new()).unwrap();
    std::fs::copy(folder.join("adapter_config.json"), stripped.path().join("adapter_config.json")).unwrap();
    let whole = changes(&read("peft_rslora", &base), &base);
    assert!(changes(&AdapterFile::read(stripped.path(), &base).unwrap(), &base) == whole);
}

/// The adapters by module; factors as bits, without unit axes.
type Bits = BTreeMap<(Component, String), (Vec<(Part, Vec<usize>, Vec<u32>)>, f32, Dtype)>;

fn bits(modules: &[AdaptedModule]) -> Bits {
    let factors = |adapter: &AnyAdapter<Array>| {
        let factors = Adapter::<Cpu>::factors(adapter).into_iter();
        let mut factors: Vec<_> = factors
            .map(|(part, array)| {
                let shape = array.shape.iter().copied().filter(|length| *length != 1).collect();
                (part, shape, array.values.iter().map(|value| value.to_bits()).collect())
            })
            .collect();
        factors.sort();
        factors
    };
    let entry = |module: &AdaptedModule| {
        let scale = Adapter::<Cpu>::scale(&module.adapter) as f32;
        ((module.component, module.path.clone()), (factors(&module.adapter), scale, module.dtype))
    };
    modules.iter().map(entry).collect()
}

#[test]
fn kohya_to_diffusers_and_back_keeps_every_bit() {
    for (case, name) in [
        ("kohya_sd15_linear", "sd15"),
        ("kohya_sd15_locon", "sd15"),
        ("kohya_sd15_mixed", "sd15"),
        ("kohya_sd15_no_alpha", "sd15"),
        ("kohya_sd15_alpha_zero", "sd15"),
        ("kohya_sd15_conv_as_2d", "sd15"),
        ("kohya_sd15_fp8", "sd15"),
        ("kohya_sd15_ldm_names", "sd15"),
        ("kohya_sd21_linear_as_conv", "sd21"),
        ("kohya_sdxl_ldm_all", "sdxl"),
        ("kohya_sdxl_te2", "sdxl"),
        ("lycoris_sdxl_text_projection", "sdxl"),
        ("lycoris_dora_out", "sd15"),
        ("diffusers_sd15_dora", "sd15"),
        ("diffusers_sdxl_metadata", "sdxl"),
    ] {
        let base = base(name);
        let original = read(case, &base);
        let diffusers = through(Dialect::Diffusers, &original.modules, &base);
        assert_eq!(bits(&diffusers.modules), bits(&original.modules), "{case} in diffusers");
        let kohya = through(Dialect::Kohya, &diffusers.modules, &base);
        assert_eq!(bits(&kohya.modules), bits(&original.modules), "{case} in kohya");
        let comfy = through(Dialect::Comfy, &kohya.modules, &base);
        assert_eq!(bits(&comfy.modules), bits(&original.modules), "{case} in comfy");
    }
}

#[test]
fn a_kohya_file_written_again_has_the_same_keys_and_factors() {
    for (case, name) in [("kohya_sd15_linear", "sd15"), ("kohya_sd15_locon", "sd15"), ("kohya_sdxl_ldm_all", "sdxl")] {
        let base = base(name);
        let original = read(case, &base);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("adapter.safetensors");
        write_adapter(&path, Dialect::Kohya, base.family(), &original.modules, &BTreeMap::new(), None).unwrap();
        let (old, new) = (TensorFile::open(&original.path).unwrap(), TensorFile::open(&path).unwrap());
        assert_eq!(old.names().collect::<Vec<_>>(), new.names().collect::<Vec<_>>(), "{case}");
        for key in old.names() {
            if key.ends_with(".alpha") {
                assert_eq!(old.doubles(key).unwrap(), new.doubles(key).unwrap(), "{key}");
            } else {
                assert_eq!(
                    (old.info(key).unwrap().dtype, old.bytes(key)),
                    (new.info(key).unwrap().dtype, new.bytes(key))
                );
            }
        }
    }
}

#[test]
fn every_family_of_lycoris_reads_back_from_kohya() {
    let base = base("sd15");
    for case in [
        "lycoris_boft",
        "lycoris_boft_rescaled",
        "lycoris_dora_in",
        "lycoris_full",
        "lycoris_glora",
        "lycoris_ia3_in",
        "lycoris_ia3_out",
        "lycoris_locon",
        "lycoris_locon_tucker",
        "lycoris_loha",
        "lycoris_loha_dora",
        "lycoris_loha_tucker",
        "lycoris_lokr_both",
        "lycoris_lokr_conv_flat",
        "lycoris_lokr_dora",
        "lycoris_lokr_full",
        "lycoris_lokr_tucker",
        "lycoris_lokr_w2",
        "lycoris_mixed",
        "lycoris_norm",
        "lycoris_oft",
        "lycoris_oft_constraint",
        "lycoris_oft_rescaled",
        "lycoris_prefix",
        "kohya_oft",
    ] {
        let original = read(case, &base);
        let again = through(Dialect::Kohya, &original.modules, &base);
        assert_eq!(bits(&again.modules), bits(&original.modules), "{case}");
        let sides = |file: &AdapterFile| -> Vec<_> {
            let side = |module: &AdaptedModule| match &module.adapter {
                AnyAdapter::Oft(oft) => Some(format!("{:?}", oft.side)),
                AnyAdapter::Boft(boft) => Some(format!("{:?}", boft.bound)),
                AnyAdapter::Ia3(ia3) => Some(format!("{:?}", ia3.axis)),
                AnyAdapter::Glora(glora) => Some(format!("{:?}", glora.order)),
                _ => None,
            };
            file.modules.iter().map(side).collect()
        };
        assert_eq!(sides(&again), sides(&original), "{case}");
    }
}

#[test]
fn peft_folders_read_back_from_peft() {
    for (case, name) in [
        ("peft_lora", "llama"),
        ("peft_all_linear", "llama"),
        ("peft_patterns", "llama"),
        ("peft_rslora", "llama"),
        ("peft_rslora_patterns", "llama"),
        ("peft_dora", "llama"),
        ("peft_embedding_dora", "llama"),
        ("peft_loha", "llama"),
        ("peft_lokr", "llama"),
        ("peft_lokr_factors", "llama"),
        ("peft_ia3", "llama"),
        ("peft_oft", "llama"),
        ("peft_oft_neumann", "llama"),
        ("peft_lora_bias", "qwen2"),
    ] {
        let base = base(name);
        let original = read(case, &base);
        let again = through(Dialect::Peft, &original.modules, &base);
        assert_eq!(bits(&again.modules), bits(&original.modules), "{case}");
    }
}

#[test]
fn whole_tensors_read_back_from_peft_and_are_refused_elsewhere() {
    for (case, name) in [
        ("peft_modules_to_save", "llama"),
        ("peft_token_indices", "llama"),
        ("peft_embedding", "llama"),
        ("peft_embedding_tied", "llama_tied"),
        ("peft_bias_all", "qwen2"),
        ("peft_bias_lora_only", "qwen2"),
    ] {
        let base = base(name);
        let original = read(case, &base);
        let folder = tempfile::tempdir().unwrap();
        let write = |dialect| write_adapter_file(&folder.path().join("out"), dialect, base.family(), &original, None);
        assert!(write(Dialect::Kohya).unwrap_err().to_string().contains("whole tensor"), "{case}");
        write(Dialect::Peft).unwrap();
        let again = AdapterFile::read(&folder.path().join("out"), &base).unwrap();
        assert_eq!(bits(&again.modules), bits(&original.modules), "{case}");
        assert_eq!(again.unapplied, []);
        let whole = |file: &AdapterFile| -> Vec<_> {
            let mut whole: Vec<_> = file
                .replacements
                .iter()
                .map(|new| (new.tensor.clone(), new.rows.clone(), new.under_adapters, new.value.values.clone()))
                .collect();
            whole.sort_by(|a, b| a.0.cmp(&b.0));
            whole
        };
        assert_eq!(whole(&again), whole(&original), "{case}");
        assert!(!original.replacements.is_empty(), "{case}");
    }
}

#[test]
fn starts_are_joined_to_the_factors() {
    let base = base("llama");
    for (case, converted) in [("peft_pissa", "peft_pissa_converted"), ("peft_olora", "peft_olora_converted")] {
        let written = through(Dialect::Peft, &read(case, &base).modules, &base);
        for (module, expected) in written.modules.iter().zip(&read(converted, &base).modules) {
            let AnyAdapter::Lora(lora) = &module.adapter else { panic!("{case}") };
            assert_eq!((lora.start.is_none(), lora.down.shape[0]), (true, 8));
            let weight = base.read(module.component, &format!("{}.weight", module.path)).unwrap().unwrap();
            let delta = |adapter: &AnyAdapter<Array>| adapter.delta(&Cpu, &weight).unwrap().values;
            for (got, want) in delta(&module.adapter).iter().zip(delta(&expected.adapter)) {
                assert!((got - want).abs() < 1e-5, "{case} {}: {got} and {want}", module.path);
            }
        }
    }
}

#[test]
fn what_a_dialect_cannot_say_is_an_error_that_names_the_module() {
    let (sd, llama) = (base("sd15"), base("llama"));
    for (case, base, dialect) in [
        ("lycoris_loha", &sd, Dialect::Diffusers),
        ("lycoris_locon_tucker", &sd, Dialect::Diffusers),
        ("lycoris_dora_in", &sd, Dialect::Diffusers),
        ("lycoris_oft", &sd, Dialect::Peft),
        ("lycoris_glora", &sd, Dialect::Peft),
        ("kohya_sd15_linear", &sd, Dialect::Peft),
        ("peft_lora", &llama, Dialect::Kohya),
        ("peft_lora", &llama, Dialect::Diffusers),
    ] {
        let file = read(case, base);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out");
        let error = write_adapter(&path, dialect, base.family(), &file.modules, &BTreeMap::new(), None).unwrap_err();
        assert!(error.to_string().contains("cannot be written as"), "{case}: {error}");
        assert!(!path.exists());
    }
}

#[test]
fn scales_of_another_dialect_are_not_carried_along() {
    let base = base("sd15");
    let original = read("diffusers_sd15_metadata", &base);
    assert!(original.metadata.contains_key("lora_adapter_metadata"));
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("out.safetensors");
    write_adapter(&path, Dialect::Kohya, base.family(), &original.modules, &original.metadata, None).unwrap();
    assert!(!TensorFile::open(&path).unwrap().metadata().contains_key("lora_adapter_metadata"));
    let again = AdapterFile::read(&path, &base).unwrap();
    assert_eq!(bits(&again.modules), bits(&original.modules));
}

#[test]
fn numbers_that_overflow_the_wanted_type_are_refused() {
    let base = base("sd15");
    let mut file = read("kohya_sd15_linear", &base);
    if let AnyAdapter::Lora(lora) = &mut file.modules[0].adapter {
        lora.up.values[0] = 70_000.0;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("out.safetensors");
    let write = |dtype| write_adapter(&path, Dialect::Kohya, &Family::Sd1, &file.modules, &BTreeMap::new(), dtype);
    assert!(write(Some(Dtype::F16)).is_err());
    assert!(!path.exists());
    write(Some(Dtype::Bf16)).unwrap();
}

#[test]
fn kohya_metadata_says_what_it_is_and_keeps_what_was_said() {
    let base = base("sdxl");
    let file = read("kohya_sdxl_ldm", &base);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("style.safetensors");
    let said =
        BTreeMap::from([("ss_seed".to_owned(), "7".to_owned()), ("modelspec.title".to_owned(), "Mine".to_owned())]);
    write_adapter(&path, Dialect::Kohya, base.family(), &file.modules, &said, None).unwrap();
    let written = TensorFile::open(&path).unwrap();
    for (key, value) in [
        ("ss_seed", "7"),
        ("modelspec.title", "Mine"),
        ("ss_output_name", "style"),
        ("ss_base_model_version", "sdxl_base_v1-0"),
        ("ss_network_module", "networks.lora"),
        ("ss_v2", "False"),
        ("modelspec.architecture", "stable-diffusion-xl-v1-base/lora"),
    ] {
        assert_eq!(written.metadata()[key], value, "{key}");
    }
    // Other metadata does not change the hashes.
    let more = BTreeMap::from([("ss_seed".to_owned(), "7".to_owned()), ("lora.note".to_owned(), "x".repeat(999))]);
    let other = folder.path().join("other").join("style.safetensors");
    std::fs::create_dir(other.parent().unwrap()).unwrap();
    write_adapter(&other, Dialect::Kohya, base.family(), &file.modules, &more, None).unwrap();
    let other = TensorFile::open(&other).unwrap();
    for hash in ["sshs_model_hash", "sshs_legacy_hash"] {
        assert_eq!(written.metadata()[hash], other.metadata()[hash]);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn tensors_and_metadata_of_any_kind_read_back(
        tensors in prop::collection::btree_map(".{1,12}", (prop::sample::select(Dtype::ALL.to_vec()), prop::collection::vec(0_usize..4, 0..4)), 0..8),
        metadata in prop::collection::btree_map(".{0,8}", ".{0,30}", 0..4),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.safetensors");
        let tensors: Vec<(String, TensorData<'static>)> = tensors
            .into_iter()
            .filter(|(name, _)| name != "__metadata__")
            .filter_map(|(name, (dtype, shape))| {
                let length = dtype.bytes_of(&shape)?;
                let bytes: Vec<u8> = (0..length).map(|index| index as u8).collect();
                Some((name, TensorData::new(dtype, shape, bytes).unwrap()))
            })
            .collect();
        write_tensors(&path, &tensors, &metadata).unwrap();
        let file = TensorFile::read(&path).unwrap();
        prop_assert_eq!(file.metadata(), &metadata);
        prop_assert_eq!(file.names().len(), tensors.len());
        for (name, data) in &tensors {
            prop_assert_eq!(file.bytes(name), Some(data.bytes()));
        }
    }

    #[test]
    fn any_bytes_give_a_header_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..200), json in "\\{[ -~]{0,100}\\}?") {
        let _ = Header::parse(&bytes);
        let mut file = (json.len() as u64).to_le_bytes().to_vec();
        file.extend_from_slice(json.as_bytes());
        file.extend_from_slice(&bytes);
        let _ = Header::parse(&file);
    }
}
