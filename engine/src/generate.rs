//! `lora generate`: pictures or texts from a prompt, as the base says.

mod pictures;
mod texts;

use std::process::ExitCode;

use lora_cli::{
    Failure,
    options::{GenerateConfig, is_language_model},
    ui::Ui,
};

/// Runs the command; with `compare` for the base, each adapter alone, and all together.
///
/// # Errors
/// Whatever stops it, as it is to be shown.
pub(crate) fn run(config: &GenerateConfig, compare: bool, ui: &Ui) -> Result<ExitCode, Failure> {
    match is_language_model(&config.base) {
        true => texts::run(config, compare, ui),
        false => pictures::run(config, compare, ui),
    }
}
