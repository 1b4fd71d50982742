//! The commands that need no libtorch: one verb, one file, one `run`.

pub(crate) mod adapters;
pub(crate) mod check;
pub(crate) mod completions;
pub(crate) mod config;
pub(crate) mod convert;
pub(crate) mod diff;
pub(crate) mod doctor;
pub(crate) mod extract;
pub(crate) mod import;
pub(crate) mod inspect;
pub(crate) mod man;
pub(crate) mod merge;
pub(crate) mod metadata;
pub(crate) mod mix;
#[cfg(feature = "hub")]
pub(crate) mod pull;
#[cfg(not(feature = "hub"))]
#[path = "no_pull.rs"]
pub(crate) mod pull;
pub(crate) mod report;
pub(crate) mod resize;
pub(crate) mod runs;

use std::{
    io,
    path::{Path, PathBuf},
};

use lora_core::hub;

use crate::Failure;

/// Where a base is: a path, or a name that the cache of the hub has.
///
/// # Errors
/// If a name leads nowhere.
pub(crate) fn locate(base: impl AsRef<Path>) -> Result<PathBuf, Failure> {
    let base = base.as_ref();
    Ok(match base.to_str() {
        Some(text) => hub::locate(text)?,
        None => base.to_owned(), // no name has such letters
    })
}

/// Output that could not be written: a full disk behind `>`.
pub(crate) fn output(error: io::Error) -> Failure {
    Failure::new("output", format!("cannot write the output: {error}"))
}
