//! What the module part of a key means for one base model.
//!
//! Names are never unflattened (`to_out_0` could be `to.out.0`): every name that a file could use for a module of the base
//! is built, in each spelling, and looked up. Prefixes and spellings are those of `docs/formats.md` §2, §3 and §6.

use std::collections::{BTreeMap, HashMap};

use super::{BaseModel, Component, ldm::UnetNames};

/// A module of the base, by component and path.
pub type Place = (Component, String);

/// Every spelling of every module of one base.
#[derive(Debug)]
pub struct Names {
    /// Per component: names with `_` for `.`; `None` where two modules share one.
    flat: HashMap<Component, HashMap<String, Option<String>>>,
    /// Per component: names with dots, other spellings among them.
    dotted: HashMap<Component, HashMap<String, String>>,
    /// Whole names, prefix and all, of a base that was implied by a file.
    whole: BTreeMap<String, Place>,
}

/// What a module part leads to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    /// A module of the base.
    Module(Place),
    /// The prefix means a component that the base has, but no module of it has this name.
    NoModule(Component),
    /// The prefix means a component that the base lacks.
    NoComponent(Component),
    /// The prefix belongs to another family of models.
    OtherFamily(&'static str),
    /// No prefix that is known.
    Unknown,
}

/// Prefixes before flattened names.
const FLAT: [(&str, Component); 6] = [
    ("lora_unet_", Component::Unet),
    ("oft_unet_", Component::Unet),
    ("lycoris_", Component::Unet),
    ("lora_te1_", Component::TextEncoder),
    ("lora_te2_", Component::TextEncoder2),
    ("lora_te_", Component::TextEncoder),
];

/// Prefixes before dotted names.
const DOTTED: [(&str, Component); 8] = [
    ("unet.", Component::Unet),
    ("text_encoder.", Component::TextEncoder),
    ("text_encoder_2.", Component::TextEncoder2),
    ("model.diffusion_model.", Component::Unet),
    ("diffusion_model.", Component::Unet),
    ("text_encoders.clip_l.transformer.", Component::TextEncoder),
    ("text_encoders.clip_h.transformer.", Component::TextEncoder),
    ("text_encoders.clip_g.transformer.", Component::TextEncoder2),
];

/// Beginnings of keys that belong to models which are not read here.
const OTHERS: [(&str, &str); 22] = [
    ("lora_prior_", "Stable Cascade"),
    ("lora_unet_double_blocks_", "FLUX"),
    ("lora_unet_single_blocks_", "FLUX"),
    ("lora_unet_final_layer_", "FLUX"),
    ("diffusion_model.double_blocks.", "FLUX"),
    ("diffusion_model.single_blocks.", "FLUX"),
    ("transformer.single_transformer_blocks.", "FLUX"),
    ("lora_unet_joint_blocks_", "Stable Diffusion 3"),
    ("diffusion_model.joint_blocks.", "Stable Diffusion 3"),
    ("lora_te3_", "a model with T5 (FLUX or Stable Diffusion 3)"),
    ("diffusion_model.blocks.", "a video or DiT model (Wan, Cosmos, …)"),
    ("lora_unet_blocks_", "a video or DiT model (Wan, Cosmos, …)"),
    ("lora_transformer_", "a transformer model (FLUX, Stable Diffusion 3, …)"),
    ("transformer.", "a transformer model (FLUX, Stable Diffusion 3, …)"),
    ("text_encoders.t5xxl.", "a model with T5 (FLUX or Stable Diffusion 3)"),
    ("lora_llm_", "a model with a language model as text encoder"),
    ("lora_sd3_", "Stable Diffusion 3"),
    ("diffusion_model.layers.", "Z-Image or Lumina"),
    ("lora_unet_layers_", "Z-Image or Lumina"),
    ("diffusion_model.transformer_blocks.", "a transformer model (FLUX, Qwen-Image, …)"),
    ("lora_unet_transformer_blocks_", "a transformer model (FLUX, Qwen-Image, …)"),
    ("transformer_blocks.", "a transformer model (FLUX, Qwen-Image, …)"),
];

/// Where a diffusers UNet's paths begin, for files that carry no prefix at all.
const BARE_UNET: [&str; 8] = [
    "down_blocks.",
    "mid_block.",
    "up_blocks.",
    "conv_in",
    "conv_out",
    "conv_norm_out",
    "time_embedding.",
    "add_embedding.",
];

impl Names {
    /// The table of a base.
    pub fn of(base: &BaseModel) -> Self {
        let mut names = Self { flat: HashMap::new(), dotted: HashMap::new(), whole: base.spellings().clone() };
        for component in base.components() {
            let unet = (component == Component::Unet)
                .then(|| UnetNames::of_diffusers(base.modules(component).map(|(path, _)| path)));
            for (path, _) in base.modules(component) {
                names.add(component, path, path);
                if let Some(ldm) = unet.as_ref().and_then(|unet| unet.ldm_path(path)) {
                    names.add(component, path, &ldm);
                }
                for alias in aliases(component, path) {
                    names.dotted.entry(component).or_default().entry(alias).or_insert_with(|| path.to_owned());
                }
            }
        }
        names
    }

