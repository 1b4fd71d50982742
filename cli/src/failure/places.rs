//! What to do about a path that cannot be read or written: the reason that the system gives, looked at again on the disk.

use std::{
    io::{self, ErrorKind},
    path::Path,
};

use super::shell_word;

/// What to do where a file could not be read.
pub(super) fn unread(path: &Path, why: &io::Error) -> String {
    if is_loop(why) {
        return "its symbolic links lead to each other: name the file itself".to_owned();
    }
    match std::fs::metadata(path) {
        Ok(found) if found.is_dir() => return "name the .safetensors file in it".to_owned(),
        Ok(found) if !found.is_file() => return format!("it is {}: name a file on a disk", special(&found)),
        _ => {}
    }
    match why.kind() {
        ErrorKind::PermissionDenied if path.symlink_metadata().is_err() => {
            format!("is its folder yours to enter? `ls -ld {}` shows whose it is", word(nearest(path)))
        }
        ErrorKind::PermissionDenied => "is it yours to read?".to_owned(),
        ErrorKind::NotFound => match path.read_link() {
            Ok(target) => format!("it is a link to {}, which is not there", target.display()),
            Err(_) => format!("there is no such file; `ls {}` shows what is there", word(nearest(path))),
        },
        ErrorKind::NotADirectory => format!("{} is a file and no folder", nearest(path).display()),
        _ => "can other programs read it? the disk, or the network that it lies on, may be failing".to_owned(),
    }
}

/// What to do where a file or folder could not be written.
pub(super) fn unwritten(path: &Path, why: &io::Error) -> String {
    if is_loop(why) {
        return "its symbolic links lead to each other: name another place".to_owned();
    }
    match why.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => format!(
            "free some space (`df -h {}` shows what is left), or name a place on another disk",
            word(nearest(path))
        ),
        ErrorKind::FileTooLarge => format!(
            "a limit (`ulimit -f`) or the disk (`df -h {}`) takes no file of that size: name a place on another disk",
            word(nearest(path))
        ),
        ErrorKind::IsADirectory => format!("name a file in it, as {}", word(&path.join("NAME.safetensors"))),
        ErrorKind::InvalidInput if path.file_name().is_none() => {
            format!("name something in it, as {}", word(&path.join("NAME")))
        }
        ErrorKind::AlreadyExists | ErrorKind::DirectoryNotEmpty => "name one that is not there yet".to_owned(),
        ErrorKind::NotFound | ErrorKind::NotADirectory => missing_folder(path),
        ErrorKind::ReadOnlyFilesystem | ErrorKind::PermissionDenied => "name a place that you may write to".to_owned(),
        ErrorKind::InvalidFilename => "its name is longer than the disk takes: choose a shorter one".to_owned(),
        _ => "name another place".to_owned(),
    }
}

/// What is wrong with the way to a place, whose last folder cannot be used.
fn missing_folder(path: &Path) -> String {
    let found = nearest(path);
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    match found.is_dir() {
        // A slash at the end asks for a folder, which a file never becomes.
        _ if path.as_os_str().as_encoded_bytes().ends_with(b"/") => "leave out the slash at the end".to_owned(),
        true if found != folder && found != path => format!("`mkdir -p {}` makes the folder", word(folder)),
        true => "name another place".to_owned(),
        false => format!("{} is no folder: name another place", found.display()),
    }
}

/// The longest beginning of a path that is there, be it a link to nothing; the working folder if none is.
fn nearest(path: &Path) -> &Path {
    let there = |path: &&Path| !path.as_os_str().is_empty() && path.symlink_metadata().is_ok();
    path.ancestors().find(there).unwrap_or(Path::new("."))
}

fn is_loop(why: &io::Error) -> bool {
    cfg!(unix) && why.raw_os_error() == Some(libc::ELOOP)
}

#[cfg(unix)]
fn special(found: &std::fs::Metadata) -> &'static str {
    use std::os::unix::fs::FileTypeExt as _;
    let kind = found.file_type();
    match (kind.is_fifo(), kind.is_socket()) {
        (true, _) => "a pipe",
        (_, true) => "a socket",
        _ => "a device",
    }
}

#[cfg(not(unix))]
fn special(_found: &std::fs::Metadata) -> &'static str {
    "a device"
}

fn word(path: &Path) -> String {
    shell_word(&as_argument(path))
}

/// A path as an argument that no program takes for an option.
pub(crate) fn as_argument(path: &Path) -> String {
    let text = path.display().to_string();
    if text.starts_with('-') { format!("./{text}") } else { text }
}

/// A name beside a file for what is made of it: another end, and never the name of the file itself.
pub(crate) fn beside(path: &Path, end: &str) -> String {
    let other = path.with_extension(end);
    as_argument(&if other == path { path.with_extension(format!("converted.{end}")) } else { other })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_made_of_a_file_has_another_name() {
        for (path, other) in [
            ("a.ckpt", "a.safetensors"),
            ("a.safetensors", "a.converted.safetensors"),
            ("-x.pt", "./-x.safetensors"),
            ("models/a", "models/a.safetensors"),
        ] {
            assert_eq!(beside(Path::new(path), "safetensors"), other);
        }
    }

    #[test]
    fn space_is_asked_for_where_there_is_none() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        std::fs::write(&file, "").unwrap();
        let at = |end: &str| folder.path().join(end);
        for (path, kind, hint) in [
            (at("new"), ErrorKind::StorageFull, "df -h"),
            (at("new"), ErrorKind::QuotaExceeded, "df -h"),
            (at("a/b/new"), ErrorKind::NotFound, "mkdir -p"),
            (at("file/new"), ErrorKind::NotADirectory, "file is no folder"),
            (at("new/"), ErrorKind::NotADirectory, "slash at the end"),
            (at("new"), ErrorKind::PermissionDenied, "may write to"),
            (at(""), ErrorKind::IsADirectory, "NAME.safetensors"),
            (".".into(), ErrorKind::InvalidInput, "./NAME"),
            (at("new"), ErrorKind::InvalidInput, "name another place"),
            (at("file"), ErrorKind::AlreadyExists, "not there yet"),
        ] {
            let said = unwritten(&path, &kind.into());
            assert!(said.contains(hint), "{}: {said}", path.display());
            assert_eq!(said.contains("df -h"), hint == "df -h", "{said}");
            assert_eq!(said.contains("mkdir"), hint == "mkdir -p", "{said}");
        }
    }
}
