//! `lora config import`: a kohya TOML configuration as one of ours, on stdout.
//!
//! Names and meanings are those of sd-scripts' `train_network.py`, whose files may group keys under headings that mean
//! nothing. What has no counterpart here becomes a comment: nothing is dropped in silence.

use std::{fs, path::Path};

use toml::{Table, Value};

use crate::{
    Failure,
    commands::output,
    failure::Exit,
    options::{ConfigError, Place, TrainOptions},
    ui::Ui,
};

pub(crate) fn run(file: &Path, ui: &Ui) -> Result<(), Failure> {
    let text = fs::read_to_string(file).map_err(|source| ConfigError::Read { path: file.to_owned(), source })?;
    let theirs: Table = text.parse().map_err(|error: toml::de::Error| ConfigError::Syntax {
        place: Place::new(file, &text, error.span().map_or(0, |span| span.start)),
        message: error.message().lines().next().unwrap_or("not TOML").to_owned(),
    })?;
    let (ours, left) = translate(&theirs);
    // What comes out must be what the other commands accept.
    if let Err(error) = toml::from_str::<TrainOptions>(&ours.to_string()) {
        return Err(Failure { exit: Exit::Usage, ..Failure::new("import", error.message().to_owned()) }
            .detail(format!("translating {}", file.display()))
            .hint("correct the value in that file and import it again"));
    }
    let mut lines = vec![format!("# Imported from {}", file.display())];
    lines.extend(ours.iter().map(|(key, value)| format!("{key} = {value}")));
    if !left.is_empty() {
        lines.push("\n# Without a counterpart here:".into());
        lines.extend(left.iter().map(|line| format!("#   {line}")));
        ui.warn(&format!("{} settings have no counterpart; they are listed as comments", left.len()));
    }
    ui.data(&lines.join("\n")).map_err(output)
}

/// Our keys, and the lines that have no counterpart.
fn translate(theirs: &Table) -> (Table, Vec<String>) {
    let mut flat: Vec<(&String, &Value)> = Vec::new();
    for (key, value) in theirs {
        match value {
            Value::Table(section) => flat.extend(section),
            _ => flat.push((key, value)),
        }
    }
    let (mut ours, mut left) = (Table::new(), Vec::new());
    for (key, value) in flat {
        let arguments = value.as_array().filter(|_| key == "network_args");
        let Some(arguments) = arguments else {
            match translated(key, value) {
                Some(entries) => ours.extend(entries.into_iter().map(|(key, value)| (key.to_owned(), value))),
                None => left.push(format!("{key} = {value}")),
            }
            continue;
        };
        for argument in arguments {
            match network_argument(argument) {
                Some((key, value)) => drop(ours.insert(key.to_owned(), value)),
                None => left.push(format!("{key} = [{argument}]")),
            }
        }
    }
    // sd-scripts' own defaults where they differ from ours, so that the import trains as the original did.
    let rank = ours.entry("rank").or_insert(Value::Integer(4)).clone();
    ours.entry("alpha").or_insert(Value::Integer(1));
    ours.entry("min-snr").or_insert(Value::Float(0.0));
    ours.entry("flip").or_insert(Value::Boolean(false));
    ours.entry("caption-dropout").or_insert(Value::Float(0.0));
    ours.entry("schedule").or_insert("constant".into());
    ours.entry("warmup").or_insert(Value::Integer(0));
    ours.entry("batch").or_insert(Value::Integer(1));
    if !ours.contains_key("epochs") {
        ours.entry("steps").or_insert(Value::Integer(1600));
    } else {
        ours.remove("steps"); // max_train_epochs wins over max_train_steps
    }
    // A fraction of the rank, as a float like every other alpha.
    if let (Some(Value::Integer(alpha)), Value::Integer(_)) = (ours.get("alpha"), rank) {
        let alpha = Value::Float(*alpha as f64);
        ours.insert("alpha".into(), alpha);
    }
    (ours, left)
}

/// One of the `name=value` that the network's module is given.
fn network_argument(argument: &Value) -> Option<(&'static str, Value)> {
    let (name, value) = argument.as_str()?.split_once('=')?;
    match name.trim() {
        "loraplus_lr_ratio" | "loraplus_unet_lr_ratio" => Some(("lora-plus", value.trim().parse::<f64>().ok()?.into())),
        _ => None,
    }
}

