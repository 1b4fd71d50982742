//! `lora merge` through the real program: the peers' answers, every layout of a base, and what must be refused.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

use lora_core::format::{
    AdapterFile, BaseModel, Component, Dtype, Strengths, TensorData, TensorFile, merge, write_tensors,
};
use serde_json::Value;
use support::{formats, lora_of};

/// Every tensor of every file of a folder, or of a file, as `FILE:NAME`.
fn tensors(path: &Path) -> BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)> {
    let mut files = vec![path.to_owned()];
    if path.is_dir() {
        files = fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()).collect();
        files.retain(|path| path.extension().is_some_and(|end| end == "safetensors"));
    }
    let mut tensors = BTreeMap::new();
    for path in files {
        let file = TensorFile::open(&path).unwrap();
        let stem = path.file_stem().unwrap().to_str().unwrap();
        for name in file.names() {
            let info = file.info(name).unwrap();
            let bytes = file.bytes(name).unwrap().to_vec();
            tensors.insert(format!("{stem}.{name}"), (info.dtype, info.shape.clone(), bytes));
        }
    }
    tensors
}

/// A copy of a folder of tensor files in another type; configurations come along.
fn stored_as(dtype: Dtype, from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let target = to.join(path.file_name().unwrap());
        if path.extension().is_none_or(|end| end != "safetensors") {
            fs::copy(&path, target).unwrap();
            continue;
        }
        let file = TensorFile::open(&path).unwrap();
        let rounded = file.names().map(|name| {
            let array = file.array(name).unwrap();
            (name.to_owned(), TensorData::from_f32(dtype, array.shape, &array.values).unwrap())
        });
        write_tensors(&target, &rounded.collect::<Vec<_>>(), file.metadata()).unwrap();
    }
}

#[test]
fn every_case_of_the_peers_comes_out_of_the_program_as_they_have_it() {
    let mut seen = 0;
    for entry in fs::read_dir(formats()).unwrap() {
        let case = entry.unwrap().path();
        let Ok(text) = fs::read_to_string(case.join("manifest.json")) else { continue };
        let manifest: Value = serde_json::from_str(&text.replace(": Infinity", ": null")).unwrap();
        let adapters = manifest["adapters"].as_array();
        // Name tables and hostile files have tests of their own; a combination and block weights no words here.
        let Some(adapters) = adapters.filter(|adapters| {
            manifest["combine"] != "linear" && adapters.iter().all(|adapter| adapter["lbws"].is_null())
        }) else {
            continue;
        };
        check_case(&case, &manifest, adapters);
        seen += 1;
    }
    assert!(seen >= 85, "{seen} cases");
}

