//! From the files of a folder to pictures with captions, masks and repeats: the layouts that are understood.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    ffi::OsString,
    fmt, fs,
    path::{Component, Path, PathBuf},
};

use super::{
    Error, Masks, NoteKind, Result, ScanOptions, Skipped,
    caption::decode_text,
    table::{Table, csv, jsonl},
    walk::{Folder, Walk, composed, extension, stem, walk},
};

/// More repeats than this are a year or a number of something else, as in `2024_holidays`.
const MAX_REPEATS: u32 = 999;
/// What OneTrainer appends to a picture's name for its mask.
const MASK_SUFFIX: &str = "-masklabel";

/// A picture file with what belongs to it; not opened yet.
#[derive(Debug)]
pub(super) struct Candidate {
    pub path: PathBuf,
    /// Its path below the data folder.
    pub name: String,
    /// The caption beside it.
    pub caption: Option<PathBuf>,
    /// The caption of a table.
    pub text: Option<String>,
    pub mask: Option<PathBuf>,
    pub repeats: u32,
    /// The name of its kohya folder.
    pub concept: Option<String>,
}

/// What a folder comes to.
#[derive(Debug)]
pub(super) struct Gathered {
    pub candidates: Vec<Candidate>,
    pub skipped: Vec<Skipped>,
    /// In words.
    pub layout: String,
    pub notes: BTreeMap<(NoteKind, String), Vec<String>>,
    /// Folders that were entered.
    pub folders: usize,
}

/// `10_neon cat` is ten repeats of the concept `neon cat`.
pub(super) fn kohya(folder: &str) -> Option<(u32, String)> {
    let (number, name) = folder.split_once('_')?;
    let digits = number.bytes().all(|byte| byte.is_ascii_digit());
    let repeats = number.parse().ok().filter(|repeats| digits && *repeats <= MAX_REPEATS)?;
    let name = name.trim();
    (!name.is_empty()).then(|| (repeats, name.to_owned()))
}

/// Puts pictures, captions and masks together.
pub(super) fn gather(root: &Path, walk: Walk, options: &ScanOptions) -> Result<Gathered> {
    let mut gathered = Gathered {
        candidates: Vec::new(),
        skipped: Vec::new(),
        layout: String::new(),
        notes: BTreeMap::new(),
        folders: walk.entered,
    };
    for (path, reason) in walk.others {
        gathered.skip(root, &path, reason, false);
    }
    let mut layout = Layout::default();
    let mut texts = Rows::new();
    for folder in &walk.folders {
        gathered.read_tables(root, folder, &mut texts, &mut layout);
    }
    let masks = find_masks(root, &walk.folders, options)?;
    let mut used = HashSet::new();
    for folder in &walk.folders {
        gathered.take_folder(root, folder, &masks, &mut used, &mut texts, &mut layout);
    }
    for (path, (line, _)) in texts {
        let reason = format!("`{}` is not there", name_below(root, &path));
        gathered.skipped.push(Skipped { path: line, reason, bad: true });
    }
    for mask in masks.of.values().filter(|mask| !used.contains(*mask)) {
        gathered.skip(root, mask, "a mask without its picture".to_owned(), false);
    }
    gathered.layout = layout.to_string();
    Ok(gathered)
}

/// Captions of tables by the picture's path: the table's line, and the text if it has one.
type Rows = HashMap<PathBuf, (String, Option<String>)>;

/// All masks, whether their pictures are there or not.
#[derive(Debug, Default)]
struct MaskTable {
    /// By the path of the picture without its extension.
    of: HashMap<PathBuf, PathBuf>,
    files: HashSet<PathBuf>,
}

impl MaskTable {
    fn insert(&mut self, picture: &Path, mask: &Path) {
        self.of.insert(normal(picture), mask.to_owned());
        self.files.insert(mask.to_owned());
    }
}

impl Gathered {
    fn skip(&mut self, root: &Path, path: &Path, reason: String, bad: bool) {
        self.skipped.push(Skipped { path: name_below(root, path), reason, bad });
    }

    fn note(&mut self, kind: NoteKind, message: &str, file: String) {
        self.notes.entry((kind, message.to_owned())).or_default().push(file);
    }

