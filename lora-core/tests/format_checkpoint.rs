//! Single-file checkpoints against the tensors that diffusers' own converter makes of them.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{collections::BTreeMap, fmt::Write as _, path::PathBuf};

use lora_core::format::{Component, Dtype, Family, TensorFile, checkpoint::Checkpoint};
use sha2::{Digest, Sha256};

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/checkpoints").join(name)
}

/// The first 16 hex digits of the SHA-256 of the tensor in f16.
fn fingerprint(values: &[f32]) -> String {
    let digest = Sha256::digest(Dtype::F16.narrow(values).unwrap());
    digest[..8].iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").unwrap();
        text
    })
}

fn check(name: &str, family: Family) {
    let folder = fixture(name);
    let file = TensorFile::open(&folder.join("checkpoint.safetensors")).unwrap();
    let checkpoint = Checkpoint::of(&file).unwrap().unwrap();
    assert_eq!(*checkpoint.family(), family);

    let twin = std::fs::read_to_string(folder.join("twin.tsv")).unwrap();
    let mut expected: BTreeMap<(Component, &str), (Vec<usize>, &str)> = BTreeMap::new();
    for line in twin.lines().skip(1) {
        let [component, tensor, shape, print] = line.split('\t').collect::<Vec<_>>()[..] else { panic!("{line}") };
        let shape = shape.split('x').map(|length| length.parse().unwrap()).collect();
        expected.insert((Component::from_name(component).unwrap(), tensor), (shape, print));
    }
    let mut found = 0;
    for component in checkpoint.components() {
        for (tensor, source) in checkpoint.tensors(component) {
            let (shape, print) = expected.get(&(component, tensor)).unwrap_or_else(|| panic!("{component}.{tensor}"));
            let array = source.read(&file).unwrap();
            assert_eq!((&array.shape, &source.shape), (shape, shape), "{component}.{tensor}");
            assert_eq!(fingerprint(&array.values), *print, "{component}.{tensor}");
            found += 1;
        }
    }
    assert_eq!(found, expected.len(), "every tensor of the components is found");

    let unused: Vec<String> = serde_json::from_slice(&std::fs::read(folder.join("unused.json")).unwrap()).unwrap();
    assert_eq!(checkpoint.unused(), unused);
}

#[test]
fn stable_diffusion_1_gives_its_diffusers_twin() {
    check("sd1", Family::Sd1);
}

#[test]
fn stable_diffusion_2_gives_its_diffusers_twin() {
    check("sd2", Family::Sd2);
}

#[test]
fn stable_diffusion_xl_gives_its_diffusers_twin() {
    check("sdxl", Family::Sdxl);
}

#[test]
fn putting_every_tensor_back_gives_the_stored_numbers() {
    for name in ["sd1", "sd2", "sdxl"] {
        let file = TensorFile::open(&fixture(name).join("checkpoint.safetensors")).unwrap();
        let checkpoint = Checkpoint::of(&file).unwrap().unwrap();
        let mut rebuilt = BTreeMap::new();
        for component in checkpoint.components() {
            for (_, source) in checkpoint.tensors(component) {
                let stored = rebuilt.entry(source.key.clone()).or_insert_with(|| {
                    let mut blank = file.array(&source.key).unwrap();
                    blank.values.fill(f32::NAN);
                    blank
                });
                source.put_back(&source.read(&file).unwrap(), stored).unwrap();
            }
        }
        for (key, stored) in &rebuilt {
            assert_eq!(*stored, file.array(key).unwrap(), "{name}: {key}");
        }
        assert_eq!(rebuilt.len() + checkpoint.unused().len(), file.names().len());
    }
}

#[test]
fn other_files_are_no_checkpoints() {
    let adapter =
        PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/formats/kohya_sd15_linear/adapter.safetensors");
    assert!(Checkpoint::of(&TensorFile::open(&adapter).unwrap()).unwrap().is_none());
}
