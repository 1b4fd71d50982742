//! Which files a folder holds, sorted by what they are for; nothing is opened but the beginning of a file.
//!
//! Folders are walked to the end; hidden files and what file managers leave behind are ignored; a finished run of ours is
//! not taken for training data. Names are compared in Unicode's composed form, since macOS writes `é` as two characters.

use std::{
    collections::HashSet,
    ffi::{OsStr, OsString},
    fs,
    io::Read as _,
    path::{Path, PathBuf},
};

use unicode_normalization::UnicodeNormalization as _;

use super::{
    Skipped,
    sniff::{Sniffed, promised, sniff},
};

/// Folders within folders, at most.
const MAX_DEPTH: usize = 16;

/// One folder with pictures or captions, and what lies directly in it.
#[derive(Debug, Default)]
pub(super) struct Folder {
    /// Where it is.
    pub path: PathBuf,
    /// Files that are pictures by name or by content, sorted.
    pub pictures: Vec<PathBuf>,
    /// `.txt` and `.caption` files, sorted.
    pub captions: Vec<PathBuf>,
    /// `metadata.jsonl` or `metadata.csv`.
    pub tables: Vec<PathBuf>,
}

/// What a walk found.
#[derive(Debug, Default)]
pub(super) struct Walk {
    /// Every folder that holds something of use, in the order of their paths.
    pub folders: Vec<Folder>,
    /// Files that are of no use, with the reason.
    pub others: Vec<(PathBuf, String)>,
    /// Hidden files and file managers' leftovers.
    pub ignored: usize,
    /// Folders that were entered, the first one not counted.
    pub entered: usize,
}

/// Walks over `root`.
pub(super) fn walk(root: &Path) -> std::io::Result<Walk> {
    let mut walk = Walk::default();
    let mut seen = HashSet::new();
    seen.extend(fs::canonicalize(root));
    // The root must be readable; a folder below it that is not is listed.
    fs::read_dir(root)?;
    enter(root, 0, &mut walk, &mut seen);
    walk.folders.sort_by(|a, b| a.path.cmp(&b.path));
    walk.others.sort();
    Ok(walk)
}

/// A file's name without its last extension, in composed form: what pictures, captions and masks are matched by.
pub(super) fn stem(path: &Path) -> OsString {
    composed(path.file_stem().unwrap_or_default())
}

/// A name in Unicode's composed form (NFC); names that are not Unicode stay as they are.
pub(super) fn composed(name: &OsStr) -> OsString {
    name.to_str().map_or_else(|| name.to_owned(), |name| name.nfc().collect::<String>().into())
}

/// The extension in lower case.
pub(super) fn extension(path: &Path) -> String {
    path.extension().map(|extension| extension.to_string_lossy().to_lowercase()).unwrap_or_default()
}

fn enter(path: &Path, depth: usize, walk: &mut Walk, seen: &mut HashSet<PathBuf>) {
    let entries = match fs::read_dir(path) {
        Ok(entries) => entries,
        Err(error) => return walk.others.push((path.to_owned(), format!("the folder cannot be read: {error}"))),
    };
    let mut paths: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    paths.sort_by_cached_key(|path| (composed(path.file_name().unwrap_or_default()), path.clone()));
    let mut folder = Folder { path: path.to_owned(), ..Folder::default() };
    for path in paths {
        if is_ignored(&path) {
            walk.ignored += 1;
            continue;
        }
        // Follows links, so that a folder of links to pictures works; a broken link is an error here.
        match fs::metadata(&path) {
            Err(error) => walk.others.push((path, format!("cannot be read: {error}"))),
            Ok(data) if data.is_dir() => {
                if is_run(&path) {
                    walk.others.push((path, "a folder of a training run".to_owned()));
                } else if depth == MAX_DEPTH {
                    walk.others.push((path, format!("more than {MAX_DEPTH} folders deep")));
                } else if fs::canonicalize(&path).is_ok_and(|real| seen.insert(real)) {
                    walk.entered += 1;
                    enter(&path, depth + 1, walk, seen);
                } else {
                    walk.others.push((path, "a link to a folder that is there already".to_owned()));
                }
            }
            Ok(data) if !data.is_file() => walk.others.push((path, "not a regular file".to_owned())),
            Ok(_) => sort_in(path, &mut folder, walk),
        }
    }
    if !(folder.pictures.is_empty() && folder.captions.is_empty() && folder.tables.is_empty()) {
        walk.folders.push(folder);
    }
}

fn sort_in(path: PathBuf, folder: &mut Folder, walk: &mut Walk) {
    let name = path.file_name().map(|name| name.to_string_lossy().to_lowercase()).unwrap_or_default();
    let extension = extension(&path);
    if matches!(name.as_str(), "metadata.jsonl" | "metadata.csv") {
        folder.tables.push(path);
    } else if matches!(extension.as_str(), "txt" | "caption") {
        folder.captions.push(path);
    } else if promised(&extension).is_some() {
        folder.pictures.push(path);
    } else {
        match beginning(&path).map(|bytes| sniff(&bytes)) {
            Ok(Sniffed::Picture(_) | Sniffed::Unsupported(_)) => folder.pictures.push(path),
            Ok(Sniffed::Other(what)) => walk.others.push((path, format!("not a picture: {what}"))),
            Ok(Sniffed::Text) => walk.others.push((path, Skipped::TEXT.to_owned())),
            Ok(Sniffed::Empty) => walk.others.push((path, "the file is empty".to_owned())),
            Ok(Sniffed::Unknown) if matches!(extension.as_str(), "safetensors" | "ckpt" | "pt" | "npz") => {
                walk.others.push((path, format!("not a picture: a .{extension} file")));
            }
            Ok(Sniffed::Unknown) => walk.others.push((path, "not a picture: unknown bytes".to_owned())),
            Err(error) => walk.others.push((path, format!("cannot be read: {error}"))),
        }
    }
}

fn beginning(path: &Path) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    fs::File::open(path)?.take(512).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn is_ignored(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    name.starts_with('.')
        || ["thumbs.db", "desktop.ini", "ehthumbs.db", "__macosx", "@eadir", "icon\r"].contains(&&*name.to_lowercase())
}

/// A run's folder holds pictures too: samples, which must not be learnt from by accident.
fn is_run(path: &Path) -> bool {
    path.join("config.toml").is_file() && (path.join("metrics.jsonl").is_file() || path.join("checkpoints").is_dir())
}
