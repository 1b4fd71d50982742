//! diffusers' spelling: `unet.….lora_A.weight`, scales in the header under `lora_adapter_metadata`.
//!
//! The text encoders' keys contain `text_model.`, which diffusers of every version takes; the names in the configuration
//! begin below it, since transformers has it in some classes and not in others.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::{Writer, Written, components, filled, kohya::plain_direction, peft, shaped_as_layer};
use crate::{
    AnyAdapter, Backend, Cpu, Result,
    adapter::{Axis, Lora},
    format::{AdaptedModule, Component},
};

impl Writer<'_> {
    pub(super) fn diffusers(&self, metadata: &BTreeMap<String, String>) -> Result<Written> {
        let mut tensors = Vec::new();
        let mut config = Map::new();
        for component in components(self.modules) {
            if matches!(component, Component::Vae | Component::LanguageModel) {
                let module = self.modules.iter().find(|module| module.component == component);
                if let Some(module) = module {
                    return Err(self.unwritable(module, "it takes UNets and text encoders alone"));
                }
            }
            let modules: Vec<&AdaptedModule> =
                self.modules.iter().filter(|module| module.component == component).collect();
            let [down_suffix, up_suffix] = suffixes(component, &modules);
            let mut entries = Vec::new();
            for module in &modules {
                let (lora, magnitude) = match &module.adapter {
                    AnyAdapter::Lora(lora) if lora.mid.is_none() => (lora, None),
                    AnyAdapter::Dora(dora) if dora.axis == Axis::Output => match plain_direction(dora) {
                        Some(lora) => (lora, Some(&dora.magnitude)),
                        None => return Err(self.unwritable(module, "it knows DoRA over LoRA alone")),
                    },
                    _ => {
                        return Err(self.unwritable(module, "it knows LoRA and DoRA along outputs alone"));
                    }
                };
                let key = |suffix: &str| format!("{component}.{}.{suffix}", module.path);
                let (down, up) = shaped_as_layer(module, lora)?;
                tensors.push((key(&format!("{down_suffix}.weight")), self.tensor(module, &down)?));
                tensors.push((key(&format!("{up_suffix}.weight")), self.tensor(module, &up)?));
                if let Some(bias) = &lora.up_bias {
                    tensors.push((key(&format!("{up_suffix}.bias")), self.tensor(module, bias)?));
                }
                if let Some(magnitude) = magnitude {
                    let shape = peft::magnitude_shape(module.weight.len(), magnitude.values.len());
                    let magnitude = Cpu.reshape(magnitude, &shape)?;
                    // Text encoders go through transformers' own loader, which wants the parameter's name.
                    let suffix = match component.is_text_encoder() {
                        true => "lora_magnitude_vector.weight",
                        false => "lora_magnitude_vector",
                    };
                    tensors.push((key(suffix), self.tensor(module, &magnitude)?));
                }
                entries.push(entry(module, lora, magnitude.is_some()));
            }
            let uniform = peft::Uniform::of(&entries);
            if let Some(odd) = modules.iter().zip(&entries).find(|(_, entry)| !uniform.fits(entry)) {
                let reason = "it wants DoRA and biases on all modules of a component or on none";
                return Err(self.unwritable(odd.0, reason));
            }
            for (field, value) in peft::lora_config(&entries, &uniform, false) {
                config.insert(format!("{component}.{field}"), value);
            }
        }
        let text = serde_json::to_string_pretty(&Value::Object(config)).unwrap_or_default();
        let mut metadata = filled(metadata, [("format", "pt".to_owned())]);
        metadata.insert("lora_adapter_metadata".to_owned(), text);
        Ok((tensors, metadata))
    }
}

/// How factors are called: as peft does, unless diffusers could not tell.
///
/// Its loader (0.42) recognises a text encoder's keys by one that its own table renames, and that table knows attention
/// projections alone. Where there is none of them, the older spelling, which it knows for every layer, is written.
fn suffixes(component: Component, modules: &[&AdaptedModule]) -> [&'static str; 2] {
    let known = |module: &&AdaptedModule| {
        ["q_proj", "k_proj", "v_proj", "out_proj"].iter().any(|name| module.path.ends_with(name))
    };
    match component.is_text_encoder() && !modules.iter().any(known) {
        true => ["lora_linear_layer.down", "lora_linear_layer.up"],
        false => ["lora_A", "lora_B"],
    }
}

fn entry(module: &AdaptedModule, lora: &Lora<crate::Array>, has_magnitude: bool) -> peft::Entry {
    let name = module.path.strip_prefix("text_model.").unwrap_or(&module.path);
    peft::Entry {
        name: name.to_owned(),
        rank: lora.down.shape.first().copied().unwrap_or(0),
        scale: lora.scale,
        has_magnitude,
        has_bias: lora.up_bias.is_some(),
    }
}
