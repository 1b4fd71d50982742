//! What a file seems to be, judged by its keys alone: for messages, never for numbers.

use super::{BaseModel, Dialect, Fault, Key, TensorFile};

/// How many keys a message shows.
const SHOWN: usize = 3;

/// The spelling of most keys.
pub fn dialect<'a>(names: impl Iterator<Item = &'a str>) -> Dialect {
    let mut counts = [(Dialect::Kohya, 0), (Dialect::Diffusers, 0), (Dialect::Peft, 0), (Dialect::Comfy, 0)];
    for name in names {
        let index = match name {
            _ if ["lora_", "lycoris_", "oft_unet_", "bundle_emb."].iter().any(|start| name.starts_with(start)) => 0,
            _ if name.starts_with("base_model.model.") => 2,
            _ if name.starts_with("diffusion_model.") || name.starts_with("text_encoders.") => 3,
            _ => 1,
        };
        counts[index].1 += 1;
    }
    // The earlier wins a draw.
    counts.iter().rev().max_by_key(|(_, count)| *count).map_or(Dialect::Kohya, |(dialect, _)| *dialect)
}

/// The fault of a file that has nothing for the base.
pub(super) fn nothing_matches(file: &TensorFile, base: &BaseModel) -> Fault {
    let mut modules: Vec<&str> = file.names().filter_map(|name| Key::parse(name).map(|key| key.module)).collect();
    modules.dedup();
    Fault::NothingMatches {
        modules: modules.len(),
        base: base.family().clone(),
        guess: family(file).map(str::to_owned),
        keys: file.names().take(SHOWN).map(str::to_owned).collect(),
    }
}

/// The family of models that a file seems to be for.
pub fn family(file: &TensorFile) -> Option<&'static str> {
    let any = |parts: &[&str]| file.names().any(|name| parts.iter().any(|part| name.contains(part)));
    if any(&["double_blocks", "single_transformer_blocks", "single_blocks"]) {
        return Some("FLUX");
    }
    if any(&["joint_blocks", "lora_te3_"]) {
        return Some("Stable Diffusion 3");
    }
    if any(&["lora_prior_"]) {
        return Some("Stable Cascade");
    }
    if any(&["model.layers.", "lm_head"]) {
        return Some("a language model");
    }
    // The width of the text that cross-attention reads tells the Stable Diffusions apart.
    let width = file.names().find(|name| name.contains("attn2") && name.contains("to_k") && is_down(name));
    match width.and_then(|name| file.info(name)?.shape.get(1).copied()) {
        Some(768) => return Some("Stable Diffusion 1.x"),
        Some(1024) => return Some("Stable Diffusion 2.x"),
        Some(2048) => return Some("Stable Diffusion XL"),
        _ => {}
    }
    // Only SDXL has more than one transformer block at a place, attention on its third level alone, or two encoders.
    let deep = ["transformer_blocks_1_", "transformer_blocks.1.", "transformer_blocks_9_", "transformer_blocks.9."];
    if any(&deep) || any(&["lora_te2_", "text_encoder_2.", "add_embedding", "label_emb"]) {
        return Some("Stable Diffusion XL");
    }
    any(&["down_blocks", "up_blocks", "mid_block", "input_blocks", "output_blocks", "middle_block"])
        .then_some("Stable Diffusion 1.x or 2.x")
}

fn is_down(name: &str) -> bool {
    ["lora_down", "lora_A", ".down."].iter().any(|part| name.contains(part))
}
