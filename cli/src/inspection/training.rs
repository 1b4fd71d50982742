//! What the metadata of an adapter file tells of its training: kohya's `ss_*`, Stability's `modelspec.*`.
//!
//! Metadata is what a stranger wrote: everything is text for people, nothing is believed.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::{Map, Value};

/// What the metadata tells.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Training {
    /// The name of the adapter.
    pub title: Option<String>,
    /// The base by name.
    pub base_model: Option<String>,
    /// Pictures or examples.
    pub examples: Option<u64>,
    /// Updates.
    pub steps: Option<u64>,
    /// Passes over the data.
    pub epochs: Option<u64>,
    /// Learning rate.
    pub lr: Option<f64>,
    /// Optimizer.
    pub optimizer: Option<String>,
    /// Sides of the pictures.
    pub resolution: Option<String>,
    /// The program that wrote the file.
    pub program: Option<String>,
    /// Words that call up what was learnt.
    pub trigger_words: Vec<String>,
    /// The most frequent tags of the captions with their counts.
    pub tags: Vec<(String, u64)>,
}

/// Tags that are shown.
const TAGS: usize = 12;

impl Training {
    /// Out of a file's metadata; what is malformed says nothing.
    pub fn of(metadata: &BTreeMap<String, String>) -> Self {
        let text = |keys: &[&str]| {
            let found = keys.iter().filter_map(|key| metadata.get(*key)).map(|text| text.trim().to_owned());
            found.into_iter().find(|text| !text.is_empty() && text != "None")
        };
        let number = |keys: &[&str]| text(keys)?.parse::<f64>().ok();
        let whole = |keys: &[&str]| number(keys).filter(|count| *count >= 0.0).map(|count| count as u64);
        let tags = tags(metadata.get("ss_tag_frequency").map_or("", String::as_str));
        Self {
            title: text(&["modelspec.title", "ss_output_name"]),
            base_model: text(&["ss_sd_model_name", "lora.base", "ss_base_model_version", "modelspec.architecture"]),
            examples: whole(&["ss_num_train_images"]),
            steps: whole(&["ss_steps", "ss_max_train_steps"]),
            epochs: whole(&["ss_epoch", "ss_num_epochs"]),
            lr: number(&["ss_unet_lr", "ss_learning_rate"]),
            optimizer: text(&["ss_optimizer"]).map(|name| class_name(&name).to_owned()),
            resolution: text(&["modelspec.resolution", "ss_resolution"]),
            program: text(&["modelspec.implementation", "software"])
                .or_else(|| Some(format!("lora {}", text(&["lora.version"])?))),
            trigger_words: trigger_words(metadata, &tags),
            tags,
        }
    }
}

/// The class of `module.Class(options)`, as Python writes it.
fn class_name(text: &str) -> &str {
    let path = text.split(['(', ' ']).next().unwrap_or(text);
    path.rsplit('.').next().unwrap_or(path)
}

/// Words that the file names, or else folder names after the repeats (`10_ohwx dog`) and tags that every caption has.
fn trigger_words(metadata: &BTreeMap<String, String>, tags: &[(String, u64)]) -> Vec<String> {
    let named = ["modelspec.trigger_phrase", "lora.trigger", "ss_trigger", "trigger_words"];
    if let Some(words) = named.iter().filter_map(|key| metadata.get(*key)).find(|words| !words.trim().is_empty()) {
        return words.split(',').map(|word| word.trim().to_owned()).filter(|word| !word.is_empty()).collect();
    }
    let pictures: u64 = metadata.get("ss_num_train_images").and_then(|count| count.parse().ok()).unwrap_or(0);
    let mut words: Vec<String> = folders(metadata)
        .into_iter()
        .filter_map(|folder| {
            let (repeats, name) = folder.split_once('_')?;
            (repeats.parse::<u32>().is_ok() && !name.is_empty()).then(|| name.to_owned())
        })
        .collect();
    // Counts are per picture and repeat in some versions: a tag in nine of ten counts as always there.
    words.extend(
        tags.iter()
            .filter(|(_, count)| pictures > 0 && u128::from(*count) * 10 >= u128::from(pictures) * 9)
            .map(|(tag, _)| tag.clone())
            .take(2),
    );
    words.dedup();
    words
}

fn folders(metadata: &BTreeMap<String, String>) -> Vec<String> {
    let text = metadata.get("ss_tag_frequency").or(metadata.get("ss_dataset_dirs"));
    let map: Option<Map<String, Value>> = text.and_then(|text| serde_json::from_str(text).ok());
    map.map(|map| map.into_iter().map(|(folder, _)| folder).collect()).unwrap_or_default()
}

/// `{"folder": {"tag": count}}`, summed over folders, most frequent first.
fn tags(text: &str) -> Vec<(String, u64)> {
    let folders: BTreeMap<String, BTreeMap<String, u64>> = serde_json::from_str(text).unwrap_or_default();
    let mut sums: BTreeMap<String, u64> = BTreeMap::new();
    for (tag, count) in folders.into_values().flatten() {
        let sum = sums.entry(tag.trim().to_owned()).or_default();
        *sum = sum.saturating_add(count);
    }
    let mut tags: Vec<_> = sums.into_iter().filter(|(tag, _)| !tag.is_empty()).collect();
    tags.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
    tags.truncate(TAGS);
    tags
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(entries: &[(&str, &str)]) -> Training {
        Training::of(&entries.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect())
    }

    #[test]
    fn kohya_metadata_is_read() {
        let training = of(&[
            ("ss_sd_model_name", "sd15.safetensors"),
            ("ss_num_train_images", "40"),
            ("ss_optimizer", "bitsandbytes.optim.adamw.AdamW8bit(weight_decay=0.01,betas=(0.9, 0.99))"),
            ("ss_unet_lr", "None"),
            ("ss_learning_rate", "0.0001"),
            ("ss_tag_frequency", r#"{"10_ohwx dog": {"ohwx dog": 40, "grass": 7}, "more": {"grass": 2}}"#),
        ]);
        assert_eq!(training.base_model.as_deref(), Some("sd15.safetensors"));
        assert_eq!(training.optimizer.as_deref(), Some("AdamW8bit"));
        assert_eq!(training.lr, Some(1e-4));
        assert_eq!(training.tags, [("ohwx dog".to_owned(), 40), ("grass".to_owned(), 9)]);
        assert_eq!(training.trigger_words, ["ohwx dog"]);
    }

    #[test]
    fn hostile_metadata_says_nothing() {
        for text in ["", "[]", "{\"a\": 3}", "{\"a\": {\"b\": -1}}", "{\"a\": {\"b\": 1e99}}", "{"] {
            assert_eq!(of(&[("ss_tag_frequency", text), ("ss_steps", "-3"), ("ss_epoch", "x")]).tags, []);
        }
        let huge = format!(r#"{{"a": {{"b": {0}}}, "c": {{"b": {0}}}}}"#, u64::MAX);
        let pictures = u64::MAX.to_string();
        let training = of(&[("ss_tag_frequency", &huge), ("ss_num_train_images", &pictures)]);
        assert_eq!(training.tags, [("b".to_owned(), u64::MAX)]);
    }

    #[test]
    fn a_named_trigger_wins() {
        let training = of(&[("modelspec.trigger_phrase", "ohwx, dog"), ("ss_tag_frequency", r#"{"1_x": {}}"#)]);
        assert_eq!(training.trigger_words, ["ohwx", "dog"]);
    }
}