fn check_case(case: &Path, manifest: &Value, adapters: &[Value]) {
    let name = manifest["name"].as_str().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let mut base = formats().join("bases").join(manifest["base"].as_str().unwrap());
    let mut words = vec!["merge".to_owned(), "--json".into(), "--allow-unmatched".into(), "--out".into(), "out".into()];
    if manifest["base_dtype"] == "bf16" {
        stored_as(Dtype::Bf16, &base, &folder.path().join("base"));
        base = folder.path().join("base");
    } else {
        words.extend(["--dtype".to_owned(), "fp32".into()]);
    }
    for adapter in adapters {
        let number = |key: &str| adapter[key].as_f64();
        let unet = number("weight").or(number("unet")).unwrap_or(1.0);
        let encoder = |key| number("weight").or(number(key)).unwrap_or(1.0);
        let (first, second) = (encoder("text_encoder"), encoder("text_encoder_2"));
        let file = case.join(adapter["file"].as_str().unwrap());
        words.extend(["--lora".to_owned(), format!("{}:unet={unet},te1={first},te2={second}", file.display())]);
    }
    words.extend(["--base".to_owned(), base.display().to_string()]);
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let (code, shown, error) = lora_of(folder.path(), &words);
    assert_eq!(code, 0, "{name}: {error}");

    let document: Value = serde_json::from_str(&shown).unwrap();
    let unapplied =
        document["adapters"].as_array().unwrap().iter().flat_map(|one| one["unapplied"].as_array().unwrap());
    let unapplied: BTreeSet<&str> = unapplied.map(|entry| entry["key"].as_str().unwrap()).collect();
    let expected = manifest["must_report"].as_array().unwrap().iter().map(|key| key.as_str().unwrap());
    assert_eq!(unapplied, expected.collect(), "{name}");

    let is_language = manifest["base"].as_str().unwrap().starts_with(['l', 'q']);
    let answers = TensorFile::open(&case.join(manifest["expected"].as_str().unwrap())).unwrap();
    let tolerance = |key: &str| manifest["tolerance"][key].as_f64().unwrap();
    let (before, after) = (tensors(&base), tensors(&folder.path().join("out")));
    assert!(before.keys().all(|key| after.contains_key(key)), "{name}: tensors are missing");
    for (key, (dtype, shape, bytes)) in &after {
        let answer = if is_language { key.split_once('.').unwrap().1 } else { key };
        let Ok(want) = answers.array(answer) else {
            assert_eq!(before.get(key), Some(&(*dtype, shape.clone(), bytes.clone())), "{name}: {key} is changed");
            continue;
        };
        assert_eq!(shape, &want.shape, "{name}: {key}");
        for (got, want) in dtype.widen(bytes).unwrap().iter().zip(&want.values) {
            let error = f64::from((got - want).abs());
            let allowed = tolerance("atol") + tolerance("rtol") * f64::from(want.abs());
            assert!(error <= allowed, "{name}: {key}: {got} instead of {want}");
        }
    }
}

#[test]
fn unmatched_keys_are_refused_unless_allowed() {
    let folder = tempfile::tempdir().unwrap();
    let base = formats().join("bases/sd15");
    let adapter = formats().join("kohya_sd15_unknown_keys/adapter.safetensors");
    let words = ["merge", "--base", base.to_str().unwrap(), "--lora", adapter.to_str().unwrap(), "--out", "out"];
    let (code, shown, error) = lora_of(folder.path(), &words);
    assert_eq!((code, shown.as_str()), (1, ""));
    let error = error.replace(formats().to_str().unwrap(), "FIXTURES");
    insta::assert_snapshot!(error, @"
    error: 4 of 40 keys of FIXTURES/kohya_sd15_unknown_keys/adapter.safetensors find no place in this base
      lora_te_text_model_encoder_layers_30_mlp_fc1.lora_down.weight: the base's text_encoder has no such module
      lora_te_text_model_encoder_layers_30_mlp_fc1.lora_up.weight: the base's text_encoder has no such module
      lora_unet_down_blocks_7_attentions_0_proj_in.lora_down.weight: the base's unet has no such module
      lora_unet_down_blocks_7_attentions_0_proj_in.lora_up.weight: the base's unet has no such module

    hint: `lora check FIXTURES/kohya_sd15_unknown_keys/adapter.safetensors --base FIXTURES/bases/sd15` names them all; `--allow-unmatched` merges the rest
    ");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "something was written");

    let (code, shown, error) = lora_of(folder.path(), &[&words[..], &["--allow-unmatched"]].concat());
    assert_eq!(code, 0, "{error}");
    assert!(shown.starts_with("Merged"), "{shown}");
    assert_eq!(error.matches("the base's").count(), 4, "{error}");
}

#[test]
fn output_over_the_base_leaves_a_merged_base_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let adapter = formats().join("kohya_sd15_linear/adapter.safetensors");
    stored_as(Dtype::F32, &formats().join("bases/sd15"), &folder.path().join("base"));
    fs::write(folder.path().join("base/README.md"), "about this model").unwrap();
    let merge = |base: &str, out: &str| {
        let words = ["merge", "--base", base, "--lora", adapter.to_str().unwrap(), "--out", out];
        let (code, _, error) = lora_of(folder.path(), &words);
        assert_eq!(code, 0, "{error}");
    };
    merge("base", "apart");
    merge("base", "base");
    assert_eq!(tensors(&folder.path().join("base")), tensors(&folder.path().join("apart")));
    assert_eq!(fs::read_to_string(folder.path().join("base/README.md")).unwrap(), "about this model");
    let mut names: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["apart", "base"]);

    // A folder that holds something else is nobody's to replace.
    let words = ["merge", "--base", "base", "--lora", adapter.to_str().unwrap(), "--out", "apart"];
    let (code, _, error) = lora_of(folder.path(), &words);
    assert_eq!(code, 1);
    assert!(error.contains("it exists and is not the base"), "{error}");

    // One file over itself.
    let file = "apart/unet.safetensors";
    merge_one(folder.path(), file, "one.safetensors");
    merge_one(folder.path(), file, file);
    assert_eq!(fs::read(folder.path().join("one.safetensors")).unwrap(), fs::read(folder.path().join(file)).unwrap());
}