    fn take_folder(
        &mut self,
        root: &Path,
        folder: &Folder,
        masks: &MaskTable,
        used: &mut HashSet<PathBuf>,
        texts: &mut Rows,
        layout: &mut Layout,
    ) {
        let captions = self.captions_by_stem(root, folder);
        let mut spoken_for = HashSet::new();
        let concept = concept_of(root, &folder.path);
        let (repeats, concept) = concept.map_or((1, None), |(repeats, name)| (repeats, Some(name)));
        for path in folder.pictures.iter().filter(|path| !masks.files.contains(*path)) {
            // A caption may be named after the picture's stem or after its whole name: cat.txt or cat.png.txt.
            let whole = composed(path.file_name().unwrap_or_default());
            let key = [stem(path), whole].into_iter().find(|key| captions.contains_key(key));
            let caption = key.map(|key| {
                let caption = captions[&key].clone();
                spoken_for.insert(key);
                caption
            });
            let text = texts.remove(&normal(path)).and_then(|(_, text)| text);
            let mask = masks.of.get(&normal(&path.with_extension(""))).cloned();
            let name = name_below(root, path);
            if repeats == 0 {
                self.skip(root, path, "its folder says 0 repeats".to_owned(), false);
                continue;
            }
            if let Some(mask) = &mask {
                used.insert(mask.clone());
                self.note(NoteKind::Masked, "the loss counts where the mask is white", name.clone());
            }
            layout.count(root, &folder.path, repeats, concept.as_deref(), caption.as_deref());
            self.candidates.push(Candidate {
                path: path.clone(),
                name,
                caption,
                text,
                mask,
                repeats,
                concept: concept.clone(),
            });
        }
        for (_, path) in captions.iter().filter(|(key, _)| !spoken_for.contains(*key)) {
            self.skip(root, path, Skipped::STRAY_CAPTION.to_owned(), false);
        }
    }

    /// Captions of one folder by what they are named after; `.txt` goes before `.caption`.
    fn captions_by_stem(&mut self, root: &Path, folder: &Folder) -> BTreeMap<OsString, PathBuf> {
        let mut captions: BTreeMap<OsString, PathBuf> = BTreeMap::new();
        let (txt, other): (Vec<&PathBuf>, Vec<&PathBuf>) =
            folder.captions.iter().partition(|path| extension(path) == "txt");
        for path in txt.into_iter().chain(other) {
            match captions.get(&stem(path)) {
                None => drop(captions.insert(stem(path), path.clone())),
                Some(first) if fs::read(first).ok() != fs::read(path).ok() => {
                    let message = "two captions of one picture differ; the .txt is used";
                    self.note(NoteKind::CaptionTwice, message, name_below(root, path));
                }
                Some(_) => {}
            }
        }
        captions
    }

    fn read_tables(&mut self, root: &Path, folder: &Folder, texts: &mut Rows, layout: &mut Layout) {
        for path in &folder.tables {
            let bytes = match fs::read(path) {
                Ok(bytes) => bytes,
                Err(error) => {
                    self.skip(root, path, format!("cannot be read: {error}"), true);
                    continue;
                }
            };
            let Table { rows, bad } = {
                let (text, _) = decode_text(&bytes);
                if extension(path) == "csv" { csv(&text) } else { jsonl(&text) }
            };
            let table = name_below(root, path);
            layout.tables.insert(path.file_name().unwrap_or_default().to_string_lossy().into_owned());
            for (line, reason) in bad {
                self.skipped.push(Skipped { path: format!("{table}:{line}"), reason, bad: true });
            }
            for (line, file, text) in rows {
                let line = format!("{table}:{line}");
                let file = Path::new(&file);
                if file.components().any(|part| !matches!(part, Component::Normal(_) | Component::CurDir)) {
                    let reason = format!("`{}` is outside of the folder", file.display());
                    self.skipped.push(Skipped { path: line, reason, bad: true });
                } else {
                    texts.insert(normal(&folder.path.join(file)), (line, text));
                }
            }
        }
    }
}

