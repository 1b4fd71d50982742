//! A peft folder: `adapter_model.safetensors` and `adapter_config.json`.
//!
//! Modules whose rank or alpha differs from the most frequent one get an entry in `rank_pattern` or `alpha_pattern`.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::{Writer, alpha, components, filled, kohya::plain_direction, peft_lokr, peft_oft, shaped_as_layer};
use crate::{
    AnyAdapter, Array, Backend, Cpu, Error, Result,
    adapter::{Axis, Cayley, Ia3Kind, Lora, OftSide},
    format::{AdaptedModule, Component, Family, TensorData, key, write_atomically, write_tensors},
};

/// What the configuration says of one module.
pub(super) struct Entry {
    pub name: String,
    pub rank: usize,
    pub scale: f64,
    pub has_magnitude: bool,
    pub has_bias: bool,
}

/// What a configuration says once for all modules.
pub(super) struct Uniform {
    rank: usize,
    alpha: f64,
    has_magnitude: bool,
    has_bias: bool,
}

impl Uniform {
    pub(super) fn of(entries: &[Entry]) -> Self {
        Self {
            rank: most_frequent(entries.iter().map(|entry| entry.rank as u64)) as usize,
            alpha: f64::from_bits(most_frequent(entries.iter().map(|entry| alpha(entry.scale, entry.rank).to_bits()))),
            has_magnitude: entries.first().is_some_and(|entry| entry.has_magnitude),
            has_bias: entries.first().is_some_and(|entry| entry.has_bias),
        }
    }

    /// Whether the module needs nothing that a configuration cannot say of one module.
    pub(super) fn fits(&self, entry: &Entry) -> bool {
        (entry.has_magnitude, entry.has_bias) == (self.has_magnitude, self.has_bias)
    }
}

/// The fields of a LoRA configuration.
pub(super) fn lora_config(entries: &[Entry], uniform: &Uniform, fan_in_fan_out: bool) -> Map<String, Value> {
    let patterns = |differs: &dyn Fn(&Entry) -> Option<Value>| -> Map<String, Value> {
        let of = |entry: &Entry| Some((regex::escape(&entry.name), differs(entry)?));
        entries.iter().filter_map(of).collect()
    };
    let ranks = patterns(&|entry| (entry.rank != uniform.rank).then(|| json!(entry.rank)));
    let alphas = patterns(&|entry| {
        let alpha = alpha(entry.scale, entry.rank);
        (alpha != uniform.alpha).then(|| numeral(alpha))
    });
    let names: Vec<&str> = entries.iter().map(|entry| &*entry.name).collect();
    let fields = json!({
        "peft_type": "LORA",
        "r": uniform.rank,
        "lora_alpha": numeral(uniform.alpha),
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "use_rslora": false,
        "use_dora": uniform.has_magnitude,
        "lora_bias": uniform.has_bias,
        "bias": "none",
        "lora_dropout": 0.0,
        "fan_in_fan_out": fan_in_fan_out,
        "init_lora_weights": true,
        "inference_mode": true,
        "target_modules": names,
    });
    fields.as_object().cloned().unwrap_or_default()
}

/// peft's magnitudes: `[out]` of a linear layer, `[1, out, 1, 1]` of a convolution.
pub(super) fn magnitude_shape(axes: usize, length: usize) -> Vec<usize> {
    if axes == 4 { vec![1, length, 1, 1] } else { vec![length] }
}

