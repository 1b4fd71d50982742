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
use lora_diffusion::{
    Base,
    sample::{Request, generate},
};
use lora_torch::{Projection, Projections as _};

use crate::{
    adapters::{self, Variant},
    base,
    failures::Explain as _,
    machine::Machine,
    pictures,
};

/// Draws; the files' paths go to stdout.
///
/// # Errors
/// Whatever stops it, as it is to be shown.
pub(crate) fn run(config: &GenerateConfig, compare: bool, ui: &Ui) -> Result<ExitCode, Failure> {
    let machine = Machine::choose(config.device, config.dtype)?;
    let files = base::find(&config.base, values::Prediction::Auto, config.quantize)?;
    let names = base::names(&files)?;
    let side = base::resolution(&files, None) as usize;
    let mut base = files.load(&machine.on).explain()?;
    base.text.clip_skip = config.clip_skip.get() - 1;
    let mut adapters = adapters::attach(&config.lora, &names, projections(&mut base), ui)?;
    let variants = if compare { adapters.variants().into_iter().map(Some).collect() } else { vec![None] };
    let paths = paths(config, &variants)?;
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
    let mut list = Vec::new();
    for (variant, paths) in variants.iter().zip(paths.chunks(config.count.get())) {
        if let Some(variant) = variant {
            adapters.set(projections(&mut base), &variant.strengths)?;
        }
        let mut stage: Option<Stage> = None;
        let drawn = generate(&base, &request, &mut |done, total| {
            stage.get_or_insert_with(|| Stage::new(*ui, "drawing", total as u64)).set(done as u64);
        })
        .explain()?;
        drop(stage);
        for ((picture, path), seed) in drawn.iter().zip(paths).zip(&request.seeds) {
            pictures::write(path, &pictures::png(picture)?)?;
            let mut shown = serde_json::json!({"file": path.to_string_lossy(), "seed": seed});
            if let Some(variant) = variant {
                shown["adapter"] = variant.label.as_str().into();
            }
            list.push(shown);
        }
    }
    let failed = |error: std::io::Error| Failure::from_error("stdout", &error);
    if ui.json {
        ui.json_data(&serde_json::json!({"prompt": config.prompt, "pictures": list})).map_err(failed)?;
    } else {
        for path in &paths {
            ui.data(&path.display().to_string()).map_err(failed)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// All layers of a base that adapters can sit on.
fn projections(base: &mut Base) -> Vec<&mut Projection> {
    base.unet.projections().into_iter().chain(base.text.projections()).collect()
}

/// One path a picture, variant by variant: the one that was named, numbered if there are several, or free names in the
/// working folder; those of a comparison say whose they are.
fn paths(config: &GenerateConfig, variants: &[Option<Variant>]) -> Result<Vec<PathBuf>, Failure> {
    let count = config.count.get();
    let (folder, stem) = match &config.out {
        Some(out) if out.extension().is_none_or(|ending| !ending.eq_ignore_ascii_case("png")) => {
            return Err(Failure::usage("bad_option", format!("--out: `{}` does not end in .png", out.display()))
                .hint(format!("--out {}", out.with_extension("png").display())));
        }
        Some(out) if count == 1 && variants.len() == 1 => return Ok(vec![out.clone()]),
        Some(out) => (out.parent(), out.file_stem().unwrap_or_default().to_string_lossy().into_owned()),
        None => (None, slug(&config.prompt)),
    };
    let mut paths: Vec<PathBuf> = Vec::new();
    for variant in variants {
        let whose = variant.as_ref().map_or_else(String::new, |variant| format!("-{}", variant.label.replace(' ', "")));
        let path = |name: String| folder.map_or_else(|| PathBuf::from(&name), |folder| folder.join(&name));
        match config.out {
            Some(_) if count == 1 => paths.push(path(format!("{stem}{whose}.png"))),
            Some(_) => paths.extend((0..count).map(|at| path(format!("{stem}{whose}-{at:02}.png")))),
            None => {
                let free = (1u64..)
                    .map(|number| path(format!("{stem}{whose}-{number}.png")))
                    .filter(|path| !Path::new(path).exists());
                paths.extend(free.take(count));
            }
        }
    }
    Ok(paths)
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
