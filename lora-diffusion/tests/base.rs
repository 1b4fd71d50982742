//! Finding and opening base models: what is taken, and how what is not is refused.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use lora_core::format::{Component, Dtype, Family, TensorData, write_tensors};
use lora_diffusion::{Base, BaseFiles, base::checkpoint_weights, sample, schedule::sampler::SamplerKind};
use lora_torch::Torch;
use serde_json::{Value, json};
use tch::Kind;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/sd")
}

fn tiny() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/tiny-sd")
}

fn refusal(path: &Path) -> String {
    BaseFiles::find(path).map(|_| ()).unwrap_err().to_string()
}

/// A copy of the bundled base that may be spoilt.
fn copy() -> tempfile::TempDir {
    fn into(from: &Path, to: &Path) {
        fs::create_dir_all(to).unwrap();
        for entry in fs::read_dir(from).unwrap() {
            let entry = entry.unwrap();
            let target = to.join(entry.file_name());
            if entry.path().is_dir() {
                into(&entry.path(), &target);
            } else {
                fs::copy(entry.path(), target).unwrap();
            }
        }
    }
    let folder = tempfile::tempdir().unwrap();
    into(&tiny(), folder.path());
    folder
}

#[test]
fn a_folder_is_described_without_reading_its_weights() {
    let files = BaseFiles::find(&tiny()).unwrap();
    assert_eq!(files.family, Family::Sd1);
    assert_eq!((files.resolution(), files.vae.factor(), files.text.len()), (128, 8, 1));
    assert!(!files.is_sdxl() && !files.zero_negative);
}

#[test]
fn what_is_no_base_is_refused_by_what_it_is() {
    let folder = tempfile::tempdir().unwrap();
    assert!(refusal(&folder.path().join("nothing")).contains("no such file or folder"));
    assert!(refusal(folder.path()).contains("no `model_index.json`"));
    assert!(refusal(&tiny().join("unet")).contains("one component of a model, try the folder above it"));
    assert!(refusal(&tiny().join("unet/diffusion_pytorch_model.safetensors")).contains("one component"));
    assert!(refusal(&fixtures().join("lora_kohya/adapter.safetensors")).contains("an adapter, not a base model"));
    let pickle = folder.path().join("model.ckpt");
    fs::write(&pickle, "PK").unwrap();
    assert!(refusal(&pickle).contains("a pickle, which may run code"));
}

