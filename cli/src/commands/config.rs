//! `lora config`: every option, its value and where it comes from.

use std::{fs, io, path::Path};

use serde_json::{Map, Value, json};

use crate::{
    Failure,
    args::{ConfigCommand, Invocation},
    commands::{import, output},
    options::{
        ConfigError, DataOptions, GenerateOptions, Key, Layers, Options, Origin, Preset, TrainOptions, closest,
        describe, values::word,
    },
    text,
    ui::Ui,
};
use clap::ValueEnum as _;

pub(crate) fn run(command: &ConfigCommand, invocation: &Invocation, ui: &Ui) -> Result<(), Failure> {
    match command {
        ConfigCommand::Show { options } => show(invocation.layers(TrainOptions::clone(options))?, ui),
        ConfigCommand::Init { file } => init(file, ui),
        ConfigCommand::Explain { key } => explain(key, invocation, ui),
        ConfigCommand::Import { file } => import::run(file, ui),
    }
}

fn show(layers: Layers<TrainOptions>, ui: &Ui) -> Result<(), Failure> {
    let values = resolved(&layers.options)?;
    let keys: Vec<_> = describe().into_iter().filter(|key| key.table.is_none()).collect();
    if ui.json {
        let document: Map<_, _> = keys
            .iter()
            .map(|key| {
                let origin = layers.origin(&key.name).to_string();
                (key.name.clone(), json!({"value": values.get(&key.name), "origin": origin}))
            })
            .collect();
        return ui.json_data(&document).map_err(output);
    }
    let paint = ui.stdout();
    let lines: Vec<_> = keys
        .iter()
        .map(|key| match values.get(&key.name) {
            Some(value) => {
                let left = format!("{} = {}", key.name, toml_value(value));
                let pad = " ".repeat(40usize.saturating_sub(text::width(&left)));
                format!("{left}{pad} {}", paint.dim(&format!("# {}", layers.origin(&key.name))))
            }
            None => paint.dim(&format!("# {} is not set{}", key.name, default_of(&key.help))),
        })
        .collect();
    ui.data(&lines.join("\n")).map_err(output)
}

fn init(file: &Path, ui: &Ui) -> Result<(), Failure> {
    let text = template()?;
    let create = || -> io::Result<()> {
        use io::Write as _;
        fs::File::create_new(file)?.write_all(text.as_bytes())
    };
    match create() {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            return Err(Failure::new("config_exists", format!("{} is there already", file.display()))
                .hint("name another file: `lora config init other.toml`")
                .with("path", file.display().to_string()));
        }
        Err(error) => {
            return Err(Failure::from_error("config_unwritable", &error)
                .detail(format!("writing {}", file.display()))
                .hint("name a file in a folder that exists and is yours: `lora config init FILE`"));
        }
    }
    match ui.json {
        true => ui.json_data(&json!({ "file": file })),
        false => ui.data(&file.display().to_string()),
    }
    .map_err(output)
}

/// Every key with its description, commented out at its default.
fn template() -> Result<String, Failure> {
    let train = resolved(&TrainOptions::default())?;
    let mut lines = vec![
        "# Options of `lora`. Uncomment what should differ; `lora config show` tells what holds and why.".to_owned(),
        "# A key is the flag without its dashes. Flags and LORA_* variables win over this file.".to_owned(),
    ];
    let mut table = None;
    for key in describe() {
        if key.table != table {
            table = key.table;
            lines.push(format!("\n[{}]", table.unwrap_or_default()));
        }
        let value = match (train.get(&key.name), key.table) {
            (Some(value), None) => toml_value(value),
            _ => example(&key),
        };
        lines.push(format!("\n# {}", key.help.lines().next().unwrap_or_default()));
        if !key.values.is_empty() {
            lines.push(format!("# One of: {}", key.values.join(", ")));
        }
        lines.push(format!("# {} = {value}", key.name));
    }
    Ok(lines.join("\n") + "\n")
}

/// A value that shows the form of a key without a fixed default.
fn example(key: &Key) -> String {
    let default = default_of(&key.help);
    let default = default.trim_start_matches(": ");
    match key.name.as_str() {
        "lora" => "[\"adapter.safetensors:0.8\"]".into(),
        "size" => "512".into(),
        "resolution" => "512".into(),
        "epochs" => "10".into(),
        "factor" => "8".into(),
        "sample-every" | "save-every" | "validate-every" => "100".into(),
        "stop" => "[\"\\nUser:\"]".into(),
        "top-k" => "40".into(),
        _ if matches!(default, "true" | "false") => default.into(),
        _ if default.parse::<f64>().is_ok() => default.into(),
        _ if key.values.iter().any(|value| value == default) => format!("\"{default}\""),
        _ => "\"\"".into(),
    }
}

