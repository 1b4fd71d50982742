//! `lora eval`: how well a model does on pictures or on texts, as the base says.

mod pictures;
mod texts;

use std::process::ExitCode;

use lora_cli::{
    Failure,
    options::{DataConfig, is_language_model, values::LoraFile},
    ui::Ui,
};
use serde_json::{Value, json};

/// What is measured, besides the loss of all adapters together.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Measures {
    /// Timesteps for each picture.
    pub(crate) draws: usize,
    /// Whether each question is put to the model, too.
    pub(crate) answers: bool,
    /// Whether the base, each adapter alone, and all together are measured.
    pub(crate) compare: bool,
}

/// Runs the command.
///
/// # Errors
/// Whatever stops it, as it is to be shown.
pub(crate) fn run(config: &DataConfig, lora: &[LoraFile], measures: Measures, ui: &Ui) -> Result<ExitCode, Failure> {
    match is_language_model(config.base()?) {
        true => texts::run(config, lora, measures, ui),
        false => pictures::run(config, lora, measures, ui),
    }
}

/// Writes one result, or those of a comparison: as lines under each other's names, or as one document.
fn write(results: &[(Option<&str>, Value, Vec<String>)], ui: &Ui) -> Result<(), Failure> {
    let written = match results {
        [(None, document, _)] if ui.json => ui.json_data(document),
        [(None, _, lines)] => ui.data(&lines.join("\n")),
        _ if ui.json => {
            let named = results.iter().map(|(label, document, _)| {
                let mut document = document.clone();
                document["adapter"] = (*label).into();
                document
            });
            ui.json_data(&json!({"compared": named.collect::<Vec<_>>()}))
        }
        _ => {
            let blocks = results.iter().map(|(label, _, lines)| {
                let head = ui.stdout().bold(label.unwrap_or_default());
                format!("{head}\n  {}", lines.join("\n  "))
            });
            ui.data(&blocks.collect::<Vec<_>>().join("\n"))
        }
    };
    written.map_err(|error| Failure::from_error("stdout", &error))
}
