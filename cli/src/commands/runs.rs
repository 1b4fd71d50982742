//! `lora runs`: what was trained, and what came of it.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::{
    Failure,
    args::RunsCommand,
    commands::output,
    failure::printable,
    run::{RunDir, RunError, Summary, find_runs, sample_sets, summarise},
    text,
    ui::{Paint, Ui},
};

pub(crate) fn run(command: &RunsCommand, ui: &Ui) -> Result<(), Failure> {
    match command {
        RunsCommand::List { folder } => list(folder, ui),
        RunsCommand::Show { run } => show(run, ui),
        RunsCommand::Compare { runs } => compare(runs, ui),
    }
}

fn list(folder: &Path, ui: &Ui) -> Result<(), Failure> {
    let (mut runs, mut damaged) = (Vec::new(), Vec::new());
    for path in find_runs(folder)? {
        match summarise(&path) {
            Ok(summary) => runs.push(summary),
            Err(error) => damaged.push((path, error)),
        }
    }
    for (path, error) in &damaged {
        ui.warn(&format!("{} is left out: {error}", path.display()));
    }
    if ui.json {
        return ui.json_data(&runs).map_err(output);
    }
    if runs.is_empty() {
        ui.say(&format!("no runs in {} or its folder `runs`", folder.display()));
        return Ok(());
    }
    let mut table = vec![["RUN", "STATE", "STEP", "LOSS", "TIME", "ADAPTER"].map(String::from).to_vec()];
    table.extend(runs.iter().map(|run| {
        let adapter =
            run.adapter.as_ref().and_then(|path| path.file_name()).map(|name| name.to_string_lossy().into_owned());
        vec![
            run.run.display().to_string(),
            run.state.to_owned(),
            progress(run),
            loss(run),
            text::duration(run.seconds),
            adapter.unwrap_or_else(|| "-".into()),
        ]
    }));
    ui.data(&columns(&table, ui.stdout())).map_err(output)
}

fn show(path: &Path, ui: &Ui) -> Result<(), Failure> {
    let run = RunDir::open(path)?;
    let summary = summarise(path)?;
    let samples = sample_sets(&run)?;
    let checkpoints = run.checkpoint_steps()?;
    if ui.json {
        let mut document = serde_json::to_value(&summary).map_err(|error| Failure::from_error("run", &error))?;
        document["checkpoints"] = json!(checkpoints);
        document["samples"] = json!(samples.iter().map(|set| set.step).collect::<Vec<_>>());
        return ui.json_data(&document).map_err(output);
    }
    let list = |steps: Vec<u64>| match steps.is_empty() {
        true => "none".to_owned(),
        false => format!("at {}", steps.iter().map(u64::to_string).collect::<Vec<_>>().join(", ")),
    };
    let mut rows = vec![
        ("run", path.display().to_string()),
        ("state", format!("{}, step {}", summary.state, progress(&summary))),
        ("loss", loss(&summary)),
        ("validation", validation(&summary)),
        ("time", text::duration(summary.seconds)),
        ("checkpoints", list(checkpoints)),
        ("samples", list(samples.iter().map(|set| set.step).collect())),
    ];
    rows.extend(summary.adapter.iter().map(|path| ("adapter", path.display().to_string())));
    if run.report().is_file() {
        rows.push(("report", run.report().display().to_string()));
    }
    let paint = ui.stdout();
    rows.retain(|(label, value)| *label != "validation" || value != "-");
    let mut lines: Vec<_> =
        rows.into_iter().map(|(label, value)| format!("{} {value}", paint.bold(&format!("{label:<12}")))).collect();
    lines.push(String::new());
    lines.extend(summary.config.iter().map(|(key, value)| format!("{key:<20} {}", plain(Some(value)))));
    ui.data(&lines.join("\n")).map_err(output)?;
    if summary.state == "stopped" {
        let command = crate::failure::shell_word(&path.display().to_string());
        ui.say(&format!("go on with it: lora train --resume {command}"));
    }
    Ok(())
}

fn compare(paths: &[PathBuf], ui: &Ui) -> Result<(), Failure> {
    let runs = paths.iter().map(|path| summarise(path)).collect::<Result<Vec<_>, RunError>>()?;
    let mut keys: Vec<&String> = Vec::new();
    for key in runs.iter().flat_map(|run| run.config.keys()) {
        if !keys.contains(&key) {
            keys.push(key);
        }
    }
    keys.retain(|key| runs.iter().any(|run| run.config.get(*key) != runs[0].config.get(*key)));
    if ui.json {
        let options: serde_json::Map<_, _> = keys
            .iter()
            .map(|key| {
                ((*key).clone(), runs.iter().map(|run| run.config.get(*key).cloned().unwrap_or(Value::Null)).collect())
            })
            .collect();
        let results: Vec<_> = runs
            .iter()
            .map(|run| {
                json!({"run": run.run.to_string_lossy(), "state": run.state, "step": run.step, "loss": run.loss,
                "validation_loss": run.validation_loss, "seconds": run.seconds})
            })
            .collect();
        return ui.json_data(&json!({"runs": results, "differing_options": options})).map_err(output);
    }
    let row = |label: &str, cell: &dyn Fn(&Summary) -> String| {
        [label.to_owned()].into_iter().chain(runs.iter().map(cell)).collect::<Vec<_>>()
    };
    let mut table = vec![row("", &|run| run.run.display().to_string())];
    table.extend(keys.iter().map(|key| row(key, &|run| plain(run.config.get(*key)))));
    table.push(row("state", &|run| run.state.to_owned()));
    table.push(row("step", &progress));
    table.push(row("loss", &loss));
    if runs.iter().any(|run| run.validation_loss.is_some()) {
        table.push(row("validation", &validation));
    }
    table.push(row("time", &|run| text::duration(run.seconds)));
    ui.data(&columns(&table, ui.stdout())).map_err(output)
}

fn progress(run: &Summary) -> String {
    run.steps.map_or_else(|| run.step.to_string(), |steps| format!("{}/{steps}", run.step))
}

fn loss(run: &Summary) -> String {
    run.loss.map_or_else(|| "-".into(), |loss| format!("{loss:.4}"))
}

fn validation(run: &Summary) -> String {
    run.validation_loss.map_or_else(|| "-".into(), |loss| format!("{loss:.4}"))
}

fn plain(value: Option<&Value>) -> String {
    match value {
        None | Some(Value::Null) => "-".into(),
        Some(Value::String(text)) => printable(text),
        Some(Value::Array(items)) => items.iter().map(|item| plain(Some(item))).collect::<Vec<_>>().join(", "),
        Some(other) => other.to_string(),
    }
}

/// Cells in columns, two spaces apart, the first row bold.
fn columns(table: &[Vec<String>], paint: Paint) -> String {
    let count = table.iter().map(Vec::len).max().unwrap_or(0);
    let widths: Vec<_> = (0..count)
        .map(|column| table.iter().filter_map(|row| row.get(column)).map(|cell| text::width(cell)).max().unwrap_or(0))
        .collect();
    let line = |row: &Vec<String>| {
        let cells =
            row.iter().zip(&widths).map(|(cell, width)| format!("{cell}{}", " ".repeat(width - text::width(cell))));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    let mut lines: Vec<_> = table.iter().map(line).collect();
    if let Some(first) = lines.first_mut() {
        *first = paint.bold(first);
    }
    lines.join("\n")
}
