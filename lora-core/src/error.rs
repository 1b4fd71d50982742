//! Everything that can go wrong in this crate, with what was seen and what was expected as fields.

use std::{
    io,
    path::{Path, PathBuf},
};

use crate::format::Fault;

/// The result of every fallible function here.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file could not be written; what stood there before still stands.
    #[error("cannot write {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file's content breaks a rule.
    #[error("{}: {fault}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The rule.
        fault: Box<Fault>,
    },
    /// An operation was given tensors that do not fit together.
    #[error("{operation}: shapes {} do not fit", listed(shapes))]
    Shapes {
        /// The operation.
        operation: &'static str,
        /// The shapes it was given.
        shapes: Vec<Vec<usize>>,
    },
    /// A setting that no adapter can have.
    #[error("{option}: {reason}")]
    Config {
        /// The option as a person writes it.
        option: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// A pattern for target modules that is no regular expression.
    #[error("`{pattern}` is neither a preset nor a regular expression")]
    Pattern {
        /// What was written.
        pattern: String,
        /// What is wrong with it.
        source: regex::Error,
    },
    /// A preset or pattern that matches no module of the model.
    #[error("no module of this model matches `{wanted}`{}", alternatives(near))]
    NoTarget {
        /// The preset or pattern.
        wanted: String,
        /// Presets and endings of module paths that look like it, the nearest first.
        near: Vec<String>,
    },
    /// A matrix that has no inverse, or a decomposition that did not converge.
    #[error("{operation}: {reason}")]
    Numeric {
        /// The operation.
        operation: &'static str,
        /// What happened.
        reason: String,
    },
    /// A foreign backend's own error.
    #[error("{operation} failed on this backend")]
    Backend {
        /// The operation.
        operation: &'static str,
        /// Its cause.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl Error {
    /// A failure of the arithmetic on one module with the file and the module that it concerns; any other error as it is.
    #[must_use]
    pub fn in_module(self, path: &Path, module: &str) -> Self {
        match self {
            Self::Numeric { reason, .. } => {
                Self::file(path, Fault::Indecomposable { module: module.to_owned(), reason })
            }
            other => other,
        }
    }

    /// The same with a path below `from` called as it will be once that lies at `to`.
    pub(crate) fn moved(mut self, from: &Path, to: &Path) -> Self {
        if let Self::Read { path, .. } | Self::Write { path, .. } | Self::File { path, .. } = &mut self
            && let Ok(rest) = path.strip_prefix(from)
        {
            // Joined with nothing, a path gets a slash at its end.
            *path = if rest.as_os_str().is_empty() { to.to_owned() } else { to.join(rest) };
        }
        self
    }

    /// A fault with the file that it was found in.
    pub(crate) fn file(path: &Path, fault: Fault) -> Self {
        Self::File { path: path.to_owned(), fault: Box::new(fault) }
    }
}

fn listed(shapes: &[Vec<usize>]) -> String {
    shapes.iter().map(|shape| format!("{shape:?}")).collect::<Vec<_>>().join(" and ")
}

fn alternatives(near: &[String]) -> String {
    match near {
        [] => String::new(),
        _ => format!("; near it: {}", near.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")),
    }
}
