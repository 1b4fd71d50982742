//! What this process is writing at the moment, so that a program that is told to stop leaves nothing of it behind.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

static UNFINISHED: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// How often a folder is emptied into which other threads still write.
const ATTEMPTS: usize = 10;

/// A temporary file or folder, for as long as it is one.
pub(super) struct Unfinished {
    path: PathBuf,
}

impl Unfinished {
    pub(super) fn new(path: &Path) -> Self {
        UNFINISHED.lock().unwrap_or_else(PoisonError::into_inner).push(path.to_owned());
        Self { path: path.to_owned() }
    }

    /// Gives it its final name by `rename`, and does not let [`remove_unfinished`] come between.
    pub(super) fn finish<T>(self, rename: impl FnOnce() -> T) -> T {
        let mut unfinished = UNFINISHED.lock().unwrap_or_else(PoisonError::into_inner);
        let renamed = rename();
        unfinished.retain(|path| *path != self.path);
        drop(unfinished);
        renamed
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        UNFINISHED.lock().unwrap_or_else(PoisonError::into_inner).retain(|path| *path != self.path);
    }
}

/// Removes the temporary files and folders that this process is writing, and says whether there were any.
///
/// For a program that is told to stop, right before it exits: from then on no write of this process comes to an end.
pub fn remove_unfinished() -> bool {
    let unfinished = UNFINISHED.lock().unwrap_or_else(PoisonError::into_inner);
    for path in unfinished.iter() {
        // A folder may get another file while it is emptied.
        let gone = || fs::remove_file(path).is_ok() || fs::remove_dir_all(path).is_ok() || !path.exists();
        let _ = (0..ATTEMPTS).any(|_| gone());
    }
    let any = !unfinished.is_empty();
    std::mem::forget(unfinished);
    any
}
