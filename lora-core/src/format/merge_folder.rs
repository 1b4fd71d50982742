//! Merging into a model's folder: changed weights are written anew, everything else is copied beside them.
//!
//! The new folder grows under a hidden name next to its place and takes its name when it is complete. Over the base itself
//! the two folders change places, so that a reader finds the old one or the new one.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use serde_json::Value;

use super::{Layout, Merger, atomic, base::read_config, exchange::exchange, unfinished::Unfinished};
use crate::{Error, Result};

/// Folders below folders: more are a loop of links.
const DEPTH: usize = 16;

/// Files that hold weights, in whatever form.
const WEIGHTS: [&str; 9] = ["safetensors", "bin", "pt", "pth", "ckpt", "msgpack", "h5", "onnx", "gguf"];

impl Merger<'_> {
    /// Writes the whole base to `out`: a file for a base in one file, a folder for a folder. `base` is the path that
    /// the base was opened from; `out` may be the same.
    ///
    /// Weights of a changed component that were not read (another precision, a pickle) would be the unchanged model under
    /// another name; they are not copied but returned. `progress` is told how many bytes are written in all.
    ///
    /// # Errors
    /// As [`write`](Self::write); if `out` is a folder that holds files and is not the base, or lies inside the base.
    pub fn write_model(&self, base: &Path, out: &Path, progress: &mut dyn FnMut(u64)) -> Result<Vec<PathBuf>> {
        if !base.is_dir() {
            self.write(0, out, progress)?;
            return Ok(Vec::new());
        }
        let failed = |source| Error::Write { path: out.to_owned(), source };
        let refused = |kind, reason: &str| Err(failed(io::Error::new(kind, reason)));
        let parent = atomic::folder_of(out);
        let Some(name) = out.file_name() else {
            return refused(io::ErrorKind::InvalidInput, "it is no name of a folder");
        };
        let origin = base.canonicalize().map_err(|source| Error::Read { path: base.to_owned(), source })?;
        let over_base = out.canonicalize().is_ok_and(|out| out == origin);
        if !over_base && out.exists() {
            let empty = out.is_dir() && fs::read_dir(out).map_err(failed)?.next().is_none();
            if !empty {
                return refused(io::ErrorKind::AlreadyExists, "it exists and is not the base");
            }
        }
        if !over_base && parent.canonicalize().map_err(failed)?.starts_with(&origin) {
            return refused(io::ErrorKind::InvalidInput, "it lies inside the base");
        }
        atomic::remove_abandoned(out);
        let prefix = atomic::hidden_prefix(name);
        let mut builder = tempfile::Builder::new();
        builder.prefix(&prefix).rand_bytes(atomic::RANDOM).suffix(atomic::SUFFIX);
        #[cfg(unix)]
        builder.permissions(<fs::Permissions as std::os::unix::fs::PermissionsExt>::from_mode(0o777));
        let temporary = builder.tempdir_in(parent).map_err(|error| failed(atomic::without_path(error)))?;
        let held = File::open(temporary.path()).map_err(failed)?;
        atomic::hold(&held);
        let unfinished = Unfinished::new(temporary.path());

        let mut copy =
            FolderCopy { merger: self, stale: self.stale_folders(base), left_out: Vec::new(), done: 0, progress };
        copy.folder(base, temporary.path(), 0).map_err(|error| error.moved(temporary.path(), out))?;
        let left_out = copy.left_out;
        if over_base {
            // Where the name is a link, the folder behind it is the one that changes.
            unfinished.finish(|| exchange(temporary.path(), &origin)).map_err(failed)?;
        } else {
            unfinished.finish(|| fs::rename(temporary.path(), out)).map_err(failed)?;
            // The name is taken: there is nothing left to remove.
            drop(temporary.keep());
        }
        atomic::sync_folder(parent).map_err(failed)?;
        Ok(left_out)
    }

    /// The folders in which weights that were not read would contradict the merged ones.
    fn stale_folders(&self, base: &Path) -> BTreeSet<PathBuf> {
        match self.base().layout() {
            Layout::Diffusers => self.components().into_iter().map(|component| base.join(component.name())).collect(),
            _ => BTreeSet::from([base.to_owned()]),
        }
    }
}

struct FolderCopy<'a, 'b> {
    merger: &'a Merger<'b>,
    stale: BTreeSet<PathBuf>,
    left_out: Vec<PathBuf>,
    done: u64,
    progress: &'a mut dyn FnMut(u64),
}