    fn add(&mut self, component: Component, path: &str, spelling: &str) {
        self.dotted.entry(component).or_default().insert(spelling.to_owned(), path.to_owned());
        self.flat
            .entry(component)
            .or_default()
            .entry(spelling.replace('.', "_"))
            .and_modify(|other| {
                if other.as_deref() != Some(path) {
                    *other = None;
                }
            })
            .or_insert_with(|| Some(path.to_owned()));
    }

    /// The module that the module part of a key names.
    pub fn find(&self, module: &str) -> Found {
        if let Some(place) = self.whole.get(module) {
            return Found::Module(place.clone());
        }
        let module = module.strip_prefix("base_model.model.").unwrap_or(module);
        let known = |component: Component| self.dotted.contains_key(&component);
        for (prefix, component) in FLAT {
            if let Some(name) = module.strip_prefix(prefix) {
                if let Some(Some(path)) = self.flat.get(&component).and_then(|flat| flat.get(name)) {
                    return Found::Module((component, path.clone()));
                }
                return other_family(module).unwrap_or(missing(component, known(component)));
            }
        }
        for (prefix, component) in DOTTED {
            if let Some(name) = module.strip_prefix(prefix) {
                // peft's old training scripts put their own prefix behind the component.
                let name = name.strip_prefix("base_model.model.").unwrap_or(name);
                return match self.dotted(component, name) {
                    Some(path) => Found::Module((component, path)),
                    None => other_family(module).unwrap_or(missing(component, known(component))),
                };
            }
        }
        for component in [Component::LanguageModel, Component::Unet, Component::TextEncoder, Component::TextEncoder2] {
            if let Some(path) = self.dotted(component, module) {
                return Found::Module((component, path));
            }
        }
        // Trained on a language model without its head, whose paths lack the first level; or the other way round.
        let bare = module.strip_prefix("model.");
        if let Some(path) = bare
            .and_then(|bare| self.dotted(Component::LanguageModel, bare))
            .or_else(|| self.dotted(Component::LanguageModel, &format!("model.{module}")))
        {
            return Found::Module((Component::LanguageModel, path));
        }
        if BARE_UNET.iter().any(|start| module.starts_with(start)) {
            return missing(Component::Unet, known(Component::Unet));
        }
        if module.starts_with("model.layers.") || module == "lm_head" || module.starts_with("model.embed_tokens") {
            return missing(Component::LanguageModel, known(Component::LanguageModel));
        }
        other_family(module).unwrap_or(Found::Unknown)
    }

    fn dotted(&self, component: Component, name: &str) -> Option<String> {
        let table = self.dotted.get(&component)?;
        table.get(name).or_else(|| table.get(&name.replace(".processor.", "."))).cloned()
    }
}

fn missing(component: Component, known: bool) -> Found {
    if known { Found::NoModule(component) } else { Found::NoComponent(component) }
}

fn other_family(module: &str) -> Option<Found> {
    OTHERS.iter().find(|(start, _)| module.starts_with(start)).map(|(_, family)| Found::OtherFamily(family))
}

/// Other dotted spellings of a path: old attention processors, text encoders without their first level.
fn aliases(component: Component, path: &str) -> Vec<String> {
    let mut aliases = Vec::new();
    if component == Component::Unet {
        // `attn1.processor.to_out_lora`: the processor is cut off by the reader, the list index was never there.
        aliases.extend(path.strip_suffix(".to_out.0").map(|path| format!("{path}.to_out")));
    }
    if component.is_text_encoder() {
        let bare = path.strip_prefix("text_model.").unwrap_or(path);
        aliases.push(bare.to_owned());
        for (new, old) in [("q_proj", "to_q"), ("k_proj", "to_k"), ("v_proj", "to_v"), ("out_proj", "to_out")] {
            if let Some(attention) = bare.strip_suffix(new).filter(|rest| rest.ends_with("self_attn.")) {
                aliases.push(format!("{attention}{old}"));
                aliases.push(format!("text_model.{attention}{old}"));
            }
        }
    }
    aliases
}

/// The flattened name of a path under its file prefix, as sd-scripts writes it.
///
/// `has_two_encoders` tells `lora_te1_` from `lora_te_`; `None` for a component that such files cannot hold.
pub(super) fn flattened(component: Component, path: &str, has_two_encoders: bool) -> Option<String> {
    let prefix = match component {
        Component::Unet => "lora_unet_",
        Component::TextEncoder if has_two_encoders => "lora_te1_",
        Component::TextEncoder => "lora_te_",
        Component::TextEncoder2 => "lora_te2_",
        Component::Vae | Component::LanguageModel => return None,
    };
    Some(format!("{prefix}{}", path.replace('.', "_")))
}
