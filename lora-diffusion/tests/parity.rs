//! Every case of `fixtures/sd` within its stated tolerance: the numbers come from diffusers, transformers, peft and sd-scripts.
//!
//! The same code runs other folders of that layout: `cargo run -p lora-diffusion --example parity -- FOLDER`.

#![expect(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

#[path = "../examples/parity/cases/mod.rs"]
mod cases;

use std::path::Path;

/// Runs all cases whose names begin so.
fn check(prefix: &str) {
    // The cases run side by side; threads of their own would only get into each other's way.
    tch::set_num_threads(1);
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let (folder, base) = (root.join("tests/fixtures/sd"), root.join("../assets/tiny-sd"));
    let names = cases::names(&folder).unwrap();
    let names: Vec<&String> = names.iter().filter(|name| name.starts_with(prefix)).collect();
    assert!(!names.is_empty(), "no case begins with {prefix}");
    for name in names {
        let report = cases::run(&folder, name, &base).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(report.passed(), "{report}");
    }
}

#[test]
fn prompts_become_the_same_ids() {
    check("tokenizer_");
}

#[test]
fn text_encoders_agree() {
    check("clip_");
}

#[test]
fn the_autoencoder_agrees() {
    check("vae");
}

#[test]
fn unets_of_all_three_versions_agree() {
    check("unet_");
    check("micro_conditioning");
}

#[test]
fn samplers_and_noise_schedules_agree() {
    check("scheduler_");
}

#[test]
fn pictures_agree() {
    check("txt2img_");
}

#[test]
fn adapters_agree_beside_the_base_and_merged() {
    check("lora_");
}

#[test]
fn checkpoints_in_a_single_file_agree() {
    check("checkpoint_");
}

#[test]
fn pictures_go_to_the_same_buckets() {
    check("buckets");
}

#[test]
fn training_takes_the_same_steps() {
    check("train_");
}