/// One setting in our words; an empty list where it says what holds here anyway.
fn translated(key: &str, value: &Value) -> Option<Vec<(&'static str, Value)>> {
    let word = value.as_str().unwrap_or_default().to_lowercase();
    let same = |ours: &'static str| Some(vec![(ours, value.clone())]);
    let named = |ours: &'static str, word: &str| Some(vec![(ours, Value::from(word))]);
    match key {
        "pretrained_model_name_or_path" => same("base"),
        "train_data_dir" => same("data"),
        "output_dir" => same("out"),
        "output_name" => same("name"),
        "network_dim" => same("rank"),
        "network_alpha" => same("alpha"),
        "learning_rate" | "unet_lr" => same("lr"),
        "text_encoder_lr" => same("text-encoder-lr"),
        "max_train_steps" => same("steps"),
        "max_train_epochs" => same("epochs"),
        "train_batch_size" => same("batch"),
        "gradient_accumulation_steps" => same("accum"),
        "lr_warmup_steps" => match value.as_float() {
            Some(share) if share < 1.0 => Some(vec![("warmup", Value::from(format!("{}%", share * 100.0)))]),
            _ => same("warmup"),
        },
        "lr_scheduler_num_cycles" => same("cycles"),
        "lr_scheduler_power" => same("power"),
        "max_grad_norm" => same("clip"),
        "min_snr_gamma" => same("min-snr"),
        "noise_offset" => same("noise-offset"),
        "clip_skip" => same("clip-skip"),
        "seed" => same("seed"),
        "flip_aug" => same("flip"),
        "caption_dropout_rate" => same("caption-dropout"),
        "save_every_n_steps" => same("save-every"),
        "save_last_n_steps" => None,
        "sample_every_n_steps" => same("sample-every"),
        "no_metadata" => same("no-metadata"),
        "lr_scheduler" => match word.as_str() {
            "constant" => named("schedule", "constant"),
            "constant_with_warmup" => named("schedule", "constant"),
            "linear" => named("schedule", "linear"),
            "cosine" => named("schedule", "cosine"),
            "cosine_with_restarts" => named("schedule", "cosine-restarts"),
            "polynomial" => named("schedule", "polynomial"),
            _ => None,
        },
        // The 8-bit variants keep the rule and save memory; here the state of an adapter is small anyway.
        "optimizer_type" => match word.trim_end_matches("8bit").trim_start_matches("paged") {
            "adamw" => named("optimizer", "adamw"),
            "lion" => named("optimizer", "lion"),
            "adafactor" => named("optimizer", "adafactor"),
            "prodigy" => named("optimizer", "prodigy"),
            "sgdnesterov" => named("optimizer", "sgd"),
            _ => None,
        },
        "network_module" => match word.as_str() {
            // kohya's network sits on the transformer blocks' linears and on the text encoder.
            "networks.lora" => {
                Some(vec![("method", "lora".into()), ("targets", vec![Value::from("attention+ff+te")].into())])
            }
            _ => None,
        },
        "network_train_unet_only" if value.as_bool() == Some(true) => {
            Some(vec![("targets", vec![Value::from("attention+ff")].into())])
        }
        "mixed_precision" => match word.as_str() {
            "bf16" => named("dtype", "bf16"),
            "fp16" => named("dtype", "fp16"),
            "no" => named("dtype", "fp32"),
            _ => None,
        },
        "v_parameterization" => named("prediction", if value.as_bool() == Some(true) { "v" } else { "epsilon" }),
        "masked_loss" | "alpha_mask" if value.as_bool() == Some(true) => named("mask", "alpha"),
        "resolution" => {
            let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            let sides: Vec<i64> = text.split(',').filter_map(|side| side.trim().parse().ok()).collect();
            match sides[..] {
                [side] => Some(vec![("resolution", side.into())]),
                [width, height] if width == height => Some(vec![("resolution", width.into())]),
                _ => None,
            }
        }
        // Always so here.
        "cache_latents" | "cache_latents_to_disk" | "enable_bucket" | "xformers" | "sdpa" | "mem_eff_attn" => {
            Some(Vec::new())
        }
        "save_model_as" if word == "safetensors" => Some(Vec::new()),
        "network_train_unet_only" | "masked_loss" | "alpha_mask" => Some(Vec::new()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kohya_file_trains_the_same_here() {
        let theirs = r#"
            [model_arguments]
            pretrained_model_name_or_path = "sd15.safetensors"
            [training]
            network_module = "networks.lora"
            network_dim = 32
            network_alpha = 16
            network_train_unet_only = true
            network_args = ["loraplus_lr_ratio=4", "conv_dim=8"]
            unet_lr = 1e-4
            optimizer_type = "AdamW8bit"
            lr_scheduler = "cosine_with_restarts"
            lr_scheduler_num_cycles = 3
            lr_warmup_steps = 0.05
            resolution = "512,512"
            max_train_epochs = 10
            mixed_precision = "bf16"
            xformers = true
            bucket_reso_steps = 64
        "#;
        let (ours, left) = translate(&theirs.parse().unwrap());
        let options: TrainOptions = toml::from_str(&ours.to_string()).unwrap();
        assert_eq!(options.rank.unwrap().get(), 32);
        assert_eq!(options.alpha, Some(16.0));
        assert_eq!(options.targets.unwrap(), ["attention+ff"]);
        assert_eq!(options.warmup.unwrap().to_string(), "5%");
        assert_eq!((options.resolution, options.steps, options.epochs), (Some(512), None, Some(10.0)));
        assert_eq!(options.min_snr, Some(0.0)); // off in sd-scripts unless asked for
        assert_eq!(options.lora_plus, Some(4.0));
        assert_eq!(left, ["bucket_reso_steps = 64", "network_args = [\"conv_dim=8\"]"]);
    }
}
