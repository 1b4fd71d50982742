//! Twenty steps of training, recorded by diffusers, peft and torch; and the inputs that they read.

use std::{
    collections::BTreeMap,
    fs,
    num::NonZeroUsize,
    path::{Path, PathBuf},
};

use lora_core::{AdapterConfig, AnyAdapter, Method, adapter::Lora};
use lora_diffusion::{
    BaseFiles, Result as DiffusionResult,
    data::{Alpha, BucketRule, Dataset, LatentOptions, ScanOptions, latents::latents, pixels::square_means},
    objective::{DiffusionObjective, Example, Source, Words, offset_noise},
    schedule::{Prediction, training::Weighting},
};
use lora_parity::{Failure, Report};
use lora_torch::{Target, Torch, TrainOptions, Trainer, optimizer::OptimizerConfig, schedule::Schedule};
use tch::{Kind, Tensor};

use super::fixture::Case;

/// The recorded inputs: pictures, captions and masks made again from the style folder that they were made from.
pub(super) fn inputs(case: &Case, base: &Path, report: &mut Report) -> Result<(), Failure> {
    let files = BaseFiles::find(base)?;
    let (vae, text) = (files.load_vae(&Torch::CPU)?, files.load_text(&Torch::CPU)?);
    let style = case.config["style"].as_str().and_then(|style| style.split(' ').next()).ok_or("no style")?;
    let mut options = ScanOptions::new(case.tensor("mask_of_picture_0")?.size()[0] as u32);
    options.buckets = BucketRule::square(options.buckets.resolution);
    let mut dataset = Dataset::scan(&style_folder(style, base)?, &options, &|_, _| {})?;
    let captions: Vec<&str> = dataset.pictures.iter().map(|picture| &*picture.caption).collect();
    let wanted: Vec<String> = case.typed("captions")?;
    report.equal("captions", &captions, &wanted.iter().map(String::as_str).collect::<Vec<_>>());
    let ids: Vec<i64> = Vec::try_from(text.ids(&captions)?.remove(0).f_reshape([-1])?)?;
    report.equal("ids", &ids, &Vec::<i64>::try_from(case.tensor("ids")?.f_reshape([-1])?)?);

    let options = LatentOptions { alpha: Alpha::White, flip: false, vae: [0; 32], kind: Kind::Float };
    let made = latents(&mut dataset, None, options, &mut |pixels| vae.encode(pixels), &mut |_, _| {})?;
    let means = (0..made.len()).map(|picture| Ok(made.get(picture, false)?.mean));
    let means = means.collect::<Result<Vec<Tensor>, Failure>>()?;
    case.close(report, "latents", &vae.scale(&Tensor::f_stack(&means, 0)?)?, &case.tensor("latents")?)?;

    let mask = case.tensor("mask_of_picture_0")?.f_to_kind(Kind::Float)?.f_div_scalar(4.0)?;
    let width = mask.size()[1] as usize;
    let squares = square_means(&Vec::<f32>::try_from(mask.f_reshape([-1])?)?, width);
    let wanted = Vec::<f32>::try_from(case.tensor("latent_masks")?.f_get(0)?.f_reshape([-1])?)?;
    let error = squares.iter().zip(&wanted).map(|(got, wanted)| (got - wanted).abs()).fold(0.0, f32::max);
    report.push("latent_masks", f64::from(error), 1e-6);
    report.equal("size of latent_masks", &[squares.len()], &[wanted.len()]);
    Ok(())
}

