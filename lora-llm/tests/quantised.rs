//! Models in 4 bits: quantised while they are loaded, and stored so by bitsandbytes.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::path::Path;

use lora_core::format::{BaseModel, Component};
use lora_llm::{BaseFiles, Decoder};
use lora_torch::{Projections as _, Torch, nf4::Scheme};
use serde_json::{Value, json};
use tch::{Kind, Tensor};

use support::{quantised_folder, tiny};

/// Such a folder, removed at the end.
fn stored(scheme: Scheme, change: impl Fn(&str, &mut Value)) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    quantised_folder(folder.path(), scheme, change);
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
        let folder = stored(scheme, |_, _| ());
        let stored = logits(&load(folder.path(), None));
        assert_eq!(stored, logits(&load(&tiny(), Some(scheme))), "{scheme:?}");
        assert_eq!(stored, logits(&load(folder.path(), Some(Scheme::Nf4))), "what is quantised stays as it is");
        let changed = (&stored - &full).square().mean(Kind::Float) / full.var(false);
        let changed = changed.double_value(&[]);
        assert!((1e-5..0.1).contains(&changed), "{scheme:?} changes the logits by {changed}");
    }
}

#[test]
fn all_linear_layers_but_embedding_and_head_are_quantised() {
    let mut decoder = load(&tiny(), Some(Scheme::Nf4Double));
    for projection in decoder.projections() {
        let in_full = ["model.embed_tokens", "lm_head"].contains(&projection.path());
        assert_eq!(projection.is_quantised(), !in_full, "{}", projection.path());
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
    let folder = stored(Scheme::Nf4Double, |_, _| ());
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
        let folder = stored(Scheme::Nf4, |of, state| {
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
