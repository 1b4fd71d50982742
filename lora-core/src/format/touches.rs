//! Which tensors of a base some adapters change, and what becomes of table and head of a language model thereby.
//!
//! Where the head is the embedding table (`tie_word_embeddings`), whatever is trained for one of the two parts them, as it
//! did while it was trained: the head gets a weight of its own, which begins as the table of the base. So peft merges what
//! `modules_to_save` brings. Adapters on such a head peft adds to the table, with a warning, and the merged model then
//! answers as none did before; here it answers as with the adapter beside it. An adapter on the table alone changes both
//! roles here as there, with a warning; and what was trained with `ensure_weight_tying` leaves the two one.

use std::{collections::BTreeMap, path::Path};

use super::{AdapterStream, BaseModel, Component, Dtype, Fault, Strengths, base::HEAD, merge_config::ConfigChanges};
use crate::{Error, Result};

/// Tensors that change; of those that are replaced as a whole the new shape.
pub(super) struct Touches<'a> {
    base: &'a BaseModel,
    tensors: BTreeMap<(Component, String), Option<Vec<usize>>>,
}

impl<'a> Touches<'a> {
    /// What adapters change at their strengths.
    pub(super) fn of(base: &'a BaseModel, adapters: &[(AdapterStream, Strengths)]) -> Self {
        let mut touches = Self { base, tensors: BTreeMap::new() };
        for (stream, strengths) in adapters {
            let acting = stream.touched().filter(|(place, _)| strengths.of(place.0, &place.1) != 0.0);
            for ((component, _), tensors) in acting {
                for tensor in tensors {
                    let shape = touches.tensors.entry((*component, tensor.tensor.clone())).or_default();
                    *shape = tensor.shape.clone().or(shape.take());
                    if tensor.splits_head {
                        touches.tensors.entry((*component, weight_of(HEAD))).or_default();
                    }
                }
            }
        }
        touches
    }

    /// The tensors, by component and name.
    pub(super) fn names(&self) -> impl Iterator<Item = &(Component, String)> {
        self.tensors.keys()
    }

    /// The shape of what takes the place of a tensor; `None` if nothing takes its place as a whole.
    pub(super) fn new_shape(&self, component: Component, name: &str) -> Option<&[usize]> {
        self.tensors.get(&(component, name.to_owned()))?.as_deref()
    }

    /// What the configuration says that is no longer true, where numbers are stored as `dtype`.
    ///
    /// # Errors
    /// If table and head would no longer have the same rows.
    pub(super) fn config_changes(&self, dtype: Option<Dtype>) -> Result<ConfigChanges> {
        let mut changes = ConfigChanges { dtype, ..ConfigChanges::default() };
        let language = Component::LanguageModel;
        let Some(table) = self.base.vocabulary() else { return Ok(changes) };
        let is_touched = |path: &str| self.tensors.contains_key(&(language, weight_of(path)));
        changes.unties = self.base.says_tied() && (is_touched(HEAD) || is_touched(table) && !self.base.has_tied_head());

        let before = |path: &str| self.base.module(language, path).and_then(|module| module.weight.first().copied());
        let rows = |path: &str| {
            let new = self.new_shape(language, &weight_of(path)).and_then(|shape| shape.first().copied());
            new.or(before(path))
        };
        let follows = self.base.has_tied_head() && !is_touched(HEAD);
        let head = if follows { rows(table) } else { rows(HEAD) };
        let has_changed = rows(table) != before(table) || head != before(HEAD);
        if let (Some(table), Some(head), true) = (rows(table), head, has_changed)
            && table != head
        {
            let path = self.base.files().first().map_or(Path::new(""), |file| file.path());
            return Err(Error::file(path, Fault::Vocabulary { table, head }));
        }
        changes.vocabulary = rows(table).filter(|_| has_changed);
        Ok(changes)
    }
}

fn weight_of(path: &str) -> String {
    format!("{path}.weight")
}
