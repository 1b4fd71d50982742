//! The list of option keys with their descriptions, read off the flags; and the nearest key to a misspelt one.

use clap::{Arg, Command};

use super::{COMMON, DataOptions, GenerateOptions, Options, TrainOptions};

/// An option as a person meets it.
#[derive(Debug, Clone)]
pub struct Key {
    /// The name in a configuration file, without its table.
    pub name: String,
    /// The table, if any.
    pub table: Option<&'static str>,
    /// How it is written on the command line.
    pub flag: String,
    /// The environment variable.
    pub variable: String,
    /// The whole help text.
    pub help: String,
    /// The words that it takes, where they are a fixed set.
    pub values: Vec<String>,
}

impl Key {
    /// The name with its table: `generate.steps`.
    pub fn path(&self) -> String {
        self.table.map_or_else(|| self.name.clone(), |table| format!("{table}.{}", self.name))
    }
}

/// The names of all keys of a set of options, in the order of their declaration.
pub fn keys<O: Options>() -> Vec<String> {
    O::augment_args(Command::new("")).get_arguments().map(name).collect()
}

/// Every key of a configuration file.
pub fn describe() -> Vec<Key> {
    let mut all = described::<TrainOptions>(&[]);
    all.extend(described::<DataOptions>(&keys::<TrainOptions>()));
    all.extend(described::<GenerateOptions>(&COMMON.map(String::from)));
    all
}

fn described<O: Options>(without: &[String]) -> Vec<Key> {
    O::augment_args(Command::new(""))
        .get_arguments()
        .filter(|arg| !without.contains(&name(arg)))
        .map(|arg| Key {
            name: name(arg),
            table: O::TABLE,
            flag: arg.get_long().map_or_else(|| name(arg).to_uppercase(), |long| format!("--{long}")),
            variable: variable(O::TABLE, &name(arg)),
            help: arg.get_long_help().or(arg.get_help()).map(ToString::to_string).unwrap_or_default(),
            values: arg.get_possible_values().iter().map(|value| value.get_name().to_owned()).collect(),
        })
        .collect()
}

fn name(arg: &Arg) -> String {
    arg.get_id().as_str().replace('_', "-")
}

/// The environment variable of a key.
pub fn variable(table: Option<&str>, key: &str) -> String {
    let table = table.filter(|_| !COMMON.contains(&key)).map_or_else(String::new, |table| format!("{table}_"));
    format!("LORA_{table}{key}").replace('-', "_").to_uppercase()
}

/// What the settings of other trainers are called here.
const FOREIGN: [(&str, &str); 30] = [
    ("learning-rate", "lr"),
    ("unet-lr", "lr"),
    ("text-encoder-learning-rate", "text-encoder-lr"),
    ("network-dim", "rank"),
    ("r", "rank"),
    ("dim", "rank"),
    ("network-alpha", "alpha"),
    ("lora-alpha", "alpha"),
    ("target-modules", "targets"),
    ("max-train-steps", "steps"),
    ("max-train-epochs", "epochs"),
    ("num-train-epochs", "epochs"),
    ("train-batch-size", "batch"),
    ("batch-size", "batch"),
    ("loraplus-lr-ratio", "lora-plus"),
    ("neftune-noise-alpha", "neftune"),
    ("val-set-size", "validation"),
    ("eval-steps", "validate-every"),
    ("validation-steps", "validate-every"),
    ("gradient-accumulation-steps", "accum"),
    ("optimizer-type", "optimizer"),
    ("lr-scheduler", "schedule"),
    ("lr-warmup-steps", "warmup"),
    ("max-grad-norm", "clip"),
    ("min-snr-gamma", "min-snr"),
    ("load-in-4bit", "quantize"),
    ("train-data-dir", "data"),
    ("pretrained-model-name-or-path", "base"),
    ("output-dir", "out"),
    ("output-name", "name"),
];

/// The key that `wrong` was probably meant to be: spelt otherwise, another tool's word, or a slip of the fingers.
pub fn closest<'a>(wrong: &str, known: impl IntoIterator<Item = &'a str> + Clone) -> Option<String> {
    let plain = wrong.trim_start_matches('-').replace('_', "-").to_lowercase();
    let is_known = |key: &str| known.clone().into_iter().any(|other| other == key);
    if is_known(&plain) {
        return Some(plain);
    }
    let foreign = |word: &str| FOREIGN.iter().find(|(theirs, _)| *theirs == word).map(|(_, ours)| (*ours).to_owned());
    let slip = || {
        let foreign = FOREIGN.iter().map(|(theirs, _)| *theirs);
        known
            .clone()
            .into_iter()
            .chain(foreign)
            .map(|key| (strsim::damerau_levenshtein(&plain, key), key))
            .filter(|(distance, key)| *distance <= (key.len() / 3).max(1) && *distance < plain.len())
            .min_by_key(|(distance, _)| *distance)
            .map(|(_, key)| foreign_or(key))
    };
    foreign(&plain).or_else(slip).filter(|key| is_known(key))
}

fn foreign_or(key: &str) -> String {
    FOREIGN.iter().find(|(theirs, _)| *theirs == key).map_or(key, |(_, ours)| ours).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slips_spellings_and_foreign_words_find_their_key() {
        let known = keys::<TrainOptions>();
        let cases = [
            ("rnak", Some("rank")),
            ("learning_rte", Some("lr")),
            ("network_dim", Some("rank")),
            ("caption_dropout", Some("caption-dropout")),
            ("MinSnr", Some("min-snr")),
            ("banana", None),
            ("x", None),
        ];
        for (wrong, right) in cases {
            assert_eq!(closest(wrong, known.iter().map(String::as_str)).as_deref(), right, "{wrong}");
        }
    }

    #[test]
    fn every_foreign_word_leads_to_an_option() {
        let known = keys::<TrainOptions>();
        for (theirs, ours) in FOREIGN {
            assert!(known.contains(&ours.to_owned()), "{theirs} leads to {ours}");
        }
    }

    #[test]
    fn every_key_is_described() {
        for key in describe() {
            assert!(!key.help.is_empty(), "{}", key.path());
        }
    }

    #[test]
    fn variables_of_common_keys_have_no_table() {
        assert_eq!(variable(Some("generate"), "steps"), "LORA_GENERATE_STEPS");
        assert_eq!(variable(Some("generate"), "seed"), "LORA_SEED");
        assert_eq!(variable(None, "text-encoder-lr"), "LORA_TEXT_ENCODER_LR");
    }
}
