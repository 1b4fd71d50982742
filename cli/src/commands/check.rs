//! `lora check`: every key of an adapter file, applied to a base or named with its reason.

use std::{collections::BTreeMap, process::ExitCode};

use lora_core::format::{AdapterFile, BaseModel};
use serde_json::json;

use crate::{
    Failure,
    args::CheckArgs,
    commands::{locate, output},
    failure::{Exit, printable},
    text,
    ui::Ui,
};

/// Keys of one reason that are named; the rest is counted.
const NAMED: usize = 8;

pub(crate) fn run(args: &CheckArgs, ui: &Ui) -> Result<ExitCode, Failure> {
    let base = BaseModel::open(&locate(&args.base)?)?;
    let read = AdapterFile::read(&args.file, &base)?;
    let ok = read.unapplied.is_empty();
    if ui.json {
        let unapplied: Vec<_> =
            read.unapplied.iter().map(|(key, reason)| json!({"key": key, "reason": reason.to_string()})).collect();
        let warnings: Vec<_> = read.warnings.iter().map(ToString::to_string).collect();
        let document = json!({
            "ok": ok,
            "applied": read.applied(),
            "total": read.keys,
            "unapplied": unapplied,
            "embeddings": read.embeddings,
            "warnings": warnings,
            "modules": read.modules.len(),
            "dialect": read.dialect.to_string(),
            "base": base.family().to_string(),
        });
        ui.json_data(&document).map_err(output)?;
    } else {
        ui.data(&lines(&read, &base, ui).join("\n")).map_err(output)?;
    }
    Ok(if ok { ExitCode::SUCCESS } else { Exit::Failed.into() })
}

fn lines(read: &AdapterFile, base: &BaseModel, ui: &Ui) -> Vec<String> {
    let paint = ui.stdout();
    let ok = read.unapplied.is_empty();
    let state = if ok { paint.green("ok  ") } else { paint.red("fail") };
    let mut lines = vec![format!(
        "{state}  {} of {} keys applied to {} of {} ({} spelling)",
        text::thousands(read.applied() as u64),
        text::thousands(read.keys as u64),
        text::plural(read.modules.len() as u64, "module"),
        base.family(),
        read.dialect
    )];
    if !read.embeddings.is_empty() {
        let count = text::plural(read.embeddings.len() as u64, "tensor");
        lines.push(format!("ok    {count} of bundled textual inversions, which are no adapters"));
    }
    lines.extend(read.warnings.iter().map(|warning| format!("{}  {warning}", paint.yellow("warn"))));
    let mut reasons: BTreeMap<String, Vec<&str>> = BTreeMap::new();
    for (key, reason) in &read.unapplied {
        reasons.entry(reason.to_string()).or_default().push(key);
    }
    for (reason, keys) in reasons {
        lines.push(format!("{}  {}: {reason}", paint.red("fail"), text::plural(keys.len() as u64, "key")));
        lines.extend(keys.iter().take(NAMED).map(|key| format!("        {}", printable(key))));
        if keys.len() > NAMED {
            lines.push(format!("        and {} more: --json names them all", keys.len() - NAMED));
        }
    }
    lines
}
