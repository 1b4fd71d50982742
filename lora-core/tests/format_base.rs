//! Bases in every layout, and adapters that are not what they are taken for.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use lora_core::format::{
    AdapterFile, AdapterStream, BaseModel, Component, Dtype, Family, Layout, Merger, ModuleKind, Reason, Strengths,
    TensorData, TensorFile, Warning, write_tensors,
};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

fn base(name: &str) -> BaseModel {
    BaseModel::open(&fixtures().join("formats/bases").join(name)).unwrap()
}

fn zeros(shape: &[usize]) -> TensorData<'static> {
    TensorData::from_f32(Dtype::F32, shape, &vec![0.0; shape.iter().product()]).unwrap()
}

/// A file of zeros under the given keys, read against a base.
fn read(base: &BaseModel, tensors: &[(&str, &[usize])]) -> lora_core::Result<AdapterFile> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("adapter.safetensors");
    let tensors: Vec<_> = tensors.iter().map(|(name, shape)| ((*name).to_owned(), zeros(shape))).collect();
    write_tensors(&path, &tensors, &BTreeMap::new()).unwrap();
    AdapterFile::read(&path, base)
}

#[test]
fn a_diffusers_folder_a_single_file_and_loose_parts_are_told_apart() {
    let tiny = BaseModel::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/tiny-sd")).unwrap();
    assert_eq!((tiny.family(), tiny.layout()), (&Family::Sd1, Layout::Diffusers));
    let components: Vec<Component> = tiny.components().collect();
    assert_eq!(components, [Component::Unet, Component::TextEncoder, Component::Vae]);
    let to_q = tiny.module(Component::Unet, "mid_block.attentions.0.transformer_blocks.0.attn1.to_q").unwrap();
    assert_eq!((to_q.kind, to_q.bias), (ModuleKind::Linear, false));

    for (name, family) in [("sd1", Family::Sd1), ("sd2", Family::Sd2), ("sdxl", Family::Sdxl)] {
        let single =
            BaseModel::open(&fixtures().join("checkpoints").join(name).join("checkpoint.safetensors")).unwrap();
        assert_eq!((single.family(), single.layout()), (&family, Layout::SingleFile));
        let module = single.module(Component::TextEncoder, "text_model.encoder.layers.0.self_attn.k_proj").unwrap();
        assert_eq!((module.kind, module.bias, module.weight[0]), (ModuleKind::Linear, true, module.weight[1]));
    }
    for (name, family) in [("sd15", Family::Sd1), ("sd21", Family::Sd2), ("sdxl", Family::Sdxl)] {
        assert_eq!((base(name).family(), base(name).layout()), (&family, Layout::Parts));
    }
    assert_eq!(*base("qwen2").family(), Family::Language("qwen2".to_owned()));
    assert!(base("llama_tied").has_tied_head() && !base("llama").has_tied_head());
    // Of both kinds the head is a module; only of one it has a tensor.
    let head = |name: &str| base(name).module(Component::LanguageModel, "lm_head").unwrap().clone();
    assert_eq!(head("llama_tied").kind, ModuleKind::Linear);
    let table = base("llama_tied");
    let table = table.module(Component::LanguageModel, "model.embed_tokens").unwrap();
    assert_eq!((head("llama_tied").weight, head("llama").kind), (table.weight.clone(), ModuleKind::Linear));
    assert!(base("llama_tied").shape(Component::LanguageModel, "lm_head.weight").is_none());
}

