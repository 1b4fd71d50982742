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

use crate::{Failure, failure::printable};

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

/// Refuses an output that would take the place of something that is read and is to stay, be it a file of a folder.
///
/// # Errors
/// If that is so.
pub(crate) fn spare<'a>(out: &Path, kept: impl IntoIterator<Item = &'a Path>) -> Result<(), Failure> {
    let folder = out.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let Some(place) = folder.canonicalize().ok().zip(out.file_name()).map(|(folder, name)| folder.join(name)) else {
        return Ok(());
    };
    // A link in that place is what would be replaced, not what it leads to.
    let is_lost = |path: &&Path| {
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let named = folder.canonicalize().ok().zip(path.file_name()).map(|(folder, name)| folder.join(name));
        let real = path.canonicalize().ok();
        [named, real].into_iter().flatten().any(|path| place == path || (place.starts_with(path) && out.exists()))
    };
    match kept.into_iter().find(is_lost) {
        None => Ok(()),
        Some(path) => {
            let [out, path] = [out, path].map(|path| path.display().to_string());
            Err(Failure::usage("output_is_input", format!("the output {out} would take the place of what is read"))
                .detail(format!("read       {}", printable(&path)))
                .hint("give the output a name of its own"))
        }
    }
}

/// Output that could not be written: a full disk behind `>`.
pub(crate) fn output(error: io::Error) -> Failure {
    Failure::new("output", format!("cannot write the output: {error}"))
}