impl FolderCopy<'_, '_> {
    fn folder(&mut self, from: &Path, to: &Path, depth: usize) -> Result<()> {
        let read = |source| Error::Read { path: from.to_owned(), source };
        let failed = |source| Error::Write { path: to.to_owned(), source };
        if depth > DEPTH {
            return Err(read(io::Error::other("its folders are nested too deeply: a loop of links?")));
        }
        let mut entries: Vec<_> =
            fs::read_dir(from).and_then(|entries| entries.collect::<io::Result<_>>()).map_err(read)?;
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            let (from, to) = (entry.path(), to.join(entry.file_name()));
            let kind = fs::metadata(&from).map_err(|source| Error::Read { path: from.clone(), source })?;
            if kind.is_dir() {
                fs::create_dir(&to).map_err(failed)?;
                self.folder(&from, &to, depth + 1)?;
            } else if kind.is_file() {
                self.file(&from, &to)?;
            }
        }
        atomic::sync_folder(to).map_err(failed)
    }

    fn file(&mut self, from: &Path, to: &Path) -> Result<()> {
        let files = self.merger.base().files();
        let index = files.iter().position(|file| file.path() == from);
        let before = self.done;
        if let Some(index) = index.filter(|index| self.merger.changes_file(*index)) {
            let progress = &mut self.progress;
            let mut written = 0;
            self.merger.write(index, to, &mut |bytes| {
                written = bytes;
                progress(before + bytes);
            })?;
            self.done += written;
            return Ok(());
        }
        if index.is_none() && self.is_stale(from) {
            self.left_out.push(from.to_owned());
            return Ok(());
        }
        if let Some(index) = self.index_of_shards(from)? {
            return atomic::write_atomically(to, |out| out.write_all(index.as_bytes()));
        }
        let failed = |source| Error::Write { path: to.to_owned(), source };
        let mut source = File::open(from).map_err(|source| Error::Read { path: from.to_owned(), source })?;
        // Made anew rather than with the old file's mode: files of a download cache are read-only.
        let mut copy = File::create(to).map_err(failed)?;
        self.done +=
            io::copy(&mut source, &mut copy).and_then(|bytes| copy.sync_all().map(|()| bytes)).map_err(failed)?;
        (self.progress)(self.done);
        Ok(())
    }

    /// Whether a file holds the unmerged weights of a component that is merged.
    fn is_stale(&self, file: &Path) -> bool {
        let in_stale_folder = file.parent().is_some_and(|folder| self.stale.contains(folder));
        let name = file.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
        let weights = file.extension().is_some_and(|end| WEIGHTS.iter().any(|known| end.eq_ignore_ascii_case(known)));
        let is_index = name.ends_with(".index.json") && !self.lists_read_files(file);
        in_stale_folder && self.merger.acted_on() > 0 && (weights || is_index)
    }

    /// Whether an index of shards names files of the base that were read.
    fn lists_read_files(&self, index: &Path) -> bool {
        let Ok(config) = read_config(index) else { return true };
        let mut named = config["weight_map"].as_object().into_iter().flatten().filter_map(|(_, name)| name.as_str());
        named.any(|name| self.merger.base().files().iter().any(|file| file.path() == index.with_file_name(name)))
    }

    /// The text of an index of shards whose sizes or names have changed; `None` for every other file.
    fn index_of_shards(&self, path: &Path) -> Result<Option<String>> {
        if !path.to_string_lossy().ends_with(".safetensors.index.json") || !self.lists_read_files(path) {
            return Ok(None);
        }
        let mut config = read_config(path)?;
        let mut total = 0;
        for (index, file) in self.merger.base().files().iter().enumerate() {
            let Some(name) = file.path().file_name().filter(|name| path.with_file_name(name) == file.path()) else {
                continue;
            };
            total += self.merger.bytes_of(index);
            if let Some(map) = config["weight_map"].as_object_mut() {
                for tensor in self.merger.new_tensors(index) {
                    map.insert(tensor.to_owned(), Value::from(name.to_string_lossy()));
                }
            }
        }
        if let Some(metadata) = config["metadata"].as_object_mut() {
            metadata.insert("total_size".to_owned(), Value::from(total));
        }
        Ok(Some(format!("{config:#}\n")))
    }
}
