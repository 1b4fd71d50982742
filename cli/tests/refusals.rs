//! What is refused, through the real program: what went wrong is named, and the hint fits that and nothing else.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::{collections::BTreeMap, fs, path::Path};

use lora_core::{
    Array,
    format::{Dtype, TensorData, TensorFile, write_tensors},
};
use support::{done, formats, lora_of};

/// The exit code and what is said of a refused line; `@` stands for the folder of the fixtures.
#[track_caller]
fn refused(folder: &Path, line: &str) -> (i32, String) {
    let fixtures = formats().display().to_string();
    let words: Vec<String> = line.split_whitespace().map(|word| word.replace('@', &fixtures)).collect();
    let (code, shown, talk) = lora_of(folder, &words.iter().map(String::as_str).collect::<Vec<_>>());
    assert!(code != 0, "{line}: {shown}");
    (code, talk)
}

/// Checks that a line is refused with some words and without others.
#[track_caller]
fn says(folder: &Path, line: &str, words: &[&str], never: &[&str]) {
    let (_, talk) = refused(folder, line);
    assert!(words.iter().all(|word| talk.contains(word)), "{line}: {words:?} in\n{talk}");
    assert!(!never.iter().any(|word| talk.contains(word)), "{line}: {never:?} in\n{talk}");
}

/// A file of the fixtures with some of its tensors changed.
fn changed(folder: &Path, name: &str, case: &str, change: impl Fn(&str, &mut Array)) {
    let file = TensorFile::open(&formats().join(case).join("adapter.safetensors")).unwrap();
    let tensors: Vec<_> = file
        .names()
        .map(|key| {
            let mut array = file.array(key).unwrap();
            change(key, &mut array);
            (key.to_owned(), TensorData::from_f32(Dtype::F32, &*array.shape, &array.values).unwrap())
        })
        .collect();
    write_tensors(&folder.join(name), &tensors, file.metadata()).unwrap();
}

fn copied(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

/// A container by its header and the bytes behind it.
fn raw(folder: &Path, name: &str, header: &str, data: usize) {
    let bytes = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &vec![0; data]].concat();
    fs::write(folder.join(name), bytes).unwrap();
}

#[test]
fn large_numbers_are_decomposed_and_what_cannot_be_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path();
    let scaled = |part: &'static str| {
        move |key: &str, array: &mut Array| {
            if key.contains(part) {
                array.values.iter_mut().for_each(|value| *value *= 1e12);
            }
        }
    };
    changed(here, "large.safetensors", "lycoris_loha", scaled("w1_a"));
    changed(here, "larger.safetensors", "lycoris_loha", scaled("hada_"));
    changed(here, "spike.safetensors", "lycoris_loha", |key, array| {
        if key.contains("w1_a") {
            array.values[0] = 1e38;
        }
    });
    let base = formats().join("bases/sd15").display().to_string();
    for name in ["large", "spike"] {
        done(here, &format!("resize {name}.safetensors out.safetensors --rank 2 --base {base}"));
    }
    let module = "unet.mid_block.attentions.0.proj_in";
    let line = "resize larger.safetensors out.safetensors --rank 2 --base @/bases/sd15";
    says(here, line, &["larger.safetensors", module, "not finite", "hint: such numbers"], &["svd"]);
    let line =
        "mix --method svd --rank 2 --lora large.safetensors --lora larger.safetensors --base @/bases/sd15 --out o";
    says(here, line, &["large.safetensors and larger.safetensors", "proj_in", "not finite", "hint: such"], &["svd"]);
}

