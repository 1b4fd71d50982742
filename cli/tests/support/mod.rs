//! The real program in a folder, as if nothing else were on the machine; shared by the tests beside this one.
#![allow(dead_code, reason = "no test program needs all of it")]
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use lora_core::format::{Dtype, TensorData, write_tensors};

/// What the peers wrote, and what is wrong with files.
pub(crate) fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../lora-core/tests/fixtures")
}

/// The adapter files among them.
pub(crate) fn formats() -> PathBuf {
    fixtures().join("formats")
}

/// The program, about to start in `folder`.
pub(crate) fn command(folder: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lora"));
    command.current_dir(folder).env_clear().env("HOME", folder);
    command
}

/// Exit code, stdout and stderr of the program with the words of a line.
pub(crate) fn lora(folder: &Path, line: &str) -> (i32, String, String) {
    lora_of(folder, &line.split_whitespace().collect::<Vec<_>>())
}

/// [`lora`], with words that may hold blanks.
pub(crate) fn lora_of(folder: &Path, words: &[&str]) -> (i32, String, String) {
    let output = command(folder).args(words).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

/// What a command that must succeed shows.
#[track_caller]
pub(crate) fn done(folder: &Path, line: &str) -> String {
    done_of(folder, &line.split_whitespace().collect::<Vec<_>>())
}

/// [`done`], with words that may hold blanks.
#[track_caller]
pub(crate) fn done_of(folder: &Path, words: &[&str]) -> String {
    let (code, shown, talk) = lora_of(folder, words);
    assert_eq!(code, 0, "{words:?}: {shown}{talk}");
    shown
}

/// A part of a UNet, 50 MB, and a LoRA on each of its layers: `base.safetensors`, `adapter.safetensors`.
pub(crate) fn write_models(folder: &Path) {
    const BLOCKS: usize = 24;
    const WIDTH: usize = 1024;
    const RANK: usize = 8;
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

/// What lies in a folder, in order.
pub(crate) fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    let mut names: Vec<String> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}