fn explain(name: &str, invocation: &Invocation, ui: &Ui) -> Result<(), Failure> {
    let all = describe();
    let wanted = name.trim_start_matches('-').replace('_', "-");
    let Some(key) = all.iter().find(|key| key.path() == wanted) else {
        let paths: Vec<_> = all.iter().map(Key::path).collect();
        let suggestion = closest(&wanted, paths.iter().map(String::as_str));
        return Err(ConfigError::NoSuchKey { key: name.into(), suggestion }.into());
    };
    let (value, origin) = match key.table {
        Some(_) => now(invocation.layers(GenerateOptions::default())?, key),
        None if crate::options::keys::<TrainOptions>().contains(&key.name) => {
            let layers = invocation.layers(TrainOptions::default())?;
            let value = resolved(&layers.options)?.get(&key.name).cloned();
            (value, layers.origin(&key.name))
        }
        None => now(invocation.layers(DataOptions::default())?, key),
    };
    let presets: Map<String, Value> = Preset::value_variants()
        .iter()
        .filter(|_| key.table.is_none())
        .filter_map(|preset| {
            let options = serde_json::to_value(preset.options()).ok()?;
            let value = options.get(&key.name).filter(|value| !value.is_null())?.clone();
            Some((word(preset), value))
        })
        .collect();
    if ui.json {
        let document = json!({
            "key": key.path(), "help": key.help, "flag": key.flag, "variable": key.variable, "values": key.values,
            "presets": presets, "value": value, "origin": origin.to_string(),
        });
        return ui.json_data(&document).map_err(output);
    }
    let paint = ui.stdout();
    let mut lines = vec![paint.bold(&key.path())];
    for paragraph in key.help.lines().filter(|line| !line.is_empty()) {
        lines.extend(text::wrap(paragraph, 76).into_iter().map(|line| format!("  {line}")));
    }
    let mut rows = vec![("flag", key.flag.clone()), ("variable", key.variable.clone())];
    let in_file = match key.table {
        Some(table) => format!("{} = … under [{table}]", key.name),
        None => format!("{} = …", key.name),
    };
    rows.push(("file", in_file));
    if !key.values.is_empty() {
        rows.push(("values", key.values.join(", ")));
    }
    if !presets.is_empty() {
        let list = presets.iter().map(|(preset, value)| format!("{preset} {}", toml_value(value)));
        rows.push(("presets", list.collect::<Vec<_>>().join(", ")));
    }
    let value = value.as_ref().map_or_else(|| "not set".to_owned(), toml_value);
    rows.push(("now", format!("{value} ({origin})")));
    lines.extend(rows.into_iter().map(|(label, value)| format!("  {label:<9} {value}")));
    ui.data(&lines.join("\n")).map_err(output)
}

/// The value of a key of other commands than `train`, where something was said.
fn now<O: Options + Clone>(layers: Layers<O>, key: &Key) -> (Option<Value>, Origin) {
    let values = serde_json::to_value(&layers.options).unwrap_or_default();
    (values.get(&key.name).filter(|value| !value.is_null()).cloned(), layers.origin(&key.name))
}

/// What a training would run with; keys without any value are absent.
fn resolved(options: &TrainOptions) -> Result<Map<String, Value>, Failure> {
    // DATA and BASE have no default, and showing the rest should not need them.
    let filled = TrainOptions {
        data: options.data.clone().or_else(|| Some("DATA".into())),
        base: options.base.clone().or_else(|| Some("BASE".into())),
        ..options.clone()
    };
    let config = filled.resolve()?;
    let mut values = match serde_json::to_value(&config) {
        Ok(Value::Object(values)) => values,
        _ => Map::new(),
    };
    for (key, said) in [("data", options.data.is_some()), ("base", options.base.is_some())] {
        if !said {
            values.remove(key);
        }
    }
    if options.data.is_none() && options.name.is_none() {
        values.remove("name");
    }
    if let Some(out) = &config.out {
        values.insert("out".into(), json!(out));
    }
    values.retain(|_, value| !value.is_null());
    Ok(values)
}

fn toml_value(value: &Value) -> String {
    match toml::Value::try_from(value) {
        Ok(value) => value.to_string(),
        Err(_) => value.to_string(),
    }
}

/// `: 16` of a help text that ends in `[default: 16]`.
fn default_of(help: &str) -> String {
    let default =
        help.lines().next().and_then(|line| line.rsplit_once("[default")).map(|(_, tail)| tail.trim_end_matches(']'));
    default.unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_of_the_template_can_be_uncommented() {
        let text = template().unwrap();
        let is_key = |line: &str| line.split_once(" = ").is_some_and(|(key, _)| !key.contains(' '));
        let uncommented: Vec<_> = text
            .lines()
            .map(|line| line.strip_prefix("# ").filter(|line| is_key(line)).unwrap_or(line))
            .filter(|line| !line.starts_with("epochs")) // steps or epochs
            .collect();
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("lora.toml");
        fs::write(&file, uncommented.join("\n")).unwrap();
        let table: toml::Table = toml::from_str(&uncommented.join("\n")).unwrap();
        assert!(table.len() > 45, "{}", table.len());
        let words = ["lora", "config", "show", "--config"].map(std::ffi::OsString::from);
        let invocation = Invocation::parse(words.into_iter().chain([file.into_os_string()])).unwrap();
        let layers = invocation.layers(TrainOptions::default()).unwrap();
        assert_eq!(layers.options.rank.unwrap().get(), 16);
        invocation.layers(GenerateOptions::default()).unwrap();
    }
}