#[test]
fn a_hint_fits_its_fault() {
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path();
    let generic = "made a mistake";
    copied(&formats().join("peft_lora/adapter"), &here.join("prefix"));
    let config = here.join("prefix/adapter_config.json");
    let text = fs::read_to_string(&config).unwrap();
    assert!(text.contains(r#""LORA""#));
    fs::write(&config, text.replace(r#""LORA""#, r#""PREFIX_TUNING""#)).unwrap();
    says(here, "check prefix --base @/bases/llama", &["PREFIX_TUNING", "OFT are known here"], &[generic]);
    fs::write(&config, text.replacen('{', r#"{"r": 3,"#, 1)).unwrap();
    says(here, "check prefix --base @/bases/llama", &["adapter_config.json", "`r` occurs twice"], &[generic]);
    says(here, "resize @/peft_pissa/adapter out --energy 0.5", &["needs the base", "`--base BASE`"], &[generic]);

    let loud = "mix --lora @/kohya_sd15_linear/adapter.safetensors --lora @/kohya_sd15_linear/adapter.safetensors:1e9";
    let line = format!("{loud} --dtype fp16 --out out.safetensors");
    says(here, &line, &["module `lora_unet_", "--dtype bf16", "F16"], &[generic, "unet.lora_unet"]);

    let tensor = r#"{"dtype":"F4","shape":[7],"data_offsets":[0,4]}"#;
    raw(here, "nibbles.safetensors", &format!(r#"{{"a":{tensor}}}"#), 4);
    says(here, "inspect nibbles.safetensors", &["takes 28 bits, which is no whole number"], &["64 bits"]);
    let tensor = r#"{"dtype":"F4","shape":[9223372036854775807,8],"data_offsets":[0,4]}"#;
    raw(here, "endless.safetensors", &format!(r#"{{"a":{tensor}}}"#), 4);
    says(here, "inspect endless.safetensors", &["more bytes than 64 bits can count"], &[]);
    raw(here, "longer.safetensors", r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#, 9);
    says(here, "inspect longer.safetensors", &["followed by other bytes", "behind its end"], &["half-way"]);
}

#[test]
fn another_spelling_is_named_where_it_has_words() {
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path();
    let line = |to: &str| format!("convert @/peft_lora/adapter out.safetensors --to {to}");
    says(here, &line("comfy"), &["written as comfy", "`--to peft`"], &["--to kohya"]);
    says(here, &line("kohya"), &["written as kohya", "`--to peft`"], &["--to kohya"]);
    let line = "convert @/lycoris_loha/adapter.safetensors out.safetensors --to diffusers";
    says(here, line, &["written as diffusers", "`--to kohya`"], &[]);
    // Both encoders have the same names for peft, and alone they mean the first.
    let line = "convert @/kohya_sdxl_te2/adapter.safetensors out --to peft";
    says(here, line, &["`text_encoder_2.", "second text encoder", "`--to kohya`"], &[]);
    assert!(!here.join("out").exists());

    fs::copy(formats().join("kohya_sd15_linear/adapter.safetensors"), here.join("a.safetensors")).unwrap();
    says(here, "convert a.safetensors a.safetensors", &["a.safetensors a.converted.safetensors --to kohya`"], &[]);
    fs::write(here.join("empty.safetensors"), "").unwrap();
    for (name, why) in [("gone.pt", "no such file"), ("empty.safetensors", "0 bytes")] {
        let (code, talk) = refused(here, &format!("convert {name} out.safetensors"));
        assert!(code == 1 && talk.contains(name) && talk.contains(why), "{talk}");
    }
    fs::copy(here.join("a.safetensors"), here.join("-x.safetensors")).unwrap();
    let (_, _, talk) = lora_of(here, &["inspect", "--", "-x.safetensors"]);
    assert!(talk.contains("lora check ./-x.safetensors --base"), "{talk}");

    says(
        here,
        "diff a.safetensors @/peft_lora/adapter",
        &["are for different models", "a.safetensors: Stable Diffusion 1", "a language model"],
        &["--base"],
    );
}

#[test]
fn an_option_that_is_said_twice_or_not_at_all_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path();
    fs::copy(formats().join("kohya_sd15_linear/adapter.safetensors"), here.join("a.safetensors")).unwrap();
    for (line, words) in [
        ("resize a.safetensors b.safetensors", ["--rank <N>", "--energy <SHARE>"]),
        ("mix --lora a.safetensors:unet=1,unet=2 --out b.safetensors", ["unet=2", "already"]),
        ("metadata a.safetensors --set a=1 --set a=2", ["`a`", "twice"]),
    ] {
        let (code, talk) = refused(here, line);
        assert_eq!(code, 2, "{talk}");
        assert!(words.iter().all(|word| talk.contains(word)), "{line}: {talk}");
    }
}

#[test]
fn a_place_that_cannot_be_written_says_why() {
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path();
    fs::write(here.join("file"), "").unwrap();
    fs::create_dir(here.join("full")).unwrap();
    fs::write(here.join("full/x"), "").unwrap();
    let never = ["df -h", "free some space", "tmp"];
    let convert = |out: &str| format!("convert @/kohya_sd15_linear/adapter.safetensors {out} --to diffusers");
    says(here, &convert("file/x.safetensors"), &["file is no folder"], &["df -h", "mkdir", "tmp"]);
    says(here, &convert("new/deep/x.safetensors"), &["`mkdir -p new/deep`"], &never);
    says(here, &convert("full"), &["full/NAME.safetensors"], &never);
    says(here, &convert("."), &["./NAME"], &never);
    let merge = |out: &str| format!("merge --base model --lora @/peft_lora/adapter --out {out}");
    copied(&formats().join("bases/llama"), &here.join("model"));
    says(here, &merge("full"), &["not there yet"], &never);
    says(here, &merge("model/inside"), &["inside the base"], &never);
    says(here, &merge("file/inside"), &["cannot write file/inside"], &never);
}

#[cfg(unix)]
#[test]
fn a_path_that_is_no_file_is_called_what_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path();
    std::os::unix::fs::symlink("round.safetensors", here.join("round.safetensors")).unwrap();
    std::os::unix::fs::symlink("nowhere", here.join("dangling.safetensors")).unwrap();
    std::os::unix::net::UnixListener::bind(here.join("socket.safetensors")).unwrap();
    let never = ["no such file;", "yours to read"];
    says(here, "inspect round.safetensors", &["links lead to each other"], &never);
    says(here, "inspect dangling.safetensors", &["a link to nowhere"], &never);
    says(here, "inspect socket.safetensors", &["it is a socket"], &never);
    std::os::unix::fs::symlink("loop", here.join("loop")).unwrap();
    let line = "convert @/kohya_sd15_linear/adapter.safetensors loop/out.safetensors --to diffusers";
    says(here, line, &["links lead to each other"], &["tmp", "df -h"]);
}

#[test]
fn a_merge_that_fails_names_the_place_that_was_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let line = "merge --base @/bases/llama --lora @/peft_lora/adapter:1e39 --out merged";
    says(folder.path(), line, &["merged/", "would hold"], &[".tmp"]);
    assert!(!folder.path().join("merged").exists());
}

#[test]
fn an_index_promises_no_tensor_that_its_shards_lack() {
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path();
    let model = here.join("model");
    copied(&formats().join("bases/llama"), &model);
    let whole = fs::read_dir(&model).unwrap().map(|entry| entry.unwrap().path());
    let whole = whole.into_iter().find(|path| path.extension().is_some_and(|end| end == "safetensors")).unwrap();
    let names: Vec<String> = TensorFile::read(&whole).unwrap().names().map(str::to_owned).collect();
    fs::rename(&whole, model.join("model-00001-of-00001.safetensors")).unwrap();
    let index = |entries: &[(&str, &str)]| {
        let map: BTreeMap<&str, &str> = entries.iter().copied().collect();
        let text = serde_json::json!({"metadata": {}, "weight_map": map}).to_string();
        fs::write(model.join("model.safetensors.index.json"), text).unwrap();
    };
    let shard = "model-00001-of-00001.safetensors";
    let check = "check @/peft_lora/adapter --base model";
    index(&[(&names[0], shard), ("model.ghost.weight", shard)]);
    says(here, check, &["index.json", "`model.ghost.weight`", shard, "no shard holds it"], &[]);
    for outside in ["../model-00001-of-00001.safetensors", "/etc/x.safetensors"] {
        index(&[(&names[0], outside)]);
        says(here, check, &[&names[0], outside, "no file name in this folder"], &["weight_map"]);
    }
    // What the index does not name is read from the shards all the same.
    index(&[(&names[0], shard)]);
    done(here, &check.replace('@', &formats().display().to_string()));
}
