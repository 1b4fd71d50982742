//! What is said of a run on texts before it starts.

use lora_cli::{
    plan::{DataPlan, Skipped},
    text,
};
use lora_core::format::Component;
use lora_llm::{LlmConfig, data::Tokens, example::pack};

use super::{FoundTexts, Texts};
use crate::train::{
    Family as _, Known,
    plan::{Outline, kind_bytes, weights},
};

impl FoundTexts {
    /// What this family adds to the plan.
    pub(super) fn in_plan(&self, known: &Known) -> Outline<'_> {
        let Known { config, machine, .. } = known;
        let (dataset, model) = (&self.dataset, &self.base.files.config);
        let longest = config.max_len.get().min(model.max_positions);
        let rows = if config.packing { pack(&dataset.train, longest).len() } else { dataset.train.len() } as u64;
        let (batch, accum) = (config.batch.get() as u64, config.accum.get() as u64);
        let tokens = Tokens::of(&dataset.train);
        let width = if config.packing { longest } else { tokens.longest } as u64;
        let kind = kind_bytes(machine.on.kind);
        let numbers: u64 = self
            .names
            .tensors(Component::LanguageModel)
            .map(|(_, _, source)| source.shape.iter().product::<usize>() as u64)
            .sum();
        let quantised = model.quantised || self.base.files.quantise.is_some();
        let [weights, largest] = weights(&self.names, Component::LanguageModel, self.base.files.quantise, kind);
        let share = 100.0 * tokens.trained as f64 / tokens.total.max(1) as f64;
        let mut notes = vec![format!(
            "{} tokens, longest {}, {share:.0} % of them in the loss",
            text::count(tokens.total as u64),
            tokens.longest
        )];
        if !dataset.validation.is_empty() {
            notes.push(format!("{} kept for validation", text::plural(dataset.validation.len() as u64, "example")));
        }
        if dataset.long.rows > 0 {
            let long = text::plural(dataset.long.rows as u64, "row");
            notes.push(format!("{long} longer than {longest} tokens, {} left out (--on-long)", dataset.long.dropped));
        }
        notes.extend(dataset.notes.iter().cloned());
        let skipped = dataset.bad.iter().map(|bad| Skipped {
            path: dataset.path.clone(),
            reason: format!("line {}, column {}: {}", bad.line, bad.column, bad.reason),
        });
        Outline {
            validates: !dataset.validation.is_empty(),
            base_kind: format!(
                "{}, {} parameters{}",
                model.family,
                text::count(numbers),
                if quantised { ", in 4 bits (NF4)" } else { "" }
            ),
            data: DataPlan {
                source: config.data.clone(),
                layout: format!("{}; {}", dataset.format, dataset.layout),
                unit: "example".into(),
                used: dataset.train.len() as u64,
                skipped: skipped.collect(),
                notes,
                buckets: Vec::new(),
            },
            batch,
            weights,
            activations: activations(model, batch * width, config.checkpointing) * kind + largest,
            cache: tokens.total as u64 * 5,
            prepare: numbers as f64 * kind as f64 / 1e9,
            file_number: Texts::DTYPE.size() as u64,
            steps_in: Box::new(move |epochs| (epochs * rows).div_ceil(batch * accum)),
        }
    }
}

/// Numbers that the backward pass needs of the forward pass, for `tokens` ids in a batch.
///
/// A layer keeps two norms' inputs and outputs, queries, keys, values, what attention gives, and three widths of the MLP;
/// computed again, only its input. The head works chunk by chunk.
fn activations(model: &LlmConfig, tokens: u64, again: bool) -> u64 {
    let (width, inner, layers) = (model.hidden_size as u64, model.intermediate_size as u64, model.layers as u64);
    let layer = tokens * (8 * width + 4 * inner);
    if again { layers * tokens * width + layer } else { layers * layer }
}