/// Masks of all pictures, by the path of the picture without its extension.
fn find_masks(root: &Path, folders: &[Folder], options: &ScanOptions) -> Result<MaskTable> {
    let mut masks = MaskTable::default();
    match &options.masks {
        Masks::Off => {}
        Masks::Folder(path) => {
            let found = walk(path).map_err(|source| Error::Read { path: path.clone(), source })?;
            for mask in found.folders.iter().flat_map(|folder| &folder.pictures) {
                let below = mask.strip_prefix(path).unwrap_or(mask).with_extension("");
                masks.insert(&root.join(below), mask);
            }
        }
        Masks::Auto => {
            for folder in folders {
                let name = folder.path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
                let of_masks = folder.path != root && matches!(name.as_str(), "mask" | "masks");
                let pictures_at = if of_masks { folder.path.parent().unwrap_or(root) } else { &folder.path };
                for mask in &folder.pictures {
                    let stem = mask.file_stem().unwrap_or_default();
                    let labelled = stem.to_str().and_then(|stem| stem.strip_suffix(MASK_SUFFIX));
                    match labelled {
                        Some(stem) => masks.insert(&pictures_at.join(stem), mask),
                        None if of_masks => masks.insert(&pictures_at.join(stem), mask),
                        None => {}
                    }
                }
            }
        }
    }
    Ok(masks)
}

/// Repeats and name by the nearest kohya folder, up to and including the data folder itself.
fn concept_of(root: &Path, folder: &Path) -> Option<(u32, String)> {
    let real_root = fs::canonicalize(root).unwrap_or_else(|_| root.to_owned());
    let below = folder.strip_prefix(root).unwrap_or(Path::new(""));
    let names = below.iter().rev().chain(real_root.file_name());
    names.filter_map(|name| kohya(&name.to_string_lossy())).next()
}

/// A path below the data folder, for people; bytes that are no Unicode are replaced.
fn name_below(root: &Path, path: &Path) -> String {
    path.strip_prefix(root).unwrap_or(path).to_string_lossy().into_owned()
}

/// A path with all names in composed form and without `.`: what paths are compared by.
fn normal(path: &Path) -> PathBuf {
    path.components().filter(|part| *part != Component::CurDir).map(|part| composed(part.as_os_str())).collect()
}

/// What a layout is made of, for its name.
#[derive(Debug, Default)]
struct Layout {
    /// Kohya folders by name, with repeats.
    kohya: BTreeMap<String, u32>,
    /// Other folders with pictures; the data folder is the empty name.
    plain: BTreeSet<PathBuf>,
    /// Extensions of captions.
    captions: BTreeSet<String>,
    tables: BTreeSet<String>,
}

impl Layout {
    fn count(&mut self, root: &Path, folder: &Path, repeats: u32, concept: Option<&str>, caption: Option<&Path>) {
        match concept {
            Some(concept) => drop(self.kohya.insert(concept.to_owned(), repeats)),
            None => drop(self.plain.insert(folder.strip_prefix(root).unwrap_or(folder).to_owned())),
        }
        self.captions.extend(caption.map(extension));
    }
}

impl fmt::Display for Layout {
    /// For example "flat folder, .txt captions".
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts = Vec::new();
        if !self.kohya.is_empty() {
            let names: Vec<String> =
                self.kohya.iter().take(4).map(|(name, repeats)| format!("{name} × {repeats}")).collect();
            let more = if self.kohya.len() > 4 { ", …" } else { "" };
            parts.push(format!("kohya folders ({}{more})", names.join(", ")));
        }
        match (self.plain.len(), self.plain.contains(Path::new(""))) {
            (0, _) => {}
            (1, true) if self.kohya.is_empty() => parts.push("flat folder".to_owned()),
            (1, true) => parts.push("pictures beside them".to_owned()),
            (count, _) => parts.push(format!("nested folders ({count} with pictures)")),
        }
        parts.extend(self.tables.iter().cloned());
        match self.captions.len() {
            0 if self.tables.is_empty() => parts.push("no captions".to_owned()),
            0 => {}
            _ => {
                let kinds: Vec<String> = self.captions.iter().map(|kind| format!(".{kind}")).collect();
                parts.push(format!("{} captions", kinds.join(" and ")));
            }
        }
        f.write_str(&parts.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kohya_names_are_a_number_and_a_name() {
        assert_eq!(kohya("10_neon cat"), Some((10, "neon cat".into())));
        assert_eq!(kohya("001_a_b"), Some((1, "a_b".into())));
        for other in ["neon", "10", "10_", "_neon", "x_10", "+3_a", "2024_holidays"] {
            assert_eq!(kohya(other), None, "{other}");
        }
    }
}
