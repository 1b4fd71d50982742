//! What an adapter file for pictures says of itself.

use std::{collections::BTreeMap, path::Path};

use lora_cli::plan::Plan;
use lora_core::{Method, format::Family};
use serde_json::{Value, json};
use tch::Kind;

use super::Pictures;
use crate::train::{Facts, Known, plan::optimizer_name};

/// `ss_*` for A1111, Forge and Civitai, `modelspec.*` for ComfyUI and SwarmUI, `lora.*` for this program.
pub(super) fn metadata(
    Pictures { files, side, .. }: &Pictures,
    known: &Known,
    facts: &Facts,
    plan: &Plan,
    step: u64,
) -> BTreeMap<String, String> {
    let Known { config, machine, .. } = known;
    let (version, v2) = match files.family {
        Family::Sd2 => ("sd_v2", "True"),
        Family::Sdxl => ("sdxl_base_v1-0", "False"),
        _ => ("sd_v1", "False"),
    };
    let (module, mut arguments) = match config.method {
        Method::Lora | Method::RsLora => ("networks.lora", json!({})),
        Method::Dora => ("lycoris.kohya", json!({"algo": "lora", "dora_wd": "True"})),
        Method::Loha => ("lycoris.kohya", json!({"algo": "loha"})),
        Method::Lokr => ("lycoris.kohya", json!({"algo": "lokr"})),
    };
    if config.lora_plus != 1.0 {
        arguments["loraplus_lr_ratio"] = config.lora_plus.to_string().into();
    }
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
        ("ss_optimizer", optimizer_name(config.optimizer).to_owned()),
        ("ss_lr_scheduler", word(&config.schedule)),
        ("ss_steps", step.to_string()),
        ("ss_max_train_steps", plan.steps.to_string()),
        ("ss_seed", config.seed.to_string()),
        ("ss_clip_skip", config.clip_skip.to_string()),
        ("ss_mixed_precision", machine_precision(machine.on.kind).to_owned()),
        ("ss_num_train_images", facts.examples.to_string()),
        ("ss_resolution", format!("({side}, {side})")),
        ("ss_min_snr_gamma", config.min_snr.to_string()),
        ("ss_noise_offset", config.noise_offset.to_string()),
        ("modelspec.title", config.name.clone()),
        ("modelspec.resolution", format!("{side}x{side}")),
        ("lora.recipe", plan.recipe.clone()),
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
        said.push(("ss_dataset_dirs", json!({folder: {"n_repeats": 1, "img_count": facts.examples}}).to_string()));
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
