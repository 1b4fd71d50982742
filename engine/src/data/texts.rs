//! What training would see of a file of texts.

use std::process::ExitCode;

use lora_cli::{
    Failure,
    failure::shell_word,
    options::{DataConfig, TextConfig, values::OnBad},
    ui::Ui,
};
use lora_llm::data::{Dataset, Preview};

use crate::{failures::Explain as _, texts::TextBase};

/// Says how the file is read, and which rows would be skipped and why.
///
/// # Errors
/// If there is nothing that could be trained on.
pub(super) fn check(config: &DataConfig, ui: &Ui) -> Result<ExitCode, Failure> {
    // All rows that cannot be used are listed here, also where training would stop at the first.
    let (base, dataset) = read(config, OnBad::Skip)?;
    let report = dataset.report(base.template.as_ref());
    let written = match ui.json {
        true => ui.json_data(&report),
        false => ui.data(report.to_string().trim_end()),
    };
    written.map_err(|error| Failure::from_error("stdout", &error))?;
    if dataset.bad.is_empty() || config.text.on_bad == OnBad::Skip {
        return Ok(ExitCode::SUCCESS);
    }
    let (bad, rows) = (dataset.bad.len(), dataset.rows);
    let [data, base] = [config.data.display().to_string(), config.base.clone().unwrap_or_default()];
    Err(Failure::new("bad_data", format!("{}: {bad} of {rows} rows cannot be used, so training stops there", data))
        .hint(format!(
            "correct them, or train on the others: `lora train {} --base {} --on-bad skip`",
            shell_word(&data),
            shell_word(&base)
        ))
        .with("bad", bad)
        .with("rows", rows))
}

/// Shows examples with what counts in the loss in colour, or between `⟦` and `⟧` where there is none.
///
/// # Errors
/// As [`check`].
pub(super) fn preview(config: &DataConfig, limit: usize, ui: &Ui) -> Result<ExitCode, Failure> {
    let (base, dataset) = read(config, config.text.on_bad)?;
    let shown = dataset.train.iter().take(limit).map(|example| Preview::new(example, &base.tokenizer).explain());
    let shown: Vec<Preview> = shown.collect::<Result<_, _>>()?;
    let failed = |error: std::io::Error| Failure::from_error("stdout", &error);
    if ui.json {
        ui.json_data(&serde_json::json!({"examples": shown})).map_err(failed)?;
        return Ok(ExitCode::SUCCESS);
    }
    let paint = ui.stdout();
    let coloured = !paint.green("").is_empty();
    for (at, (preview, line)) in shown.iter().zip(&dataset.lines).enumerate() {
        ui.data(&paint.dim(&format!("── {} · line {line}", at + 1))).map_err(failed)?;
        let text = match coloured {
            true => preview
                .pieces
                .iter()
                .map(|piece| if piece.trained { paint.green(&piece.text) } else { piece.text.clone() })
                .collect(),
            false => preview.to_string(),
        };
        ui.data(text.trim_end()).map_err(failed)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn read(config: &DataConfig, on_bad: OnBad) -> Result<(TextBase, Dataset), Failure> {
    let Some(base) = config.base.as_deref() else {
        return Err(Failure::usage("missing_option", "texts are counted in tokens, which takes the base's tokenizer")
            .hint(format!("`lora data check {} --base BASE`", shell_word(&config.data.display().to_string()))));
    };
    let base = TextBase::find(base, config.chat_template.as_deref(), config.quantize)?;
    let dataset = base.read(&config.data, TextConfig { on_bad, ..config.text }, 0.0, config.seed, None)?;
    Ok((base, dataset))
}
