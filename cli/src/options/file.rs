//! Reading one configuration file: TOML, every key known, every error with its place.

use std::{collections::BTreeMap, fs, path::Path};

use serde::Deserialize as _;
use serde_json::{Map, Value};
use toml::de::{DeTable, DeValue, Deserializer};

use super::{
    COMMON, ConfigError, DataOptions, GenerateOptions, Layer, Options, Origin, Place, TrainOptions, closest, keys,
};

/// What the configuration file `path` says about the options `O`.
///
/// The whole file is checked, not only what concerns `O`: a misspelt key never waits for the command that reads it.
///
/// # Errors
/// If the file cannot be read, is not TOML, or holds an unknown key or a value that its key cannot have.
pub(super) fn read<O: Options>(path: &Path) -> Result<Layer<O>, ConfigError> {
    let text = fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
    parse(path, &text)
}

fn parse<O: Options>(path: &Path, text: &str) -> Result<Layer<O>, ConfigError> {
    let place = |offset| Place::new(path, text, offset);
    let document = DeTable::parse(text).map_err(|error| ConfigError::Syntax {
        place: place(error.span().map_or(0, |span| span.start)),
        message: error.message().lines().next().unwrap_or("not TOML").to_owned(),
    })?;
    let mut top_keys = keys::<TrainOptions>();
    top_keys.extend(keys::<DataOptions>().into_iter().filter(|key| !keys::<TrainOptions>().contains(key)));
    let generate_keys: Vec<_> =
        keys::<GenerateOptions>().into_iter().filter(|key| !COMMON.contains(&key.as_str())).collect();

    let mut layer = Layer { options: O::default(), origins: BTreeMap::new() };
    let folder = path.parent().unwrap_or(Path::new("."));
    let mut read = |table: &DeTable<'_>, known: &[String], of: Option<&str>| -> Result<(), ConfigError> {
        for (key, value) in table {
            let name = key.get_ref().as_ref();
            if of.is_none() && Some(name) == GenerateOptions::TABLE && matches!(value.get_ref(), DeValue::Table(_)) {
                continue;
            }
            if !known.iter().any(|known| known == name) {
                let suggestion = closest(name, known.iter().map(String::as_str));
                return Err(ConfigError::UnknownKey { place: place(key.span().start), key: name.into(), suggestion });
            }
            // Each command reads its own table, and from the top level what it shares with others.
            let mut entry = DeTable::new();
            entry.insert(key.clone(), value.clone());
            let entry = toml::Spanned::new(0..text.len(), entry);
            let bad = |error: toml::de::Error| ConfigError::Value {
                place: place(value.span().start),
                key: of.map_or_else(|| name.to_owned(), |table| format!("{table}.{name}")),
                message: in_plain_words(error.message()),
            };
            let mine = of == O::TABLE || (of.is_none() && COMMON.contains(&name));
            if mine && keys::<O>().iter().any(|key| key == name) {
                let said = O::deserialize(Deserializer::from(entry)).map_err(bad)?;
                let above = std::mem::take(&mut layer.options);
                layer.options = above.or(said.rebase(folder));
                let line = place(key.span().start).line;
                layer.origins.insert(name.to_owned(), Origin::File { path: path.to_owned(), line });
            } else if of.is_none() && keys::<TrainOptions>().iter().any(|key| key == name) {
                TrainOptions::deserialize(Deserializer::from(entry)).map_err(bad)?;
            } else if of.is_none() {
                DataOptions::deserialize(Deserializer::from(entry)).map_err(bad)?;
            } else {
                GenerateOptions::deserialize(Deserializer::from(entry)).map_err(bad)?;
            }
        }
        Ok(())
    };
    let document = document.get_ref();
    read(document, &top_keys, None)?;
    if let Some(DeValue::Table(table)) = GenerateOptions::TABLE.and_then(|name| document.get(name)).map(|v| v.get_ref())
    {
        read(table, &generate_keys, GenerateOptions::TABLE)?;
    }
    Ok(layer)
}

/// The parser's words without the names of Rust's types.
fn in_plain_words(message: &str) -> String {
    let mut message = message.replace('\n', ", ");
    for (theirs, ours) in [
        ("a nonzero usize", "a whole number above 0"),
        ("a nonzero u64", "a whole number above 0"),
        ("usize", "a whole number"),
        ("u64", "a whole number"),
        ("u32", "a whole number"),
        ("f64", "a number"),
        ("a boolean", "true or false"),
        ("data did not match any variant of untagged enum NumberOrWord", "a number or a word is expected"),
        ("a sequence", "a list: [\"...\", \"...\"]"),
    ] {
        message = message.replace(theirs, ours);
    }
    message
}

/// The keys that speak in a set of options, with their values.
pub(super) fn said<O: Options>(options: &O) -> Map<String, Value> {
    match serde_json::to_value(options) {
        Ok(Value::Object(map)) => map.into_iter().filter(|(_, value)| !value.is_null()).collect(),
        _ => Map::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn train(text: &str) -> Result<TrainOptions, String> {
        let layer = parse::<TrainOptions>(Path::new("my.toml"), text);
        layer.map(|layer| layer.options).map_err(|error| error.to_string())
    }

    #[test]
    fn errors_name_file_line_and_column() {
        let cases = [
            ("lr = 1e-4\n  learning_rte = 3\n", "unknown key `learning_rte` in my.toml:2:3"),
            ("lr = 1e-4\nrank = \"big\"\n", "bad value of `rank` in my.toml:2:8"),
            ("lr = 1e-4\nrank = 0\n", "bad value of `rank` in my.toml:2:8"),
            ("optimizer = 'adam'", "bad value of `optimizer` in my.toml:1:13"),
            ("warmup = '300%'", "bad value of `warmup` in my.toml:1:10"),
            ("[generate]\nstepz = 3\n", "unknown key `stepz` in my.toml:2:1"),
            ("[generate]\nsteps = -3\n", "bad value of `generate.steps` in my.toml:2:9"),
            ("[train]\nrank = 3\n", "unknown key `train` in my.toml:1:2"),
            ("rank = 3\nrank = 4\n", "duplicate key in my.toml:2:1"),
        ];
        for (text, message) in cases {
            assert_eq!(train(text).unwrap_err(), message, "{text}");
        }
    }

    #[test]
    fn values_are_numbers_and_words() {
        let options =
            train("lr = 1\nwarmup = 20\ntargets = ['attention', 'proj_.*']\ndevice = 'cuda:1'\nflip = false").unwrap();
        assert_eq!(options.lr, Some(1.0));
        assert_eq!(options.targets.unwrap().len(), 2);
        assert_eq!(options.flip, Some(false));
    }

    #[test]
    fn generate_reads_its_table_and_what_all_share() {
        let text = "seed = 7\nsteps = 800\nsampler = 'euler'\n[generate]\nsteps = 20\n";
        let options = parse::<GenerateOptions>(Path::new("my.toml"), text).unwrap().options;
        assert_eq!(options.steps.unwrap().get(), 20);
        assert_eq!(options.seed, Some(7));
        assert_eq!(options.sampler, None);
    }

    #[test]
    fn paths_in_a_file_start_at_the_file() {
        let options =
            parse::<TrainOptions>(Path::new("/there/my.toml"), "data = 'pictures'\nbase = 'org/name'").unwrap().options;
        assert_eq!(options.data.unwrap(), Path::new("/there/pictures"));
        assert_eq!(options.base.unwrap(), "org/name");
    }
}
