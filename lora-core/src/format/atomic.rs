//! Files that are there whole or not at all.
//!
//! The content goes to a temporary file beside the target, reaches the disk, is read back, and only then takes the
//! target's name. Killing the program at any moment leaves the old file or the new one; a reader that has the old one
//! open or mapped keeps it, so output over input is safe. What a killed run leaves beside them, the next one removes: a
//! temporary file is locked for as long as its writer lives.

use std::{
    ffi::{OsStr, OsString},
    fs::{File, Permissions},
    io::{self, BufWriter, Write},
    path::Path,
};

use super::{Fault, unfinished::Unfinished};
use crate::{Error, Result};

/// How temporary neighbours of a file end: nobody else's do.
pub(super) const SUFFIX: &str = ".lora-tmp";

/// Random letters and digits in the name of a temporary neighbour.
pub(super) const RANDOM: usize = 6;

/// Room for many small tensors per call of the operating system.
const BUFFER: usize = 1 << 20;

/// Writes a file, or leaves everything as it was.
///
/// The mode is that of any new file (`0666` less the umask). A symbolic link at `path` is replaced, what it points to
/// is left alone: models in a download cache are links into a store that others share.
///
/// # Errors
/// If the folder does not exist, `path` is a folder, device or pipe, or any step fails; what was there then still is.
pub fn write_atomically(path: &Path, write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<()> {
    let failed = |source| Error::Write { path: path.to_owned(), source };
    replace(path, |out| write(out).map_err(failed), |_| Ok(()))
}

/// [`write_atomically`] with a look at the finished temporary file before it takes its place.
pub(super) fn replace(
    path: &Path,
    write: impl FnOnce(&mut dyn Write) -> Result<()>,
    check: impl FnOnce(&Path) -> Result<()>,
) -> Result<()> {
    let failed = |source| Error::Write { path: path.to_owned(), source };
    let through_buffer = |file: &File| {
        let mut counting = Counting { out: BufWriter::with_capacity(BUFFER, file), bytes: 0 };
        write(&mut counting)?;
        counting.out.flush().map_err(failed)?;
        Ok(counting.bytes)
    };
    replace_file(path, through_buffer, check)
}

/// [`replace`] for whoever writes into the temporary file itself; `write` gives the count of bytes.
pub(super) fn replace_file(
    path: &Path,
    write: impl FnOnce(&File) -> Result<u64>,
    check: impl FnOnce(&Path) -> Result<()>,
) -> Result<()> {
    let failed = |source| Error::Write { path: path.to_owned(), source };
    let name =
        path.file_name().ok_or_else(|| failed(io::Error::new(io::ErrorKind::InvalidInput, "it is no file name")))?;
    match std::fs::metadata(path) {
        Ok(found) if found.is_dir() => {
            return Err(failed(io::Error::new(io::ErrorKind::IsADirectory, "it is a folder")));
        }
        // Renaming over it would take it from everybody who uses it.
        Ok(found) if !found.is_file() => {
            return Err(failed(io::Error::new(io::ErrorKind::InvalidInput, "it is a device or a pipe, not a file")));
        }
        _ => {}
    }
    let folder = folder_of(path);
    remove_abandoned(path);
    let mut builder = tempfile::Builder::new();
    let prefix = hidden_prefix(name);
    builder.prefix(&prefix).rand_bytes(RANDOM).suffix(SUFFIX);
    #[cfg(unix)]
    builder.permissions(<Permissions as std::os::unix::fs::PermissionsExt>::from_mode(0o666));
    // The folder's own error has the system's words, which an error of the temporary file has lost.
    std::fs::metadata(folder).map_err(failed)?;
    let temporary = builder.tempfile_in(folder).map_err(|error| failed(without_path(error)))?;
    hold(temporary.as_file());
    let unfinished = Unfinished::new(temporary.path());

    let written = write(temporary.as_file())?;
    temporary.as_file().sync_all().map_err(failed)?;

    let found = std::fs::metadata(temporary.path()).map_err(failed)?.len();
    if found != written {
        return Err(Error::file(path, Fault::ReadBack { what: format!("{found} bytes instead of {written}") }));
    }
    check(temporary.path())?;
    unfinished.finish(|| temporary.persist(path)).map_err(|error| failed(error.error))?;
    sync_folder(folder).map_err(failed)
}

/// What the system said of the temporary file, whose random name says nothing to a person.
pub(super) fn without_path(error: io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(_) => error,
        None => error.kind().into(),
    }
}

/// The folder that a path lies in.
pub(super) fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

/// How temporary neighbours of a file begin.
pub(super) fn hidden_prefix(name: &OsStr) -> OsString {
    let mut prefix = OsString::from(".");
    prefix.push(name);
    prefix.push(".");
    // A long name plus the random part may exceed what file systems take.
    if prefix.len() > 200 { ".lora.".into() } else { prefix }
}

