//! Runs a folder laid out like `fixtures/formats`: adapters against tiny bases, the peers' merged weights as answers.
//!
//! Shared by the test suite (the folder in `tests/fixtures`) and by the example `parity_formats` (any folder).
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    path::Path,
};

use lora_core::{
    Array, Error, Result,
    format::{AdapterFile, BaseModel, Component, Dtype, Strengths, TensorFile, merge},
    mix::{Ingredient, Method, mix},
};
use serde_json::Value;

/// What came out of one case.
pub(crate) struct Outcome {
    pub(crate) name: String,
    /// The largest error, as a share of what the tolerance allows; 1 is the limit.
    pub(crate) worst: f64,
    /// The largest absolute error.
    pub(crate) error: f64,
    pub(crate) problems: Vec<String>,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verdict = if self.problems.is_empty() { "ok  " } else { "FAIL" };
        write!(f, "{verdict} {:<34} error {:.2e}, {:.3} of the tolerance", self.name, self.error, self.worst)?;
        self.problems.iter().take(5).try_for_each(|problem| write!(f, "\n       {problem}"))
    }
}

/// The cases of a folder, by name; those in `wanted`, or all if it is empty.
pub(crate) fn run(root: &Path, wanted: &[String]) -> Vec<Outcome> {
    let mut folders: Vec<_> = std::fs::read_dir(root)
        .unwrap_or_else(|error| panic!("cannot read {}: {error}", root.display()))
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.join("manifest.json").is_file())
        .filter(|path| wanted.is_empty() || wanted.iter().any(|name| path.ends_with(name)))
        .collect();
    folders.sort();
    let mut outcomes = Vec::new();
    for folder in folders {
        // Python writes infinities where a peer's own check failed; no answer depends on them.
        let manifest = std::fs::read_to_string(folder.join("manifest.json")).unwrap();
        let manifest: Value = serde_json::from_str(&manifest.replace(": Infinity", ": null")).unwrap();
        match manifest["family"].as_str().unwrap() {
            // Tables, checked by a test of their own.
            "names" => {}
            "hostile" => outcomes.extend(hostile(root, &folder, &manifest)),
            _ => outcomes.push(case(root, &folder, &manifest)),
        }
    }
    outcomes
}

fn case(root: &Path, folder: &Path, manifest: &Value) -> Outcome {
    let mut outcome =
        Outcome { name: text(&manifest["name"]).to_owned(), worst: 0.0, error: 0.0, problems: Vec::new() };
    if let Err(error) = compare(root, folder, manifest, &mut outcome) {
        outcome.problems.push(error.to_string());
    }
    outcome
}

