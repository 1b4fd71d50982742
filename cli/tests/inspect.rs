//! `lora inspect` and `lora check` on small files written here.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::{collections::BTreeMap, fs, path::Path};

use lora_core::format::{Dtype, TensorData, write_tensors};
use serde_json::Value;
use support::lora;

/// Writes an adapter for two modules of the bundled base, in kohya's spelling; `extra` keys are added to it.
fn write_adapter(folder: &Path, extra: &[&str]) {
    let tensor = |shape: &[usize], value: f32| {
        TensorData::from_f32(Dtype::F16, shape, &vec![value; shape.iter().product()]).unwrap()
    };
    let query = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q";
    let conv = "lora_unet_mid_block_resnets_0_conv1";
    let mut tensors = vec![
        (format!("{query}.lora_down.weight"), tensor(&[4, 128], 0.5)),
        (format!("{query}.lora_up.weight"), tensor(&[128, 4], 0.25)),
        (format!("{query}.alpha"), tensor(&[], 2.0)),
        (format!("{conv}.lora_down.weight"), tensor(&[2, 128, 3, 3], 0.0)),
        (format!("{conv}.lora_up.weight"), tensor(&[128, 2, 1, 1], 0.0)),
        (format!("{conv}.alpha"), tensor(&[], 1.0)),
    ];
    tensors.extend(extra.iter().map(|key| ((*key).to_owned(), tensor(&[1], 1.0))));
    let metadata = [
        ("ss_base_model_version", "sd_v1"),
        ("ss_sd_model_name", "sd15.safetensors"),
        ("ss_num_train_images", "24"),
        ("ss_steps", "800"),
        ("ss_learning_rate", "0.002"),
        ("ss_tag_frequency", "{\"10_ohwx style\": {\"house\": 12, \"boat\\u001b[2J\": 3}}"),
    ];
    let metadata: BTreeMap<_, _> = metadata.map(|(key, value)| (key.to_owned(), value.to_owned())).into();
    write_tensors(&folder.join("neon.safetensors"), &tensors, &metadata).unwrap();
}

/// The bundled base, under a short name.
fn base(folder: &Path) {
    let assets = Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/tiny-sd");
    for part in ["unet", "text_encoder", "vae"] {
        fs::create_dir_all(folder.join("base").join(part)).unwrap();
        for file in fs::read_dir(assets.join(part)).unwrap() {
            let path = file.unwrap().path();
            fs::copy(&path, folder.join("base").join(part).join(path.file_name().unwrap())).unwrap();
        }
    }
}