/// Removes what killed runs left of a file or folder: temporary neighbours whose writer is no more.
///
/// Whoever writes to `path` does so anyway; who first asks for room on the disk wants it done before. What cannot be removed
/// stays.
pub fn remove_abandoned(path: &Path) {
    let Some(prefix) = path.file_name().map(hidden_prefix) else { return };
    let is_temporary = |name: &OsStr| {
        let rest = name.as_encoded_bytes().strip_prefix(prefix.as_encoded_bytes());
        let random = rest.and_then(|rest| rest.strip_suffix(SUFFIX.as_bytes()));
        random.is_some_and(|random| random.len() == RANDOM && random.iter().all(u8::is_ascii_alphanumeric))
    };
    for entry in std::fs::read_dir(folder_of(path)).into_iter().flatten().flatten() {
        let left = entry.path();
        if !is_temporary(&entry.file_name()) || !File::open(&left).is_ok_and(|file| is_abandoned(&file)) {
            continue;
        }
        let _ = match entry.file_type() {
            Ok(kind) if kind.is_dir() => std::fs::remove_dir_all(left),
            Ok(kind) if kind.is_file() => std::fs::remove_file(left),
            _ => Ok(()),
        };
    }
}

/// Says to other runs that somebody is at work on a temporary file or folder, for as long as it is open here.
///
/// Elsewhere than on Unix a lock keeps readers out, this program's own read-back among them. Where the file system knows no
/// locks, nothing is ever taken for abandoned.
pub(super) fn hold(file: &File) {
    if cfg!(unix) {
        let _ = file.try_lock();
    }
}

fn is_abandoned(file: &File) -> bool {
    cfg!(unix) && file.try_lock().is_ok()
}

struct Counting<W> {
    out: W,
    bytes: u64,
}

impl<W: Write> Write for Counting<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.out.write(bytes)?;
        self.bytes += written as u64;
        Ok(written)
    }
    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// Makes the new name itself survive a power cut; Windows has no such call and needs none.
pub(super) fn sync_folder(folder: &Path) -> io::Result<()> {
    if cfg!(unix) { File::open(folder)?.sync_all() } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_write_leaves_the_old_file_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.txt");
        write_atomically(&path, |out| out.write_all(b"old")).unwrap();
        let error = write_atomically(&path, |out| {
            out.write_all(b"half")?;
            Err(io::Error::from(io::ErrorKind::StorageFull))
        });
        assert!(matches!(error, Err(Error::Write { .. })));
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[cfg(unix)]
    #[test]
    fn the_mode_is_that_of_an_ordinary_new_file() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let (ours, plain) = (folder.path().join("ours"), folder.path().join("plain"));
        write_atomically(&ours, |out| out.write_all(b"x")).unwrap();
        std::fs::write(&plain, b"x").unwrap();
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode();
        assert_eq!(mode(&ours), mode(&plain));
    }

    #[cfg(unix)]
    #[test]
    fn a_link_is_replaced_and_its_target_stays() {
        let folder = tempfile::tempdir().unwrap();
        let (blob, link) = (folder.path().join("blob"), folder.path().join("link"));
        std::fs::write(&blob, b"shared").unwrap();
        std::os::unix::fs::symlink(&blob, &link).unwrap();
        write_atomically(&link, |out| out.write_all(b"mine")).unwrap();
        assert_eq!(std::fs::read(&blob).unwrap(), b"shared");
        assert_eq!(std::fs::read(&link).unwrap(), b"mine");
    }

    #[cfg(unix)]
    #[test]
    fn what_a_killed_run_left_goes_and_what_a_living_one_holds_stays() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.txt");
        let place = |name: &str| folder.path().join(name);
        let others = [".a.txt.backup.tmp", ".a.txt.older.lora-tmp", ".b.txt.k1Lled.lora-tmp", "a.txt.lora-tmp"];
        for name in [".a.txt.k1Lled.lora-tmp", ".a.txt.l1ving.lora-tmp"].iter().chain(&others) {
            std::fs::write(place(name), b"half").unwrap();
        }
        std::fs::create_dir(place(".a.txt.f0lder.lora-tmp")).unwrap();
        std::fs::write(place(".a.txt.f0lder.lora-tmp/b"), b"half").unwrap();
        let living = File::open(place(".a.txt.l1ving.lora-tmp")).unwrap();
        hold(&living);
        write_atomically(&path, |out| out.write_all(b"new")).unwrap();
        let mut names: Vec<_> =
            std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        let mut left: Vec<_> = others.into_iter().chain([".a.txt.l1ving.lora-tmp", "a.txt"]).collect();
        left.sort_unstable();
        assert_eq!(names, left);
    }

    #[cfg(unix)]
    #[test]
    fn a_pipe_stays_a_pipe() {
        use std::os::unix::fs::FileTypeExt as _;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pipe");
        assert!(std::process::Command::new("mkfifo").arg(&path).status().unwrap().success());
        let error = write_atomically(&path, |out| out.write_all(b"x")).unwrap_err();
        assert!(error.to_string().contains("pipe"), "{error}");
        assert!(std::fs::metadata(&path).unwrap().file_type().is_fifo());
    }

    #[test]
    fn a_folder_is_never_overwritten() {
        let folder = tempfile::tempdir().unwrap();
        assert!(write_atomically(folder.path(), |out| out.write_all(b"x")).is_err());
        assert!(write_atomically(&folder.path().join("no/such/folder"), |out| out.write_all(b"x")).is_err());
    }
}
