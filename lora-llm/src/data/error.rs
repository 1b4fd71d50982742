//! Why a file of texts cannot be trained on, with what to type instead.

use std::{
    io,
    path::{Path, PathBuf},
};

use super::BadRow;

/// The result of every fallible function of this module.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Nothing is there.
    #[error("{}: no such file", path.display())]
    NotFound {
        /// What was asked for.
        path: PathBuf,
    },
    /// A folder where a file is wanted.
    #[error("{}: a folder, expected a file of texts", path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
    },
    /// Two files of a folder for one purpose.
    #[error("{} and {}: one of them is meant", first.display(), second.display())]
    Ambiguous {
        /// The one.
        first: PathBuf,
        /// The other.
        second: PathBuf,
    },
    /// A folder with nothing to measure a model with.
    #[error("beside {} there is neither a test file nor one for validation", train.display())]
    NothingHeldOut {
        /// What was trained on.
        train: PathBuf,
    },
    /// A file could not be read or unpacked.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file of another kind.
    #[error("{}: {what}, not a file of texts", path.display())]
    NotTexts {
        /// The file.
        path: PathBuf,
        /// What it is.
        what: &'static str,
    },
    /// A text in UTF-16.
    #[error("{}: encoded as UTF-16, expected UTF-8", path.display())]
    Utf16 {
        /// The file.
        path: PathBuf,
    },
    /// A row that cannot be used, and rows must not be skipped.
    #[error("{}:{first}{}", path.display(), others(*bad, *rows))]
    Bad {
        /// The file.
        path: PathBuf,
        /// The first such row.
        first: BadRow,
        /// How many there are.
        bad: usize,
        /// How many rows there are.
        rows: usize,
    },
    /// Rows in no known format.
    #[error("{}:{line}:1: rows with {found} are in no known format\n  understood are\n{formats}", path.display(), formats = FORMATS)]
    Format {
        /// The file.
        path: PathBuf,
        /// The line of the first row.
        line: usize,
        /// The fields of the first row.
        found: String,
    },
    /// Nothing to train on.
    #[error("{}: nothing to train on: {reason}", path.display())]
    Nothing {
        /// The file.
        path: PathBuf,
        /// What there was.
        reason: String,
    },
    /// Conversations for a model without a chat template.
    #[error("{}: conversations (`{format}`), but the model has no chat template", path.display())]
    NoTemplate {
        /// The file.
        path: PathBuf,
        /// The format.
        format: super::Format,
    },
    /// A setting that cannot be.
    #[error("{option}: {reason}")]
    Option {
        /// The option as a person writes it.
        option: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// The tokenizer refused a text.
    #[error(transparent)]
    Tokenizer(#[from] crate::tokenizer::Error),
    /// The chat template made a mistake.
    #[error(transparent)]
    Chat(#[from] crate::chat::Error),
}

/// The formats that are understood.
const FORMATS: &str = "  \
    {\"messages\": [{\"role\": \"user\", \"content\": \"…\"}, {\"role\": \"assistant\", \"content\": \"…\"}]}\n  \
    {\"prompt\": \"…\", \"completion\": \"…\"}\n  \
    {\"instruction\": \"…\", \"input\": \"…\", \"output\": \"…\"}\n  \
    {\"conversations\": [{\"from\": \"human\", \"value\": \"…\"}, {\"from\": \"gpt\", \"value\": \"…\"}]}\n  \
    {\"text\": \"…\"}";

impl Error {
    /// What to do about it, where there is something.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Self::NotFound { path } => {
                let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
                let folder = folder.map_or_else(|| ".".to_owned(), pasted);
                format!("`ls {folder}` shows what is there")
            }
            Self::Folder { .. } => {
                "give the file itself (.jsonl, .json or .txt, also .gz or .zst), or a folder with train.jsonl and valid.jsonl"
                    .to_owned()
            }
            Self::Ambiguous { first, .. } => format!("keep one, or give the file itself: {}", pasted(first)),
            Self::NothingHeldOut { train } => {
                format!("`lora eval {} --base BASE` measures what was trained on", pasted(train))
            }
            Self::NotTexts { what: "a Git LFS pointer", .. } => "`git lfs pull` fetches the file itself".to_owned(),
            Self::NotTexts { what: "a Parquet file", .. } => "this program was built without Parquet; in Python, \
                 `pandas.read_parquet(\"FILE\").to_json(\"FILE.jsonl\", orient=\"records\", lines=True)` converts it"
                .to_owned(),
            Self::NotTexts { .. } => {
                "expected JSON lines, a JSON array or plain text, also packed with gzip or zstd".to_owned()
            }
            Self::Utf16 { path } => {
                format!("`iconv -f UTF-16 -t UTF-8 {} > utf8.jsonl` converts it", pasted(path))
            }
            Self::Bad { path, .. } => format!(
                "`lora data check {} --base BASE` lists them all; `--on-bad skip` trains on the others",
                pasted(path)
            ),
            Self::Format { path, .. } => format!(
                "rename the fields to one of these; `lora data preview {} --base BASE` then shows what is trained on",
                pasted(path)
            ),
            Self::NoTemplate { .. } => {
                "take the model's instruct variant, or give a template: --chat-template FILE.jinja".to_owned()
            }
            Self::Tokenizer(error) => return error.hint(),
            Self::Chat(error) => return error.hint(),
            _ => return None,
        })
    }
}

/// A path that a shell takes as one word.
fn pasted(path: &Path) -> String {
    let path = path.display().to_string();
    let plain = |letter: char| letter.is_alphanumeric() || "-_./".contains(letter);
    if path.chars().all(plain) { path } else { format!("'{}'", path.replace('\'', r"'\''")) }
}

fn others(bad: usize, rows: usize) -> String {
    match bad {
        0 | 1 => String::new(),
        more => format!("\n  and {} more of {rows} rows cannot be used", more - 1),
    }
}