#[test]
fn weights_that_no_layer_reads_are_refused() {
    let folder = copy();
    let path = folder.path().join("unet/config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    config["transformer_layers_per_block"] = json!(0);
    fs::write(&path, config.to_string()).unwrap();
    let error = BaseFiles::find(folder.path()).unwrap().load_unet(&Torch::CPU).unwrap_err().to_string();
    assert!(error.contains("belong to no layer") && error.contains("transformer_blocks.0"), "{error}");
}

#[test]
fn missing_weights_are_named() {
    let folder = copy();
    fs::remove_file(folder.path().join("vae/diffusion_pytorch_model.safetensors")).unwrap();
    fs::write(folder.path().join("vae/diffusion_pytorch_model.bin"), "PK").unwrap();
    let error = BaseFiles::find(folder.path()).unwrap().load_vae(&Torch::CPU).unwrap_err().to_string();
    assert!(error.contains("only `diffusion_pytorch_model.bin` is there"), "{error}");
}

#[test]
fn impossible_requests_are_refused() {
    let base = Base::open(&tiny(), &Torch::CPU).unwrap();
    let draw = |request| sample::generate(&base, &request, &mut |_, _| {}).map(|_| ()).unwrap_err().to_string();
    let request = sample::Request { height: 128, width: 128, steps: 2, ..sample::Request::default() };
    assert!(draw(sample::Request { width: 100, ..request.clone() }).contains("a multiple of 8"));
    assert!(draw(sample::Request { seeds: Vec::new(), ..request.clone() }).contains("--seed"));
    assert!(draw(sample::Request { steps: 0, ..request }).contains("0 steps"));
}

/// A picture is a function of its own seed: not of the batch that it is drawn in.
#[test]
fn a_seed_gives_the_same_picture_alone_and_in_a_batch() {
    let base = Base::open(&tiny(), &Torch::CPU).unwrap();
    let request = sample::Request {
        prompt: "a red circle".into(),
        height: 64,
        width: 64,
        steps: 3,
        guidance: 3.0,
        sampler: SamplerKind::EulerAncestral,
        ..sample::Request::default()
    };
    let draw = |seeds: &[u64]| {
        let request = sample::Request { seeds: seeds.to_vec(), ..request.clone() };
        sample::generate(&base, &request, &mut |_, _| {}).unwrap()
    };
    let (both, alone) = (draw(&[7, 8]), draw(&[8]));
    let difference = both[1].rgb.iter().zip(&alone[0].rgb).map(|(a, b)| a.abs_diff(*b)).max();
    assert!(difference <= Some(1), "{difference:?}");
    assert_ne!(both[0].rgb, both[1].rgb);
}

/// SDXL's two encoders, pooled text and sizes, from a folder made of the fixture's checkpoint.
#[test]
fn a_tiny_sdxl_folder_draws() {
    let folder = sdxl_folder();
    let base = Base::open(folder.path(), &Torch::CPU).unwrap();
    assert_eq!(base.files.family, Family::Sdxl);
    assert!(base.files.zero_negative);
    let request = sample::Request {
        prompt: "a b".into(),
        height: 64,
        width: 64,
        steps: 2,
        guidance: 3.0,
        ..sample::Request::default()
    };
    let draw = |negative: Option<&str>, prompt: &str| {
        let request =
            sample::Request { negative: negative.map(str::to_owned), prompt: prompt.into(), ..request.clone() };
        sample::generate(&base, &request, &mut |_, _| {}).unwrap().remove(0).rgb
    };
    let plain = draw(None, "a b");
    assert_eq!(plain.len(), 64 * 64 * 3);
    assert_ne!(plain, draw(None, "c"), "the prompt counts");
    assert_ne!(plain, draw(Some(""), "a b"), "a missing negative prompt is zeros, not the empty prompt");
}

fn sdxl_folder() -> tempfile::TempDir {
    let case = fixtures().join("checkpoint_sdxl");
    let config: Value = serde_json::from_slice(&fs::read(case.join("case.json")).unwrap()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let write = |path: &str, value: &Value| {
        let path = folder.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, value.to_string()).unwrap();
    };
    write("model_index.json", &json!({"_class_name": "StableDiffusionXLPipeline"}));
    // Letters, the same at the end of a word, and the two marks where the encoders' configurations have them.
    let words = ('a'..='z').map(String::from).chain(('a'..='z').map(|letter| format!("{letter}</w>")));
    let mut vocabulary: BTreeMap<String, u32> = words.zip(0..).collect();
    vocabulary.extend([("<|startoftext|>".to_owned(), 98), ("<|endoftext|>".to_owned(), 99)]);
    for tokenizer in ["tokenizer", "tokenizer_2"] {
        write(&format!("{tokenizer}/vocab.json"), &json!(vocabulary));
        fs::write(folder.path().join(tokenizer).join("merges.txt"), "#version: 0.2\n").unwrap();
    }
    for component in [Component::Unet, Component::Vae, Component::TextEncoder, Component::TextEncoder2] {
        let name = component.name();
        write(&format!("{name}/config.json"), &config["config"][name]);
        let weights = checkpoint_weights(&case.join("checkpoint.safetensors"), component).unwrap();
        let tensors: Vec<(String, TensorData)> = weights
            .names()
            .map(|tensor| {
                let shape = weights.shape(tensor).unwrap();
                let values = weights.root(&Torch::CPU).tensor(tensor, &shape).unwrap();
                let values = Vec::<f32>::try_from(values.to_kind(Kind::Float).contiguous().view([-1])).unwrap();
                let bytes = Dtype::F32.narrow(&values).unwrap();
                (tensor.to_owned(), TensorData::new(Dtype::F32, shape, bytes).unwrap())
            })
            .collect();
        let stem = if name.starts_with("text") { "model" } else { "diffusion_pytorch_model" };
        let path = folder.path().join(name).join(format!("{stem}.safetensors"));
        write_tensors(&path, &tensors, &BTreeMap::new()).unwrap();
    }
    folder
}
