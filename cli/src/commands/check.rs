//! `lora check`: every key of an adapter file, applied to a base or named with its reason.

use std::{collections::BTreeMap, process::ExitCode};

use lora_core::format::{BaseModel, Check, CheckedModule, Key, Misfit, TensorFile, guess_family};
use serde_json::{Value, json};

use crate::{
    Failure,
    args::CheckArgs,
    commands::{
        adapters::{inspect_hint, key_name, warning_lines},
        locate, output,
    },
    failure::Exit,
    inspection::{idle_warnings, rank_warnings},
    text,
    ui::Ui,
};

/// Keys of one reason that are named; the rest is counted.
const NAMED: usize = 8;

/// Modules of other shapes that are named.
const NAMED_MISFITS: usize = 3;

/// Columns of a line, and of what stands before its text.
const COLUMNS: usize = 80;
const MARGIN: usize = 6;

pub(crate) fn run(args: &CheckArgs, ui: &Ui) -> Result<ExitCode, Failure> {
    let base = BaseModel::open(&locate(&args.base)?)?;
    let file = TensorFile::read_adapter(&args.file)?;
    let check = Check::of(&file, &base)?;
    let (fits, warnings) = (check.misfits().count() == 0, warnings(&check));
    let report = Report { check, fits, warnings, base, file };
    if ui.json {
        ui.json_data(&report.document()).map_err(output)?;
    } else {
        ui.data(&report.lines(ui).join("\n")).map_err(output)?;
    }
    if !report.fits {
        ui.say(&inspect_hint(&args.file));
    }
    Ok(if report.is_ok() { ExitCode::SUCCESS } else { Exit::Failed.into() })
}

/// A check and what it was made of.
struct Report {
    check: Check,
    /// Whether every module that the base has is of the shape that the file wants.
    fits: bool,
    warnings: Vec<String>,
    base: BaseModel,
    file: TensorFile,
}

impl Report {
    fn is_ok(&self) -> bool {
        self.fits && self.check.file.unapplied.is_empty()
    }

    /// How many modules take part.
    fn modules(&self) -> usize {
        self.check.modules.len() - self.check.misfits().count()
    }

    fn document(&self) -> Value {
        let found = &self.check.file;
        let unapplied: Vec<_> =
            found.unapplied.iter().map(|(key, reason)| json!({"key": key, "reason": reason.to_string()})).collect();
        let misfit = |(module, misfit): (&CheckedModule, &Misfit)| {
            json!({"component": module.component.name(), "module": module.path, "key": misfit.key, "shape": misfit.shape,
                   "base_shape": misfit.base, "reason": misfit.problem})
        };
        let idle = self.check.idle().map(|(module, idle)| {
            json!({"component": module.component.name(), "module": module.path, "reason": idle.to_string()})
        });
        json!({
            "ok": self.is_ok(),
            "applied": self.check.applied(),
            "total": found.keys,
            "unapplied": unapplied,
            "misfits": self.check.misfits().map(misfit).collect::<Vec<_>>(),
            "idle": idle.collect::<Vec<_>>(),
            "embeddings": found.embeddings,
            "warnings": self.warnings,
            "modules": self.modules(),
            "dialect": found.dialect.to_string(),
            "base": self.base.family().to_string(),
        })
    }

    fn lines(&self, ui: &Ui) -> Vec<String> {
        let paint = ui.stdout();
        let found = &self.check.file;
        let mut lines = Vec::new();
        let state = if self.is_ok() { paint.green("ok  ") } else { paint.red("fail") };
        let counts = format!(
            "{} of {} keys applied to {} of {} ({})",
            text::thousands(self.check.applied() as u64),
            text::thousands(found.keys as u64),
            text::plural(self.modules() as u64, "module"),
            self.base.family(),
            found.dialect
        );
        lines.extend(marked(&state, &counts));
        if !found.embeddings.is_empty() {
            let count = text::plural(found.embeddings.len() as u64, "tensor");
            lines.push(format!("ok    {count} of bundled textual inversions, which are no adapters"));
        }
        lines.extend(self.warnings.iter().flat_map(|warning| marked(&paint.yellow("warn"), warning)));
        lines.extend(self.misfit_lines(&paint.red("fail")));
        let mut reasons: BTreeMap<String, Vec<&str>> = BTreeMap::new();
        for (key, reason) in &found.unapplied {
            reasons.entry(reason.to_string()).or_default().push(key);
        }
        for (reason, keys) in reasons {
            lines.push(format!("{}  {}: {reason}", paint.red("fail"), text::plural(keys.len() as u64, "key")));
            lines.extend(keys.iter().take(NAMED).map(|key| format!("        {}", key_name(key))));
            lines.extend(more(keys.len(), NAMED));
        }
        lines
    }

    /// The modules that do not fit, the first of them with both shapes, and whose they seem to be.
    fn misfit_lines(&self, mark: &str) -> Vec<String> {
        let misfits: Vec<_> = self.check.misfits().collect();
        if misfits.is_empty() {
            return Vec::new();
        }
        let of = text::plural(self.check.modules.len() as u64, "module");
        let verb = if misfits.len() == 1 { "does" } else { "do" };
        let mut lines =
            marked(mark, &format!("{} of {of} {verb} not fit this base", text::thousands(misfits.len() as u64)));
        for (module, misfit) in misfits.iter().take(NAMED_MISFITS) {
            lines.push(format!("        {}", key_name(&module.component.with(&module.path))));
            let beside = misfit.other.as_ref().map(|(key, shape)| format!(" beside {} {shape:?}", suffix(key)));
            let shapes = format!(
                "{} {:?}{}, base weight {:?}: {}",
                suffix(&misfit.key),
                misfit.shape,
                beside.unwrap_or_default(),
                misfit.base,
                misfit.problem
            );
            lines.extend(text::wrap(&shapes, COLUMNS - 10).into_iter().map(|line| format!("          {line}")));
        }
        lines.extend(more(misfits.len(), NAMED_MISFITS));
        // The widths of a file tell its model, where the names alone do not.
        let family = guess_family(&self.file).filter(|family| !family.contains(&self.base.family().to_string()));
        lines.extend(family.map(|family| format!("      the file looks like one for {family}")));
        lines
    }
}

/// What was applied and may surprise. An alpha of 0 is named among what changes nothing.
fn warnings(check: &Check) -> Vec<String> {
    let names: Vec<String> = check.modules.iter().map(|module| module.component.with(&module.path)).collect();
    let named = || check.modules.iter().zip(names.iter().map(String::as_str));
    let idle = named().filter_map(|(module, name)| module.idle().map(|idle| (name, idle)));
    let mut warnings = idle_warnings(idle, check.modules.len());
    warnings.extend(rank_warnings(named().filter_map(|(module, name)| Some((name, module.ranks?)))));
    warnings.extend(warning_lines(check.file.warnings.iter().filter(|warning| !warning.is_of_alpha())));
    warnings
}

/// A text behind its mark, in lines that a terminal has room for.
fn marked(mark: &str, line: &str) -> Vec<String> {
    let mut lines = text::wrap(line, COLUMNS - MARGIN).into_iter();
    let first = lines.next().map(|line| format!("{mark}  {line}"));
    first.into_iter().chain(lines.map(|line| format!("{:MARGIN$}{line}", ""))).collect()
}

fn more(count: usize, named: usize) -> Option<String> {
    (count > named)
        .then(|| format!("        and {} more: --json names them all", text::thousands((count - named) as u64)))
}

/// The end of a key, which says what the tensor is for.
fn suffix(key: &str) -> String {
    key_name(Key::parse(key).map_or(key, |key| key.suffix))
}
