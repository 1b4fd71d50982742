//! Everything that can go wrong in this crate, with what was seen and what was expected as fields.

use std::{io, path::PathBuf};

/// The result of every fallible function here.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An adapter, or a tensor file.
    #[error(transparent)]
    Core(#[from] lora_core::Error),
    /// libtorch, weights, projections or the training step.
    #[error(transparent)]
    Torch(#[from] lora_torch::Error),
    /// A folder of pictures, or something made from it.
    #[error(transparent)]
    Data(#[from] crate::data::Error),
    /// A file could not be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file could not be written.
    #[error("cannot write {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file that should hold JSON of a known form does not.
    #[error("{}: not the expected JSON", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// A model configuration that this program cannot build.
    #[error("{component}: `{option}` {reason}")]
    Config {
        /// The component, as its folder is called.
        component: &'static str,
        /// The option as the configuration file writes it.
        option: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// A vocabulary that does not hold together.
    #[error("{}: {reason}", path.display())]
    Vocabulary {
        /// The file or folder.
        path: PathBuf,
        /// What is missing.
        reason: String,
    },
    /// A path that holds no base model that this program knows.
    #[error("{}: {reason}", path.display())]
    NotABase {
        /// The file or folder.
        path: PathBuf,
        /// What was looked for and what was found.
        reason: String,
    },
    /// A sampler was asked for something that it cannot do.
    #[error("{sampler}: {reason}")]
    Sampler {
        /// The sampler's name.
        sampler: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// A picture that no model can draw.
    #[error("{option}: {reason}")]
    Request {
        /// The option as a person writes it.
        option: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// A tensor has another shape than the model can take.
    #[error("{what} has shape {actual:?}, expected {expected}")]
    Shape {
        /// What the tensor is.
        what: &'static str,
        /// Its shape.
        actual: Vec<i64>,
        /// The shape in words.
        expected: &'static str,
    },
}

impl From<tch::TchError> for Error {
    fn from(error: tch::TchError) -> Self {
        Self::Torch(error.into())
    }
}
