//! From a prompt to a picture.

use std::path::Path;

use lora_diffusion::{Base, sample, schedule::ScheduleConfig};
use lora_parity::{Failure, Report};
use lora_torch::Torch;

use super::fixture::Case;

pub(crate) fn run(case: &Case, base: &Path, report: &mut Report) -> Result<(), Failure> {
    let mut base = Base::open(base, &Torch::CPU)?;
    if !case.config["scheduler_config"].is_null() {
        base.schedule = case.typed::<ScheduleConfig>("scheduler_config")?;
    }
    let request = request(&case.config)?;
    let latents = sample::latents(&base, &request, &case.tensor("initial")?, &mut |_, _| {})?;
    case.close(report, "latents", &latents, &case.tensor("latents")?)?;
    let drawn = sample::pictures(&base, &latents)?;
    case.same_picture(report, "picture.png", &drawn[0].rgb, &png(&case.folder.join("picture.png"))?)
}

/// What to draw, from a case's description of it.
pub(crate) fn request(config: &serde_json::Value) -> Result<sample::Request, Failure> {
    let text = |key: &str| config[key].as_str().map(str::to_owned);
    let side = |i: usize| config["size"][i].as_u64().map(|side| side as usize).ok_or("no size");
    Ok(sample::Request {
        prompt: text("prompt").ok_or("no prompt")?,
        negative: text("negative"),
        height: side(0)?,
        width: side(1)?,
        steps: config["steps"].as_u64().ok_or("no steps")? as usize,
        guidance: config["guidance"].as_f64().ok_or("no guidance")?,
        sampler: text("scheduler").ok_or("no scheduler")?.parse()?,
        ..sample::Request::default()
    })
}

/// The RGB bytes of a picture.
pub(crate) fn png(path: &Path) -> Result<Vec<u8>, Failure> {
    Ok(image::open(path)?.to_rgb8().into_raw())
}
