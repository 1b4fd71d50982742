//! `lora merge` over its own base, killed again and again: the file is always the old one or the new one, and the next run
//! needs nobody to clean up before it.
#![cfg(unix)]
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    process::{Child, Stdio},
    thread,
    time::{Duration, Instant},
};

use lora_core::format::{Dtype, TensorData, write_tensors};

const BLOCKS: usize = 24;
const WIDTH: usize = 1024;
const RANK: usize = 8;
const KILLS: u32 = 20;

/// A part of a UNet, 50 MB, and a LoRA on each of its layers.
fn write_models(folder: &Path) {
    let numbers = |count: usize, size: f32| -> Vec<f32> {
        (0..count).map(|index| ((index * 7919 % 1009) as f32 / 504.5 - 1.0) * size).collect()
    };
    let data =
        |shape: [usize; 2], size| TensorData::from_f32(Dtype::F16, shape, &numbers(shape[0] * shape[1], size)).unwrap();
    let (mut base, mut adapter) = (Vec::new(), Vec::new());
    for block in 0..BLOCKS {
        let path = format!("down_blocks.0.attentions.0.transformer_blocks.{block}.attn1.to_q");
        let key = format!("lora_unet_{}", path.replace('.', "_"));
        base.push((format!("{path}.weight"), data([WIDTH, WIDTH], 1.0)));
        adapter.push((format!("{key}.lora_down.weight"), data([RANK, WIDTH], 0.1)));
        adapter.push((format!("{key}.lora_up.weight"), data([WIDTH, RANK], 0.1)));
    }
    write_tensors(&folder.join("base.safetensors"), &base, &BTreeMap::new()).unwrap();
    write_tensors(&folder.join("adapter.safetensors"), &adapter, &BTreeMap::new()).unwrap();
}

fn merge(folder: &Path, base: &str, out: &str) -> Child {
    let words = ["merge", "-q", "--base", base, "--lora", "adapter.safetensors", "--out", out];
    support::command(folder).args(words).stdout(Stdio::null()).spawn().unwrap()
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    let mut names: Vec<String> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_killed_merge_leaves_the_old_file_or_the_new_one_and_nothing_that_stops_the_next() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    write_models(folder);
    let base = folder.join("base.safetensors");
    let start = Instant::now();
    assert!(merge(folder, "base.safetensors", "merged.safetensors").wait().unwrap().success());
    let whole = start.elapsed();
    let (old, new) = (fs::read(&base).unwrap(), fs::read(folder.join("merged.safetensors")).unwrap());
    assert!(old != new);

    let mut left_old = 0;
    for kill in 0..KILLS {
        let mut child = merge(folder, "base.safetensors", "base.safetensors");
        // Spread over the whole run and a little beyond; the scheduler sees to it that no two are alike.
        thread::sleep(whole.mul_f64(f64::from(kill) / f64::from(KILLS - 2)) + Duration::from_millis(1));
        child.kill().unwrap();
        child.wait().unwrap();
        let found = fs::read(&base).unwrap();
        assert!(found == old || found == new, "kill {kill}: the file is neither the old nor the new one");
        left_old += u32::from(found == old);
        if found == new {
            fs::write(&base, &old).unwrap();
        }
    }
    assert!(left_old > 0, "no kill came before the end");

    assert!(merge(folder, "base.safetensors", "base.safetensors").wait().unwrap().success());
    assert!(fs::read(&base).unwrap() == new);
    assert_eq!(names(folder), ["adapter.safetensors", "base.safetensors", "merged.safetensors"]);
}