/// A trace: the real trainer over the real objective, fed with the recorded inputs.
pub(super) fn trace(case: &Case, base: &Path, report: &mut Report) -> Result<(), Failure> {
    let files = BaseFiles::find(base)?;
    let inputs = case.config["inputs"].as_str().and_then(|path| path.rsplit('/').nth(1)).ok_or("no inputs")?;
    let inputs = Case::open(case.folder.parent().ok_or("no folder")?, inputs)?;
    let variant = &case.config["variant"];
    let mut schedule = files.schedule.clone();
    schedule.prediction_type = Prediction::Epsilon;
    if variant["prediction"] == "v_prediction" {
        schedule.prediction_type = Prediction::V;
    }
    let weighting = variant["min_snr"].as_f64().map_or(Weighting::Uniform, Weighting::MinSnr);
    let source = Recorded::open(&inputs, case, &files)?;
    let objective = DiffusionObjective::new(files.load_unet(&Torch::CPU)?, None, &schedule, weighting, source)?;

    let number = |value: &serde_json::Value, what: &str| value.as_f64().ok_or_else(|| format!("no {what}"));
    let rank = number(&case.config["rank"], "rank")? as usize;
    let alpha = number(&variant["alpha"], "alpha")?;
    let optimizer = &case.config["optimizer"];
    let beta = |at: usize| number(&optimizer["betas"][at], "beta");
    let options = TrainOptions {
        seed: 0,
        steps: number(&case.config["steps"], "steps")? as u64,
        accumulation: 1,
        adapter: AdapterConfig::new(Method::Lora, NonZeroUsize::new(rank).ok_or("rank 0")?, alpha)?,
        optimizer: OptimizerConfig::AdamW {
            betas: [beta(0)?, beta(1)?],
            eps: number(&optimizer["eps"], "eps")?,
            weight_decay: number(&optimizer["weight_decay"], "weight_decay")?,
        },
        rate: number(&optimizer["lr"], "lr")?,
        up_rate: 1.0,
        schedule: Schedule::default(),
        clip: optimizer["clip"].as_f64(),
        ema: None,
        graphs: false,
    };
    let steps = options.steps;
    let mut starts = BTreeMap::new();
    for path in inputs.stems(".lora_A.weight") {
        let down = inputs.tensor(&format!("{path}.lora_A.weight"))?;
        starts.insert(path.trim_start_matches("init.").to_owned(), down);
    }
    let mut unfit = None;
    let mut select = |projection: &lora_torch::Projection| -> Option<Target> {
        let down = starts.remove(projection.path())?;
        let out = projection.shape()[0];
        match Tensor::f_zeros([out, rank as i64], (Kind::Float, tch::Device::Cpu)) {
            Ok(up) => {
                let start = AnyAdapter::Lora(Lora::new(down, up, alpha / rank as f64));
                Some(Target { rate: 1.0, start: Some(start) })
            }
            Err(error) => {
                unfit = Some(error);
                None
            }
        }
    };
    let mut trainer = Trainer::new(&Torch::CPU, objective, &mut select, options)?;
    if let Some(error) = unfit {
        return Err(error.into());
    }
    report.equal("modules without a place", &starts.keys().collect::<Vec<_>>(), &[]);

    let (mut losses, mut norms) = (Vec::new(), Vec::new());
    for _ in 0..steps {
        for step in trainer.step()? {
            losses.push(step.loss);
            norms.push(step.gradient_norm);
        }
    }
    case.close(report, "loss", &Tensor::f_from_slice(&losses)?, &case.tensor("loss")?)?;
    case.close(report, "grad_norm", &Tensor::f_from_slice(&norms)?, &case.tensor("grad_norm")?)?;
    compare_factors(case, &trainer, report)
}

fn compare_factors(
    case: &Case,
    trainer: &Trainer<DiffusionObjective<Recorded>>,
    report: &mut Report,
) -> Result<(), Failure> {
    let mut factors = BTreeMap::new();
    for module in trainer.adapters(false)? {
        let AnyAdapter::Lora(lora) = module.adapter else { return Err("not a LoRA".into()) };
        factors.insert(format!("{}.lora_A.weight", module.path), lora.down);
        factors.insert(format!("{}.lora_B.weight", module.path), lora.up);
    }
    let names: Vec<String> = serde_json::from_slice(&fs::read(case.folder.join("final_names.json"))?)?;
    report.equal("names of the factors", &factors.keys().collect::<Vec<_>>(), &names.iter().collect::<Vec<_>>());
    let norms = factors.values().map(|factor| Ok(factor.f_norm()?.f_double_value(&[])?));
    let norms = norms.collect::<Result<Vec<f64>, Failure>>()?;
    case.close(report, "final_norms", &Tensor::f_from_slice(&norms)?, &case.tensor("final_norms")?)?;
    for (name, factor) in &factors {
        let name = format!("final.{name}");
        if case.has(&name) {
            case.close(report, &name, factor, &case.tensor(&name)?)?;
        }
    }
    Ok(())
}

