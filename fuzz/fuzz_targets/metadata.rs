//! Any metadata is read for what it tells of a training, and comes back as it was from a file that is written with it.
#![no_main]

use std::collections::BTreeMap;

use libfuzzer_sys::fuzz_target;
use lora_cli::{failure::printable, inspection::Training};
use lora_core::format::{TensorFile, is_hidden, tensors_to_bytes};
use lora_fuzz::path;

/// Keys that mean something here, so that the fuzzer need not find them.
const KEYS: [&str; 16] = [
    "ss_tag_frequency",
    "ss_dataset_dirs",
    "ss_num_train_images",
    "ss_steps",
    "ss_epoch",
    "ss_unet_lr",
    "ss_optimizer",
    "ss_output_name",
    "ss_base_model_version",
    "ss_network_args",
    "modelspec.title",
    "modelspec.trigger_phrase",
    "modelspec.resolution",
    "lora_adapter_metadata",
    "lora.version",
    "__metadata__",
];

// One entry a line: a letter for a known key, or `key=value`.
fuzz_target!(|input: &str| {
    let mut metadata = BTreeMap::new();
    for line in input.split('\n') {
        let (key, value) = match line.split_once('=') {
            Some((key, value)) => (key, value),
            None => match line.split_at_checked(1) {
                Some((letter, value)) => (KEYS[usize::from(letter.as_bytes()[0] % 16)], value),
                None => continue,
            },
        };
        metadata.insert(key.to_owned(), value.to_owned());
    }
    let training = Training::of(&metadata);
    for text in
        training.trigger_words.iter().chain(training.title.iter()).chain(training.tags.iter().map(|(tag, _)| tag))
    {
        assert!(!printable(text).contains(|c: char| is_hidden(c) && c != '\t'));
    }
    let written = tensors_to_bytes(path(), &[], &metadata).expect("any metadata can be written");
    let read = TensorFile::from_bytes(path(), written).expect("what was written can be read");
    assert_eq!(read.metadata(), &metadata);
});
