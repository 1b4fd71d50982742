//! Why a tokenizer cannot be used, with what to do about it.

use std::{
    io,
    path::{Path, PathBuf},
};

/// The result of every fallible function of this module.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// There is no `tokenizer.json`.
    #[error("{}: no `tokenizer.json`{}", folder.display(), other.as_ref().map(|file| format!(", only `{file}`")).unwrap_or_default())]
    Missing {
        /// The folder.
        folder: PathBuf,
        /// A tokenizer of another kind that is there.
        other: Option<String>,
    },
    /// A file could not be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file is not what its name says.
    #[error("{}: not a tokenizer: {reason}", path.display())]
    Broken {
        /// The file.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// A configuration file beside it says something that cannot be.
    #[error("{}: `{key}` {reason}", path.display())]
    Setting {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// What is wrong with it.
        reason: String,
    },
    /// It knows more tokens than the model.
    #[error("{}: {tokens} tokens, but the model has embeddings for {rows}: it belongs to another model", path.display())]
    WrongModel {
        /// The tokenizer's file.
        path: PathBuf,
        /// Its tokens.
        tokens: usize,
        /// Rows of the model's embedding.
        rows: usize,
    },
    /// A text or ids that it does not take.
    #[error("{}: {reason}", path.display())]
    Refused {
        /// The tokenizer's file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
}

impl Error {
    /// What to do about it, where there is something.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Missing { other: Some(_), .. } => "only `tokenizer.json` is read; in Python, \
                 `AutoTokenizer.from_pretrained(\"MODEL\").save_pretrained(\"MODEL\")` writes one from the older files"
                .to_owned(),
            Self::Missing { .. } => {
                "give a model folder as Hugging Face lays it out: config.json, tokenizer.json and the weights"
                    .to_owned()
            }
            Self::Broken { .. } => {
                "fetch the file again: a download that broke off or a login page in its place is usual".to_owned()
            }
            Self::WrongModel { .. } => {
                "take tokenizer.json from the repository that the model's weights come from".to_owned()
            }
            _ => return None,
        })
    }

    /// The error for a folder without the file.
    pub(super) fn missing(folder: &Path, file: &Path) -> Self {
        const OTHERS: [&str; 5] = ["tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json"];
        if file.file_name().is_some_and(|name| name != "tokenizer.json") {
            let source = io::Error::from(io::ErrorKind::NotFound);
            return Self::Read { path: file.to_owned(), source };
        }
        let other = OTHERS.into_iter().find(|name| folder.join(name).is_file());
        Self::Missing { folder: folder.to_owned(), other: other.map(str::to_owned) }
    }
}
