//! What weights without a model's folders around them are: a component of a Stable Diffusion, or a model of transformers.
//!
//! A `config.json` says it (`_class_name` of diffusers, `model_type` and `architectures` of transformers); names do where
//! there is none.

use serde_json::Value;

use super::{Component, Family, Key, Role};

/// What a `config.json` describes; `None` if it does not say, or describes what is not read here.
pub(super) fn described(config: &Value) -> Option<Component> {
    match (config["_class_name"].as_str(), config["model_type"].as_str()) {
        (Some("UNet2DConditionModel"), _) => Some(Component::Unet),
        (Some("AutoencoderKL"), _) => Some(Component::Vae),
        (None, Some("clip_text_model")) => Some(match classes(config).any(|class| class.ends_with("WithProjection")) {
            true => Component::TextEncoder2,
            false => Component::TextEncoder,
        }),
        (None, Some(_)) => Some(Component::LanguageModel),
        _ => None,
    }
}

/// What the names of a model's tensors tell; `None` if they are those of no model, as an adapter's are.
pub(super) fn component_of(names: &[&str]) -> Option<Component> {
    let any = |fits: &dyn Fn(&str) -> bool| names.iter().any(|name| fits(name));
    let is_decoder = |name: &str| {
        let is_whole = Key::parse(name).is_some_and(|key| key.role == Role::Weight);
        is_whole && !name.starts_with("base_model.model.") && has_part_of_decoder(name)
    };
    if any(&|name| name.starts_with("down_blocks.")) {
        Some(Component::Unet)
    } else if any(&|name| name.starts_with("decoder.up_blocks.")) {
        Some(Component::Vae)
    } else if any(&|name| name.ends_with("embeddings.position_embedding.weight")) {
        Some(Component::TextEncoder)
    } else {
        (any(&is_decoder) && !any(&is_of_encoder)).then_some(Component::LanguageModel)
    }
}

/// The family of a model of transformers: causal language models are those whose class says so, or which have layers of a
/// decoder alone.
pub(super) fn transformers_family(config: &Value, names: &[&str]) -> Family {
    const CAUSAL: [&str; 2] = ["ForCausalLM", "LMHeadModel"];
    let is_decoder =
        names.iter().any(|name| has_part_of_decoder(name)) && !names.iter().any(|name| is_of_encoder(name));
    // A class that ends in `Model` has no head, whatever it is for.
    let says_causal =
        |class: &str| CAUSAL.iter().any(|end| class.ends_with(end)) || class.ends_with("Model") && is_decoder;
    let is_causal = match classes(config).count() {
        0 => is_decoder,
        _ => classes(config).any(says_causal),
    };
    match config["model_type"].as_str() {
        None => Family::Language("causal".to_owned()),
        Some(kind) if is_causal => Family::Language(kind.to_owned()),
        Some(kind) => Family::Transformers(kind.to_owned()),
    }
}

/// The classes that a `config.json` names.
fn classes(config: &Value) -> impl Iterator<Item = &str> {
    config["architectures"].as_array().into_iter().flatten().filter_map(Value::as_str)
}

fn has_part_of_decoder(name: &str) -> bool {
    ["layers.", "h.", "lm_head.", "embed_tokens."].iter().any(|part| {
        // Parts of a name begin behind a dot.
        name.match_indices(part).any(|(at, _)| at == 0 || name[..at].ends_with('.'))
    })
}

fn is_of_encoder(name: &str) -> bool {
    name.contains("encoder.")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_configuration_names_the_component() {
        let is = |config: Value| described(&config);
        assert_eq!(is(json!({"_class_name": "UNet2DConditionModel"})), Some(Component::Unet));
        assert_eq!(is(json!({"_class_name": "AutoencoderKL"})), Some(Component::Vae));
        assert_eq!(is(json!({"_class_name": "FluxTransformer2DModel", "model_type": "flux"})), None);
        let clip = |class: &str| is(json!({"model_type": "clip_text_model", "architectures": [class]}));
        assert_eq!(clip("CLIPTextModel"), Some(Component::TextEncoder));
        assert_eq!(clip("CLIPTextModelWithProjection"), Some(Component::TextEncoder2));
        assert_eq!(is(json!({"model_type": "llama", "architectures": null})), Some(Component::LanguageModel));
        assert_eq!(is(Value::Null), None);
    }

    #[test]
    fn names_tell_models_from_adapters_of_them() {
        let is = |names: &[&str]| component_of(names);
        assert_eq!(is(&["model.layers.0.self_attn.q_proj.weight"]), Some(Component::LanguageModel));
        assert_eq!(is(&["transformer.h.0.attn.c_attn.weight"]), Some(Component::LanguageModel));
        assert_eq!(is(&["down_blocks.0.resnets.0.conv1.weight"]), Some(Component::Unet));
        assert_eq!(is(&["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"]), None);
        assert_eq!(is(&["base_model.model.lm_head.weight"]), None);
        assert_eq!(is(&["lora_unet_double_blocks_0_img_attn_proj.lora_down.weight"]), None);
        assert_eq!(is(&["vision_model.encoder.layers.0.self_attn.q_proj.weight"]), None);
        assert_eq!(is(&["emb_params"]), None);
    }

    #[test]
    fn only_causal_language_models_are_called_that() {
        let family = |config: Value, names: &[&str]| transformers_family(&config, names);
        let language = |kind: &str| Family::Language(kind.to_owned());
        let other = |kind: &str| Family::Transformers(kind.to_owned());
        let (decoder, encoder) = (["model.layers.0.self_attn.q_proj.weight"], ["encoder.layer.0.output.dense.weight"]);
        let config = |kind: &str, class: &str| json!({"model_type": kind, "architectures": [class]});
        assert_eq!(family(json!({"model_type": "llama", "architectures": null}), &decoder), language("llama"));
        assert_eq!(family(config("llama", "LlamaModel"), &decoder), language("llama"));
        assert_eq!(family(config("gpt2", "GPT2LMHeadModel"), &[]), language("gpt2"));
        assert_eq!(family(config("bert", "BertModel"), &encoder), other("bert"));
        assert_eq!(
            family(config("t5", "T5ForConditionalGeneration"), &["encoder.block.0.layer.0.k.weight"]),
            other("t5")
        );
        assert_eq!(family(json!({"model_type": "vit"}), &encoder), other("vit"));
        assert_eq!(family(Value::Null, &decoder), language("causal"));
    }
}
