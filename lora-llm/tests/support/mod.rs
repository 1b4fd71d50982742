//! A model in 4 bits as transformers saves it, made from the bundled one.

#![allow(dead_code, reason = "each test program uses a part of it")]

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use lora_core::format::{Dtype, TensorData, write_tensors};
use lora_torch::{
    Torch, Weights,
    nf4::{BLOCK, NESTED_BLOCK, Nf4, QUANTILES, Scheme},
};
use serde_json::{Value, json};
use tch::{Kind, Tensor};

/// The bundled model.
pub(crate) fn tiny() -> PathBuf {
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
pub(crate) fn quantised_folder(folder: &Path, scheme: Scheme, change: impl Fn(&str, &mut Value)) {
    for name in ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"] {
        fs::copy(tiny().join(name), folder.join(name)).unwrap();
    }
    let mut config: Value = serde_json::from_slice(&fs::read(tiny().join("config.json")).unwrap()).unwrap();
    config["quantization_config"] = json!({
        "quant_method": "bitsandbytes", "load_in_4bit": true, "load_in_8bit": false, "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": scheme == Scheme::Nf4Double, "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
    });
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
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
        write_tensors(&folder.join(&name), tensors, &BTreeMap::new()).unwrap();
        index.extend(tensors.iter().map(|(tensor, _)| (tensor.clone(), name.clone())));
    }
    let index = json!({"metadata": {}, "weight_map": index});
    fs::write(folder.join("model.safetensors.index.json"), index.to_string()).unwrap();
}
