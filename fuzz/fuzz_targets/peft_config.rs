//! Any JSON object is a configuration with finite answers, or an error; adapters that come with it merge, or are refused.
#![no_main]

use std::{collections::BTreeMap, sync::LazyLock};

use libfuzzer_sys::fuzz_target;
use lora_core::format::{BaseModel, PeftConfig};
use serde_json::{Map, Value};

static BASE: LazyLock<BaseModel> = LazyLock::new(lora_fuzz::base);

// The configuration, a zero byte, and the description of the tensors that come with it.
fuzz_target!(|input: &[u8]| {
    let mut parts = input.splitn(2, |byte| *byte == 0);
    let config = String::from_utf8_lossy(parts.next().unwrap_or_default());
    let Ok(fields) = serde_json::from_str::<Map<String, Value>>(&config) else { return };
    match PeftConfig::of(fields.clone()) {
        Ok(config) => {
            let name = "model.layers.0.self_attn.q_proj";
            let _ = (config.scale(&[name], None), config.scale(&[name, ""], Some(4)), config.module_rank(&[name]));
            let _ = config.token_rows("model.embed_tokens");
        }
        Err(fault) => drop(fault.to_string()),
    }
    // The way of diffusers: the same fields in the header, one component each.
    let mut inside = Map::new();
    for component in ["unet", "text_encoder", "language_model"] {
        inside.extend(fields.iter().map(|(field, value)| (format!("{component}.{field}"), value.clone())));
    }
    let metadata = BTreeMap::from([("lora_adapter_metadata".to_owned(), Value::Object(inside).to_string())]);
    if let Some(file) = lora_fuzz::described(parts.next().unwrap_or_default(), &metadata) {
        lora_fuzz::read_and_merge(&file, &BASE);
    }
});