#[test]
fn shards_are_found_through_their_index_and_nowhere_else() {
    let folder = tempfile::tempdir().unwrap();
    let write = |file: &str, name: &str| {
        write_tensors(&folder.path().join(file), &[(name.to_owned(), zeros(&[4, 2]))], &BTreeMap::new()).unwrap();
    };
    write("model-00001-of-00002.safetensors", "model.layers.0.self_attn.q_proj.weight");
    write("model-00002-of-00002.safetensors", "lm_head.weight");
    assert!(BaseModel::open(folder.path()).unwrap_err().to_string().contains("no index"));
    let index = |second: &str| {
        let first = ("model.layers.0.self_attn.q_proj.weight", "model-00001-of-00002.safetensors");
        let map = serde_json::json!({"weight_map": {first.0: first.1, "lm_head.weight": second}});
        std::fs::write(folder.path().join("model.safetensors.index.json"), map.to_string()).unwrap();
    };
    index("model-00002-of-00002.safetensors");
    let model = BaseModel::open(folder.path()).unwrap();
    assert_eq!(model.modules(Component::LanguageModel).count(), 2);
    assert_eq!(model.files().len(), 2);
    // A name from a file is no path.
    for outside in ["../other.safetensors", "/etc/passwd", "a/b.safetensors", ".."] {
        index(outside);
        let error = BaseModel::open(folder.path()).unwrap_err().to_string();
        assert!(error.contains("`lm_head.weight`") && error.contains(&format!("`{outside}`")), "{error}");
    }
    index("model-00001-of-00002.safetensors");
    let error = BaseModel::open(folder.path()).unwrap_err().to_string();
    assert!(error.contains("`lm_head.weight`") && error.contains("no shard holds it"), "{error}");
    index("missing.safetensors");
    assert!(BaseModel::open(folder.path()).unwrap_err().to_string().contains("missing.safetensors"));
}

#[test]
fn encoders_without_their_first_level_are_the_same_base() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("text_encoder.safetensors");
    let name = "encoder.layers.0.mlp.fc1.weight";
    write_tensors(&path, &[(name.to_owned(), zeros(&[24, 12]))], &BTreeMap::new()).unwrap();
    let bare = BaseModel::from_parts([(Component::TextEncoder, vec![path])]).unwrap();
    let canonical = "text_model.encoder.layers.0.mlp.fc1";
    assert!(bare.module(Component::TextEncoder, canonical).is_some());
    let (_, source) = bare.locate(Component::TextEncoder, &format!("{canonical}.weight")).unwrap();
    assert_eq!(source.key, name, "it is written back under its own name");
    for prefix in ["lora_te_text_model_encoder_layers_0_mlp_fc1", "text_encoder.encoder.layers.0.mlp.fc1"] {
        let (down, up) = (format!("{prefix}.lora_down.weight"), format!("{prefix}.lora_up.weight"));
        let file = read(&bare, &[(&down, &[2, 12]), (&up, &[24, 2])]).unwrap();
        assert_eq!(file.modules[0].path, canonical);
    }
}

#[test]
fn wrong_files_are_called_what_they_are() {
    let base = base("sd15");
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("style.safetensors");
    let cases: [(&[u8], &str); 6] = [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n", "git lfs pull"),
        (b"<!DOCTYPE html>\n<html><head><title>Log in</title>", "web page"),
        (b"PK\x03\x04\x00\x00\x08\x08\x00\x00archive/data.pkl", "pickles can run code"),
        (b"\x80\x02}q\x00(X\x05\x00\x00\x00", "pickle"),
        (b"GGUF\x03\x00\x00\x00\x00\x00\x00\x00", "GGUF"),
        (b"{\"error\": \"Unauthorized\"}", "JSON"),
    ];
    for (bytes, message) in cases {
        std::fs::write(&path, bytes).unwrap();
        for error in [AdapterFile::read(&path, &base).unwrap_err(), TensorFile::open(&path).unwrap_err()] {
            let text = error.to_string();
            assert!(text.contains(message) && text.contains("style.safetensors"), "{text}");
        }
    }
    let error = AdapterFile::read(folder.path(), &base).unwrap_err().to_string();
    assert!(error.contains("is in this folder"), "{error}");
    let error = AdapterFile::read(&folder.path().join("none.safetensors"), &base).unwrap_err();
    assert!(matches!(error, lora_core::Error::Read { .. }));
}

