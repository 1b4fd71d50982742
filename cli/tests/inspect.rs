//! `lora inspect` and `lora check` on small files written here.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::{collections::BTreeMap, fs, path::Path};

use lora_core::format::{Dtype, TensorData, write_tensors};
use serde_json::{Value, json};
use support::{command, done, formats, lora};

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
    Warning    1 of 2 modules changes nothing: up is all zeros
               (lora_unet_mid_block_resnets_0_conv1)
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
    assert_eq!(code, 0);
    insta::assert_snapshot!(shown, @"
    ok    6 of 6 keys applied to 2 modules of Stable Diffusion 1.x (kohya)
    warn  1 of 2 modules changes nothing: up is all zeros
          (unet.mid_block.resnets.0.conv1)
    ");

    write_adapter(folder.path(), &["strange.key", "lora_unet_nowhere.alpha"]);
    let (code, shown, _) = lora(folder.path(), "check neon.safetensors --base base");
    assert_eq!(code, 1);
    insta::assert_snapshot!(shown, @"
    fail  6 of 8 keys applied to 2 modules of Stable Diffusion 1.x (kohya)
    warn  1 of 2 modules changes nothing: up is all zeros
          (unet.mid_block.resnets.0.conv1)
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

#[test]
fn the_one_adapter_of_a_folder_is_inspected_and_of_several_one_must_be_named() {
    let folder = tempfile::tempdir().unwrap();
    let inside = folder.path().join("mine");
    fs::create_dir(&inside).unwrap();
    write_adapter(&inside, &[]);
    let shown = done(folder.path(), "inspect mine");
    assert!(shown.starts_with("File       mine/neon.safetensors\nWhat       adapter, LoRA"), "{shown}");
    fs::copy(inside.join("neon.safetensors"), inside.join("other.safetensors")).unwrap();
    let (code, shown, error) = lora(folder.path(), "inspect mine");
    assert_eq!((code, shown.as_str()), (1, ""));
    insta::assert_snapshot!(error, @"
    error: mine holds 2 .safetensors files, of which any could be meant
      neon.safetensors
      other.safetensors

    hint: name one of them: `lora inspect mine/neon.safetensors`
    ");

    fs::create_dir(folder.path().join("word")).unwrap();
    let tensor = TensorData::from_f32(Dtype::F32, [1, 8], &[0.5; 8]).unwrap();
    let file = folder.path().join("word/cat.safetensors");
    write_tensors(&file, &[("emb_params".to_owned(), tensor)], &BTreeMap::new()).unwrap();
    assert!(done(folder.path(), "inspect word").contains("What       textual inversion"));
}

#[test]
fn a_component_is_called_what_it_is_and_serves_as_a_base() {
    let folder = tempfile::tempdir().unwrap();
    base(folder.path());
    write_adapter(folder.path(), &[]);
    let what =
        |name: &str| done(folder.path(), &format!("inspect {name}")).lines().nth(1).unwrap_or_default().to_owned();
    assert_eq!(what("base/unet"), "What       component of a base model: the UNet of Stable Diffusion 1.x");
    assert_eq!(
        what("base/text_encoder"),
        "What       component of a base model: the text encoder of Stable Diffusion 1.x"
    );
    assert_eq!(what("base/vae"), "What       component of a base model: the VAE of Stable Diffusion 1.x");
    let shown = done(folder.path(), "check neon.safetensors --base base/unet");
    assert!(shown.starts_with("ok    6 of 6 keys applied to 2 modules"), "{shown}");
    done(folder.path(), "merge --base base/unet --lora neon.safetensors --out merged");
    assert!(folder.path().join("merged/config.json").is_file());
}

#[test]
fn a_model_of_transformers_that_is_no_language_model_is_not_called_one() {
    let folder = tempfile::tempdir().unwrap();
    let tensor = TensorData::from_f32(Dtype::F32, [4, 4], &[0.5; 16]).unwrap();
    let name = "encoder.layer.0.attention.self.query.weight".to_owned();
    write_tensors(&folder.path().join("model.safetensors"), &[(name, tensor)], &BTreeMap::new()).unwrap();
    let config = json!({"model_type": "bert", "architectures": ["BertModel"]});
    fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    let shown = done(folder.path(), "inspect .");
    assert!(shown.contains("What       base model, bert model (no causal language model)\n"), "{shown}");
    assert!(shown.contains("1 tensor, 16 parameters"), "{shown}");
}

#[test]
fn an_adapter_that_changes_nothing_is_said_to() {
    let folder = tempfile::tempdir().unwrap();
    let pair = |module: &str| {
        let tensor = |value: f32| TensorData::from_f32(Dtype::F32, [12, 12], &[value; 144]).unwrap();
        [(format!("{module}.lora_down.weight"), tensor(0.5)), (format!("{module}.lora_up.weight"), tensor(0.0))]
    };
    let names =
        ["k", "q", "v"].map(|name| format!("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_{name}"));
    let tensors: Vec<_> = names.iter().flat_map(|name| pair(name)).collect();
    write_tensors(&folder.path().join("new.safetensors"), &tensors, &BTreeMap::new()).unwrap();
    let base = formats().join("bases/sd15");
    let (code, shown, _) = lora(folder.path(), &format!("check new.safetensors --base {}", base.display()));
    assert_eq!(code, 0);
    insta::assert_snapshot!(shown, @"
    ok    6 of 6 keys applied to 3 modules of Stable Diffusion 1.x (kohya)
    warn  this adapter changes nothing
    warn  3 of 3 modules change nothing: up is all zeros
          (unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_k,
          unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q and 1 more)
    ");
    let shown = done(folder.path(), "inspect new.safetensors");
    assert!(shown.contains("Warning    this adapter changes nothing\n"), "{shown}");

    // 28 alphas of 0 make one line.
    let zero = formats().join("kohya_sd15_alpha_zero/adapter.safetensors");
    let shown = done(folder.path(), &format!("check {} --base {}", zero.display(), base.display()));
    assert_eq!(shown.matches("warn").count(), 2, "{shown}");
    assert!(shown.contains("28 of 28 modules change nothing: alpha is 0"), "{shown}");
}

/// A copy of a fixture of peft, some fields of its configuration set.
fn peft(folder: &Path, fixture: &str, fields: &[(&str, Value)]) {
    let from = formats().join(fixture).join("adapter");
    fs::copy(from.join("adapter_model.safetensors"), folder.join("adapter_model.safetensors")).unwrap();
    let text = fs::read_to_string(from.join("adapter_config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&text).unwrap();
    for (field, value) in fields {
        config[*field] = value.clone();
    }
    fs::write(folder.join("adapter_config.json"), config.to_string()).unwrap();
}

#[test]
fn a_configuration_that_cannot_be_followed_is_named_and_no_scale_made_up() {
    let folder = tempfile::tempdir().unwrap();
    for wrong in [json!(0), json!(-1), json!("8")] {
        peft(folder.path(), "peft_lora", &[("r", wrong.clone())]);
        let shown = done(folder.path(), "inspect .");
        assert!(shown.contains("Rank       4, scale unknown\n"), "{wrong}: {shown}");
        assert!(shown.contains("Warning    adapter_config.json: "), "{wrong}: {shown}");
    }
    fs::write(folder.path().join("adapter_config.json"), "{").unwrap();
    let shown = done(folder.path(), "inspect .");
    assert!(shown.contains("scale unknown\n") && shown.contains("no JSON object"), "{shown}");
    fs::remove_file(folder.path().join("adapter_config.json")).unwrap();
    let shown = done(folder.path(), "inspect .");
    assert!(shown.contains("scale unknown\n") && shown.contains("not beside the file"), "{shown}");
}

#[test]
fn what_the_configuration_of_peft_says_is_shown() {
    let folder = tempfile::tempdir().unwrap();
    peft(folder.path(), "peft_rslora", &[("base_model_name_or_path", json!("someone/model-1b"))]);
    let shown = done(folder.path(), "inspect .");
    assert!(shown.contains("What       adapter, rsLoRA, peft spelling\n"), "{shown}");
    assert!(shown.contains("Rank       4, alpha 2, scale 1 (rsLoRA: alpha/√rank)\n"), "{shown}");
    assert!(shown.contains("Trained    on someone/model-1b\n"), "{shown}");

    peft(folder.path(), "peft_lora", &[("r", json!(16))]);
    let said = "the configuration says rank 16 where the tensors of 8 modules have rank 4";
    let joined = |shown: String| shown.split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(joined(done(folder.path(), "inspect .")).contains(said));
    let base = formats().join("bases/llama");
    assert!(joined(done(folder.path(), &format!("check . --base {}", base.display()))).contains(said));

    peft(folder.path(), "peft_lora", &[("lora_alpha", json!(0))]);
    assert!(done(folder.path(), "inspect .").contains("8 of 8 modules change nothing: alpha is 0"));
}

#[test]
fn parts_of_language_models_are_counted_as_such() {
    let folder = tempfile::tempdir().unwrap();
    let shown =
        |name: &str| done(folder.path(), &format!("inspect {}", formats().join(name).join("adapter").display()));
    assert!(shown("peft_modules_to_save").contains("Modules    10 (language_model 10)\n"));
    assert!(shown("peft_embedding_dora").contains("Base       a language model (judged by its keys)\n"));
    let boft =
        done(folder.path(), &format!("inspect {}", formats().join("lycoris_boft/adapter.safetensors").display()));
    assert!(boft.contains("adapter, BOFT, kohya spelling\n"), "{boft}");
}

#[test]
fn the_tensors_of_a_checkpoint_are_those_of_its_header() {
    let folder = tempfile::tempdir().unwrap();
    let file = formats().join("../checkpoints/sdxl/checkpoint.safetensors");
    let stored = lora_core::format::TensorFile::open(&file).unwrap().names().len();
    let document: Value =
        serde_json::from_str(&done(folder.path(), &format!("inspect {} --json", file.display()))).unwrap();
    assert_eq!(document["tensors"], stored);
}

#[test]
fn modules_of_other_shapes_are_all_accounted_for() {
    let folder = tempfile::tempdir().unwrap();
    base(folder.path());
    let file = formats().join("kohya_sd15_linear/adapter.safetensors");
    let line = format!("check {} --base base", file.display());
    let (code, shown, _) = lora(folder.path(), &line);
    assert_eq!(code, 1);
    let words = shown.split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(
        words.contains("do not fit this base unet.down_blocks.0.attentions.0.proj_in lora_down.weight [4, 8, 1, 1]")
    );
    assert!(words.contains("base weight [96, 96, 1, 1]: its input is not the module's"), "{shown}");
    let (code, shown, error) = lora(folder.path(), &format!("{line} --json"));
    let document: Value = serde_json::from_str(&shown).unwrap();
    assert_eq!((code, error.as_str(), &document["ok"]), (1, "", &json!(false)));
    let misfits = document["misfits"].as_array().unwrap();
    assert!(misfits.len() > 100 && misfits[0]["shape"].is_array() && misfits[0]["base_shape"].is_array());
}

#[cfg(unix)]
#[test]
fn strange_names_of_files_steer_no_terminal_and_stop_no_document() {
    use std::{ffi::OsStr, os::unix::ffi::OsStrExt};

    let folder = tempfile::tempdir().unwrap();
    write_adapter(folder.path(), &[]);
    let inspected = |name: &OsStr, json: bool| {
        fs::copy(folder.path().join("neon.safetensors"), folder.path().join(name)).unwrap();
        let words = [OsStr::new("inspect"), name].into_iter().chain(json.then_some(OsStr::new("--json")));
        command(folder.path()).args(words).output().unwrap()
    };
    let output = inspected(OsStr::new("a\nb\u{1b}[2J.safetensors"), false);
    let talk = String::from_utf8(output.stderr).unwrap();
    assert!(talk.contains(r"lora check $'a\nb\x1b[2J.safetensors' --base BASE"), "{talk}");
    let output = inspected(OsStr::from_bytes(b"bad\xff.safetensors"), true);
    let document: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(document["path"], "bad\u{fffd}.safetensors");
}

#[test]
fn keys_without_a_name_are_shown() {
    let folder = tempfile::tempdir().unwrap();
    write_adapter(folder.path(), &[""]);
    assert!(done(folder.path(), "inspect neon.safetensors").contains("Unknown    1 key: \"\"\n"));
}

#[test]
fn one_dora_in_two_spellings_is_no_distance_apart() {
    let folder = tempfile::tempdir().unwrap();
    let (file, base) = (formats().join("lycoris_dora_out/adapter.safetensors"), formats().join("bases/sd15"));
    let (file, base) = (file.display(), base.display());
    done(folder.path(), &format!("convert {file} other.safetensors --to diffusers --base {base}"));
    let (code, shown, _) = lora(folder.path(), &format!("diff {file} other.safetensors --base {base} --json"));
    let document: Value = serde_json::from_str(&shown).unwrap();
    assert_eq!((code, &document["same"]), (0, &json!(true)), "{shown}");
    assert!(document["common"].as_array().unwrap().iter().all(|module| module["distance"] == 0.0), "{shown}");
    // What only the base tells is said to be so.
    let inputs = formats().join("lycoris_dora_in/adapter.safetensors");
    let (code, shown, _) = lora(folder.path(), &format!("diff {file} {}", inputs.display()));
    assert_eq!(code, 1);
    assert!(shown.contains("`--base BASE` would tell") && !shown.contains("-0"), "{shown}");
}

/// Keys of programs for other models, some with suffixes of their own.
#[test]
fn files_for_other_models_are_named() {
    let folder = tempfile::tempdir().unwrap();
    for (key, model) in [
        ("double_blocks.0.processor.qkv_lora1.down.weight", "FLUX"),
        ("lllite_unet_input_blocks_1_0_conv.0.weight", "ControlNet-LLLite"),
        ("diffusion_model.distilled_guidance_layer.layers.0.in_layer.lora_A.weight", "Chroma"),
        ("transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj.lora_A.weight", "FLUX.2"),
        ("diffusion_model.transformer_blocks.0.attn1.to_q.lora_A.weight", "LTX-Video"),
    ] {
        let tensor = TensorData::from_f32(Dtype::F32, [2, 4], &[0.5; 8]).unwrap();
        write_tensors(&folder.path().join("a.safetensors"), &[(key.to_owned(), tensor)], &BTreeMap::new()).unwrap();
        let (code, shown, talk) = lora(folder.path(), "inspect a.safetensors");
        assert_eq!(code, 0, "{talk}");
        assert!(shown.contains(&format!("Base       {model} (judged by its keys)")), "{shown}");
        assert!(talk.contains(&format!("adapters of {model} can be looked at and not applied")), "{talk}");
        let base = formats().join("bases/sd15");
        let words = ["check", "a.safetensors", "--base", base.to_str().unwrap()];
        let (code, _, talk) = support::lora_of(folder.path(), &words);
        assert!(code == 1 && talk.contains(&format!("looks like one for {model}")), "{talk}");
    }
}

#[test]
fn a_folder_with_a_pickled_adapter_says_how_to_convert_it() {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("old")).unwrap();
    fs::copy(support::fixtures().join("pickles/adapter.pt"), folder.path().join("old/adapter_model.bin")).unwrap();
    let (code, _, talk) = lora(folder.path(), "inspect old");
    assert!(code == 1 && talk.contains("`lora convert old/adapter_model.bin "), "{talk}");
}
