//! `lora convert` and `lora metadata` through the real program: there and back, pickles, and what must be refused.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::{collections::BTreeMap, fs, path::Path};

use lora_core::format::TensorFile;
use serde_json::Value;
use support::{done, done_of, fixtures, formats, lora_of};

fn adapter(case: &str) -> String {
    let folder = formats().join(case);
    let inside = folder.join("adapter");
    if inside.is_dir() { inside } else { folder.join("adapter.safetensors") }.display().to_string()
}

fn file(path: &Path) -> TensorFile {
    TensorFile::open(&if path.is_dir() { path.join("adapter_model.safetensors") } else { path.to_owned() }).unwrap()
}

/// Names, types and numbers; alphas, which may change their type, as numbers, and shapes without axes of length 1, which some
/// programs write for linear layers.
fn content(path: &Path) -> BTreeMap<String, (String, Vec<usize>, Vec<u8>)> {
    let file = file(path);
    let names = file.names().map(|name| {
        let info = file.info(name).unwrap();
        let alpha = name.ends_with(".alpha").then(|| file.doubles(name).unwrap());
        let (kind, bytes) = match alpha {
            Some(values) => ("alpha".to_owned(), values.iter().flat_map(|value| value.to_le_bytes()).collect()),
            None => (info.dtype.to_string(), file.bytes(name).unwrap().to_vec()),
        };
        let shape = info.shape.iter().copied().filter(|length| *length != 1).collect();
        (name.to_owned(), (kind, shape, bytes))
    });
    names.collect()
}

#[test]
fn there_and_back_is_the_identity_through_every_pair_that_holds_the_family() {
    let spellings = ["kohya", "diffusers", "comfy", "peft"];
    // What each family goes through; nobody names a base.
    for (case, able) in [
        ("kohya_sd15_linear", &spellings[..3]),
        ("kohya_sd15_locon", &spellings[..3]),
        ("kohya_sd15_mixed", &spellings[..3]),
        ("kohya_sd15_fp8", &spellings[..3]),
        ("kohya_sd15_alpha_zero", &spellings[..3]),
        ("kohya_sd21_linear_as_conv", &spellings[..3]),
        ("kohya_sdxl_ldm_all", &spellings[..3]),
        ("kohya_sdxl_te2", &spellings[..3]),
        ("diffusers_sd15_dora", &spellings[..3]),
        ("diffusers_sdxl_metadata", &spellings[..3]),
        ("lycoris_dora_out", &spellings[..3]),
        ("lycoris_locon_tucker", &["kohya", "comfy"]),
        ("lycoris_loha", &["kohya", "comfy"]),
        ("lycoris_loha_tucker", &["kohya", "comfy"]),
        ("lycoris_lokr_both", &["kohya", "comfy"]),
        ("lycoris_lokr_w2", &["kohya", "comfy"]),
        ("lycoris_lokr_tucker", &["kohya", "comfy"]),
        ("lycoris_dora_in", &["kohya", "comfy"]),
        ("lycoris_norm", &["kohya", "comfy"]),
        ("peft_lora", &["peft"]),
        ("peft_rslora_patterns", &["peft"]),
        ("peft_dora", &["peft"]),
        ("peft_embedding", &["peft"]),
        ("peft_loha", &["peft"]),
        ("peft_lokr", &["peft"]),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let source = adapter(case);
        for first in able {
            let direct = format!("{first}.out");
            done_of(folder.path(), &["convert", &source, &direct, "--to", first]);
            for second in able {
                let (away, back) = (format!("{first}-{second}.out"), format!("{first}-{second}-{first}.out"));
                done_of(folder.path(), &["convert", &direct, &away, "--to", second]);
                done_of(folder.path(), &["convert", &away, &back, "--to", first]);
                assert!(content(&at(&back)) == content(&at(&direct)), "{case}: {first} over {second}");
            }
        }
    }
}

