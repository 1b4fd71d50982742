//! Any line is a key with a module and a suffix, or none; looked up in a base, it has an answer.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use lora_core::format::{Found, Key, Names, Quoted, guess_dialect};

static BASE: LazyLock<lora_core::format::BaseModel> = LazyLock::new(lora_fuzz::base);
static NAMES: LazyLock<Names> = LazyLock::new(|| Names::of(&BASE));

fuzz_target!(|input: &str| {
    for line in input.lines() {
        if let Some(key) = Key::parse(line) {
            assert!(line.starts_with(key.module) && line.ends_with(key.suffix) && !key.module.is_empty());
            find(key.module);
        }
        find(line);
        assert!(!Quoted(line).to_string().contains(|c: char| c.is_control()));
    }
    let _ = guess_dialect(input.lines());
});

/// What is found in the base is there.
fn find(module: &str) {
    if let Found::Module((component, path)) = NAMES.find(module) {
        assert!(BASE.module(component, &path).is_some());
    }
}