impl Writer<'_> {
    pub(super) fn peft(&self, metadata: &BTreeMap<String, String>) -> Result<()> {
        let mut tensors = Vec::new();
        let components = components(self.modules);
        if let [_, second, ..] = components[..]
            && let Some(module) = self.modules.iter().find(|module| module.component == second)
        {
            return Err(self.unwritable(module, "a folder holds the adapter of one model"));
        }
        // peft puts it onto whatever model it is given, so its names are the same for both encoders; alone they mean the first.
        if let Some(module) = self.modules.iter().find(|module| module.component == Component::TextEncoder2) {
            return Err(self.unwritable(module, "a folder does not say that it is for the second text encoder"));
        }
        let fields = match self.modules.first().map(|module| &module.adapter) {
            None | Some(AnyAdapter::Lora(_) | AnyAdapter::Dora(_)) => self.peft_lora(&mut tensors)?,
            Some(_) => self.peft_other(&mut tensors)?,
        };
        let mut fields: Map<String, Value> = fields;
        self.peft_whole(&mut tensors, &mut fields)?;
        if matches!(self.family, Family::Language(_)) {
            fields.insert("task_type".to_owned(), json!("CAUSAL_LM"));
        }
        if let (Family::Language(_) | Family::Transformers(_), Some(base)) =
            (self.family, metadata.get("base_model_name_or_path"))
        {
            fields.insert("base_model_name_or_path".to_owned(), json!(base));
        }
        std::fs::create_dir_all(self.path).map_err(|source| Error::Write { path: self.path.to_owned(), source })?;
        let text = format!("{:#}\n", Value::Object(fields));
        write_atomically(&self.path.join("adapter_config.json"), |out| out.write_all(text.as_bytes()))?;
        let metadata = filled(metadata, [("format", "pt".to_owned())]);
        write_tensors(&self.path.join("adapter_model.safetensors"), &tensors, &metadata)
    }

    fn peft_lora(&self, tensors: &mut Vec<(String, TensorData<'static>)>) -> Result<Map<String, Value>> {
        let mut entries = Vec::new();
        // Linear layers are turned in all of a model or in none; embeddings have keys of their own.
        let fan_in_fan_out = self.modules.iter().any(|module| module.turned && !is_table(module));
        for module in self.modules {
            let unwritable = |reason| self.unwritable(module, reason);
            let (lora, magnitude) = match &module.adapter {
                AnyAdapter::Lora(lora) if lora.mid.is_none() => (lora, None),
                AnyAdapter::Dora(dora) if (dora.axis == Axis::Input) == module.turned => match plain_direction(dora) {
                    Some(lora) => (lora, Some(&dora.magnitude)),
                    None => return Err(unwritable("it knows DoRA over LoRA alone")),
                },
                AnyAdapter::Lora(_) => return Err(unwritable("it knows no Tucker cores")),
                _ => return Err(unwritable("one folder holds one kind of adapter")),
            };
            if fan_in_fan_out && !module.turned && module.weight.len() == 2 && !is_table(module) {
                return Err(unwritable("other modules of it are stored the other way round"));
            }
            let key = |suffix: &str| format!("base_model.model.{}.{suffix}", module.path);
            let (down, up) = self.peft_pair(module, lora)?;
            let [a, b] = match is_table(module) && module.turned {
                true => ["lora_embedding_A", "lora_embedding_B"],
                false => ["lora_A.weight", "lora_B.weight"],
            };
            tensors.push((key(a), self.tensor(module, &down)?));
            tensors.push((key(b), self.tensor(module, &up)?));
            if let Some(bias) = &lora.up_bias {
                tensors.push((key("lora_B.bias"), self.tensor(module, bias)?));
            }
            if let Some(magnitude) = magnitude {
                let shape = magnitude_shape(module.weight.len(), magnitude.values.len());
                tensors.push((key("lora_magnitude_vector"), self.tensor(module, &Cpu.reshape(magnitude, &shape)?)?));
            }
            entries.push(Entry {
                name: module.path.clone(),
                rank: lora.down.shape.first().copied().unwrap_or(0),
                scale: lora.scale,
                has_magnitude: magnitude.is_some(),
                has_bias: lora.up_bias.is_some(),
            });
        }
        let uniform = Uniform::of(&entries);
        if let Some((odd, _)) = self.modules.iter().zip(&entries).find(|(_, entry)| !uniform.fits(entry)) {
            return Err(self.unwritable(odd, "it wants DoRA and biases on all modules or on none"));
        }
        Ok(lora_config(&entries, &uniform, fan_in_fan_out))
    }

    /// `A` and `B` as peft stores them.
    fn peft_pair(&self, module: &AdaptedModule, lora: &Lora<Array>) -> Result<(Array, Array)> {
        if module.turned {
            return Ok((Cpu.transpose(&lora.up)?, Cpu.transpose(&lora.down)?));
        }
        shaped_as_layer(module, lora)
    }

    /// LoHa, LoKr, (IA)³ and OFT: one kind a folder.
    fn peft_other(&self, tensors: &mut Vec<(String, TensorData<'static>)>) -> Result<Map<String, Value>> {
        let mut entries = Vec::new();
        let mut kinds = Vec::new();
        let mut extra = Map::new();
        let mut feed_forward = Vec::new();
        let (mut shapes, mut blocks) = (Vec::new(), Vec::new());
        for module in self.modules {
            let unwritable = |reason| self.unwritable(module, reason);
            let name = |suffix: &str| format!("base_model.model.{}.{suffix}", module.path);
            let (kind, rank, scale) = match &module.adapter {
                AnyAdapter::Loha(loha) => ("LOHA", loha.w1_b.shape.first().copied().unwrap_or(1), loha.scale),
                AnyAdapter::Lokr(lokr) => {
                    let shape = peft_lokr::Shape::of(lokr, &module.weight);
                    let shape = shape.ok_or_else(|| unwritable("LoKr with a core is not written"))?;
                    let rank = shape.rank();
                    shapes.push(shape);
                    ("LOKR", rank, lokr.scale)
                }
                AnyAdapter::Ia3(ia3) if ia3.kind == Ia3Kind::Factor => {
                    if ia3.axis == Axis::Input {
                        feed_forward.push(json!(module.path));
                    }
                    tensors.push((name("ia3_l"), self.tensor(module, &ia3.vector)?));
                    ("IA3", 1, 1.0)
                }
                AnyAdapter::Oft(oft) => {
                    let OftSide::Columns(cayley) = oft.side else {
                        return Err(unwritable("its OFT turns inputs, this one turns outputs"));
                    };
                    let terms = if let Cayley::Neumann(terms) = cayley { Some(terms) } else { None };
                    extra.insert("use_cayley_neumann".to_owned(), json!(terms.is_some()));
                    extra.insert("num_cayley_neumann_terms".to_owned(), json!(terms.unwrap_or(5)));
                    let cut = peft_oft::Blocks::of(&oft.blocks, &module.weight);
                    blocks.push(cut.ok_or_else(|| unwritable("its blocks do not fill the weight"))?);
                    tensors.push((name("oft_R.weight"), self.tensor(module, &oft.blocks)?));
                    ("OFT", 1, 1.0)
                }
                _ => return Err(unwritable("it knows no such family")),
            };
            if matches!(kind, "LOHA" | "LOKR") {
                for (part, array) in crate::adapter::Adapter::<Cpu>::factors(&module.adapter) {
                    let suffix = key::suffix_of(key::Role::Factor(part));
                    tensors.push((name(suffix), self.tensor(module, array)?));
                }
            }
            if kinds.iter().any(|other| *other != kind) {
                return Err(unwritable("one folder holds one kind of adapter"));
            }
            kinds.push(kind);
            entries.push(Entry { name: module.path.clone(), rank, scale, has_magnitude: false, has_bias: false });
        }
        if let (Some(&"LOKR"), Some(module)) = (kinds.first(), self.modules.first()) {
            let (factor, both) = peft_lokr::options(&shapes)
                .ok_or_else(|| self.unwritable(module, "it would cut the weights into other factors"))?;
            extra.insert("decompose_factor".to_owned(), json!(factor));
            extra.insert("decompose_both".to_owned(), json!(both));
        }
        if let (Some(&"OFT"), Some(module)) = (kinds.first(), self.modules.first()) {
            extra.extend(peft_oft::options(&blocks).ok_or_else(|| {
                self.unwritable(module, "its configuration knows one size of blocks, or one count of them")
            })?);
        }
        let uniform = Uniform::of(&entries);
        let mut fields = lora_config(&entries, &uniform, false);
        fields.insert("peft_type".to_owned(), json!(kinds.first()));
        for field in ["use_rslora", "use_dora", "lora_bias", "lora_dropout", "init_lora_weights", "bias"] {
            fields.remove(field);
        }
        match kinds.first() {
            Some(&"LOHA" | &"LOKR") => {
                fields.remove("fan_in_fan_out");
                if let Some(alpha) = fields.remove("lora_alpha") {
                    fields.insert("alpha".to_owned(), alpha);
                }
            }
            kind => {
                for field in ["r", "lora_alpha", "rank_pattern", "alpha_pattern"] {
                    fields.remove(field);
                }
                if kind == Some(&"IA3") {
                    fields.insert("feedforward_modules".to_owned(), Value::Array(feed_forward));
                }
            }
        }
        fields.extend(extra);
        Ok(fields)
    }
}

/// Whether the module is a table of rows, by the names that such modules have.
fn is_table(module: &AdaptedModule) -> bool {
    let last = module.path.rsplit('.').next().unwrap_or("");
    ["embed_tokens", "wte", "wpe", "token_embedding", "position_embedding", "embed_in"].contains(&last)
}

/// A number as JSON, whole ones without a fraction.
fn numeral(number: f64) -> Value {
    if number.fract() == 0.0 && number.abs() < 9e15 { json!(number as i64) } else { json!(number) }
}

/// The value that occurs most often; the first of several.
fn most_frequent(values: impl Iterator<Item = u64>) -> u64 {
    let mut counts: Vec<(u64, usize)> = Vec::new();
    for value in values {
        match counts.iter_mut().find(|(other, _)| *other == value) {
            Some((_, count)) => *count += 1,
            None => counts.push((value, 1)),
        }
    }
    counts.iter().rev().max_by_key(|(_, count)| *count).map_or(0, |(value, _)| *value)
}
