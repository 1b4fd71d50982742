//! A folder as diffusers saves it: `model_index.json`, and one folder a component.

use std::path::{Path, PathBuf};

use lora_core::format::{Changed, Component, Family, TensorFile, checkpoint::Source};
use lora_torch::Weights;
use serde_json::Value;

use super::{BaseFiles, Place, not_a_base, tensors};
use crate::{
    Error, Result,
    clip::ClipConfig,
    config::read_json,
    schedule::{Prediction, ScheduleConfig},
    tokenizer::Tokenizer,
    unet::UnetConfig,
    vae::VaeConfig,
};

pub(super) fn find(path: &Path) -> Result<BaseFiles> {
    let index = path.join("model_index.json");
    if !index.is_file() {
        return Err(not_a_base(path, what_is_there(path)));
    }
    let index: Value = read_json(&index)?;
    let config = |component: Component| path.join(component.name()).join("config.json");
    let unet = UnetConfig::open(&config(Component::Unet))?;
    let mut text = vec![ClipConfig::open(&config(Component::TextEncoder))?];
    if config(Component::TextEncoder2).is_file() {
        text.push(ClipConfig::open(&config(Component::TextEncoder2))?);
    }
    let family = match (unet.addition_embed_type, unet.use_linear_projection) {
        (Some(_), _) if text.len() == 2 => Family::Sdxl,
        (Some(_), _) => {
            return Err(not_a_base(path, "an SDXL model needs two text encoders, there is no `text_encoder_2`"));
        }
        (None, true) => Family::Sd2,
        (None, false) => Family::Sd1,
    };
    let scheduler = path.join("scheduler").join("scheduler_config.json");
    let schedule = match scheduler.is_file() {
        true => ScheduleConfig::open(&scheduler)?,
        false => ScheduleConfig::stable_diffusion(Prediction::Epsilon),
    };
    Ok(BaseFiles {
        path: path.into(),
        zero_negative: family == Family::Sdxl && index["force_zeros_for_empty_prompt"].as_bool().unwrap_or(true),
        family,
        vae: VaeConfig::open(&config(Component::Vae))?,
        unet,
        text,
        schedule,
        place: Place::Folder,
        quantise: None,
        changed: Changed::new(),
    })
}

pub(super) fn weights(path: &Path, component: Component) -> Result<Weights> {
    let files = weight_files(&path.join(component.name()))?;
    if !matches!(component, Component::TextEncoder | Component::TextEncoder2) {
        return Ok(Weights::open(&files)?);
    }
    // Adapters name the modules of text encoders with `text_model.`; transformers 5 saves them without.
    let opened = Weights::open(&files)?;
    if opened.names().any(|name| name.starts_with("text_model.")) {
        return Ok(opened);
    }
    let mut named = Vec::new();
    for file in &files {
        let file = TensorFile::open(file)?;
        for name in file.names() {
            let Some(info) = file.info(name) else { continue };
            let full = if name.starts_with("text_projection") { name.to_owned() } else { format!("text_model.{name}") };
            named.push((full, tensors::read(&file, &Source::plain(name, &info.shape))?));
        }
    }
    Ok(Weights::from_tensors(named))
}

pub(super) fn tokenizer(path: &Path, component: Component) -> Result<Tokenizer> {
    Tokenizer::open(&path.join(if component == Component::TextEncoder2 { "tokenizer_2" } else { "tokenizer" }))
}

/// The safetensors files of a component: one, the shards that an index names, or a variant in another precision.
pub(super) fn weight_files(folder: &Path) -> Result<Vec<PathBuf>> {
    for stem in ["diffusion_pytorch_model", "model"] {
        let whole = folder.join(format!("{stem}.safetensors"));
        if whole.is_file() {
            return Ok(vec![whole]);
        }
        let index = folder.join(format!("{stem}.safetensors.index.json"));
        if index.is_file() {
            return shards(folder, &index);
        }
        for variant in ["fp16", "bf16", "fp32", "non_ema"] {
            let other = folder.join(format!("{stem}.{variant}.safetensors"));
            if other.is_file() {
                return Ok(vec![other]);
            }
            let index = folder.join(format!("{stem}.safetensors.index.{variant}.json"));
            if index.is_file() {
                return shards(folder, &index);
            }
        }
        for pickle in [format!("{stem}.bin"), format!("pytorch_{stem}.bin")] {
            if folder.join(&pickle).is_file() {
                let reason =
                    format!("only `{pickle}` is there, a pickle, which may run code; convert it to safetensors");
                return Err(not_a_base(folder, reason));
            }
        }
    }
    Err(not_a_base(folder, "no `diffusion_pytorch_model.safetensors` or `model.safetensors` is there"))
}

fn shards(folder: &Path, index: &Path) -> Result<Vec<PathBuf>> {
    let file: Value = read_json(index)?;
    let mut names: Vec<&str> =
        file["weight_map"].as_object().map(|map| map.values().filter_map(Value::as_str).collect()).unwrap_or_default();
    names.sort_unstable();
    names.dedup();
    // The names come from a file: they may not lead out of the folder.
    if names.is_empty() || names.iter().any(|name| Path::new(name).components().count() != 1 || *name == "..") {
        return Err(Error::NotABase { path: index.into(), reason: "does not name the files of the model".into() });
    }
    Ok(names.into_iter().map(|name| folder.join(name)).collect())
}

/// Why a folder is no base, by what it holds instead.
fn what_is_there(path: &Path) -> String {
    let has = |name: &str| path.join(name).is_file();
    let missing = "no `model_index.json` is there";
    if has("config.json") && has("tokenizer_config.json") {
        return format!("{missing}; it looks like a language model");
    }
    if has("config.json") {
        return format!("{missing}; it looks like one component of a model, try the folder above it");
    }
    let checkpoints = std::fs::read_dir(path).into_iter().flatten().flatten();
    match checkpoints.map(|entry| entry.path()).find(|path| path.extension().is_some_and(|end| end == "safetensors")) {
        Some(file) => {
            format!("{missing}; a checkpoint in a single file is given by its own path, such as {}", file.display())
        }
        None => format!("{missing}, so it is no diffusers folder"),
    }
}
