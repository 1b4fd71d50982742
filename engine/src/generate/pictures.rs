//! From a prompt to picture files.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use lora_cli::{
    Failure,
    options::{GenerateConfig, values},
    progress::Stage,
    ui::Ui,
};
use lora_diffusion::sample::{Request, generate};
use lora_torch::Projections as _;

use crate::{adapters, base, failures::Explain as _, machine::Machine, pictures};

/// Draws; the files' paths go to stdout.
///
/// # Errors
/// Whatever stops it, as it is to be shown.
pub(crate) fn run(config: &GenerateConfig, ui: &Ui) -> Result<ExitCode, Failure> {
    let machine = Machine::choose(config.device, config.dtype)?;
    let files = base::find(&config.base, values::Prediction::Auto, config.quantize)?;
    let names = base::names(&files)?;
    let side = base::resolution(&files, None) as usize;
    let paths = paths(config)?;
    let mut base = files.load(&machine.on).explain()?;
    base.text.clip_skip = config.clip_skip.get() - 1;
    let projections = base.unet.projections().into_iter().chain(base.text.projections()).collect();
    adapters::attach(&config.lora, &names, projections, ui)?;
    let [width, height] = config.size.map_or([side; 2], |size| [size.width as usize, size.height as usize]);
    let request = Request {
        prompt: config.prompt.clone(),
        negative: (!config.negative.is_empty()).then(|| config.negative.clone()),
        seeds: (0..config.count.get() as u64).map(|at| config.seed.wrapping_add(at)).collect(),
        height,
        width,
        steps: config.steps.get(),
        guidance: config.guidance,
        sampler: pictures::sampler(config.sampler),
    };
    let mut stage: Option<Stage> = None;
    let drawn = generate(&base, &request, &mut |done, total| {
        stage.get_or_insert_with(|| Stage::new(*ui, "drawing", total as u64)).set(done as u64);
    })
    .explain()?;
    drop(stage);
    for (picture, path) in drawn.iter().zip(&paths) {
        pictures::write(path, &pictures::png(picture)?)?;
    }
    let failed = |error: std::io::Error| Failure::from_error("stdout", &error);
    if ui.json {
        let list: Vec<_> = paths
            .iter()
            .zip(&request.seeds)
            .map(|(path, seed)| serde_json::json!({"file": path, "seed": seed}))
            .collect();
        ui.json_data(&serde_json::json!({"prompt": config.prompt, "pictures": list})).map_err(failed)?;
    } else {
        for path in &paths {
            ui.data(&path.display().to_string()).map_err(failed)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// One path a picture: the one that was named, numbered if there are several, or free names in the working folder.
fn paths(config: &GenerateConfig) -> Result<Vec<PathBuf>, Failure> {
    let count = config.count.get();
    match &config.out {
        Some(out) => {
            if out.extension().is_none_or(|ending| !ending.eq_ignore_ascii_case("png")) {
                return Err(Failure::usage("bad_option", format!("--out: `{}` does not end in .png", out.display()))
                    .hint(format!("--out {}", out.with_extension("png").display())));
            }
            if count == 1 {
                return Ok(vec![out.clone()]);
            }
            let stem = out.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            Ok((0..count).map(|at| out.with_file_name(format!("{stem}-{at:02}.png"))).collect())
        }
        None => {
            let stem = slug(&config.prompt);
            let free = (1u64..)
                .map(|number| PathBuf::from(format!("{stem}-{number}.png")))
                .filter(|path| !Path::new(path).exists());
            Ok(free.take(count).collect())
        }
    }
}

/// The first words of a prompt as a file name.
fn slug(prompt: &str) -> String {
    let words: Vec<String> = prompt
        .split(|letter: char| !letter.is_alphanumeric())
        .filter(|word| !word.is_empty())
        .take(6)
        .map(str::to_lowercase)
        .collect();
    if words.is_empty() { "picture".to_owned() } else { words.join("-") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prompt_becomes_a_short_file_name() {
        assert_eq!(slug("A *red* star, in/neon style at night please"), "a-red-star-in-neon-style");
        assert_eq!(slug("!?"), "picture");
    }
}