fn compare(root: &Path, folder: &Path, manifest: &Value, outcome: &mut Outcome) -> Result<()> {
    let base = BaseModel::open(&root.join("bases").join(text(&manifest["base"])))?;
    let dtype = match manifest["base_dtype"].as_str() {
        None => Dtype::F32,
        Some("bf16") => Dtype::Bf16,
        Some("fp16") => Dtype::F16,
        Some(other) => panic!("base_dtype {other}"),
    };
    let rounded = |array: Array| Array::new(array.shape, dtype.widen(&dtype.narrow(&array.values).unwrap()).unwrap());
    let mut read = |component, name: &str| base.read(component, name)?.map(rounded).transpose();

    let mut files = Vec::new();
    for adapter in manifest["adapters"].as_array().unwrap() {
        let file = AdapterFile::read(&folder.join(text(&adapter["file"])), &base)?;
        let mut strengths = Strengths::all(adapter["weight"].as_f64().unwrap_or(1.0));
        for component in Component::ALL {
            if let Some(strength) = adapter[component.name()].as_f64() {
                strengths = strengths.with(component, strength);
            }
        }
        if let Some(weights) = adapter["lbws"].as_array() {
            let weights: Vec<f64> = weights.iter().map(|weight| weight.as_f64().unwrap()).collect();
            strengths = strengths.with_blocks(&weights, &base).unwrap();
        }
        files.push((file, strengths));
    }
    let reported: BTreeSet<&str> = files.iter().flat_map(|(file, _)| &file.unapplied).map(|(key, _)| &**key).collect();
    let expected: BTreeSet<&str> = manifest["must_report"].as_array().unwrap().iter().map(text).collect();
    if reported != expected {
        outcome.problems.push(format!("reported {reported:?} instead of {expected:?}"));
    }
    if let Some(embeddings) = manifest["embeddings"].as_array() {
        let found: Vec<&str> = files.iter().flat_map(|(file, _)| &file.embeddings).map(|key| &**key).collect();
        if found != embeddings.iter().map(text).collect::<Vec<_>>() {
            outcome.problems.push(format!("embeddings {found:?}"));
        }
    }
    let changed = if manifest["combine"] == "linear" {
        let ingredients: Vec<Ingredient<'_>> =
            files.iter().map(|(file, strengths)| Ingredient { file, strengths }).collect();
        let mixed = mix(&ingredients, Method::Linear).unwrap();
        let modules = mixed.into_iter().map(|mixed| mixed.module).collect();
        let combined = AdapterFile { modules, ..files[0].0.clone() };
        merge(&mut read, &[(&combined, &Strengths::default())])?
    } else {
        let adapters: Vec<(&AdapterFile, &Strengths)> =
            files.iter().map(|(file, strengths)| (file, strengths)).collect();
        merge(&mut read, &adapters)?
    };
    let mut found: BTreeMap<String, Array> = BTreeMap::new();
    for ((component, name), array) in changed {
        let array = rounded(array)?;
        if read(component, &name)?.is_some_and(|base| same_bits(&base, &array)) {
            continue;
        }
        let stored = base.locate(component, &name).map_or(&*name, |(_, source)| &*source.key);
        let name = match component {
            Component::LanguageModel => stored.to_owned(),
            _ => format!("{component}.{stored}"),
        };
        found.insert(name, array);
    }
    let expected = TensorFile::open(&folder.join(text(&manifest["expected"])))?;
    let tolerance = |key: &str| manifest["tolerance"][key].as_f64().unwrap();
    for name in expected.names() {
        let want = expected.array(name)?;
        let Some(got) = found.remove(name) else {
            outcome.problems.push(format!("{name} is not changed"));
            continue;
        };
        if got.shape != want.shape {
            outcome.problems.push(format!("{name}: shape {:?} instead of {:?}", got.shape, want.shape));
            continue;
        }
        for (got, want) in got.values.iter().zip(&want.values) {
            let error = f64::from((got - want).abs());
            let share = error / (tolerance("atol") + tolerance("rtol") * f64::from(want.abs()));
            if (share.is_nan() || share > 1.0) && outcome.problems.len() < 10 {
                outcome.problems.push(format!("{name}: {got} instead of {want}"));
            }
            outcome.error = outcome.error.max(error);
            outcome.worst = outcome.worst.max(share);
        }
    }
    // What is left was changed against expectation.
    outcome.problems.extend(found.keys().map(|name| format!("{name} is changed")));
    Ok(())
}

fn hostile(root: &Path, folder: &Path, manifest: &Value) -> Vec<Outcome> {
    let base = BaseModel::open(&root.join("bases").join(text(&manifest["base"]))).unwrap();
    let cases = manifest["cases"].as_array().unwrap();
    cases.iter().map(|case| hostile_case(&base, folder, case)).collect()
}

fn hostile_case(base: &BaseModel, folder: &Path, case: &Value) -> Outcome {
    let path = folder.join(text(&case["file"]));
    let result = match text(&case["level"]) {
        "container" if case["expect"] != "error-no-tensors" => TensorFile::open(&path).map(|_| None),
        _ => AdapterFile::read(&path, base).map(Some),
    };
    let key = case["key"].as_str().unwrap_or("");
    let names_the_key = |error: &Error| error.to_string().contains(key);
    let problem = match (text(&case["expect"]), &result) {
        ("error" | "error-no-tensors", Err(error)) if names_the_key(error) => None,
        ("error" | "error-no-tensors", Err(error)) => Some(format!("`{error}` does not name `{key}`")),
        ("error" | "error-no-tensors", Ok(_)) => Some("it is accepted".to_owned()),
        ("accept" | "accept-container", Ok(_)) => None,
        ("report", Ok(Some(file))) if file.unapplied.iter().any(|(found, _)| found.starts_with(key)) => None,
        ("report", Ok(_)) => Some(format!("`{key}` is not reported")),
        (_, Err(error)) => Some(format!("it is refused: {error}")),
        (other, Ok(_)) => Some(format!("expectation `{other}` is unknown")),
    };
    let name = format!("hostile/{}", text(&case["file"]).trim_end_matches(".safetensors"));
    Outcome { name, worst: 0.0, error: 0.0, problems: problem.into_iter().collect() }
}

fn same_bits(a: &Array, b: &Array) -> bool {
    a.shape == b.shape && a.values.iter().zip(&b.values).all(|(a, b)| a.to_bits() == b.to_bits())
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_else(|| panic!("{value} is no text"))
}
