//! What can go wrong with a run's folder.

use std::{
    io,
    path::{Path, PathBuf},
};

/// What went wrong, and with which file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunError {
    /// A new run was to be written where one is already.
    #[error("{} already holds a run", path.display())]
    Exists {
        /// The folder.
        path: PathBuf,
    },
    /// Another process writes to the run.
    #[error("{} is in use{}", path.display(), pid.map(|pid| format!(" by process {pid}")).unwrap_or_default())]
    Locked {
        /// The folder.
        path: PathBuf,
        /// The other process, if it said so.
        pid: Option<u32>,
    },
    /// A folder that holds no run.
    #[error("{} is not a run: {missing} is missing", path.display())]
    NotARun {
        /// The folder.
        path: PathBuf,
        /// The file that every run has.
        missing: &'static str,
    },
    /// A file of the run could not be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file of the run could not be written.
    #[error("cannot write {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A record that is not what this program writes.
    #[error("{}:{line}: not a record of this program", path.display())]
    Record {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// Why.
        source: serde_json::Error,
    },
}

impl RunError {
    /// The file or folder that it is about.
    pub fn path(&self) -> &Path {
        match self {
            Self::Exists { path }
            | Self::Locked { path, .. }
            | Self::NotARun { path, .. }
            | Self::Read { path, .. }
            | Self::Write { path, .. }
            | Self::Record { path, .. } => path,
        }
    }

    pub(crate) fn read(path: &Path) -> impl FnOnce(io::Error) -> Self + '_ {
        |source| Self::Read { path: path.to_owned(), source }
    }

    pub(crate) fn write(path: &Path) -> impl FnOnce(io::Error) -> Self + '_ {
        |source| Self::Write { path: path.to_owned(), source }
    }
}
