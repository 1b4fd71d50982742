//! Tensors that a peft folder brings whole: trained heads and norms, biases, tables under adapters, rows of tables.
//!
//! Where each stands in a folder is the inverse of `docs/formats.md` §7.

use serde_json::{Map, Value, json};

use super::Writer;
use crate::{Result, format::TensorData};

impl Writer<'_> {
    /// Adds the tensors and what the configuration says of them.
    pub(super) fn peft_whole(
        &self,
        tensors: &mut Vec<(String, TensorData<'static>)>,
        fields: &mut Map<String, Value>,
    ) -> Result<()> {
        let mut saved: Vec<&str> = Vec::new();
        let mut rows = Map::new();
        let mut bias = "none";
        for new in self.replacements {
            let (path, kind) = new.tensor.rsplit_once('.').unwrap_or((&new.tensor, ""));
            let key = if let Some(indices) = &new.rows {
                rows.insert(path.to_owned(), json!(indices)); // the end of a name, not a pattern
                format!("{path}.token_adapter.trainable_tokens_delta")
            } else if new.under_adapters {
                if kind == "bias" && bias == "none" {
                    bias = "lora_only";
                }
                format!("{path}.base_layer.{kind}")
            } else {
                // A bias alone is one of many; with its weight it is a module saved whole.
                let weight = format!("{path}.weight");
                match self.replacements.iter().any(|other| other.tensor == weight && !other.under_adapters) {
                    true if !saved.contains(&path) => saved.push(path),
                    true => {}
                    false => bias = "all",
                }
                new.tensor.clone()
            };
            let data = self.stored(&new.tensor, new.dtype, &new.value)?;
            tensors.push((format!("base_model.model.{key}"), data));
        }
        if !saved.is_empty() {
            fields.insert("modules_to_save".to_owned(), json!(saved));
        }
        if !rows.is_empty() {
            fields.insert("trainable_token_indices".to_owned(), Value::Object(rows));
        }
        if bias != "none" {
            fields.insert("bias".to_owned(), json!(bias));
        }
        Ok(())
    }
}
