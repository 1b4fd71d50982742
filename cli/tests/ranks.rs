//! `lora resize`, `mix`, `extract` and `diff` through the real program, on small files written here.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use lora_core::{
    Draw, Purpose,
    format::{BaseModel, Component, Dtype, TensorData, TensorFile, write_tensors},
};
use serde_json::Value;
use support::{done, lora};

#[track_caller]
fn json(folder: &Path, line: &str) -> Value {
    serde_json::from_str(&done(folder, &format!("{line} --json"))).unwrap()
}

const QUERY: &str = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q";
const CONV: &str = "lora_unet_mid_block_resnets_0_conv1";
const TEXT: &str = "lora_te_text_model_encoder_layers_0_mlp_fc1";

fn base() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/tiny-sd")
}

/// Shape of the weight of one of the modules above in the bundled base.
fn weight(module: &str) -> Vec<usize> {
    let base = BaseModel::open(&base()).unwrap();
    let (component, path) = match module {
        QUERY => (Component::Unet, "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"),
        CONV => (Component::Unet, "mid_block.resnets.0.conv1"),
        _ => (Component::TextEncoder, "text_model.encoder.layers.0.mlp.fc1"),
    };
    base.module(component, path).unwrap().weight.clone()
}

/// A LoRA file for some modules, each with its rank and alpha, of random factors.
fn write_lora(folder: &Path, name: &str, seed: u64, modules: &[(&str, usize, f32)], dtype: Dtype) {
    let mut tensors = Vec::new();
    for (index, (module, rank, alpha)) in modules.iter().enumerate() {
        let weight = weight(module);
        let mut draw = Draw::new(seed, Purpose::Init, 0, index as u32);
        let mut put = |suffix: &str, shape: &[usize]| {
            let values = draw.normal(shape.iter().product(), 0.1);
            tensors.push((format!("{module}.{suffix}"), TensorData::from_f32(dtype, shape, &values).unwrap()));
        };
        put("lora_down.weight", &[&[*rank], &weight[1..]].concat());
        put("lora_up.weight", &[&[weight[0], *rank][..], &vec![1; weight.len() - 2]].concat());
        tensors.push((format!("{module}.alpha"), TensorData::from_f32(Dtype::F32, [], &[*alpha]).unwrap()));
    }
    let metadata = [
        ("ss_base_model_version", "sd_v1"),
        ("ss_network_dim", "8"),
        ("ss_network_alpha", "4.0"),
        ("ss_network_module", "networks.lora"),
        ("ss_seed", "7"),
        ("sshs_model_hash", "stale"),
    ];
    let metadata: BTreeMap<_, _> = metadata.map(|(key, value)| (key.to_owned(), value.to_owned())).into();
    write_tensors(&folder.join(name), &tensors, &metadata).unwrap();
}

fn file(path: &Path) -> TensorFile {
    TensorFile::read(path).unwrap()
}

#[test]
fn a_resized_file_keeps_its_spelling_and_says_its_ranks() {
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path();
    write_lora(here, "big.safetensors", 1, &[(QUERY, 8, 4.0), (CONV, 8, 4.0), (TEXT, 4, 4.0)], Dtype::F32);
    let shown = done(here, "resize big.safetensors small.safetensors --rank 4");
    assert!(shown.contains("2 modules") && shown.contains("the file had ranks 4 to 8, now rank 4"), "{shown}");
    assert!(shown.contains("Kept       1 module that"), "{shown}");
    let small = file(&here.join("small.safetensors"));
    assert_eq!(small.names().collect::<Vec<_>>(), file(&here.join("big.safetensors")).names().collect::<Vec<_>>());
    assert_eq!(small.info(&format!("{CONV}.lora_down.weight")).unwrap().shape, [4, 128, 3, 3]);
    assert_eq!(small.info(&format!("{CONV}.lora_up.weight")).unwrap().shape, [128, 4, 1, 1]);
    assert_eq!(small.doubles(&format!("{QUERY}.alpha")).unwrap(), [4.0]);
    let metadata = small.metadata();
    assert_eq!(
        (&*metadata["ss_network_dim"], &*metadata["ss_network_alpha"], &*metadata["ss_seed"]),
        ("4", "4.0", "7")
    );
    assert_ne!(metadata["sshs_model_hash"], "stale");
    assert_eq!(metadata["ss_training_comment"], "dimension is resized from 8 to 4");

    // All of the energy is the same update; in place is safe.
    done(here, "resize big.safetensors whole.safetensors --energy 1");
    done(here, "diff big.safetensors whole.safetensors");
    let document = json(here, "resize big.safetensors big.safetensors --energy 0.5");
    let modules = document["modules"].as_array().unwrap();
    assert!(
        modules.iter().all(|module| module["energy"].as_f64().unwrap() >= 0.5 && module["rank"].as_u64().unwrap() < 8)
    );
    assert_eq!(file(&here.join("big.safetensors")).metadata()["ss_network_dim"], "Dynamic");
    assert!(done(here, &format!("check small.safetensors --base {}", base().display())).starts_with("ok"));
}

