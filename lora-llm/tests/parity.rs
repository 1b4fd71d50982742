//! Every case of `fixtures/llm` within its tolerance: the numbers come from transformers and peft.
//!
//! The same code runs other folders of that layout: `cargo run -p lora-llm --example parity -- FOLDER`.

#![expect(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

#[path = "../examples/parity/cases/mod.rs"]
mod cases;

use std::path::Path;

fn check(name: &str) {
    // The cases run side by side; threads of their own would only get into each other's way.
    tch::set_num_threads(1);
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let (folder, base) = (root.join("tests/fixtures/llm"), root.join("../assets/tiny-llm"));
    assert!(cases::names(&folder).unwrap().iter().any(|case| case == name), "there is no case {name}");
    let report = cases::run(&folder, name, &base).unwrap_or_else(|error| panic!("{name}: {error}"));
    assert!(report.passed(), "{report}");
}

#[test]
fn texts_become_the_same_ids() {
    check("tokenize");
}

#[test]
fn conversations_become_the_same_text() {
    check("chat");
}

#[test]
fn logits_losses_and_greedy_continuations_agree() {
    check("prompts");
}

#[test]
fn losses_over_full_windows_agree() {
    check("windows");
}

#[test]
fn three_hundred_steps_of_training_take_the_same_course() {
    check("facts");
}
