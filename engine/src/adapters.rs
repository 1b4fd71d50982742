//! Adapter files on a loaded model.

use lora_cli::{Failure, options::values::LoraFile, text, ui::Ui};
use lora_core::format::{AdapterFile, BaseModel, Reason, Strengths};
use lora_torch::Projection;

use crate::failures::Explain as _;

/// Puts all files on a model's projections, each at its strength; a key that finds no place is an error that names it.
pub(crate) fn attach(
    files: &[LoraFile],
    names: &BaseModel,
    projections: Vec<&mut Projection>,
    ui: &Ui,
) -> Result<(), Failure> {
    let mut read: Vec<(AdapterFile, Strengths)> = Vec::new();
    for file in files {
        let adapter = AdapterFile::read(&file.path, names).explain()?;
        refuse_unapplied(&adapter, file)?;
        ui.say(&format!(
            "Adapter {} on {}, strength {}",
            file.path.display(),
            text::plural(adapter.modules.len() as u64, "module"),
            file.strength
        ));
        read.push((adapter, file.strength.into()));
    }
    let adapters: Vec<(&AdapterFile, &Strengths)> = read.iter().map(|(file, strengths)| (file, strengths)).collect();
    lora_torch::attach(projections, &adapters).explain()
}

fn refuse_unapplied(read: &AdapterFile, file: &LoraFile) -> Result<(), Failure> {
    let Some((key, reason)) = read.unapplied.first() else { return Ok(()) };
    let why = match reason {
        Reason::NoModule(component) => format!("the base's {} has no such module", component.name()),
        Reason::NoComponent(component) => format!("the base has no {}", component.name()),
        Reason::OtherFamily(family) => format!("it belongs to {family}"),
        Reason::UnknownSuffix => "the end of its name is unknown".to_owned(),
        _ => "its name is unknown".to_owned(),
    };
    let count = read.unapplied.len();
    Err(Failure::new(
        "unapplied_keys",
        format!("{}: {count} of {} keys find no place in this base", file.path.display(), read.keys),
    )
    .detail(format!("the first is `{key}`: {why}"))
    .hint(format!("see all of them with `lora check {} --base BASE`", file.path.display()))
    .with("unapplied", count as u64))
}
