//! `lora data check` and `lora data preview`: what training would see.

mod pictures;
mod texts;

use std::{path::Path, process::ExitCode};

use lora_cli::{
    Failure,
    options::{DataConfig, is_language_model},
    ui::Ui,
};
use lora_llm::data::Parts;

/// Lists what would be trained on, and what would be skipped and why.
///
/// # Errors
/// If there is nothing that could be trained on.
pub(crate) fn check(config: &DataConfig, ui: &Ui) -> Result<ExitCode, Failure> {
    match is_text(config) {
        true => texts::check(config, ui),
        false => pictures::check(config, ui),
    }
}

/// Shows at most `limit` examples as training sees them; pictures on a sheet, `out`.
///
/// # Errors
/// If there is nothing to show.
pub(crate) fn preview(config: &DataConfig, limit: usize, out: &Path, ui: &Ui) -> Result<ExitCode, Failure> {
    match is_text(config) {
        true => texts::preview(config, limit, ui),
        false => pictures::preview(config, limit, out, ui),
    }
}

/// The base decides; without one, a file is one of texts, and so is a folder with a file to train on.
fn is_text(config: &DataConfig) -> bool {
    let looks_like_texts = || config.data.is_file() || Parts::find(&config.data).is_ok_and(|parts| parts.is_some());
    config.base.as_deref().map_or_else(looks_like_texts, is_language_model)
}