#[test]
fn a_file_for_another_model_says_which() {
    let to_k = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k";
    let (down, up) = (format!("{to_k}.lora_down.weight"), format!("{to_k}.lora_up.weight"));
    let xl: &[(&str, &[usize])] = &[(&down, &[4, 2048]), (&up, &[640, 4])];
    let llama: &[(&str, &[usize])] = &[("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", &[2, 16])];
    let flux: &[(&str, &[usize])] = &[("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", &[2, 16])];
    for (base_name, tensors, expected) in [
        (
            "llama",
            xl,
            "0 of 1 modules match this base (llama language model); the file looks like one for Stable Diffusion XL",
        ),
        ("sd15", llama, "looks like one for a language model"),
        ("sd15", flux, "looks like one for FLUX"),
    ] {
        let error = read(&base(base_name), tensors).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn what_is_left_over_is_listed_with_its_reason() {
    let q = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q";
    let name = |suffix: &str| format!("{q}.{suffix}");
    let file = read(
        &base("sd15"),
        &[
            (&name("lora_down.weight"), &[2, 12]),
            (&name("lora_up.weight"), &[12, 2]),
            (&name("mystery"), &[1]),
            ("lora_unet_down_blocks_9_attentions_0_proj_in.alpha", &[1]),
            ("lora_te2_text_projection.alpha", &[1]),
            ("lora_unet_double_blocks_0_img_attn_proj.alpha", &[1]),
            ("optimizer_state", &[3]),
            ("bundle_emb.a cat.emb_params", &[1, 12]),
        ],
    )
    .unwrap();
    let reasons: BTreeMap<&str, &Reason> = file.unapplied.iter().map(|(key, reason)| (&**key, reason)).collect();
    assert_eq!(reasons[&*name("mystery")], &Reason::UnknownSuffix);
    assert_eq!(reasons["lora_unet_down_blocks_9_attentions_0_proj_in.alpha"], &Reason::NoModule(Component::Unet));
    assert_eq!(reasons["lora_te2_text_projection.alpha"], &Reason::NoComponent(Component::TextEncoder2));
    assert_eq!(reasons["lora_unet_double_blocks_0_img_attn_proj.alpha"], &Reason::OtherFamily("FLUX"));
    assert_eq!(reasons["optimizer_state"], &Reason::UnknownKey);
    assert_eq!(file.embeddings, ["bundle_emb.a cat.emb_params"]);
    assert_eq!((file.applied(), file.keys, file.unapplied.len()), (2, 8, 5));
}

#[test]
fn a_stored_alpha_of_zero_is_followed_and_said() {
    let q = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q";
    let [down, up, alpha] = ["lora_down.weight", "lora_up.weight", "alpha"].map(|suffix| format!("{q}.{suffix}"));
    let file = read(&base("sd15"), &[(&down, &[2, 12]), (&up, &[12, 2]), (&alpha, &[])]).unwrap();
    assert_eq!(file.warnings, [Warning::AlphaIsZero(alpha)]);
}

#[test]
fn peft_tensors_without_their_configuration_have_no_scale_and_are_refused() {
    let q = "base_model.model.model.layers.0.self_attn.q_proj";
    let (down, up) = (format!("{q}.lora_A.weight"), format!("{q}.lora_B.weight"));
    let error = read(&base("llama"), &[(&down, &[2, 16]), (&up, &[16, 2])]).unwrap_err().to_string();
    assert!(error.contains("adapter_config.json") && error.contains(q), "{error}");
}

#[test]
fn t_lora_is_refused_for_what_its_file_lacks() {
    let q = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q";
    let [p, lambda, alpha] = ["p_layer.weight", "lambda_layer", "alpha"].map(|suffix| format!("{q}.{suffix}"));
    let q = format!("{q}.q_layer.weight");
    let tensors: [(&str, &[usize]); 4] = [(&alpha, &[]), (&lambda, &[1, 4]), (&p, &[12, 4]), (&q, &[4, 12])];
    let error = read(&base("sd15"), &tensors).unwrap_err().to_string();
    assert!(error.contains("T-LoRA"), "{error}");
}

#[test]
fn old_names_and_adapter_names_inside_keys_are_understood() {
    let base = base("sd15");
    let attention = "mid_block.attentions.0.transformer_blocks.0.attn2";
    for (down, up, path) in [
        ("unet.{}.processor.to_out_lora.down.weight", "unet.{}.processor.to_out_lora.up.weight", "to_out.0"),
        ("{}.processor.to_q_lora.down.weight", "{}.processor.to_q_lora.up.weight", "to_q"),
        ("unet.{}.to_q.lora_A.default.weight", "unet.{}.to_q.lora_B.default.weight", "to_q"),
        ("unet.base_model.model.{}.to_q.lora_A.weight", "unet.base_model.model.{}.to_q.lora_B.weight", "to_q"),
        ("unet.{}.to_q.lora_A", "unet.{}.to_q.lora_B", "to_q"),
    ] {
        let (down, up) = (down.replace("{}", attention), up.replace("{}", attention));
        let file = read(&base, &[(&down, &[2, 12]), (&up, &[12, 2])]).unwrap();
        assert_eq!(file.modules[0].path, format!("{attention}.{path}"), "{down}");
        assert!(file.unapplied.is_empty());
    }
}

/// A matrix of zeros `[4, 32]` in 4 bits as bitsandbytes stores it, and a norm beside it.
fn packed_base(folder: &Path, quant_type: &str) {
    let bytes = |bytes: &[u8]| TensorData::new(Dtype::U8, [bytes.len()], bytes.to_vec()).unwrap();
    let q = "model.layers.0.self_attn.q_proj.weight";
    let state = format!(r#"{{"quant_type": "{quant_type}", "blocksize": 64, "dtype": "bfloat16", "shape": [4, 32]}}"#);
    let tensors = [
        (q.to_owned(), TensorData::new(Dtype::U8, [64, 1], vec![0x77; 64]).unwrap()),
        (format!("{q}.absmax"), zeros(&[2])),
        (format!("{q}.quant_map"), zeros(&[16])),
        (format!("{q}.quant_state.bitsandbytes__{quant_type}"), bytes(state.as_bytes())),
        ("model.layers.0.input_layernorm.weight".to_owned(), zeros(&[32])),
    ];
    write_tensors(&folder.join("model.safetensors"), &tensors, &BTreeMap::new()).unwrap();
}

#[test]
fn a_matrix_in_4_bits_is_a_module_that_can_be_adapted_and_not_merged_into() {
    let folder = tempfile::tempdir().unwrap();
    packed_base(folder.path(), "nf4");
    let base = BaseModel::open(folder.path()).unwrap();
    let path = "model.layers.0.self_attn.q_proj";
    let module = base.module(Component::LanguageModel, path).unwrap();
    assert_eq!((module.kind, &*module.weight), (ModuleKind::Linear, &[4, 32][..]));
    assert_eq!(base.tensors(Component::LanguageModel).count(), 2, "what describes a matrix is no tensor of the model");
    assert!(base.is_packed(Component::LanguageModel, &format!("{path}.weight")));

    let (down, up) = (format!("{path}.lora_A.weight"), format!("{path}.lora_B.weight"));
    let adapter = folder.path().join("adapter.safetensors");
    let factors = [(down, zeros(&[2, 32])), (up, zeros(&[4, 2]))];
    write_tensors(&adapter, &factors, &BTreeMap::new()).unwrap();
    std::fs::write(folder.path().join("adapter_config.json"), r#"{"peft_type": "LORA", "r": 2, "lora_alpha": 2}"#)
        .unwrap();
    assert!(AdapterFile::read(&adapter, &base).unwrap().unapplied.is_empty());
    let adapters = [(AdapterStream::open(&adapter, &base).unwrap(), Strengths::all(1.0))];
    let error = Merger::new(&base, &adapters, None).unwrap_err().to_string();
    assert!(error.contains(path) && error.contains("4 bits"), "{error}");

    packed_base(folder.path(), "fp4");
    assert!(BaseModel::open(folder.path()).unwrap_err().to_string().contains("`fp4`"));
}
