//! Models in 4 bits: quantised while they are loaded, and stored so by bitsandbytes.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use lora_core::format::{BaseModel, Component, Dtype, TensorData, write_tensors};
use lora_llm::{BaseFiles, Decoder};
use lora_torch::{
    Projections as _, Torch, Weights,
    nf4::{BLOCK, NESTED_BLOCK, Nf4, QUANTILES, Scheme},
};
use serde_json::{Value, json};
use tch::{Kind, Tensor};

fn tiny() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/tiny-llm")
}

/// A tensor as it is written into a file, in the type that it has.
fn data(tensor: &Tensor) -> TensorData<'static> {
    let shape: Vec<usize> = tensor.size().iter().map(|length| *length as usize).collect();
    let (dtype, width) = match tensor.kind() {
        Kind::Uint8 => (Dtype::U8, 1),
        Kind::Float => (Dtype::F32, 4),
        Kind::BFloat16 => (Dtype::Bf16, 2),
        kind => panic!("{kind:?}"),
    };
    let mut bytes = vec![0; tensor.numel() * width];
    tensor.contiguous().view([-1]).view_dtype(Kind::Uint8).copy_data(&mut bytes, tensor.numel() * width);
    TensorData::new(dtype, shape, bytes).unwrap()
}

/// What `save_pretrained` of transformers makes of a model that bitsandbytes quantised, `change` having seen each description.
///
/// Matrices and what belongs to them lie in different files, as they do where one file ends in between.
fn quantised_folder(scheme: Scheme, change: impl Fn(&str, &mut Value)) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        fs::copy(tiny().join(name), folder.path().join(name)).unwrap();
    }
    let mut config: Value = serde_json::from_slice(&fs::read(tiny().join("config.json")).unwrap()).unwrap();
    config["quantization_config"] = json!({
        "quant_method": "bitsandbytes", "load_in_4bit": true, "load_in_8bit": false, "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": scheme == Scheme::Nf4Double, "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
    });
    fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    let mut files: [Vec<(String, TensorData<'static>)>; 2] = Default::default();
    let weights = Weights::open(&[tiny().join("model.safetensors")]).unwrap();
    let root = weights.root(&Torch::CPU.with_kind(Kind::BFloat16));
    for name in weights.names() {
        let tensor = root.tensor(name, &weights.shape(name).unwrap()).unwrap();
        if !name.contains("_proj.") {
            files[0].push((name.to_owned(), data(&tensor)));
            continue;
        }
        let nf4 = Nf4::quantise(&tensor, scheme).unwrap();
        let mut state = json!({"quant_type": "nf4", "blocksize": BLOCK, "dtype": "bfloat16", "shape": tensor.size()});
        files[0].push((name.to_owned(), data(&nf4.packed().view([-1, 1]))));
        let mut part = |part: &str, tensor: &Tensor| files[1].push((format!("{name}.{part}"), data(tensor)));
        part("quant_map", &Tensor::from_slice(&QUANTILES));
        match nf4.nested() {
            None => part("absmax", &nf4.factors().unwrap()),
            Some(nested) => {
                part("absmax", &nested.bytes);
                part("nested_absmax", &nested.scales);
                part("nested_quant_map", &nested.code);
                state["nested_blocksize"] = json!(NESTED_BLOCK);
                state["nested_dtype"] = json!("float32");
                state["nested_offset"] = json!(nested.offset.double_value(&[0]));
            }
        }
        change(name, &mut state);
        let kind = state["quant_type"].as_str().unwrap().to_owned();
        let text = state.to_string();
        part(&format!("quant_state.bitsandbytes__{kind}"), &Tensor::from_slice(text.as_bytes()));
    }
    let mut index = BTreeMap::new();
    for (number, tensors) in files.iter().enumerate() {
        let name = format!("model-{:05}-of-00002.safetensors", number + 1);
        write_tensors(&folder.path().join(&name), tensors, &BTreeMap::new()).unwrap();
        index.extend(tensors.iter().map(|(tensor, _)| (tensor.clone(), name.clone())));
    }
    let index = json!({"metadata": {}, "weight_map": index});
    fs::write(folder.path().join("model.safetensors.index.json"), index.to_string()).unwrap();
    folder
}

fn logits(decoder: &Decoder) -> Tensor {
    tch::no_grad(|| decoder.logits(&Tensor::from_slice(&[5i64, 17, 900, 3, 44]).view([1, -1]), None).unwrap())
}

fn load(folder: &Path, quantise: Option<Scheme>) -> Decoder {
    let mut files = BaseFiles::find(folder).unwrap();
    files.quantise = quantise;
    files.load(&Torch::CPU).unwrap().decoder
}

#[test]
fn a_stored_model_in_4_bits_is_the_one_that_loading_quantises() {
    let full = logits(&load(&tiny(), None));
    for scheme in [Scheme::Nf4, Scheme::Nf4Double] {
        let folder = quantised_folder(scheme, |_, _| ());
        let stored = logits(&load(folder.path(), None));
        assert_eq!(stored, logits(&load(&tiny(), Some(scheme))), "{scheme:?}");
        assert_eq!(stored, logits(&load(folder.path(), Some(Scheme::Nf4))), "what is quantised stays as it is");
        let changed = (&stored - &full).square().mean(Kind::Float) / full.var(false);
        let changed = changed.double_value(&[]);
        assert!((1e-5..0.1).contains(&changed), "{scheme:?} changes the logits by {changed}");
    }
}

#[test]
fn all_linear_layers_but_the_head_are_quantised() {
    let mut decoder = load(&tiny(), Some(Scheme::Nf4Double));
    for projection in decoder.projections() {
        assert_eq!(projection.is_quantised(), projection.path() != "lm_head", "{}", projection.path());
    }
}

#[test]
fn several_decoders_share_their_4_bits() {
    let mut files = BaseFiles::find(&tiny()).unwrap();
    files.quantise = Some(Scheme::Nf4);
    let decoders = files.load_decoders(&Torch::CPU, 2).unwrap();
    assert_eq!(logits(&decoders[0]), logits(&decoders[1]));
}

#[test]
fn adapters_see_the_shapes_of_the_numbers() {
    let folder = quantised_folder(Scheme::Nf4Double, |_, _| ());
    let (packed, full) = (BaseModel::open(folder.path()).unwrap(), BaseModel::open(&tiny()).unwrap());
    let modules = |base: &BaseModel| -> Vec<_> {
        base.modules(Component::LanguageModel).map(|(path, module)| (path.to_owned(), module.clone())).collect()
    };
    assert_eq!(modules(&packed), modules(&full));
    assert_eq!(packed.tensors(Component::LanguageModel).count(), full.tensors(Component::LanguageModel).count());
    let name = "model.layers.2.mlp.down_proj.weight";
    assert!(packed.is_packed(Component::LanguageModel, name) && !full.is_packed(Component::LanguageModel, name));
    let error = packed.read(Component::LanguageModel, name).unwrap_err();
    assert!(error.to_string().contains("4 bits"), "{error}");
}

#[test]
fn what_does_not_hold_together_is_named() {
    let refused = |change: &dyn Fn(&mut Value), parts: &[&str]| {
        let name = "model.layers.1.self_attn.q_proj.weight";
        let folder = quantised_folder(Scheme::Nf4, |of, state| {
            if of == name {
                change(state)
            }
        });
        let error = BaseFiles::find(folder.path()).unwrap().load(&Torch::CPU).unwrap_err().to_string();
        for part in parts {
            assert!(error.contains(part), "`{part}` is missing in {error}");
        }
    };
    refused(&|state| state["shape"] = json!([256, 128]), &["model.layers.1.self_attn.q_proj.weight", "[256, 128]"]);
    refused(&|state| state["blocksize"] = json!(128), &["model.layers.1.self_attn.q_proj.weight", "128"]);
    refused(&|state| state["quant_type"] = json!("fp4"), &["fp4", "nf4"]);
}
