//! Which file of a folder is meant, where it has no model's layout: the one adapter in it.

use std::path::{Path, PathBuf};

use lora_core::{
    Error,
    format::{BaseModel, Fault, TensorFile, adapter_path},
};

use super::has_adapters;
use crate::{
    Failure,
    failure::{printable, shell_word},
};

/// Files that are named.
const NAMED: usize = 8;

/// What a folder holds.
pub(super) enum Folder {
    /// An adapter, or something else that is no base, in this file.
    File(PathBuf),
    /// A base, or a component of one.
    Base(BaseModel),
}

/// Looks into a folder.
///
/// # Errors
/// If it holds neither, or several adapters.
pub(super) fn open(folder: &Path) -> Result<Folder, Failure> {
    if let Ok(file) = adapter_path(folder) {
        return Ok(Folder::File(file));
    }
    let files = safetensors(folder);
    // What cannot be opened is named by what opens it next.
    let is_adapter = |file: &&PathBuf| TensorFile::open(file).is_ok_and(|file| has_adapters(&file));
    let adapters: Vec<&PathBuf> = files.iter().filter(is_adapter).collect();
    if let ([adapter], 1) = (&adapters[..], files.len()) {
        return Ok(Folder::File((*adapter).clone()));
    }
    match (BaseModel::open(folder), adapters.first(), &files[..]) {
        (Ok(base), _, _) => Ok(Folder::Base(base)),
        (Err(_), Some(first), _) => Err(several(folder, &files, first)),
        (Err(Error::File { fault, .. }), None, [only]) if matches!(*fault, Fault::NotABase { .. }) => {
            Ok(Folder::File(only.clone()))
        }
        (Err(error), None, _) => Err(error.into()),
    }
}

/// The files of a folder that are called so, in the order of their names.
fn safetensors(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    let is_file = |path: &PathBuf| path.extension().is_some_and(|end| end == "safetensors") && path.is_file();
    let mut files: Vec<PathBuf> = entries.filter(is_file).collect();
    files.sort();
    files
}

fn several(folder: &Path, files: &[PathBuf], first: &Path) -> Failure {
    let name = |file: &Path| file.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let message = format!("{} holds {} .safetensors files, of which any could be meant", folder.display(), files.len());
    let failure = files
        .iter()
        .take(NAMED)
        .fold(Failure::new("several_files", message), |failure, file| failure.detail(printable(&name(file))));
    let failure = match files.len().saturating_sub(NAMED) {
        0 => failure,
        more => failure.detail(format!("and {more} more")),
    };
    failure
        .hint(format!("name one of them: `lora inspect {}`", shell_word(&first.display().to_string())))
        .with("path", folder.display().to_string())
        .with("files", files.iter().map(|file| name(file)).collect::<Vec<_>>())
}
