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
pub(crate) mod report;
pub(crate) mod resize;
pub(crate) mod runs;

use std::io;

use crate::Failure;

/// Output that could not be written: a full disk behind `>`.
pub(crate) fn output(error: io::Error) -> Failure {
    Failure::new("output", format!("cannot write the output: {error}"))
}