fn merge_one(folder: &Path, base: &str, out: &str) {
    let adapter = formats().join("diffusers_sd15_conv/adapter.safetensors");
    let words = ["merge", "--base", base, "--lora", adapter.to_str().unwrap(), "--out", out, "--allow-unmatched"];
    let (code, _, error) = lora_of(folder, &words);
    assert_eq!(code, 0, "{error}");
}

#[test]
fn a_result_that_the_type_cannot_hold_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let base = formats().join("bases/sd15");
    let adapter = formats().join("kohya_sd15_linear/adapter.safetensors");
    let strong = format!("{}:1e9", adapter.display());
    let words =
        ["merge", "--base", base.to_str().unwrap(), "--lora", &strong, "--out", "out", "--dtype", "fp16", "--json"];
    let (code, shown, error) = lora_of(folder.path(), &words);
    assert_eq!((code, shown.as_str()), (1, ""));
    let error: Value = serde_json::from_str(&error).unwrap();
    assert_eq!(error["error"]["code"], "overflow");
    let message = error["error"]["message"].as_str().unwrap();
    assert!(message.contains(".weight` would hold") && message.contains("F16"), "{message}");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "something was left behind");
}

#[test]
fn a_sharded_folder_keeps_its_shards_and_its_index_tells_the_new_sizes() {
    let folder = tempfile::tempdir().unwrap();
    let base = folder.path().join("base");
    fs::create_dir(&base).unwrap();
    let whole = formats().join("bases/llama");
    fs::copy(whole.join("config.json"), base.join("config.json")).unwrap();
    let file = TensorFile::open(&whole.join("model.safetensors")).unwrap();
    let mut map = serde_json::Map::new();
    for (number, shard) in ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"].iter().enumerate() {
        let mine = file.names().enumerate().filter(|(index, _)| index % 2 == number);
        let mine = mine.map(|(_, name)| {
            let info = file.info(name).unwrap();
            map.insert(name.to_owned(), (*shard).into());
            (name.to_owned(), TensorData::new(info.dtype, &*info.shape, file.bytes(name).unwrap().to_vec()).unwrap())
        });
        write_tensors(&base.join(shard), &mine.collect::<Vec<_>>(), &BTreeMap::new()).unwrap();
    }
    let index = serde_json::json!({"metadata": {"total_size": 1}, "weight_map": map});
    fs::write(base.join("model.safetensors.index.json"), index.to_string()).unwrap();
    fs::write(base.join("pytorch_model.bin"), "the same weights, unmerged").unwrap();

    let adapter = formats().join("peft_lora/adapter");
    let merge = |base: &str, out: &str| {
        let words = ["merge", "--base", base, "--lora", adapter.to_str().unwrap(), "--out", out, "--dtype", "bf16"];
        let (code, shown, error) = lora_of(folder.path(), &[&words[..], &["--json"]].concat());
        assert_eq!(code, 0, "{error}");
        serde_json::from_str::<Value>(&shown).unwrap()
    };
    let document = merge("base", "shards");
    assert_eq!(document["left_out"], serde_json::json!(["base/pytorch_model.bin"]));
    merge(whole.to_str().unwrap(), "whole");
    let strip = |tensors: BTreeMap<String, _>| -> BTreeMap<String, _> {
        tensors.into_iter().map(|(key, tensor)| (key.split_once('.').unwrap().1.to_owned(), tensor)).collect()
    };
    assert_eq!(strip(tensors(&folder.path().join("shards"))), strip(tensors(&folder.path().join("whole"))));
    let text = fs::read_to_string(folder.path().join("shards/model.safetensors.index.json")).unwrap();
    let index: Value = serde_json::from_str(&text).unwrap();
    let bytes: usize = tensors(&folder.path().join("shards")).values().map(|(_, _, bytes)| bytes.len()).sum();
    assert_eq!(index["metadata"]["total_size"], bytes);
    assert!(!folder.path().join("shards/pytorch_model.bin").exists());
}

