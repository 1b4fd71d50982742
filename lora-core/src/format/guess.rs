//! What a file seems to be, judged by its keys alone: for messages, never for numbers.

use super::{BaseModel, Dialect, Fault, Key, Role, TensorFile};

/// How many keys a message shows.
const SHOWN: usize = 3;

/// Keys of textual inversions: of A1111, and of ComfyUI for two encoders.
const EMBEDDINGS: [&str; 3] = ["emb_params", "clip_l", "clip_g"];

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
    let is_embedding = |name: &str| EMBEDDINGS.contains(&name) || name.starts_with("string_to_param");
    if file.names().all(is_embedding) {
        return Fault::NotAnAdapter { what: "an embedding (a textual inversion)" };
    }
    Fault::NothingMatches {
        modules: modules.len(),
        base: base.family().clone(),
        guess: family(file).map(str::to_owned),
        is_foreign: foreign_family(file).is_some(),
        keys: file.names().take(SHOWN).map(str::to_owned).collect(),
    }
}

/// Families that are not read here, by parts that one of their keys has; the first that fits wins.
const FOREIGN: [(&[&str], &str); 27] = [
    (&["distilled_guidance_layer"], "Chroma"),
    (&["to_qkv_mlp_proj"], "FLUX.2"),
    (&["double_stream_modulation"], "FLUX.2"),
    (&["individual_token_refiner"], "HunyuanVideo"),
    (&["double_blocks.", "img_attn_qkv"], "HunyuanVideo"),
    (&["double_stream_blocks"], "HiDream"),
    (&["transformer_blocks", "img_mlp"], "Qwen-Image"),
    (&["transformer_blocks", "img_mod"], "Qwen-Image"),
    (&["double_blocks"], "FLUX"),
    (&["single_transformer_blocks"], "FLUX"),
    (&["single_blocks"], "FLUX"),
    (&["joint_blocks"], "Stable Diffusion 3"),
    (&["lora_sd3_"], "Stable Diffusion 3"),
    (&["lora_te3_"], "a model with T5 (FLUX or Stable Diffusion 3)"),
    (&["lora_prior_"], "Stable Cascade"),
    (&["diffusion_model.layers."], "Z-Image or Lumina"),
    (&["lora_unet_layers_"], "Z-Image or Lumina"),
    (&["blocks.", "self_attn.q."], "Wan"),
    (&["blocks_", "self_attn_q."], "Wan"),
    (&["diffusion_model.blocks."], "a video or DiT model (Wan, Cosmos, …)"),
    (&["lora_unet_blocks_"], "a video or DiT model (Wan, Cosmos, …)"),
    (&["transformer_blocks", "add_q_proj"], "FLUX, Stable Diffusion 3 or Qwen-Image"),
    (&["transformer_blocks", "add_k_proj"], "FLUX, Stable Diffusion 3 or Qwen-Image"),
    (&["transformer_blocks", "add_v_proj"], "FLUX, Stable Diffusion 3 or Qwen-Image"),
    (&["diffusion_model.transformer_blocks.", ".attn1."], "LTX-Video"),
    (&["lora_transformer_"], "a transformer model (FLUX, Stable Diffusion 3, …)"),
    (&["lllite_"], "ControlNet-LLLite"),
];

/// Beginnings of keys that are read here, and need not be compared with all of those: files have thousands.
const OURS: [&str; 11] = [
    "lora_unet_down_blocks_",
    "lora_unet_mid_block_",
    "lora_unet_up_blocks_",
    "lora_unet_input_blocks_",
    "lora_unet_middle_block_",
    "lora_unet_output_blocks_",
    "lora_te1_",
    "lora_te2_",
    "lora_te_",
    "unet.",
    "text_encoder",
];

/// The fault of a file whose keys are names of whole weights alone: a model, or a part of one.
///
/// peft writes such weights beside adapters, under its own prefix.
pub(super) fn whole_model(file: &TensorFile) -> Option<Fault> {
    let plain = |name: &str| {
        let role = Key::parse(name).map(|key| key.role);
        // Programs with suffixes of their own have words in them that no model has.
        let is_adapter = ["base_model.model.", "lllite_"].iter().any(|start| name.starts_with(start));
        !is_adapter && !name.contains("lora") && matches!(role, None | Some(Role::Weight | Role::Bias | Role::Scale))
    };
    let weights = |name: &str| name.ends_with(".weight");
    (file.names().all(plain) && file.names().any(weights))
        .then_some(Fault::NotAnAdapter { what: "whole weights (a model, or a part of one)" })
}

/// The family of a file that is for no model that is read here: it can be named, and not applied.
pub fn foreign_family(file: &TensorFile) -> Option<&'static str> {
    let ours = |name: &&str| OURS.iter().any(|start| name.starts_with(start));
    let fits = |name: &str, parts: &[&str]| parts.iter().all(|part| name.contains(part));
    let first = |name: &str| FOREIGN.iter().position(|(parts, _)| fits(name, parts));
    let found = file.names().filter(|name| !ours(name)).filter_map(first).min().and_then(|index| FOREIGN.get(index));
    let other = || file.names().any(|name| name.starts_with("transformer.") && !name.starts_with("transformer.h."));
    found
        .map(|(_, family)| *family)
        .or_else(|| other().then_some("a transformer model (FLUX, Stable Diffusion 3, LTX, …)"))
}

/// The family of models that a file seems to be for.
pub fn family(file: &TensorFile) -> Option<&'static str> {
    let any = |parts: &[&str]| file.names().any(|name| parts.iter().any(|part| name.contains(part)));
    if let Some(foreign) = foreign_family(file) {
        return Some(foreign);
    }
    let language = |name: &str| {
        let parts = [".model.layers.", "lm_head", "embed_tokens", ".transformer.h."];
        name.starts_with("model.layers.") || parts.iter().any(|part| name.contains(part))
    };
    if file.names().any(language) {
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
