//! The adapter file that a run leaves: its layout, what it says about itself, and how to use it.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use lora_cli::{
    Failure,
    options::{TrainConfig, values::Format},
    plan::Plan,
    text,
    usage::uses,
};
use lora_core::{
    AnyAdapter, Array, Backend as _, Method, Part,
    format::{AdaptedModule, Component, Dialect, Dtype, Family, write_adapter as write_file},
};
use lora_torch::{NamedAdapter, Torch};
use serde_json::{Value, json};
use tch::{Kind, Tensor};

use super::Known;
use crate::{base, failures::Explain as _};

/// What a run trained on, as far as a file may say it.
pub(super) struct Facts {
    /// Hash of pictures and captions.
    pub(super) data_hash: String,
    /// Hash of the base's weights.
    pub(super) base_hash: String,
    /// Pictures that were used.
    pub(super) pictures: usize,
}

/// Where the adapter in a run's or a checkpoint's folder lies: a file, or with `--format peft` the folder itself.
pub(super) fn adapter_in(folder: &Path, config: &TrainConfig) -> PathBuf {
    match config.format {
        Format::Peft => folder.to_owned(),
        Format::Kohya | Format::Diffusers => folder.join(format!("{}.safetensors", config.name)),
    }
}

/// Writes the adapters after `step` steps, in half precision, with what the field's programs look for.
///
/// # Errors
/// If a factor is not finite or does not fit half precision, or the file cannot be written.
pub(super) fn write_adapter(
    path: &Path,
    adapters: &[NamedAdapter],
    known: &Known,
    plan: &Plan,
    facts: &Facts,
    step: u64,
) -> Result<(), Failure> {
    let modules: Vec<AdaptedModule> = adapters
        .iter()
        .map(|named| {
            let component = named.component.unwrap_or(Component::Unet);
            let weight =
                known.names.module(component, &named.path).map(|module| module.weight.clone()).unwrap_or_default();
            Ok(AdaptedModule {
                component,
                path: named.path.clone(),
                adapter: on_host(&named.adapter)?,
                weight,
                dtype: Dtype::F16,
                turned: false,
            })
        })
        .collect::<Result<_, Failure>>()?;
    let dialect = match known.config.format {
        Format::Kohya => Dialect::Kohya,
        Format::Diffusers => Dialect::Diffusers,
        Format::Peft => Dialect::Peft,
    };
    let metadata = if known.config.no_metadata { BTreeMap::new() } else { metadata(known, plan, facts, step) };
    write_file(path, dialect, &known.files.family, &modules, &metadata, Some(Dtype::F16)).explain()
}

/// The finished file, and what to type in the programs that people use.
pub(super) fn how_to_use(file: &Path, config: &TrainConfig, prompt: Option<&String>) -> String {
    let size = std::fs::metadata(file).ok().filter(std::fs::Metadata::is_file);
    let size = size.map_or_else(String::new, |facts| format!(" ({})", text::bytes(facts.len())));
    let base = Path::new(&config.base);
    let here = std::env::current_dir().ok();
    let base = here.and_then(|here| base.strip_prefix(here).ok()).unwrap_or(base).display().to_string();
    let prompt = prompt.map_or("a picture in the new style", String::as_str);
    let inside = if config.format == Format::Peft { file.join("adapter_model.safetensors") } else { file.to_owned() };
    let mut lines = vec![format!("File    {}{size}", file.display())];
    for (at, way) in uses(&inside, &base, prompt, config.format).into_iter().enumerate() {
        let label = if at == 0 { "Use it" } else { "" };
        lines.push(format!("{label:<8}{:<10} {}", way.program, way.how));
        lines.extend(way.code.iter().flat_map(|code| code.lines()).map(|line| format!("{:19}{line}", "")));
    }
    lines.join("\n")
}

/// The adapter with its tensors on the host.
fn on_host(adapter: &AnyAdapter<Tensor>) -> Result<AnyAdapter<Array>, Failure> {
    let to_array = |_: Part, tensor: &Tensor| {
        let values = Torch::CPU.values(tensor)?;
        Ok(Array { shape: tensor.size().iter().map(|length| *length as usize).collect(), values })
    };
    adapter.map(&mut |part, tensor| to_array(part, tensor)).explain()
}

/// `ss_*` for A1111, Forge and Civitai, `modelspec.*` for ComfyUI and SwarmUI, `lora.*` for this program.
fn metadata(known: &Known, plan: &Plan, facts: &Facts, step: u64) -> BTreeMap<String, String> {
    let Known { config, files, machine, .. } = known;
    let side = base::resolution(files, config.resolution);
    let (version, v2) = match files.family {
        Family::Sd2 => ("sd_v2", "True"),
        Family::Sdxl => ("sdxl_base_v1-0", "False"),
        _ => ("sd_v1", "False"),
    };
    let (module, arguments) = match config.method {
        Method::Lora | Method::RsLora => ("networks.lora", json!({})),
        Method::Dora => ("lycoris.kohya", json!({"algo": "lora", "dora_wd": "True"})),
        Method::Loha => ("lycoris.kohya", json!({"algo": "loha"})),
        Method::Lokr => ("lycoris.kohya", json!({"algo": "lokr"})),
    };
    let mut said: Vec<(&str, String)> = vec![
        ("ss_network_module", module.to_owned()),
        ("ss_network_dim", config.rank.to_string()),
        ("ss_network_alpha", config.alpha.to_string()),
        ("ss_network_args", arguments.to_string()),
        ("ss_base_model_version", version.to_owned()),
        ("ss_v2", v2.to_owned()),
        ("ss_output_name", config.name.clone()),
        ("ss_learning_rate", config.lr.to_string()),
        ("ss_text_encoder_lr", config.text_encoder_lr.to_string()),
        ("ss_optimizer", plan.recipe.clone()),
        ("ss_lr_scheduler", word(&config.schedule)),
        ("ss_steps", step.to_string()),
        ("ss_max_train_steps", plan.steps.to_string()),
        ("ss_seed", config.seed.to_string()),
        ("ss_clip_skip", config.clip_skip.to_string()),
        ("ss_mixed_precision", machine_precision(machine.on.kind).to_owned()),
        ("ss_num_train_images", facts.pictures.to_string()),
        ("ss_resolution", format!("({side}, {side})")),
        ("ss_min_snr_gamma", config.min_snr.to_string()),
        ("ss_noise_offset", config.noise_offset.to_string()),
        ("modelspec.title", config.name.clone()),
        ("modelspec.resolution", format!("{side}x{side}")),
        ("lora.version", env!("CARGO_PKG_VERSION").to_owned()),
        ("lora.base_hash", facts.base_hash.clone()),
        ("lora.data_hash", facts.data_hash.clone()),
    ];
    if let Some(trigger) = &config.trigger {
        said.push(("modelspec.trigger_phrase", trigger.clone()));
    }
    if !config.private {
        let folder = config.data.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let model = Path::new(&config.base)
            .file_name()
            .map_or_else(|| config.base.clone(), |name| name.to_string_lossy().into_owned());
        said.push(("ss_sd_model_name", model));
        said.push(("ss_dataset_dirs", json!({folder: {"n_repeats": 1, "img_count": facts.pictures}}).to_string()));
    }
    said.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
}

/// The word that an option's value is written as.
fn word(value: &impl serde::Serialize) -> String {
    match serde_json::to_value(value) {
        Ok(Value::String(word)) => word,
        _ => String::new(),
    }
}

fn machine_precision(kind: Kind) -> &'static str {
    match kind {
        Kind::BFloat16 => "bf16",
        Kind::Half => "fp16",
        _ => "no",
    }
}
