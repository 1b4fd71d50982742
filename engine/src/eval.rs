//! `lora eval`: how well a model does on pictures or on texts, as the base says.

mod pictures;
mod texts;

use std::process::ExitCode;

use lora_cli::{
    Failure,
    options::{DataConfig, is_language_model, values::LoraFile},
    ui::Ui,
};

/// Runs the command; `draws` timesteps for each picture, or, with `answers`, an answer to each question.
///
/// # Errors
/// Whatever stops it, as it is to be shown.
pub(crate) fn run(
    config: &DataConfig,
    lora: &[LoraFile],
    draws: usize,
    answers: bool,
    ui: &Ui,
) -> Result<ExitCode, Failure> {
    match is_language_model(config.base()?) {
        true => texts::run(config, lora, answers, ui),
        false => pictures::run(config, lora, draws, ui),
    }
}
