//! Adapter files in generation: beside the base and merged into it, at every strength of the case.

use std::path::{Path, PathBuf};

use lora_core::format::{AdapterFile, Strengths};
use lora_diffusion::{Base, BaseFiles, adapters, sample};
use lora_parity::{Failure, Report};
use lora_torch::{Projections, Torch};
use tch::{Device, Kind, Tensor};

use super::{fixture::Case, pictures};

pub(crate) fn run(case: &Case, path: &Path, report: &mut Report) -> Result<(), Failure> {
    let paths: Vec<PathBuf> = match case.config["adapters"].as_array() {
        Some(paths) => paths.iter().filter_map(|path| Some(case.folder.join(path.as_str()?))).collect(),
        None => vec![case.folder.join("adapter.safetensors")],
    };
    let model = BaseFiles::find(path)?.model()?;
    let files: Vec<AdapterFile> = paths.iter().map(|path| AdapterFile::read(path, &model)).collect::<Result<_, _>>()?;
    for file in &files {
        report.equal("keys that were not applied", &file.unapplied, &[]);
    }
    if let Some(modules) = case.config["modules"].as_u64() {
        report.equal("modules", &[files[0].modules.len() as u64], &[modules]);
    }
    // Without an adapter the output is another: the comparison below would notice an adapter that does nothing.
    let mut base = Base::open(path, &Torch::CPU)?;
    let plain = unet(case, &base)?;
    let judged = case.stems(".unet").into_iter().filter(|tag| tag != "base");
    for tag in judged {
        let strengths: Vec<Strengths> = tag
            .split('_')
            .map(|strength| Ok(Strengths::all(strength.parse::<f64>()?)))
            .collect::<Result<_, Failure>>()?;
        let adapters: Vec<(&AdapterFile, &Strengths)> = files.iter().zip(&strengths).collect();

        let projections = base.unet.projections().into_iter().chain(base.text.projections());
        adapters::attach(projections, &adapters)?;
        compare(case, &tag, &base, report)?;
        for projection in base.unet.projections().into_iter().chain(base.text.projections()) {
            projection.detach_all();
        }
        let rest = plain.f_sub(&unet(case, &base)?)?.f_abs()?.f_max()?.f_double_value(&[])?;
        report.push("what is left of an adapter that was taken off", rest, 0.0);

        let mut merged = BaseFiles::find(path)?;
        merged.change(adapters::merge_into(&model, &adapters)?);
        compare(case, &tag, &merged.load(&Torch::CPU)?, report)?;
    }
    if case.has("base.unet") {
        let expected = case.tensor("base.unet")?;
        let error = plain.f_sub(&expected)?.f_abs()?.f_max()?.f_double_value(&[])?;
        report.push("base.unet", error, 2e-5);
    }
    Ok(())
}

fn compare(case: &Case, tag: &str, base: &Base, report: &mut Report) -> Result<(), Failure> {
    let picture = &case.config["picture"];
    let request = pictures::request(picture)?;
    let name = format!("{tag}.context");
    if case.has(&name) {
        let context = base.text.encode(&[&request.prompt], Device::Cpu)?.context;
        case.close(report, &name, &context, &case.tensor(&name)?)?;
    }
    let name = format!("{tag}.unet");
    case.close(report, &name, &unet(case, base)?, &case.tensor(&name)?)?;
    let name = format!("{tag}.latents");
    let latents = sample::latents(base, &request, &case.tensor("initial")?, &mut |_, _| {})?;
    case.close(report, &name, &latents, &case.tensor(&name)?)?;
    let name = format!("{tag}.png");
    let drawn = sample::pictures(base, &latents)?;
    case.same_picture(report, &name, &drawn[0].rgb, &pictures::png(&case.folder.join(&name))?)
}

fn unet(case: &Case, base: &Base) -> Result<Tensor, Failure> {
    let prompt = case.config["picture"]["prompt"].as_str().ok_or("no prompt")?;
    let context = base.text.encode(&[prompt], Device::Cpu)?.context;
    let timestep: f64 = case.typed("timestep")?;
    let t = Tensor::f_full([1], timestep, (Kind::Float, Device::Cpu))?;
    Ok(base.unet.forward(&case.tensor("latent")?, &t, &context, None)?)
}