#[test]
fn keys_that_are_no_adapter_stop_a_tool_unless_they_may_stay() {
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path();
    write_lora(here, "a.safetensors", 1, &[(QUERY, 4, 4.0)], Dtype::F16);
    let a = file(&here.join("a.safetensors"));
    let mut tensors: Vec<_> = a
        .names()
        .map(|name| {
            let info = a.info(name).unwrap();
            (name.to_owned(), TensorData::new(info.dtype, &*info.shape, a.bytes(name).unwrap()).unwrap())
        })
        .collect();
    tensors.push(("strange.key".to_owned(), TensorData::from_f32(Dtype::F16, [1], &[3.0]).unwrap()));
    write_tensors(&here.join("odd.safetensors"), &tensors, a.metadata()).unwrap();
    let (code, _, talk) = lora(here, "resize odd.safetensors out.safetensors --rank 2");
    assert_eq!(code, 1);
    insta::assert_snapshot!(talk, @"
    error: 1 of 4 keys of odd.safetensors belong to no adapter
      strange.key: no naming that is known

    hint: `--allow-unmatched` goes on without them; a `--base` may know more of them
    ");
    assert!(!here.join("out.safetensors").exists());
    done(here, "resize odd.safetensors out.safetensors --rank 2 --allow-unmatched");
    assert_eq!(file(&here.join("out.safetensors")).array("strange.key").unwrap().values, [3.0]);
}

#[test]
fn a_mixture_is_the_sum_and_merges_to_the_same_model() {
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path();
    write_lora(here, "a.safetensors", 1, &[(QUERY, 4, 2.0), (TEXT, 4, 2.0)], Dtype::F32);
    write_lora(here, "b.safetensors", 2, &[(QUERY, 3, 3.0), (CONV, 2, 1.0)], Dtype::F32);
    let parts = "--lora a.safetensors:unet=0.7,te=0.4 --lora b.safetensors:-0.5";
    let shown = done(here, &format!("mix {parts} --out both.safetensors"));
    assert!(shown.starts_with("Mixed      2 adapters into 3 modules, ranks 2 to 7"), "{shown}");
    done(here, &format!("mix {parts} --out cut.safetensors --method svd --energy 1"));
    done(here, "diff both.safetensors cut.safetensors");
    let base = base();
    done(here, &format!("merge --base {} {parts} --out merged", base.display()));
    done(here, &format!("merge --base {} --lora both.safetensors --out mixed", base.display()));
    let [merged, mixed] = ["merged", "mixed"].map(|name| BaseModel::open(&here.join(name)).unwrap());
    for component in [Component::Unet, Component::TextEncoder] {
        for (name, _, _) in merged.tensors(component) {
            let [one, two] = [&merged, &mixed].map(|model| model.read(component, name).unwrap().unwrap().values);
            let off = one.iter().zip(&two).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            // Both are rounded to the base's type once.
            assert!(off < 2e-3, "{name} {off}");
        }
    }
    let metadata = file(&here.join("both.safetensors")).metadata().clone();
    assert_eq!((&*metadata["ss_network_dim"], &*metadata["modelspec.merged_from"]), ("Dynamic", "a, b"));
    assert!(!metadata.contains_key("ss_seed"));
    let (_, _, talk) = lora(here, "mix --lora a.safetensors --lora a.safetensors --out c.safetensors --method linear");
    assert!(talk.contains("cross terms"), "{talk}");
    let (code, _, talk) =
        lora(here, "mix --lora a.safetensors --lora b.safetensors --out c.safetensors --method linear");
    assert_eq!(code, 1);
    insta::assert_snapshot!(talk, @"
    error: unet module `lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q`: `linear` adds factors of one rank, these have [4, 3]

    hint: `--method concat` takes any ranks; `lora resize` makes them equal
    ");
    let (code, _, talk) = lora(here, "mix --lora a.safetensors --out c.safetensors --rank 3");
    assert_eq!(code, 2, "{talk}");
}

#[test]
fn an_adapter_comes_back_out_of_a_merged_model_in_another_layout() {
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path();
    write_lora(here, "a.safetensors", 1, &[(QUERY, 4, 8.0), (CONV, 2, 4.0), (TEXT, 4, 8.0)], Dtype::F32);
    let base = base();
    let base = base.display();
    done(here, &format!("merge --base {base} --lora a.safetensors --out tuned --dtype fp32"));
    let shown = done(here, &format!("extract --base {base} --tuned tuned --rank 4 --out back.safetensors"));
    assert!(shown.starts_with("Extracted  3 modules of Stable Diffusion 1.x, rank 4"), "{shown}");
    assert!(
        shown.contains("Unchanged") && shown.contains("Energy     ") && shown.contains(" kept on average"),
        "{shown}"
    );
    let document: Value = serde_json::from_str(&lora(here, "diff a.safetensors back.safetensors --json").1).unwrap();
    for module in document["common"].as_array().unwrap() {
        assert!(module["distance"].as_f64().unwrap() < 0.01, "{module}");
    }
    assert_eq!(
        (&document["only_a"], &document["only_b"]),
        (&Value::from(Vec::<Value>::new()), &Value::from(Vec::<Value>::new()))
    );

    let exact = json(
        here,
        &format!("extract --base {base} --tuned tuned --rank 4 --conv-rank 2 --exact --out exact.safetensors"),
    );
    let conv =
        exact["modules"].as_array().unwrap().iter().find(|module| module["module"] == "mid_block.resnets.0.conv1");
    assert_eq!(conv.unwrap()["rank"], 2);

    let (code, _, talk) = lora(here, &format!("extract --base {base} --tuned {base} --rank 4 --out none.safetensors"));
    assert_eq!(code, 1);
    insta::assert_snapshot!(talk, @"
    error: no linear layer or convolution differs between the two models

    hint: `--base` is the model before training, `--tuned` the one after
    ");
    assert!(!here.join("none.safetensors").exists());
}

#[test]
fn diff_answers_as_diff_does() {
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path();
    write_lora(here, "a.safetensors", 1, &[(QUERY, 4, 2.0), (TEXT, 4, 2.0)], Dtype::F32);
    write_lora(here, "b.safetensors", 1, &[(QUERY, 4, 1.0), (CONV, 2, 1.0)], Dtype::F32);
    assert_eq!(done(here, "diff a.safetensors a.safetensors"), "Same       2 modules with the same update\n");
    let (code, shown, _) = lora(here, "diff a.safetensors b.safetensors");
    assert_eq!(code, 1);
    insta::assert_snapshot!(shown, @"
    Different  1 module in common
    Only in    a.safetensors: 1 module
               lora_te_text_model_encoder_layers_0_mlp_fc1
    Only in    b.safetensors: 1 module
               lora_unet_mid_block_resnets_0_conv1
    Distance   1 of 1 module differ, by 0.5 on average
               in shares of the larger update: at 0 they are the same, at 2 opposite
                    0.5  lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q
    ");
    assert_eq!(lora(here, "diff a.safetensors b.safetensors --tolerance 3").0, 1);
    assert_eq!(lora(here, "diff a.safetensors gone.safetensors").0, 2);
    fs::write(here.join("page.safetensors"), "<!DOCTYPE html>").unwrap();
    assert_eq!(lora(here, "diff a.safetensors page.safetensors").0, 2);
}
