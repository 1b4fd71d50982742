//! Tensors that a file brings whole: trained heads and norms, biases, rows of an embedding.

use super::{Assembled, Group, Kind};
use crate::{
    AnyAdapter, Array, Result,
    format::{BaseModel, Component, Dtype, Fault, Role},
};

/// A tensor of the base, or rows of one, that a file brings whole; no strength acts on it but 0, which leaves it out.
#[derive(Debug, Clone)]
pub struct Replacement {
    /// The part of the model.
    pub component: Component,
    /// The tensor, `module.weight` or `module.bias`.
    pub tensor: String,
    /// Its values; `[n, width]` with [`rows`](Self::rows).
    pub value: Array,
    /// The rows that are replaced, in the order of the values; `None` for all.
    pub rows: Option<Vec<usize>>,
    /// Whether the adapters of the module act on the new values rather than being overwritten by them.
    pub under_adapters: bool,
    /// How the file stores it.
    pub dtype: Dtype,
}

impl Replacement {
    /// Whether it parts a head from the embedding table that it was: a table that takes the place of the base's under the
    /// tokens alone. One that has grown does not, since the head needs rows for the new tokens and no file has them.
    pub(in crate::format) fn splits_head(&self, base: &BaseModel) -> bool {
        let table = base.vocabulary().map(|path| format!("{path}.weight"));
        let is_table = self.component == Component::LanguageModel && table.as_ref() == Some(&self.tensor);
        let is_whole = self.rows.is_none() && !self.under_adapters;
        is_table && is_whole && base.shape(self.component, &self.tensor) == Some(&self.value.shape)
    }
}

impl Group<'_> {
    pub(super) fn replacements(&self, kind: Option<Kind>, result: &mut Assembled) -> Result<()> {
        let flat_spelling = ["lora_", "lycoris_", "oft_"].iter().any(|prefix| self.spelling.starts_with(prefix));
        let is_old_addition =
            kind == Some(Kind::LowRank) && matches!(result.adapters.first(), Some(AnyAdapter::Full(_)));
        for (role, tensor, under_adapters) in [
            (Role::BaseWeight, "weight", true),
            (Role::BaseBias, "bias", true),
            (Role::SetWeight, "weight", true),
            (Role::Weight, "weight", false),
            (Role::Bias, "bias", false),
        ] {
            let belongs_to_the_family =
                role == Role::Weight && kind == Some(Kind::Ia3) || role == Role::Bias && is_old_addition;
            let Some(key) = self.keys.get(&role).filter(|_| !belongs_to_the_family) else { continue };
            if flat_spelling && role == Role::Weight {
                return Err(self.missing(Role::OnInput));
            }
            let value = self.need(role)?;
            let name = format!("{}.{tensor}", self.path);
            // A head that is the embedding table has a weight without a tensor of the base, and so has a new bias.
            let expected = match tensor {
                "weight" => self.module.weight.clone(),
                _ => vec![self.module.weight.first().copied().unwrap_or(0)],
            };
            if value.shape != expected && !(tensor == "weight" && self.module.grows_to(self.path, &value.shape)) {
                return Err(self.misfit(role, &value, None, &format!("it replaces a tensor of shape {expected:?}")));
            }
            let (component, dtype) = (self.component, self.dtype(key));
            result.replacements.push(Replacement { component, tensor: name, value, rows: None, under_adapters, dtype });
        }
        if let Some(key) = self.keys.get(&Role::TokenRows) {
            let value = self.need(Role::TokenRows)?;
            let rows = self.config.and_then(|config| config.token_rows(self.path)).ok_or_else(|| {
                let problem = format!("it does not name the rows that `{key}` replaces");
                self.fault(Fault::PeftField { field: "trainable_token_indices".to_owned(), problem })
            })?;
            let [table, width] = self.sizes();
            if value.shape != [rows.len(), width] || rows.iter().any(|row| *row >= table) {
                let problem = format!("the configuration names {} rows of it", rows.len());
                return Err(self.misfit(Role::TokenRows, &value, None, &problem));
            }
            result.replacements.push(Replacement {
                component: self.component,
                tensor: format!("{}.weight", self.path),
                value,
                rows: Some(rows.to_vec()),
                under_adapters: false,
                dtype: self.dtype(key),
            });
        }
        Ok(())
    }
}
