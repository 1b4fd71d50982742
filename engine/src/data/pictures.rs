//! What training would see of a folder of pictures.

use std::{io::Cursor, path::Path, process::ExitCode};

use lora_cli::{
    Failure,
    options::{DataConfig, values::Mask},
    ui::Ui,
};
use lora_diffusion::{
    BaseFiles,
    data::{Alpha, Dataset, ReportOptions, SheetOptions},
    tokenizer::{LENGTH, Tokenizer},
};

use crate::{base, failures::Explain as _, pictures, train};

/// Side of pictures where no base says another.
const RESOLUTION: u32 = 512;

/// Lists every picture with its bucket and caption, and every file that would be skipped with its reason.
///
/// # Errors
/// If there is nothing that could be trained on.
pub(crate) fn check(config: &DataConfig, ui: &Ui) -> Result<ExitCode, Failure> {
    let (files, dataset) = scan(config, ui)?;
    let tokenizer: Option<Tokenizer> =
        files.as_ref().and_then(|files| files.tokenizers().ok()).and_then(|all| all.into_iter().next());
    let count = |caption: &str| tokenizer.as_ref().map_or(0, |tokenizer| tokenizer.count(caption));
    let options = ReportOptions {
        tokens: tokenizer.is_some().then_some(&count as &dyn Fn(&str) -> usize),
        token_limit: LENGTH,
        batch: config.batch.get(),
        batches: None,
        seed: config.seed,
    };
    let report = dataset.report(options);
    let written = match ui.json {
        true => ui.json_data(&report),
        false => ui.data(&report.to_string()),
    };
    written.map_err(|error| Failure::from_error("stdout", &error))?;
    Ok(ExitCode::SUCCESS)
}

/// Draws a sheet of pictures as training sees them.
///
/// # Errors
/// If there is nothing to draw, or the sheet cannot be written.
pub(crate) fn preview(config: &DataConfig, limit: usize, out: &Path, ui: &Ui) -> Result<ExitCode, Failure> {
    let (_, dataset) = scan(config, ui)?;
    let alpha = if config.mask == Mask::Alpha { Alpha::Mask } else { Alpha::White };
    let sheet = dataset.sheet(SheetOptions { most: limit, alpha, ..SheetOptions::default() }).explain()?;
    let mut png = Cursor::new(Vec::new());
    sheet.write_to(&mut png, image::ImageFormat::Png).map_err(|error| Failure::from_error("png", &error))?;
    pictures::write(out, &png.into_inner())?;
    let failed = |error: std::io::Error| Failure::from_error("stdout", &error);
    if ui.json {
        let shown = dataset
            .pictures
            .iter()
            .take(limit)
            .map(|picture| serde_json::json!({"path": picture.path.to_string_lossy(), "caption": picture.caption}));
        ui.json_data(&serde_json::json!({"sheet": out.to_string_lossy(), "pictures": shown.collect::<Vec<_>>()}))
            .map_err(failed)?;
    } else {
        for (at, picture) in dataset.pictures.iter().take(limit).enumerate() {
            ui.say(&format!("{:>3}  {}  {}", at + 1, picture.name, picture.caption));
        }
        ui.data(&out.display().to_string()).map_err(failed)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn scan(config: &DataConfig, ui: &Ui) -> Result<(Option<BaseFiles>, Dataset), Failure> {
    let files = config.base.as_deref().map(|base| base::find(base, config.prediction, config.quantize)).transpose()?;
    let side = match &files {
        Some(files) => base::resolution(files, config.resolution),
        None => config.resolution.unwrap_or(RESOLUTION),
    };
    let dataset = train::pictures::scan(&config.data, side, config.trigger.clone(), config.mask, true, ui)?;
    Ok((files, dataset))
}
