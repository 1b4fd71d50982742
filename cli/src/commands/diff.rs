//! `lora diff`: two adapter files side by side; the exit code is that of `diff`.

use std::process::ExitCode;

use lora_core::{
    compare::{Comparison, ModuleComparison, Side, compare},
    format::Component,
};
use serde_json::{Value, json};

use super::{
    adapters::{Adapters, NAMED, key_name},
    output,
};
use crate::{
    Failure,
    args::DiffArgs,
    failure::{Exit, printable},
    text,
    ui::Ui,
};

/// Columns that a metadata value may take.
const VALUE: usize = 30;

/// Metadata that says the same of every file but itself.
const HASHES: [&str; 3] = ["sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256"];

pub(crate) fn run(args: &DiffArgs, ui: &Ui) -> Result<ExitCode, Failure> {
    // 1 means "different", so trouble is 2, as `diff` has it.
    compared(args, ui).map_err(|failure| Failure { exit: Exit::Usage, ..failure })
}

fn compared(args: &DiffArgs, ui: &Ui) -> Result<ExitCode, Failure> {
    if !(args.tolerance >= 0.0 && args.tolerance.is_finite()) {
        let message = format!("--tolerance {} is no distance", args.tolerance);
        return Err(Failure::usage("usage", message).hint("a share of the larger update, as 1e-5; 0 wants them equal"));
    }
    let adapters = Adapters::open(&[&args.first, &args.second], args.base.as_deref())?;
    let read = adapters.read()?;
    let [first, second] = &read[..] else {
        return Err(Failure::new("failed", "two files are needed"));
    };
    let comparison = compare(first, second, adapters.base())?;
    let unknown = |index: usize| -> Vec<String> { read[index].unapplied.iter().map(|(key, _)| key.clone()).collect() };
    let unknown = [unknown(0), unknown(1)];
    let same = comparison.is_same_update(args.tolerance) && unknown[0] == unknown[1];
    if ui.json {
        ui.json_data(&document(&comparison, &unknown, same)).map_err(output)?;
    } else {
        ui.data(&lines(args, &comparison, &unknown, same, ui).join("\n")).map_err(output)?;
    }
    Ok(if same { ExitCode::SUCCESS } else { Exit::Failed.into() })
}

fn lines(args: &DiffArgs, comparison: &Comparison, unknown: &[Vec<String>; 2], same: bool, ui: &Ui) -> Vec<String> {
    let paint = ui.stdout();
    let total = comparison.common.len();
    let mut lines = vec![match same {
        true => format!("{}       {} with the same update", paint.green("Same"), text::plural(total as u64, "module")),
        false => format!("{}  {} in common", paint.yellow("Different"), text::plural(total as u64, "module")),
    }];
    let files = [&args.first, &args.second].map(|path| printable(&path.display().to_string()));
    for (modules, file) in [(&comparison.only_first, &files[0]), (&comparison.only_second, &files[1])] {
        if !modules.is_empty() {
            lines.push(format!("Only in    {file}: {}", text::plural(modules.len() as u64, "module")));
            lines.extend(
                modules.iter().take(NAMED).map(|(component, path)| format!("           {}", name(*component, path))),
            );
            lines.extend(more(modules.len()));
        }
    }
    let mut apart: Vec<&ModuleComparison> = comparison
        .common
        .iter()
        .filter(|module| module.distance.is_none_or(|distance| distance > args.tolerance))
        .collect();
    // What cannot be compared first, then the farthest.
    let distance = |module: &ModuleComparison| module.distance.unwrap_or(f64::INFINITY);
    apart.sort_by(|a, b| distance(b).total_cmp(&distance(a)));
    if !apart.is_empty() {
        let known: Vec<f64> = comparison.common.iter().filter_map(|module| module.distance).collect();
        let mean = known.iter().sum::<f64>() / known.len().max(1) as f64;
        let average = match known.is_empty() {
            true => String::new(),
            false => format!(", by {} on average", text::digits(mean, 3)),
        };
        lines.push(format!(
            "Distance   {} of {} differ{average}",
            text::thousands(apart.len() as u64),
            text::plural(total as u64, "module"),
        ));
        lines.push("           in shares of the larger update: at 0 they are the same, at 2 opposite".to_owned());
        if known.len() < total {
            lines.push(match args.base {
                None => "           ?: it depends on base weights, which `--base BASE` would tell".to_owned(),
                Some(_) => "           ?: the two are for weights of different shapes".to_owned(),
            });
        }
        lines.extend(apart.iter().take(NAMED).map(|module| {
            let distance = module.distance.map_or_else(|| "?".to_owned(), |distance| text::digits(distance, 3));
            format!("           {distance:>8}  {}{}", name(module.component, &module.path), sides(module))
        }));
        lines.extend(more(apart.len()));
    }
    let widths = |index: usize| {
        let ranks = comparison.common.iter().filter_map(move |module| module.sides[index].rank);
        super::adapters::ranks(ranks)
    };
    if widths(0) != widths(1) {
        lines.push(format!("Rank       {} and {}", widths(0), widths(1)));
    }
    for (keys, file) in unknown.iter().zip(&files) {
        if !keys.is_empty() && unknown[0] != unknown[1] {
            lines.push(format!(
                "Unknown    {} in {file}: {}",
                text::plural(keys.len() as u64, "key"),
                key_name(&keys[0])
            ));
        }
    }
    let metadata: Vec<_> = comparison.metadata.iter().filter(|(key, _, _)| !HASHES.contains(&&**key)).collect();
    if !metadata.is_empty() {
        lines.push(format!("Metadata   {} differ, which changes no picture", text::thousands(metadata.len() as u64)));
        lines.extend(metadata.iter().take(NAMED).map(|(key, first, second)| {
            let shown = |value: &Option<String>| match value {
                Some(value) => printable(&text::ellipsis(value, VALUE)),
                None => "(absent)".to_owned(),
            };
            format!("           {}: {} | {}", printable(key), shown(first), shown(second))
        }));
        lines.extend(more(metadata.len()));
    }
    lines
}

fn name(component: Component, path: &str) -> String {
    printable(&component.with(path))
}

fn more(count: usize) -> Option<String> {
    (count > NAMED).then(|| format!("           and {} more: --json names them all", count - NAMED))
}

/// What differs beside the numbers.
fn sides(module: &ModuleComparison) -> String {
    let [a, b] = &module.sides;
    if a.family != b.family { format!(" ({} and {})", a.family, b.family) } else { String::new() }
}

fn document(comparison: &Comparison, unknown: &[Vec<String>; 2], same: bool) -> Value {
    let names = |modules: &[(Component, String)]| -> Value {
        modules.iter().map(|(component, path)| json!({"component": component.name(), "module": path})).collect()
    };
    let side = |side: &Side| json!({"method": side.family, "rank": side.rank, "alpha": side.alpha, "dtype": side.dtype.name()});
    let common = comparison.common.iter().map(|module| {
        json!({"component": module.component.name(), "module": module.path, "distance": module.distance,
               "norms": module.norms, "a": side(&module.sides[0]), "b": side(&module.sides[1])})
    });
    let metadata = comparison.metadata.iter().map(|(key, a, b)| json!({"key": key, "a": a, "b": b}));
    json!({
        "same": same,
        "only_a": names(&comparison.only_first),
        "only_b": names(&comparison.only_second),
        "common": common.collect::<Vec<_>>(),
        "unknown_keys": {"a": unknown[0], "b": unknown[1]},
        "metadata": metadata.collect::<Vec<_>>(),
    })
}
