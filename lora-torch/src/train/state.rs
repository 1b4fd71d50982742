//! Saving and resuming a training, bit for bit.
//!
//! A checkpoint holds the flat parameters, their moving average, the rule's state and every frozen tensor of the adapters
//! in one file. Randomness and schedule are functions of the step and need no state.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use lora_core::format::{Dtype, TensorData, TensorFile, write_tensors};
use tch::Tensor;

use super::Trainer;
use crate::{
    Error, Objective, Result,
    backend::{host_values, signed},
    checkpoint::{Checkpoints, State},
};

/// The file of a checkpoint that this module writes; others may lie beside it.
const FILE: &str = "training.safetensors";

/// What a resumed run should know.
#[derive(Debug, Clone, PartialEq)]
pub struct Resumed {
    /// The checkpoint that was taken.
    pub folder: PathBuf,
    /// Steps that are done.
    pub step: u64,
    /// What [`Trainer::save`] was given to keep.
    pub extra: serde_json::Value,
    /// Newer checkpoints that were not sound, with the reason.
    pub skipped: Vec<(PathBuf, String)>,
}

impl<O: Objective> Trainer<O> {
    /// Writes a checkpoint of the steps enqueued so far, and waits for them.
    ///
    /// `identity` is what a run must share with this one to go on from it (base, data, options, by name); `extra` comes
    /// back on resume; `more` may put further files beside the training state, such as the adapter in a common dialect.
    ///
    /// # Errors
    /// If something cannot be written; older checkpoints then still stand.
    pub fn save(
        &self,
        checkpoints: &Checkpoints,
        identity: BTreeMap<String, String>,
        extra: serde_json::Value,
        more: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<PathBuf> {
        let _no_grad = tch::no_grad_guard();
        let mut tensors = Vec::new();
        for (name, tensor) in self.tensors()? {
            let shape: Vec<usize> = tensor.size().iter().map(|length| *length as usize).collect();
            tensors.push((name, TensorData::from_f32(Dtype::F32, shape, &host_values(&tensor)?)?));
        }
        let state = State::new(self.step, self.identity(identity)?, extra);
        checkpoints.save(state, |folder| {
            write_tensors(&folder.join(FILE), &tensors, &BTreeMap::new())?;
            more(folder)
        })
    }

    /// Goes on from the newest sound checkpoint, or returns `None` if there is none.
    ///
    /// # Errors
    /// If it belongs to another run (the differences are named), or no checkpoint is sound.
    pub fn resume(&mut self, checkpoints: &Checkpoints, identity: BTreeMap<String, String>) -> Result<Option<Resumed>> {
        let Some(found) = checkpoints.newest()? else { return Ok(None) };
        let fault = |reason| Error::Checkpoint { path: found.folder.clone(), reason };
        let here = self.identity(identity)?;
        let differing: Vec<String> = here
            .keys()
            .chain(found.state.identity.keys().filter(|key| !here.contains_key(*key)))
            .filter(|key| here.get(*key) != found.state.identity.get(*key))
            .map(|key| difference(key, found.state.identity.get(key), here.get(key)))
            .collect();
        if !differing.is_empty() {
            return Err(fault(format!("it belongs to another run: {}", differing.join("; "))));
        }
        if found.state.step > self.options.steps {
            return Err(fault(format!("it is at step {}, the run has {}", found.state.step, self.options.steps)));
        }

        let _no_grad = tch::no_grad_guard();
        let file = TensorFile::read(&found.folder.join(FILE))?;
        // All are read and checked before the first is written.
        let mut restored = Vec::new();
        for (name, tensor) in self.tensors()? {
            let info = file.info(&name).ok_or_else(|| fault(format!("{FILE} has no `{name}`")))?;
            if signed(&info.shape) != tensor.size() {
                return Err(fault(format!("`{name}` is {:?}, expected {:?}", info.shape, tensor.size())));
            }
            let bytes = file.bytes(&name).unwrap_or_default();
            let value = Tensor::f_from_data_size(bytes, &tensor.size(), tch::Kind::Float)?;
            restored.push((tensor, value));
        }
        for (mut tensor, value) in restored {
            tensor.f_copy_(&value)?;
        }
        for (_, [master, mut working]) in self.trained.frozen()? {
            working.f_copy_(&master)?;
        }
        self.step = found.state.step;
        self.device.set_counter(self.step)?;
        let step = self.step;
        Ok(Some(Resumed { folder: found.folder, step, extra: found.state.extra, skipped: found.skipped }))
    }

    /// Every tensor that the next step depends on.
    fn tensors(&self) -> Result<Vec<(String, Tensor)>> {
        let mut tensors = vec![("parameters".to_owned(), self.device.arena.values()?)];
        tensors.extend(self.device.average.iter().map(|average| ("average".to_owned(), average.shallow_clone())));
        tensors.extend(self.device.loss_scale.iter().map(|scale| ("loss scale".to_owned(), scale.shallow_clone())));
        let state = self.device.rule.state().into_iter();
        tensors.extend(state.map(|(name, tensor)| (format!("optimizer.{name}"), tensor.shallow_clone())));
        tensors.extend(self.trained.frozen()?.into_iter().map(|(name, [master, _])| (name, master)));
        Ok(tensors)
    }

    /// What the caller names, and what this trainer knows by itself.
    fn identity(&self, mut named: BTreeMap<String, String>) -> Result<BTreeMap<String, String>> {
        named.insert("trained tensors".to_owned(), hash(&self.trained.layout(&self.device.arena)?));
        named.insert("trainable parameters".to_owned(), self.trainable_parameters().to_string());
        named.insert("seed".to_owned(), self.options.seed.to_string());
        named.insert("accumulation".to_owned(), self.options.accumulation.to_string());
        named.insert("optimizer".to_owned(), format!("{:?}", self.options.optimizer));
        Ok(named)
    }
}

fn difference(key: &str, there: Option<&String>, here: Option<&String>) -> String {
    let shown = |value: Option<&String>| value.map_or_else(|| "absent".to_owned(), |value| format!("`{value}`"));
    format!("{key} was {}, now {}", shown(there), shown(here))
}

fn hash(lines: &[String]) -> String {
    use sha2::{Digest, Sha256};
    let digest = Sha256::digest(lines.join("\n").as_bytes());
    digest.iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}
