//! A model's place in the cache: blobs named by their hash, snapshots that link to them, refs that name snapshots.
//!
//! ```text
//! <cache>/models--org--name/blobs/<hash>                  a file, whole and checked
//!                           blobs/<hash>.incomplete       the half of one, which the next try goes on with
//!                           snapshots/<commit>/<path>     a link to its blob
//!                           refs/<revision>               the commit
//! <cache>/.locks/models--org--name/<hash>.lock            held by whoever fetches the blob
//! ```
//!
//! The locks are those of `huggingface_hub`, so both wait for each other. Not every file system knows locks; see `transfer`.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io,
    path::{Path, PathBuf},
};

use lora_core::{format::write_atomically, hub::ModelName};

use crate::{Error, Hash, Result, hub::Planned};

/// A model's folders in a cache.
#[derive(Debug, Clone)]
pub(crate) struct Store {
    root: PathBuf,
    locks: PathBuf,
    copies: bool,
}

impl Store {
    pub(crate) fn new(cache: &Path, name: &ModelName, copies: bool) -> Self {
        let folder = name.folder();
        // A relative cache would make links that lead elsewhere from another folder.
        let cache = std::path::absolute(cache).unwrap_or_else(|_| cache.to_owned());
        Self { root: cache.join(&folder), locks: cache.join(".locks").join(folder), copies }
    }

    pub(crate) fn snapshot(&self, commit: &str) -> PathBuf {
        self.root.join("snapshots").join(commit)
    }

    pub(crate) fn blob(&self, hash: &Hash) -> PathBuf {
        self.root.join("blobs").join(hash.digits())
    }

    pub(crate) fn incomplete(&self, hash: &Hash) -> PathBuf {
        self.root.join("blobs").join(format!("{}.incomplete", hash.digits()))
    }

    /// Whether the snapshot or the blobs have a file in full.
    pub(crate) fn has(&self, commit: &str, file: &Planned) -> bool {
        self.is_linked(commit, file) || is_whole(&self.blob(&file.hash), file.size)
    }

    fn is_linked(&self, commit: &str, file: &Planned) -> bool {
        is_whole(&self.snapshot(commit).join(&file.name), file.size)
    }

    /// Bytes of a file that an earlier try has left.
    pub(crate) fn half(&self, file: &Planned) -> u64 {
        fs::metadata(self.incomplete(&file.hash)).map_or(0, |found| found.len())
    }

    /// Holds a blob until the file that is given back is closed. `waiting` is called if somebody else holds it.
    ///
    /// # Errors
    /// If the lock's file cannot be made.
    pub(crate) fn hold(&self, hash: &Hash, waiting: impl FnOnce()) -> Result<File> {
        let path = self.locks.join(format!("{}.lock", hash.digits()));
        let failed = |source| Error::Store { path: path.clone(), source };
        create_folder(&self.locks)?;
        let file = OpenOptions::new().create(true).truncate(false).write(true).open(&path).map_err(failed)?;
        match file.try_lock() {
            Err(TryLockError::WouldBlock) => {
                waiting();
                file.lock().map_err(failed)?;
            }
            // A file system without locks costs a second download at worst.
            Ok(()) | Err(TryLockError::Error(_)) => {}
        }
        Ok(file)
    }

    /// Makes room for blobs.
    pub(crate) fn prepare(&self) -> Result<()> {
        create_folder(&self.root.join("blobs"))
    }

    /// Puts a file of a commit into its snapshot: a link, or where there can be none a second name or a copy.
    ///
    /// # Errors
    /// If neither can be made.
    pub(crate) fn link(&self, commit: &str, file: &Planned) -> Result<()> {
        if self.is_linked(commit, file) {
            return Ok(());
        }
        let place = self.snapshot(commit).join(&file.name);
        let failed = |source| Error::Store { path: place.clone(), source };
        create_folder(place.parent().unwrap_or(&self.root))?;
        if fs::symlink_metadata(&place).is_ok() {
            fs::remove_file(&place).map_err(failed)?; // a link to a blob that is gone
        }
        // From the file's folder up to the model's, so that the cache can be moved as a whole.
        let up = "../".repeat(file.name.matches('/').count() + 2);
        let linked = !self.copies && symlink(Path::new(&format!("{up}blobs/{}", file.hash.digits())), &place).is_ok();
        // A second name costs no space, where the file system has such; or another program may have been faster.
        let blob = self.blob(&file.hash);
        if linked || fs::hard_link(&blob, &place).is_ok() || self.is_linked(commit, file) {
            return Ok(());
        }
        let mut blob = File::open(blob).map_err(failed)?;
        write(&place, |out| io::copy(&mut blob, out).map(drop))
    }

    /// Lets a revision stand for a commit. A commit needs no ref to be found.
    ///
    /// # Errors
    /// If the ref cannot be written.
    pub(crate) fn set_ref(&self, revision: &str, commit: &str) -> Result<()> {
        let path = self.root.join("refs").join(revision);
        if revision == commit || fs::read_to_string(&path).is_ok_and(|known| known.trim() == commit) {
            return Ok(());
        }
        create_folder(path.parent().unwrap_or(&self.root))?;
        write(&path, |out| out.write_all(commit.as_bytes()))
    }
}

/// Writes a file whole or not at all.
fn write(path: &Path, write: impl FnOnce(&mut dyn io::Write) -> io::Result<()>) -> Result<()> {
    write_atomically(path, write).map_err(|error| match error {
        lora_core::Error::Write { path, source } => Error::Store { path, source },
        other => Error::Store { path: path.to_owned(), source: io::Error::other(other) },
    })
}

#[cfg(unix)]
fn symlink(target: &Path, place: &Path) -> io::Result<()> {
    std::os::unix::fs::symlink(target, place)
}

/// Windows gives links to administrators and developers alone.
#[cfg(not(unix))]
fn symlink(_target: &Path, _place: &Path) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

fn is_whole(path: &Path, size: u64) -> bool {
    fs::metadata(path).is_ok_and(|found| found.is_file() && found.len() == size)
}

fn create_folder(path: &Path) -> Result<()> {
    fs::create_dir_all(path).map_err(|source| Error::Store { path: path.to_owned(), source })
}