/// Examples as they were recorded, step by step.
#[derive(Debug)]
struct Recorded {
    latents: Tensor,
    order: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    offset: Tensor,
    offset_amount: f64,
    contexts: Tensor,
    empty: Tensor,
    dropped: Option<Tensor>,
    masks: Option<Tensor>,
}

impl Recorded {
    fn open(inputs: &Case, case: &Case, files: &BaseFiles) -> Result<Self, Failure> {
        let text = files.load_text(&Torch::CPU)?;
        let ids = inputs.tensor("ids")?.f_to_kind(Kind::Int64)?;
        let contexts = tch::no_grad(|| text.encode_ids(&[ids]))?;
        let empty = tch::no_grad(|| text.encode(&[""], tch::Device::Cpu))?;
        let variant = &case.config["variant"];
        let asked = |key: &str| variant[key].as_bool().unwrap_or(false);
        Ok(Self {
            latents: inputs.tensor("latents")?,
            order: inputs.tensor("order")?,
            noise: inputs.tensor("noise")?,
            timesteps: inputs.tensor("timesteps")?,
            offset: inputs.tensor("offset_noise")?,
            offset_amount: variant["noise_offset"].as_f64().unwrap_or(0.0),
            contexts: contexts.context,
            empty: empty.context.f_get(0)?,
            dropped: asked("dropout").then(|| inputs.tensor("dropped")).transpose()?,
            masks: asked("masked").then(|| inputs.tensor("latent_masks")).transpose()?,
        })
    }

    fn example(&self, step: i64, at: i64) -> DiffusionResult<Example> {
        let whole = |table: &Tensor| -> DiffusionResult<i64> { Ok(table.f_double_value(&[step, at])? as i64) };
        let of_step = |table: &Tensor| -> DiffusionResult<Tensor> { Ok(table.f_get(step)?.f_get(at)?) };
        let picture = whole(&self.order)?;
        let dropped = self.dropped.as_ref().map(whole).transpose()? == Some(1);
        let context = if dropped { self.empty.shallow_clone() } else { self.contexts.f_get(picture)? };
        let noise = of_step(&self.noise)?.f_to_kind(Kind::Float)?;
        Ok(Example {
            latent: self.latents.f_get(picture)?,
            noise: offset_noise(&noise, &of_step(&self.offset)?, self.offset_amount)?,
            timestep: whole(&self.timesteps)? as usize,
            words: Words::Embedded { context, pooled: None },
            mask: self.masks.as_ref().map(|masks| masks.f_get(picture)).transpose()?,
            weight: 1.0,
            time_ids: [0.0; 6],
        })
    }
}

impl Source for Recorded {
    fn examples(&self, step: u64, _: u64) -> DiffusionResult<(u64, Vec<Example>)> {
        let batch = self.order.size()[1];
        let examples = (0..batch).map(|at| self.example(step as i64, at)).collect::<DiffusionResult<_>>()?;
        Ok((0, examples))
    }

    fn masked(&self) -> bool {
        self.masks.is_some()
    }
}

/// The style folder beside the base, as in the materials and as in this repository.
fn style_folder(style: &str, base: &Path) -> Result<PathBuf, Failure> {
    let name = style.rsplit('/').next().unwrap_or(style);
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/styles").join(name);
    let places = [base.join("../..").join(style), base.join("../styles").join(name), repository];
    let found = places.into_iter().find(|place| place.is_dir());
    found.ok_or_else(|| format!("the style folder {style} is nowhere").into())
}
