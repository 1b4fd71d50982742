//! The cases of a parity folder: which code runs which.

mod prompts;
mod texts;
mod training;

use std::{fs, path::Path};

use lora_parity::{Failure, Report};
use serde_json::Value;

/// The parts of `parity.json`, and the folders with a trace.
pub(crate) fn names(folder: &Path) -> Result<Vec<String>, Failure> {
    let parity = read(&folder.join("parity.json"))?;
    let parts = ["tokenize", "chat", "prompts", "windows"];
    let mut names: Vec<String> =
        parts.iter().filter(|part| parity[**part].is_array()).map(|part| (*part).to_owned()).collect();
    let mut traces = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.join("trace.json").is_file() {
            traces.extend(path.file_name().and_then(|name| name.to_str()).map(str::to_owned));
        }
    }
    traces.sort_unstable();
    names.extend(traces);
    Ok(names)
}

/// Runs one case against a base.
pub(crate) fn run(folder: &Path, name: &str, base: &Path) -> Result<Report, Failure> {
    let mut report = Report::new(name);
    let parity = read(&folder.join("parity.json"))?;
    match name {
        "tokenize" => texts::tokenize(&parity[name], base, &mut report)?,
        "chat" => texts::chat(&parity[name], base, &mut report)?,
        "prompts" => prompts::prompts(&parity[name], base, &mut report)?,
        "windows" => prompts::windows(&parity, base, &mut report)?,
        trace => training::run(&folder.join(trace), trace, base, &mut report)?,
    }
    Ok(report)
}

fn read(path: &Path) -> Result<Value, Failure> {
    let text = fs::read(path).map_err(|error| format!("{}: {error}", path.display()))?;
    Ok(serde_json::from_slice(&text).map_err(|error| format!("{}: {error}", path.display()))?)
}

fn ids(value: &Value) -> Result<Vec<u32>, Failure> {
    Ok(serde_json::from_value(value.clone())?)
}
