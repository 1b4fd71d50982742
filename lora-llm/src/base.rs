//! A transformers folder: found, described, loaded.
//!
//! [`BaseFiles::find`] looks at `config.json` and at names alone; [`BaseFiles::load`] maps the weights, in one file or in
//! shards, and copies each tensor once, straight to its device in its kind, or into 4 bits.

use std::path::{Path, PathBuf};

use lora_core::{
    Backend,
    format::{BaseModel, Changed, Component, weight_files},
};
use lora_torch::{Torch, Weights, nf4::Scheme};

use crate::{Decoder, Error, LlmConfig, Result};

/// A base model whose configuration has been read and whose weights have not.
#[derive(Debug)]
pub struct BaseFiles {
    /// Where it is.
    pub path: PathBuf,
    /// What it is.
    pub config: LlmConfig,
    /// How its linear layers, head and embedding left out, are quantised while they are loaded, if they are.
    pub quantise: Option<Scheme>,
    changed: Changed,
}

impl BaseFiles {
    /// Looks at a transformers folder.
    ///
    /// # Errors
    /// If there is none, or it holds a model that is not supported; the reason says what was looked for.
    pub fn find(path: &Path) -> Result<Self> {
        let config = path.join("config.json");
        if !config.is_file() {
            let reason = match (path.is_dir(), path.join("adapter_config.json").is_file()) {
                (false, _) => "there is no such folder",
                (true, true) => "holds an adapter, not a model; its base goes here",
                (true, false) => "no `config.json` is there, so it is no transformers folder",
            };
            return Err(Error::NotABase { path: path.into(), reason: reason.to_owned() });
        }
        Ok(Self { path: path.into(), config: LlmConfig::open(&config)?, quantise: None, changed: Changed::new() })
    }

    /// Loads the decoder, in the kind that `on` says.
    ///
    /// # Errors
    /// If weights are missing, left over, or do not fit the configuration.
    pub fn load(self, on: &Torch) -> Result<Base> {
        let decoder = self.build(&self.weights()?, on)?;
        Ok(Base { decoder, files: self, on: *on })
    }

    /// Loads the weights once and builds the decoder `count` times over the same tensors.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn load_decoders(&self, on: &Torch, count: usize) -> Result<Vec<Decoder>> {
        let weights = self.weights()?.resident(on);
        (0..count).map(|_| self.build(&weights, on)).collect()
    }

    /// Loads the decoder for answers: on the CPU its matrices stay in the 16 bits that files have, if layers compute in 32.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn load_for_answers(&self, on: &Torch) -> Result<Decoder> {
        self.build(&self.weights()?.resident(on).narrow(), on)
    }

    fn build(&self, weights: &Weights, on: &Torch) -> Result<Decoder> {
        // An adapter on the head of a tied model, merged into it, makes it a matrix of its own.
        let head = (Component::LanguageModel, "lm_head.weight".to_owned());
        let config = LlmConfig { tied: self.config.tied && !self.changed.contains_key(&head), ..self.config.clone() };
        let decoder = Decoder::new(&weights.root(on), &config)?;
        let unused: Vec<&str> = weights.unused().into_iter().filter(|name| !self.is_harmless(name)).collect();
        if let [first, ..] = unused[..] {
            let reason = format!("{} of its tensors belong to no layer, the first is `{first}`", unused.len());
            return Err(Error::NotABase { path: self.path.clone(), reason });
        }
        Ok(decoder)
    }

    /// The weights under transformers' names, not yet read.
    ///
    /// # Errors
    /// If the files are missing or broken.
    pub fn weights(&self) -> Result<Weights> {
        let mut weights = Weights::open(&self.weight_files()?)?.of(Component::LanguageModel).quantised(self.quantise);
        for ((_, name), array) in &self.changed {
            weights.replace(name.as_str(), Torch::CPU.tensor(&array.values, &array.shape)?);
        }
        Ok(weights)
    }

    /// Puts changed tensors, such as [`lora_core::format::merge`] makes, in the place of the base's own.
    pub fn change(&mut self, changed: Changed) {
        self.changed.extend(changed);
    }

    /// The same base as adapter files are read against: names and shapes of all its modules.
    ///
    /// # Errors
    /// If its files cannot be read.
    pub fn model(&self) -> Result<BaseModel> {
        Ok(BaseModel::open(&self.path)?)
    }

    /// The files that hold the weights, for hashing.
    ///
    /// # Errors
    /// If they are missing.
    pub fn weight_files(&self) -> Result<Vec<PathBuf>> {
        Ok(weight_files(&self.path)?)
    }

    /// A copy of the embedding that some programs save as the head of a tied model, and buffers that hold nothing learnt.
    fn is_harmless(&self, name: &str) -> bool {
        (self.config.tied && name == "lm_head.weight") || name.ends_with("rotary_emb.inv_freq")
    }
}

/// A loaded base model.
#[derive(Debug)]
pub struct Base {
    /// The model.
    pub decoder: Decoder,
    /// What is known of it besides its weights.
    pub files: BaseFiles,
    /// Where the model is, and in which kind.
    pub on: Torch,
}

impl Base {
    /// Finds and loads a base.
    ///
    /// # Errors
    /// As [`BaseFiles::find`] and [`BaseFiles::load`].
    pub fn open(path: &Path, on: &Torch) -> Result<Self> {
        BaseFiles::find(path)?.load(on)
    }
}
