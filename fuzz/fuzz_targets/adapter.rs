//! Any tensors under any names of a small base are an adapter that merges, or an error.
#![no_main]

use std::{collections::BTreeMap, sync::LazyLock};

use libfuzzer_sys::fuzz_target;
use lora_core::format::{AdapterFile, BaseModel, measure};

static BASE: LazyLock<BaseModel> = LazyLock::new(lora_fuzz::base);

fuzz_target!(|input: &[u8]| {
    let Some(file) = lora_fuzz::described(input, &BTreeMap::new()) else { return };
    lora_fuzz::read_and_merge(&file, &BASE);
    // The base that the file itself implies has a place for every module that was read.
    if let Ok(alone) = AdapterFile::of_alone(&file) {
        assert_eq!(alone.applied() + alone.unapplied.len() + alone.embeddings.len(), alone.keys);
    }
    // What `lora inspect` shows: a size for each module, none, or why there is no adapter.
    if let Ok(sizes) = measure(&file) {
        assert!(sizes.len() <= file.names().len());
    }
    // The tables of the published models are large: once in a while is enough.
    if input.len() % 256 == 255 {
        let _ = AdapterFile::of_published(&file);
    }
});
