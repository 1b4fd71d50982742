//! Bad input gets a clear error with a hint, or is listed and left out; nothing is lost, nothing half is left.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on stops")]

mod support;

use std::fs;

use support::{Place, said};

const SHORT: &str = "--steps 2 --batch 2 --rank 4 --sample-every 0 --device cpu --out run";

/// Exit code, what the message must hold, and that there is a hint and no run.
fn refused(place: &Place, words: &str, code: i32, parts: &[&str]) {
    let output = place.engine(words).output().unwrap();
    assert_eq!(output.status.code(), Some(code), "{words}: {}", said(&output));
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(text.starts_with("error: "), "{words}: {text}");
    assert!(text.contains("hint: "), "{words}: {text}");
    assert!(!text.contains("Exception raised") && text.lines().count() <= 14, "{words}: {text}");
    for part in parts {
        assert!(text.contains(part), "{words}: `{part}` is missing in {text}");
    }
    assert!(!place.path("run").exists(), "{words}: a run was left");
}

#[test]
fn an_empty_folder_is_refused_with_the_layouts_that_are_understood() {
    let place = Place::new(0);
    refused(&place, &format!("train pictures --base BASE {SHORT}"), 1, &["pictures", "metadata.jsonl", "10_style"]);
}

#[test]
fn a_missing_folder_is_refused() {
    refused(&Place::new(0), &format!("train nowhere --base BASE {SHORT}"), 1, &["nowhere"]);
}

#[test]
fn pictures_without_any_caption_are_refused_with_a_way_out() {
    let place = Place::new(3);
    for number in 0..3 {
        fs::remove_file(place.path(&format!("pictures/{number:02}.txt"))).unwrap();
    }
    refused(&place, &format!("train pictures --base BASE {SHORT}"), 1, &["caption", "--trigger"]);
    let output = place.engine(&format!("train pictures --base BASE --trigger glow {SHORT}")).output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
}

#[test]
fn something_else_than_a_base_is_refused() {
    let place = Place::new(2);
    refused(&place, &format!("train pictures --base nowhere {SHORT}"), 1, &["nowhere", "model_index.json"]);
    refused(&place, &format!("train pictures --base pictures {SHORT}"), 1, &["pictures", "model_index.json"]);
    fs::write(place.path("page.safetensors"), "<!DOCTYPE html><title>Login</title>").unwrap();
    refused(&place, &format!("train pictures --base page.safetensors {SHORT}"), 1, &["page.safetensors", "HTML"]);
}

#[test]
fn an_unknown_option_is_refused_with_the_nearest_one() {
    let place = Place::new(2);
    refused(&place, &format!("train pictures --base BASE --learning-rte 1 {SHORT}"), 2, &["--learning-rte"]);
    fs::write(place.path("my.toml"), "rank = 4\nwarmpu = 3\n").unwrap();
    refused(&place, &format!("train pictures --base BASE --config my.toml {SHORT}"), 2, &["my.toml:2", "warmup"]);
    refused(&place, &format!("train pictures --base BASE --targets atention {SHORT}"), 1, &["atention"]);
}

#[test]
fn half_and_unreadable_pictures_are_listed_and_left_out() {
    let place = Place::new(24);
    let whole = fs::read(place.path("pictures/00.png")).unwrap();
    fs::write(place.path("pictures/half.png"), &whole[..whole.len() / 2]).unwrap();
    fs::write(place.path("pictures/half.txt"), "half a picture").unwrap();
    fs::write(place.path("pictures/empty.jpg"), "").unwrap();
    let output = place.engine(&format!("train pictures --base BASE --json --dry-run {SHORT}")).output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
    let plan: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(plan["data"]["used"], 24);
    let skipped: Vec<&str> =
        plan["data"]["skipped"].as_array().unwrap().iter().map(|file| file["path"].as_str().unwrap()).collect();
    assert!(skipped.iter().any(|path| path.ends_with("half.png")), "{skipped:?}");
    assert!(skipped.iter().any(|path| path.ends_with("empty.jpg")), "{skipped:?}");
    assert!(plan["trainable_parameters"].as_u64().unwrap() > 0 && plan["memory_bytes"]["total"].as_u64().unwrap() > 0);
    assert!(!place.path("run").exists(), "a dry run has left something");
}

#[test]
fn a_folder_of_broken_pictures_is_refused() {
    let place = Place::new(4);
    for number in 0..2 {
        fs::write(place.path(&format!("pictures/{number:02}.png")), "no picture").unwrap();
    }
    refused(&place, &format!("train pictures --base BASE {SHORT}"), 1, &["2 of 4"]);
}

#[test]
#[cfg(unix)]
fn a_full_disk_stops_nothing_but_the_final_file() {
    let place = Place::new(2);
    // 40 KiB hold the metrics, but no checkpoint and no adapter: writing more fails as on a full disk.
    let words = "train pictures --base BASE --steps 2 --batch 2 --rank 16 --save-every 1 --sample-every 0 --device cpu --out run";
    let output = place.engine_after("trap '' XFSZ; ulimit -f 40;", words).output().unwrap();
    let text = said(&output);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("checkpoint not saved, training goes on"), "{text}");
    assert!(text.contains("error: ") && text.contains("hint: ") && text.contains("`df -h run`"), "{text}");
    let left: Vec<_> = fs::read_dir(place.path("run")).unwrap().flatten().map(|entry| entry.file_name()).collect();
    assert!(!left.iter().any(|name| name.to_string_lossy().ends_with(".safetensors")), "{left:?}");
    assert_eq!(fs::read_dir(place.path("run/checkpoints")).unwrap().count(), 0);
    // With room again the run goes on from the start, and ends.
    let output = place.engine("train --resume run").output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
    assert!(place.path("run/pictures.safetensors").is_file());
}

#[test]
fn an_adapter_of_another_base_is_refused_by_name() {
    let place = Place::new(0);
    let header = r#"{"lora_unet_input_blocks_4_1_transformer_blocks_9_attn1_to_q.lora_down.weight":{"dtype":"F32","shape":[1,1],"data_offsets":[0,4]},"lora_unet_input_blocks_4_1_transformer_blocks_9_attn1_to_q.lora_up.weight":{"dtype":"F32","shape":[1,1],"data_offsets":[4,8]}}"#;
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.extend_from_slice(&[0; 8]);
    fs::write(place.path("xl.safetensors"), file).unwrap();
    refused(
        &place,
        "generate x --base BASE --lora xl.safetensors --device cpu --out x.png",
        1,
        &["xl.safetensors", "0 of"],
    );
    assert!(!place.path("x.png").exists());
}
