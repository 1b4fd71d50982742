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
    /// A tokenizer, or a text that it does not take.
    #[error(transparent)]
    Tokenizer(#[from] crate::tokenizer::Error),
    /// A chat template, or a conversation that it does not take.
    #[error(transparent)]
    Chat(#[from] crate::chat::Error),
    /// A file of texts.
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
    /// A file that should hold JSON of a known form does not.
    #[error("{}: not the expected JSON", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// A path that holds no language model.
    #[error("{}: {reason}", path.display())]
    NotABase {
        /// The folder.
        path: PathBuf,
        /// What was looked for and what was found.
        reason: String,
    },
    /// A language model of a kind that cannot be built here.
    #[error("`{model}` is a kind of model that is not supported; supported are {}", crate::config::supported())]
    Unsupported {
        /// The kind, as `config.json` calls it.
        model: String,
    },
    /// A model configuration that this program cannot build.
    #[error("config.json: `{option}` {reason}")]
    Config {
        /// The option as the configuration file writes it.
        option: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// More ids than the model has positions.
    #[error("{what} has {length} tokens, but the model reads at most {limit}")]
    TooLong {
        /// What is too long.
        what: &'static str,
        /// Its length.
        length: usize,
        /// The most that there may be.
        limit: usize,
    },
    /// An id that the model has no embedding for.
    #[error("token {id} is not one of the model's {words}: tokenizer and model do not belong together")]
    UnknownToken {
        /// The id.
        id: u32,
        /// How many the model has.
        words: usize,
    },
    /// Something that was asked for and cannot be done.
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

impl Error {
    /// What to do about it, where there is something.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Tokenizer(error) => error.hint(),
            Self::Chat(error) => error.hint(),
            Self::Data(error) => error.hint(),
            _ => None,
        }
    }
}

impl From<tch::TchError> for Error {
    fn from(error: tch::TchError) -> Self {
        Self::Torch(error.into())
    }
}

/// An error on its way through the trainer; one that came from below stays what it was.
impl From<Error> for lora_torch::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Torch(error) => error,
            error => Self::model(error),
        }
    }
}
