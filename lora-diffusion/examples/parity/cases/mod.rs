//! The cases of a parity folder: which code runs which, and how a difference is judged.

mod adapters;
mod buckets;
mod checkpoints;
mod fixture;
mod models;
mod pictures;
mod samplers;
mod tokenizers;
mod training;

use std::path::Path;

use lora_parity::{Failure, Report};

use self::fixture::Case;

/// The cases that `index.json` lists.
pub(crate) fn names(folder: &Path) -> Result<Vec<String>, Failure> {
    let path = folder.join("index.json");
    let text = std::fs::read(&path).map_err(|error| format!("{}: {error}", path.display()))?;
    let index: serde_json::Value = serde_json::from_slice(&text)?;
    let names = index.as_array().into_iter().flatten().filter_map(|case| Some(case["name"].as_str()?.to_owned()));
    Ok(names.collect())
}

/// Runs one case against a base.
pub(crate) fn run(folder: &Path, name: &str, base: &Path) -> Result<Report, Failure> {
    let case = Case::open(folder, name)?;
    let mut report = Report::new(name);
    let (kind, rest) = name.split_once('_').unwrap_or((name, ""));
    match kind {
        "tokenizer" => tokenizers::run(&case, base, &mut report)?,
        "clip" => models::text_encoder(&case, base, &mut report)?,
        "vae" => models::vae(&case, base, &mut report)?,
        "unet" => models::unet(&case, base, &mut report)?,
        "micro" => models::sizes(&case, &mut report)?,
        "scheduler" if rest == "training" => samplers::training(&case, &mut report)?,
        "scheduler" => samplers::run(&case, rest, &mut report)?,
        "txt2img" => pictures::run(&case, base, &mut report)?,
        "lora" => adapters::run(&case, base, &mut report)?,
        "checkpoint" => checkpoints::run(&case, &mut report)?,
        "buckets" => buckets::run(&case, &mut report)?,
        "train" if rest == "inputs" => training::inputs(&case, base, &mut report)?,
        "train" => training::trace(&case, base, &mut report)?,
        _ => return Err("no code runs this case".into()),
    }
    Ok(report)
}
