//! Reading `config.json` files, and the two ways in which diffusers writes "the same for all levels".

use std::{fs, path::Path};

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{Error, Result};

/// A value for all levels, or one for each.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum PerLevel {
    /// The same everywhere.
    Same(usize),
    /// One a level, from the outermost inwards.
    Each(Vec<usize>),
}

impl PerLevel {
    /// The value of a level; `None` where the list is too short.
    pub fn at(&self, level: usize) -> Option<usize> {
        match self {
            Self::Same(value) => Some(*value),
            Self::Each(values) => values.get(level).copied(),
        }
    }
}

/// Reads a JSON file.
pub(crate) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let text = fs::read(path).map_err(|source| Error::Read { path: path.into(), source })?;
    serde_json::from_slice(&text).map_err(|source| Error::Json { path: path.into(), source })
}
