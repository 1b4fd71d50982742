//! What can be wrong with options, with the place as a field.

use std::{
    fmt, io,
    path::{Path, PathBuf},
};

/// A place in a configuration file, printed as `file:line:column`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The file.
    pub path: PathBuf,
    /// Counted from 1.
    pub line: usize,
    /// In characters, counted from 1.
    pub column: usize,
}

impl Place {
    /// The place of the byte `offset` in `text`, the content of `path`.
    pub fn new(path: &Path, text: &str, offset: usize) -> Self {
        let before = &text[..text.floor_char_boundary(offset.min(text.len()))];
        let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
        Self {
            path: path.to_owned(),
            line: before.matches('\n').count() + 1,
            column: before[line_start..].chars().count() + 1,
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.path.display(), self.line, self.column)
    }
}

/// What is wrong with what was said.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// A configuration file could not be read.
    #[error("cannot read the configuration {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file is not TOML.
    #[error("{message} in {place}")]
    Syntax {
        /// Where.
        place: Place,
        /// What the parser says.
        message: String,
    },
    /// A file holds a key that no option has.
    #[error("unknown key `{key}` in {place}")]
    UnknownKey {
        /// Where.
        place: Place,
        /// The key.
        key: String,
        /// The key that was probably meant.
        suggestion: Option<String>,
    },
    /// A key has a value that it cannot have.
    #[error("bad value of `{key}` in {place}")]
    Value {
        /// Where.
        place: Place,
        /// The key.
        key: String,
        /// What was seen and expected.
        message: String,
    },
    /// A number is out of its range, whoever said it.
    #[error("`{option}` is {value}")]
    Invalid {
        /// The option as a flag.
        option: String,
        /// The value.
        value: String,
        /// What it must be.
        reason: String,
    },
    /// Something that has no default was not said.
    #[error("`{option}` is missing")]
    Missing {
        /// The option as a person writes it.
        option: &'static str,
        /// A command that has it.
        example: &'static str,
    },
    /// A key that was asked about does not exist.
    #[error("there is no option `{key}`")]
    NoSuchKey {
        /// The key.
        key: String,
        /// The key that was probably meant.
        suggestion: Option<String>,
    },
    /// A run is to go on with options that would make it another run.
    #[error("{} cannot go on with other options than it began with", run.display())]
    ResumeDiffers {
        /// The run's folder.
        run: PathBuf,
        /// Key, the run's value, the value that was asked for.
        changes: Vec<(String, String, String)>,
    },
}

impl ConfigError {
    pub(super) fn invalid(option: &str, value: impl ToString, reason: &str) -> Self {
        Self::Invalid { option: option.to_owned(), value: value.to_string(), reason: reason.into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_counted_in_characters() {
        let text = "a = 1\nß = \"ü\"\nrank = 3\n";
        let place = Place::new(Path::new("x.toml"), text, text.find('ü').unwrap());
        assert_eq!((place.line, place.column), (2, 6));
        assert_eq!(Place::new(Path::new("x.toml"), text, 10_000).line, 4);
    }
}
