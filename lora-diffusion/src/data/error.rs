//! Why a folder cannot be trained on, with what to type instead.

use std::{io, path::PathBuf};

/// The result of every fallible function of this module.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Nothing is there.
    #[error("{}: no such file or folder", path.display())]
    NotFound {
        /// What was asked for.
        path: PathBuf,
    },
    /// A file was given where a folder is wanted.
    #[error("{}: a file, expected a folder of pictures", path.display())]
    NotAFolder {
        /// The file.
        path: PathBuf,
        /// Whether it is a picture by its content.
        picture: bool,
    },
    /// A folder without a single usable picture.
    #[error("{}: no picture that can be trained on; {found}", path.display())]
    NoPictures {
        /// The folder.
        path: PathBuf,
        /// What was found instead.
        found: String,
        /// Whether pictures are there, all of them unusable.
        all_bad: bool,
    },
    /// Pictures without a single caption, and nothing to say in their place.
    #[error("{}: none of the {pictures} pictures has a caption{}", path.display(), and_strays(strays))]
    NoCaptions {
        /// The folder.
        path: PathBuf,
        /// Number of pictures.
        pictures: usize,
        /// Text files that belong to no picture: perhaps they were meant to.
        strays: Vec<String>,
        /// The folder's name, for the hint.
        name: String,
    },
    /// Captions with a place for a trigger word that was not given.
    #[error("{}: the caption says `[trigger]`, but there is no trigger word ({count} such captions)", path.display())]
    NoTrigger {
        /// The first such picture.
        path: PathBuf,
        /// How many there are.
        count: usize,
    },
    /// So many unusable pictures that something else is wrong.
    #[error("{}: {bad} of {total} pictures cannot be used, the first because {reason}", path.display())]
    TooManyBad {
        /// The folder.
        path: PathBuf,
        /// Unusable pictures.
        bad: usize,
        /// All pictures.
        total: usize,
        /// Name of the first and why.
        reason: String,
    },
    /// A picture that was there at the scan and is not what it was.
    #[error("{}: {reason}", path.display())]
    Changed {
        /// The picture.
        path: PathBuf,
        /// What is different.
        reason: String,
    },
    /// A picture that does not decode after all.
    #[error("{}: {source}", path.display())]
    Picture {
        /// The picture.
        path: PathBuf,
        /// Why not.
        source: super::Unusable,
    },
    /// Resizing was refused.
    #[error("cannot resize: {reason}")]
    Resize {
        /// Why.
        reason: String,
    },
    /// Numbers that are not finite came out of a model.
    #[error("{what}: the {model} gives numbers that are not finite")]
    NotFinite {
        /// The picture or the caption.
        what: String,
        /// The model.
        model: &'static str,
    },
    /// A file or folder could not be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file could not be written.
    #[error("cannot write {}", path.display())]
    Write {
        /// The path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A setting that cannot be.
    #[error("{option}: {reason}")]
    Option {
        /// The option as a person writes it.
        option: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// A tensor file was refused.
    #[error(transparent)]
    Core(#[from] lora_core::Error),
    /// libtorch refused something.
    #[error(transparent)]
    Torch(#[from] lora_torch::Error),
}

impl From<tch::TchError> for Error {
    fn from(error: tch::TchError) -> Self {
        Self::Torch(error.into())
    }
}

/// The layouts of a folder that are understood, for hints.
const LAYOUTS: &str = "a folder is understood as any of\n  \
    pictures with captions beside them:  cat.png, cat.txt (or cat.caption)\n  \
    kohya folders with repeats:          10_style/cat.png, 10_style/cat.txt\n  \
    a table of captions:                 metadata.jsonl with {\"file_name\": \"cat.png\", \"text\": \"a cat\"}";

impl Error {
    /// What to do about it, where there is something.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Self::NotFound { path } => format!("check the spelling; `ls {}`", parent(path)),
            Self::NotAFolder { path, picture: true } => {
                format!("give the folder that the picture lies in: {}", parent(path))
            }
            Self::NotAFolder { .. } => LAYOUTS.to_owned(),
            Self::NoPictures { path, all_bad: true, .. } => {
                format!("`lora data check {}` lists every file with its reason", quoted(path))
            }
            Self::NoPictures { .. } => LAYOUTS.to_owned(),
            Self::NoCaptions { name, .. } => format!(
                "write a caption for each picture into a .txt file of the same name, or give all of them one: \
                 --trigger \"{name} style\""
            ),
            Self::NoTrigger { .. } => "say what stands for it, for example --trigger \"sks\"".to_owned(),
            Self::TooManyBad { path, .. } => {
                format!("`lora data check {}` lists them; --allow-bad trains on the others", quoted(path))
            }
            Self::Changed { .. } => "leave the pictures alone while they are read, then start again".to_owned(),
            Self::NotFinite { model: "VAE", .. } => {
                "compute the VAE in 32 bits, or use another VAE; half precision overflows in some".to_owned()
            }
            _ => return None,
        })
    }
}

fn and_strays(files: &[String]) -> String {
    match files {
        [] => String::new(),
        [first] => format!("; a text file belongs to none of them ({first})"),
        [first, ..] => format!("; {} text files belong to none of them (the first is {first})", files.len()),
    }
}

fn parent(path: &std::path::Path) -> String {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => quoted(parent),
        _ => ".".to_owned(),
    }
}

/// A path that a shell takes as one word.
fn quoted(path: &std::path::Path) -> String {
    let text = path.display().to_string();
    let plain = |letter: char| letter.is_alphanumeric() || "/._-+,@%:~".contains(letter);
    if !text.is_empty() && text.chars().all(plain) { text } else { format!("'{}'", text.replace('\'', r"'\''")) }
}