#[test]
fn a_single_file_keeps_its_own_names_fused_and_turned_tensors_among_them() {
    let folder = tempfile::tempdir().unwrap();
    let path = formats().join("../checkpoints/sdxl/checkpoint.safetensors");
    let base = BaseModel::open(&path).unwrap();
    let layer = "text_model.encoder.layers.0.self_attn";
    let modules = [
        (Component::TextEncoder2, "lora_te2_", format!("{layer}.q_proj")),
        (Component::TextEncoder2, "lora_te2_", format!("{layer}.v_proj")),
        (Component::TextEncoder2, "lora_te2_", "text_projection".to_owned()),
        (Component::TextEncoder, "lora_te1_", format!("{layer}.out_proj")),
        (Component::Unet, "lora_unet_", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q".to_owned()),
    ];
    let mut factors = Vec::new();
    for (component, prefix, module) in &modules {
        let shape = &base.module(*component, module).unwrap_or_else(|| panic!("{module}")).weight;
        for (suffix, shape) in [("lora_down", [2, shape[1]]), ("lora_up", [shape[0], 2])] {
            let values: Vec<f32> = (0..shape[0] * shape[1]).map(|i| (i % 7) as f32 * 0.125 - 0.375).collect();
            let data = TensorData::from_f32(Dtype::F32, shape, &values).unwrap();
            factors.push((format!("{prefix}{}.{suffix}.weight", module.replace('.', "_")), data));
        }
    }
    let adapter = folder.path().join("adapter.safetensors");
    write_tensors(&adapter, &factors, &BTreeMap::new()).unwrap();
    let (code, _, error) = lora_of(
        folder.path(),
        &["merge", "--base", path.to_str().unwrap(), "--lora", "adapter.safetensors:0.5", "--out", "out.safetensors"],
    );
    assert_eq!(code, 0, "{error}");

    let merged = BaseModel::open(&folder.path().join("out.safetensors")).unwrap();
    let read = AdapterFile::read(&adapter, &base).unwrap();
    assert_eq!(read.modules.len(), modules.len());
    let strengths = Strengths::all(0.5);
    let expected = merge(&mut |component, name: &str| base.read(component, name), &[(&read, &strengths)]).unwrap();
    assert_eq!(expected.len(), modules.len());
    for component in base.components() {
        for (name, dtype, _) in base.tensors(component) {
            let (before, after) = (base.read(component, name).unwrap(), merged.read(component, name).unwrap());
            let Some(want) = expected.get(&(component, name.to_owned())) else {
                assert!(before == after, "{component}.{name} is changed");
                continue;
            };
            let rounded = dtype.widen(&dtype.narrow(&want.values).unwrap()).unwrap();
            let after = after.unwrap();
            let step = match dtype {
                Dtype::F32 => 1e-6,
                _ => 1e-3,
            };
            let near = |(got, want): (&f32, &f32)| (got - want).abs() <= step * want.abs().max(1.0);
            assert!(after.values.iter().zip(&rounded).all(near), "{component}.{name}");
            assert!(before.is_some_and(|before| before != after), "{component}.{name} is not changed");
        }
    }
    let [old, new] = [&base, &merged].map(|base| &base.files()[0]);
    assert_eq!(old.names_in_place(), new.names_in_place());
    assert_eq!(old.metadata(), new.metadata());
}

#[test]
fn a_base_in_4_bits_is_refused_with_what_to_merge_into_instead() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    fs::create_dir(at("packed")).unwrap();
    fs::create_dir(at("adapter")).unwrap();
    let zeros = |shape: &[usize]| TensorData::from_f32(Dtype::F32, shape, &vec![0.0; shape.iter().product()]).unwrap();
    let bytes = |text: &str| TensorData::new(Dtype::U8, [text.len()], text.as_bytes().to_vec()).unwrap();
    let path = "model.layers.0.self_attn.q_proj";
    let state = r#"{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [4, 32]}"#;
    let packed = [
        (format!("{path}.weight"), TensorData::new(Dtype::U8, [64, 1], vec![0; 64]).unwrap()),
        (format!("{path}.weight.absmax"), zeros(&[2])),
        (format!("{path}.weight.quant_map"), zeros(&[16])),
        (format!("{path}.weight.quant_state.bitsandbytes__nf4"), bytes(state)),
    ];
    write_tensors(&at("packed/model.safetensors"), &packed, &BTreeMap::new()).unwrap();
    fs::write(at("packed/config.json"), r#"{"model_type": "llama"}"#).unwrap();
    let factors =
        [(format!("{path}.lora_A.weight"), zeros(&[2, 32])), (format!("{path}.lora_B.weight"), zeros(&[4, 2]))];
    write_tensors(&at("adapter/adapter_model.safetensors"), &factors, &BTreeMap::new()).unwrap();
    fs::write(at("adapter/adapter_config.json"), r#"{"peft_type": "LORA", "r": 2, "lora_alpha": 4}"#).unwrap();

    let (code, shown, said) = lora_of(folder.path(), &["check", "adapter", "--base", "packed"]);
    assert_eq!(code, 0, "{shown}{said}");
    let (code, shown, said) = lora_of(folder.path(), &["inspect", "packed"]);
    assert!(code == 0 && shown.contains("1 tensor, 128 parameters, NF4"), "{shown}{said}");
    let words = ["merge", "--base", "packed", "--lora", "adapter", "--out", "out"];
    let (code, _, said) = lora_of(folder.path(), &words);
    assert_eq!(code, 1, "{said}");
    for part in ["packed/model.safetensors", path, "4 bits", "hint: ", "full precision"] {
        assert!(said.contains(part), "`{part}` is missing in {said}");
    }
    assert!(!at("out").exists());
}

/// A file that loads and does nothing is what people complain about most.
#[test]
fn tensors_that_come_out_as_they_were_are_not_called_changed() {
    let folder = tempfile::tempdir().unwrap();
    let base = formats().join("bases/sd15");
    let file = TensorFile::open(&formats().join("kohya_sd15_linear/adapter.safetensors")).unwrap();
    // Every second update is one of zeros, then all of them are.
    let names: BTreeSet<String> = file.names().filter_map(|name| Some(name.split_once('.')?.0.to_owned())).collect();
    for (zeros, expected) in [(names.len() / 2, names.len() - names.len() / 2), (names.len(), 0)] {
        let silent: BTreeSet<&String> = names.iter().take(zeros).collect();
        let tensors = file.names().map(|name| {
            let array = file.array(name).unwrap();
            let is_silent = name.ends_with("lora_up.weight") && silent.iter().any(|module| name.starts_with(&**module));
            let values = if is_silent { vec![0.0; array.values.len()] } else { array.values };
            (name.to_owned(), TensorData::from_f32(Dtype::F32, array.shape, &values).unwrap())
        });
        let (lora, out) = (folder.path().join("zeros.safetensors"), folder.path().join(format!("merged{zeros}")));
        write_tensors(&lora, &tensors.collect::<Vec<_>>(), &BTreeMap::new()).unwrap();
        let words = ["merge", "--base", base.to_str().unwrap(), "--lora", lora.to_str().unwrap(), "--out"];
        let (code, shown, talk) = lora_of(folder.path(), &[&words[..], &[out.to_str().unwrap()]].concat());
        assert_eq!(code, 0, "{talk}");
        assert!(shown.contains(&format!("Changed    {expected} of ")), "{shown}");
        let same = if expected == 0 { "no tensor has changed" } else { "came out as they were" };
        assert!(talk.contains(same), "{talk}");
    }
}

#[test]
fn a_tied_head_that_was_trained_comes_out_as_a_weight_of_its_own_in_the_type_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let base = formats().join("bases/llama_tied");
    let model = BaseModel::open(&base).unwrap();
    let shape = model.shape(Component::LanguageModel, "model.embed_tokens.weight").unwrap().to_vec();
    let size: usize = shape.iter().product();
    let head = TensorData::from_f32(Dtype::F32, shape.clone(), &vec![0.5; size]).unwrap();
    let adapter = folder.path().join("adapter");
    fs::create_dir(&adapter).unwrap();
    fs::write(adapter.join("adapter_config.json"), r#"{"peft_type": "LORA", "r": 1, "lora_alpha": 1}"#).unwrap();
    let tensors = [("base_model.model.lm_head.weight".to_owned(), head)];
    write_tensors(&adapter.join("adapter_model.safetensors"), &tensors, &BTreeMap::new()).unwrap();
    let words = ["merge", "--base", base.to_str().unwrap(), "--lora", "adapter", "--out", "out", "--dtype", "bf16"];
    let (code, _, error) = lora_of(folder.path(), &words);
    assert_eq!((code, error.as_str()), (0, ""));
    let merged = tensors_of_type(&folder.path().join("out"), Dtype::Bf16);
    let half = Dtype::Bf16.widen(&merged["model.lm_head.weight"]).unwrap();
    assert!(half.len() == size && half.iter().all(|value| *value == 0.5));
    let config =
        |path: &Path| -> Value { serde_json::from_slice(&fs::read(path.join("config.json")).unwrap()).unwrap() };
    let (before, after) = (config(&base), config(&folder.path().join("out")));
    assert_eq!((&before["tie_word_embeddings"], &after["tie_word_embeddings"]), (&true.into(), &false.into()));
    for key in ["dtype", "torch_dtype"] {
        assert!(before.get(key).is_none() || after[key] == "bfloat16", "{key}: {}", after[key]);
    }

    // A head for more tokens, without rows for them in the table.
    let larger = [shape[0] + 1, shape[1]];
    let head = TensorData::from_f32(Dtype::F32, larger, &vec![0.5; larger[0] * larger[1]]).unwrap();
    let tensors = [("base_model.model.lm_head.weight".to_owned(), head)];
    write_tensors(&adapter.join("adapter_model.safetensors"), &tensors, &BTreeMap::new()).unwrap();
    let (code, _, error) = lora_of(folder.path(), &words);
    assert_eq!(code, 1);
    assert!(error.contains("rows of the new tokens are missing") && error.contains("modules_to_save"), "{error}");
}

/// The bytes of every tensor of a folder, all of one type.
fn tensors_of_type(folder: &Path, expected: Dtype) -> BTreeMap<String, Vec<u8>> {
    let checked = tensors(folder).into_iter().map(|(name, (dtype, _, bytes))| {
        assert_eq!(dtype, expected, "{name}");
        (name, bytes)
    });
    checked.collect()
}