#[test]
fn a_converted_adapter_merges_to_the_same_model() {
    for (case, base, to) in [
        ("kohya_sd15_linear", "sd15", "diffusers"),
        ("kohya_sd15_locon", "sd15", "comfy"),
        ("diffusers_sd15_dora", "sd15", "kohya"),
        ("lycoris_lokr_both", "sd15", "comfy"),
        ("kohya_sdxl_te2", "sdxl", "diffusers"),
        ("peft_dora", "llama", "peft"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let source = adapter(case);
        let base = formats().join("bases").join(base).display().to_string();
        done_of(folder.path(), &["convert", &source, "converted", "--to", to]);
        for (lora, out) in [(source.as_str(), "one"), ("converted", "two")] {
            done_of(folder.path(), &["merge", "--base", &base, "--lora", lora, "--out", out]);
        }
        for entry in fs::read_dir(folder.path().join("one")).unwrap() {
            let name = entry.unwrap().file_name();
            let [one, two] = ["one", "two"].map(|out| fs::read(folder.path().join(out).join(&name)).unwrap());
            assert!(one == two, "{case} in {to}: {name:?}");
        }
    }
}

#[test]
fn a_pickle_becomes_a_safetensors_file_and_an_attack_does_not() {
    let folder = tempfile::tempdir().unwrap();
    let pickle = |name: &str| fixtures().join("pickles").join(name).display().to_string();
    done_of(folder.path(), &["convert", &pickle("adapter.pt"), "adapter.safetensors"]);
    assert!(
        content(&folder.path().join("adapter.safetensors")) == content(Path::new(&adapter("kohya_sd15_bf16_base")))
    );
    done_of(folder.path(), &["convert", &pickle("adapter.pt"), "diffusers.safetensors", "--to", "diffusers"]);
    done_of(folder.path(), &["convert", &adapter("kohya_sd15_bf16_base"), "twin.safetensors", "--to", "diffusers"]);
    assert!(content(&folder.path().join("diffusers.safetensors")) == content(&folder.path().join("twin.safetensors")));

    let (code, shown, error) = lora_of(folder.path(), &["convert", &pickle("attack.pt"), "attack.safetensors"]);
    assert_eq!((code, shown.as_str()), (1, ""));
    insta::assert_snapshot!(error.replace(fixtures().to_str().unwrap(), "FIXTURES"), @"
    error: FIXTURES/pickles/attack.pt: the pickle is not read: it calls posix.system: this is a program and no model

    hint: nothing of it was run; look for a .safetensors version of the file
    ");
    assert!(!folder.path().join("attack.safetensors").exists());

    // Every other command refuses pickles and points to this one.
    let (code, _, error) = lora_of(folder.path(), &["inspect", &pickle("adapter.pt")]);
    assert_eq!(code, 1);
    assert!(error.contains("lora convert"), "{error}");
}

#[test]
fn names_that_fit_no_published_model_ask_for_a_base() {
    let folder = tempfile::tempdir().unwrap();
    let source = adapter("kohya_sd15_unknown_keys");
    let (code, _, error) = lora_of(folder.path(), &["convert", &source, "out", "--to", "diffusers"]);
    assert_eq!(code, 1);
    assert!(error.contains("the names alone do not say which model it is for") && error.contains("--base"), "{error}");
    let base = formats().join("bases/sd15").display().to_string();
    let words = ["convert", &source, "out", "--to", "diffusers", "--base", &base, "--json"];
    let (code, _, error) = lora_of(folder.path(), &words);
    let error: Value = serde_json::from_str(&error).unwrap();
    assert_eq!((code, &error["error"]["code"]), (1, &"unmatched_keys".into()));

    let (code, _, error) = lora_of(folder.path(), &["convert", &source, "out"]);
    assert_eq!(code, 2);
    assert!(error.contains("neither --to nor --dtype"), "{error}");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "something was written");
}

#[test]
fn numbers_can_change_their_type_and_in_may_be_out() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.safetensors");
    fs::copy(adapter("kohya_sd15_linear"), &path).unwrap();
    let before = content(&path);
    done_of(folder.path(), &["convert", "a.safetensors", "a.safetensors", "--dtype", "bf16"]);
    assert!(file(&path).names().all(|name| file(&path).info(name).unwrap().dtype.to_string() == "BF16"));
    assert_eq!(content(&path).len(), before.len());
    done_of(folder.path(), &["convert", "a.safetensors", "a.safetensors", "--to", "comfy", "--dtype", "fp32"]);
    assert!(file(&path).names().all(|name| name.contains('.') && !name.starts_with("lora_")));
}