#[test]
fn an_adapter_is_described_on_one_screen() {
    let folder = tempfile::tempdir().unwrap();
    write_adapter(folder.path(), &["strange.key"]);
    let (code, shown, _) = lora(folder.path(), "inspect neon.safetensors");
    assert_eq!(code, 0);
    insta::assert_snapshot!(shown, @r"
    File       neon.safetensors
    What       adapter, LoRA, kohya spelling
    Base       Stable Diffusion 1.x (judged by its keys)
    Modules    2 (unet 2)
    Rank       2 to 4, alpha 1 to 2
    Size       8.0 KiB, 7 tensors, 3 587 parameters, F16
    Strength   ‖ΔW‖ 16 on average, 32 at most
               (lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q)
    Trained    on sd15.safetensors, with 24 examples, 800 steps, lr 0.002
    Trigger    ohwx style
    Captions   house 12, boat\u{1b}[2J 3
    Unknown    1 key: strange.key
    Metadata   6 entries (--json shows them)
    ");
}

#[test]
fn the_json_form_keeps_the_contract() {
    let folder = tempfile::tempdir().unwrap();
    write_adapter(folder.path(), &["strange.key"]);
    let document: Value = serde_json::from_str(&lora(folder.path(), "inspect neon.safetensors --json").1).unwrap();
    for (key, value) in
        [("kind", "adapter"), ("dialect", "kohya"), ("base", "Stable Diffusion 1.x"), ("method", "lora")]
    {
        assert_eq!(document[key], value, "{key}");
    }
    assert_eq!(document["modules"], 2);
    assert_eq!(document["tensors"], 7);
    assert_eq!(document["ranks"], serde_json::json!({"min": 2, "max": 4}));
    assert_eq!(document["unknown_keys"], serde_json::json!(["strange.key"]));
    assert_eq!(document["metadata"]["ss_steps"], "800");
    // scale 2/4, B·A = 4 · 0.25 · 0.5 everywhere in 128 × 128: ‖ΔW‖ = 0.25 · 128; the other module adds nothing.
    assert!((document["strength"]["mean_norm"].as_f64().unwrap() - 16.0).abs() < 1e-3);
    assert_eq!(document["training"]["trigger_words"], serde_json::json!(["ohwx style"]));
}

#[test]
fn every_key_is_applied_or_named_with_its_reason() {
    let folder = tempfile::tempdir().unwrap();
    base(folder.path());
    write_adapter(folder.path(), &[]);
    let (code, shown, _) = lora(folder.path(), "check neon.safetensors --base base");
    assert_eq!(
        (code, shown.as_str()),
        (0, "ok    6 of 6 keys applied to 2 modules of Stable Diffusion 1.x (kohya spelling)\n")
    );

    write_adapter(folder.path(), &["strange.key", "lora_unet_nowhere.alpha"]);
    let (code, shown, _) = lora(folder.path(), "check neon.safetensors --base base");
    assert_eq!(code, 1);
    insta::assert_snapshot!(shown, @"
    fail  6 of 8 keys applied to 2 modules of Stable Diffusion 1.x (kohya spelling)
    fail  1 key: no naming that is known
            strange.key
    fail  1 key: the base's unet has no such module
            lora_unet_nowhere.alpha
    ");
    let document: Value =
        serde_json::from_str(&lora(folder.path(), "check neon.safetensors --base base --json").1).unwrap();
    assert_eq!((&document["ok"], &document["applied"], &document["total"]), (&false.into(), &6.into(), &8.into()));
    let keys: Vec<_> = document["unapplied"].as_array().unwrap().iter().map(|entry| &entry["key"]).collect();
    assert_eq!(keys, ["lora_unet_nowhere.alpha", "strange.key"]);
    assert!(document["unapplied"][0]["reason"].is_string());
}

#[test]
fn a_base_is_told_from_an_adapter() {
    let folder = tempfile::tempdir().unwrap();
    base(folder.path());
    let document: Value = serde_json::from_str(&lora(folder.path(), "inspect base --json").1).unwrap();
    assert_eq!((&document["kind"], &document["base"]), (&"base".into(), &"Stable Diffusion 1.x".into()));
}

#[test]
fn what_is_no_adapter_is_named_for_what_it_is() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("page.safetensors"), "<!DOCTYPE html><title>Login</title>").unwrap();
    write_adapter(folder.path(), &[]);
    let whole = fs::read(folder.path().join("neon.safetensors")).unwrap();
    fs::write(folder.path().join("half.safetensors"), &whole[..whole.len() / 2]).unwrap();
    let error = |name: &str| {
        let (code, shown, error) = lora(folder.path(), &format!("inspect {name}"));
        assert_eq!((code, shown.as_str()), (1, ""), "{name}");
        error
    };
    insta::assert_snapshot!(error("page.safetensors"), @"
    error: page.safetensors is a web page (HTML), not a safetensors file

    hint: the download gave a page, perhaps a login or an error: open it in a browser
    ");
    insta::assert_snapshot!(error("half.safetensors"), @"
    error: half.safetensors: the tensors take 7172 bytes, the file holds 3094: it is cut short

    hint: the download may have stopped half-way: fetch the file again
    ");
    insta::assert_snapshot!(error("gone.safetensors"), @"
    error: cannot read gone.safetensors
      No such file or directory (os error 2)

    hint: there is no such file; `ls .` shows what is there
    ");
}