#[test]
fn metadata_is_shown_changed_and_removed_and_numbers_stay() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.safetensors");
    fs::copy(adapter("kohya_sd15_linear"), &path).unwrap();
    let numbers = content(&path);
    done_of(folder.path(), &["metadata", "a.safetensors", "--strip", "--set", "b=1=2", "--set", "a=x\u{1b}[2J"]);
    assert_eq!(done_of(folder.path(), &["metadata", "a.safetensors"]), "a = x\\u{1b}[2J\nb = 1=2\n");
    let shown =
        done_of(folder.path(), &["metadata", "a.safetensors", "--remove", "a", "--out", "b.safetensors", "--json"]);
    assert_eq!(
        serde_json::from_str::<Value>(&shown).unwrap(),
        serde_json::json!({"path": "b.safetensors", "metadata": {"b": "1=2"}})
    );
    assert_eq!(file(&path).metadata().len(), 2);
    assert!(content(&path) == numbers && content(&folder.path().join("b.safetensors")) == numbers);

    let (code, _, error) = lora_of(folder.path(), &["metadata", "a.safetensors", "--remove", "c"]);
    assert_eq!(code, 1);
    assert!(error.contains("no metadata entry `c`") && error.contains("lora metadata a.safetensors"), "{error}");
    assert_eq!(lora_of(folder.path(), &["metadata", "a.safetensors", "--set", "nothing"]).0, 2);
}

/// A1111 and others look files up by these.
#[test]
fn hashes_of_other_numbers_do_not_come_along() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    fs::copy(formats().join("kohya_sd15_linear/adapter.safetensors"), folder.join("a.safetensors")).unwrap();
    done(folder, "convert a.safetensors kohya.safetensors --to kohya");
    let hash = |name: &str| {
        let file = TensorFile::open(&folder.join(name)).unwrap();
        file.metadata().get("sshs_model_hash").cloned()
    };
    assert!(hash("kohya.safetensors").is_some());
    for (name, options) in [("half", "--dtype fp16"), ("comfy", "--to comfy"), ("diffusers", "--to diffusers")] {
        done(folder, &format!("convert kohya.safetensors {name}.safetensors {options}"));
        assert_eq!(hash(&format!("{name}.safetensors")), None, "{name}");
    }
    done(folder, "convert comfy.safetensors back.safetensors --to kohya");
    assert_eq!(hash("back.safetensors"), hash("kohya.safetensors"));
}

#[test]
fn keys_without_a_place_and_embeddings_stay_behind_only_on_purpose() {
    let folder = tempfile::tempdir().unwrap();
    let base = formats().join("bases/sd15");
    for (case, left) in [("kohya_sd15_unknown_keys", "belong to no adapter"), ("lycoris_bundle", "textual inversions")]
    {
        let input = adapter(case);
        let words = ["convert", &input, "a.safetensors", "--to", "kohya", "--base", base.to_str().unwrap()];
        let (code, _, talk) = lora_of(folder.path(), &words);
        assert_eq!(code, 1, "{case}: {talk}");
        let (code, _, talk) = lora_of(folder.path(), &[&words[..], &["--allow-unmatched"]].concat());
        assert!(code == 0 && talk.contains(left), "{case}: {talk}");
        let check = ["check", "a.safetensors", "--base", base.to_str().unwrap()];
        assert!(done_of(folder.path(), &check).starts_with("ok"), "{case}");
    }
}
