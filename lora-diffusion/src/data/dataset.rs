//! A folder of pictures as training sees it: every file used, or listed with the reason why not.
//!
//! Layouts are detected, not configured: pictures with captions beside them; kohya's `N_name` folders, whose pictures are
//! shown `N` times an epoch (sd-scripts `docs/train_README`); `metadata.jsonl`. They may be mixed and nested.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicUsize, Ordering},
};

use rayon::prelude::*;
use serde::Serialize;
use sha2::{Digest, Sha256};

use super::{
    Alpha, BucketRule, Error, Fit, Result, Unusable,
    caption::{Encoding, PLACEHOLDER, decode_text, tidy, with_trigger},
    decode,
    gather::{Candidate, Gathered, gather},
    sniff::{format_name, promised},
    walk::{extension, walk},
};

/// A picture that would have to be enlarged by more than this is skipped: there is nothing to learn from it.
const MAX_ENLARGEMENT: f64 = 8.0;
/// A picture that is enlarged by more than this is noted.
const NOTED_ENLARGEMENT: f64 = 1.5;
/// A caption file larger than this is not a caption.
const MAX_CAPTION_BYTES: u64 = 1 << 20;
/// A picture file larger than this is skipped unread.
const MAX_FILE_BYTES: u64 = 1 << 30;
/// Above this share of unusable pictures, training stops unless told otherwise.
const BAD_SHARE: f64 = 0.1;

/// Where masks of the loss come from.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Masks {
    /// From a folder `masks` or `mask` beside the pictures, and from files `NAME-masklabel.png`, where there are any.
    #[default]
    Auto,
    /// There are none.
    Off,
    /// From this folder, by the pictures' names.
    Folder(PathBuf),
}

/// How a folder is read.
#[derive(Debug, Clone)]
pub struct ScanOptions {
    /// Goes into every caption, and stands in for missing ones.
    pub trigger: Option<String>,
    /// Which sizes pictures are trained at.
    pub buckets: BucketRule,
    /// What happens to transparent parts.
    pub alpha: Alpha,
    /// Where masks of the loss come from.
    pub masks: Masks,
    /// Pictures of the same kind of thing that keep a model from forgetting it (Ruiz et al. 2022, arXiv 2208.12242, §3.3).
    pub regularisation: Option<PathBuf>,
    /// What the loss of those counts.
    pub regularisation_weight: f64,
    /// Decode every picture, so that none turns out damaged later; otherwise only the headers are read.
    pub verify: bool,
}

impl ScanOptions {
    /// The customary options for a resolution.
    pub fn new(resolution: u32) -> Self {
        Self {
            trigger: None,
            buckets: BucketRule::new(resolution),
            alpha: Alpha::default(),
            masks: Masks::default(),
            regularisation: None,
            regularisation_weight: 1.0,
            verify: true,
        }
    }
}

/// SHA-256 of a file's bytes.
pub type ContentHash = [u8; 32];

/// Hexadecimal digits of a hash, lower case.
pub fn hex(hash: &ContentHash) -> String {
    hash.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Where a caption came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum CaptionSource {
    /// A text file beside the picture.
    File,
    /// A row of a table.
    Table,
    /// The name of a kohya folder, without its number.
    Concept,
    /// The name of the data folder, for want of anything better.
    FolderName,
    /// The trigger word alone.
    Trigger,
}

/// One picture that is trained on.
#[derive(Debug, Clone)]
pub struct Picture {
    /// The file.
    pub path: PathBuf,
    /// Its path below the data folder, for people.
    pub name: String,
    /// What the text encoder reads, trigger word included.
    pub caption: String,
    /// Where that came from.
    pub caption_source: CaptionSource,
    /// How often it is shown in an epoch.
    pub repeats: u32,
    /// Which bucket, and how it gets there.
    pub fit: Fit,
    /// The file's content.
    pub hash: ContentHash,
    /// A picture of where the loss counts, white where it does.
    pub mask: Option<PathBuf>,
    /// Whether its transparency says where the loss counts.
    pub masked_by_alpha: bool,
    /// What its loss counts: 1, or the weight of regularisation pictures.
    pub weight: f64,
}

/// A file that is not trained on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Skipped {
    /// Its path below the data folder.
    pub path: String,
    /// Why.
    pub reason: String,
    /// It was meant to be trained on, as far as can be seen.
    pub bad: bool,
}

/// What a note is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum NoteKind {
    /// Pictures in one layout among those of another.
    Layout,
    /// No caption of their own.
    CaptionMissing,
    /// An empty caption.
    CaptionEmpty,
    /// A caption in an encoding that is not UTF-8.
    CaptionEncoding,
    /// Two captions that differ.
    CaptionTwice,
    /// A name that promises another format.
    WrongExtension,
    /// More frames than one.
    Animated,
    /// Not quite whole.
    Damaged,
    /// Transparent parts.
    Transparent,
    /// Smaller than their bucket.
    Enlarged,
    /// The same bytes as another picture.
    Duplicate,
    /// Loss masks.
    Masked,
    /// Pictures of regularisation.
    Regularisation,
}

/// Something about some files that a person should know; they are used nevertheless.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Note {
    /// What it is about.
    pub kind: NoteKind,
    /// In words.
    pub message: String,
    /// The files.
    pub files: Vec<String>,
}

/// A scanned folder.
#[derive(Debug, Clone)]
pub struct Dataset {
    /// The folder.
    pub root: PathBuf,
    /// Its layout in words: "flat folder, .txt captions".
    pub layout: String,
    /// What is trained on, in the order of the paths; regularisation pictures last.
    pub pictures: Vec<Picture>,
    /// What is not.
    pub skipped: Vec<Skipped>,
    /// What a person should know.
    pub notes: Vec<Note>,
    /// Hidden files and file managers' leftovers that were passed over.
    pub ignored: usize,
}

impl Dataset {
    /// Scans a folder. `progress` hears of pictures done and of all pictures, from several threads.
    ///
    /// # Errors
    /// If there is no folder, no usable picture in it, or no caption and nothing that could stand for one. Single files
    /// that cannot be used are no error; see [`refuse_if_bad`](Self::refuse_if_bad).
    pub fn scan(root: &Path, options: &ScanOptions, progress: &(dyn Fn(usize, usize) + Sync)) -> Result<Self> {
        let mut dataset = scan_folder(root, options, false, progress)?;
        if let Some(folder) = &options.regularisation {
            let weight = options.regularisation_weight;
            if !(weight.is_finite() && weight >= 0.0) {
                let reason = format!("{weight} is not a weight");
                return Err(Error::Option { option: "regularisation-weight", reason });
            }
            let options = ScanOptions { trigger: None, ..options.clone() };
            let other = scan_folder(folder, &options, true, progress)?;
            dataset.add_regularisation(other, weight);
        }
        Ok(dataset)
    }

    /// Stops a run that would train on the rest of a broken folder.
    ///
    /// # Errors
    /// If more than a tenth of the pictures cannot be used.
    pub fn refuse_if_bad(&self) -> Result<()> {
        let bad: Vec<&Skipped> = self.skipped.iter().filter(|file| file.bad).collect();
        let total = self.pictures.len() + bad.len();
        match bad.first() {
            Some(first) if bad.len() as f64 > BAD_SHARE * total as f64 => Err(Error::TooManyBad {
                path: self.root.clone(),
                bad: bad.len(),
                total,
                reason: format!("{}: {}", first.path, first.reason),
            }),
            _ => Ok(()),
        }
    }

    /// A hash of everything that training sees: pictures, captions, sizes, repeats. Another order of files is the same.
    pub fn hash(&self) -> ContentHash {
        let mut rows: Vec<Vec<u8>> = self
            .pictures
            .iter()
            .map(|picture| {
                let mut row = picture.hash.to_vec();
                row.extend(format!("{:?} {} {}\0", picture.fit, picture.repeats, picture.weight).bytes());
                row.extend(picture.caption.bytes());
                row
            })
            .collect();
        rows.sort_unstable();
        let mut hash = Sha256::new();
        for row in rows {
            hash.update((row.len() as u64).to_le_bytes());
            hash.update(&row);
        }
        hash.finalize().into()
    }

    /// Pictures shown in an epoch, repeats counted.
    pub fn exposures(&self) -> u64 {
        self.pictures.iter().map(|picture| u64::from(picture.repeats)).sum()
    }

    /// Regularisation pictures are shown as often as all others together, spread evenly (as sd-scripts does).
    fn add_regularisation(&mut self, other: Self, weight: f64) {
        let wanted = self.exposures() as usize;
        let count = other.pictures.len();
        let mut files = Vec::new();
        for (index, picture) in other.pictures.into_iter().enumerate() {
            let repeats = (wanted / count + usize::from(index < wanted % count)) as u32;
            let name = format!("{} (regularisation)", picture.name);
            if repeats == 0 {
                let reason = format!("more regularisation pictures than the {wanted} exposures of an epoch");
                self.skipped.push(Skipped { path: name, reason, bad: false });
            } else {
                files.push(name.clone());
                self.pictures.push(Picture { name, repeats, weight, ..picture });
            }
        }
        let message = format!("regularisation pictures count {weight} and are shown as often as the others together");
        self.notes.push(Note { kind: NoteKind::Regularisation, message, files });
        self.skipped.extend(other.skipped);
        self.ignored += other.ignored;
    }
}

fn scan_folder(
    root: &Path,
    options: &ScanOptions,
    regularisation: bool,
    progress: &(dyn Fn(usize, usize) + Sync),
) -> Result<Dataset> {
    let walk = walk_root(root)?;
    let ignored = walk.ignored;
    let Gathered { candidates, skipped, layout, mut notes, folders } = gather(root, walk, options)?;
    let fallback = folder_name(root);
    let (done, total) = (AtomicUsize::new(0), candidates.len());
    let examined: Vec<Result<Examined, Unfit>> = candidates
        .par_iter()
        .map(|candidate| {
            let examined = examine(candidate, options, regularisation, &fallback);
            progress(done.fetch_add(1, Ordering::Relaxed) + 1, total);
            examined
        })
        .collect();

    let mut dataset = Dataset { root: root.into(), layout, pictures: vec![], skipped, notes: vec![], ignored };
    for (candidate, result) in candidates.iter().zip(examined) {
        match result {
            Ok(Examined { picture, remarks }) => {
                for (kind, message) in remarks {
                    notes.entry((kind, message)).or_default().push(candidate.name.clone());
                }
                dataset.pictures.push(picture);
            }
            Err(unfit) => {
                let reason = unfit.to_string();
                dataset.skipped.push(Skipped { path: candidate.name.clone(), reason, bad: true });
            }
        }
    }
    note_duplicates(&dataset.pictures, &mut notes);
    dataset.skipped.sort_by(|a, b| a.path.cmp(&b.path));
    dataset.notes = notes.into_iter().map(|((kind, message), files)| Note { kind, message, files }).collect();
    refuse_empty(&dataset, total, folders)?;
    refuse_speechless(&dataset, options, regularisation, &fallback)?;
    Ok(dataset)
}

fn walk_root(root: &Path) -> Result<super::walk::Walk> {
    let read = |source| Error::Read { path: root.into(), source };
    match fs::metadata(root) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Err(Error::NotFound { path: root.into() }),
        Err(source) => Err(read(source)),
        Ok(data) if data.is_dir() => walk(root).map_err(read),
        Ok(_) => {
            let picture = promised(&extension(root)).is_some();
            Err(Error::NotAFolder { path: root.into(), picture })
        }
    }
}

fn refuse_empty(dataset: &Dataset, candidates: usize, folders: usize) -> Result<()> {
    if !dataset.pictures.is_empty() {
        return Ok(());
    }
    let bad = dataset.skipped.iter().filter(|file| file.bad).count();
    let others = dataset.skipped.len() - bad;
    let mut found = Vec::new();
    if let Some(first) = dataset.skipped.iter().find(|file| file.bad) {
        found.push(format!("{bad} cannot be used, the first ({}) because {}", first.path, first.reason));
    }
    if others > 0 {
        found.push(count(others, "other file"));
    }
    if folders > 0 {
        found.push(count(folders, "folder") + " without pictures");
    }
    let found = if found.is_empty() { "it is empty".to_owned() } else { format!("found: {}", found.join(", ")) };
    Err(Error::NoPictures { path: dataset.root.clone(), found, all_bad: candidates > 0 })
}

/// "1 file", "2 files".
pub(super) fn count(number: usize, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}

/// Training on pictures that all say nothing is what a mistyped extension leads to; it is not done in silence.
fn refuse_speechless(dataset: &Dataset, options: &ScanOptions, regularisation: bool, fallback: &str) -> Result<()> {
    let pictures = &dataset.pictures;
    if options.trigger.is_none() {
        let unfilled: Vec<&Picture> = pictures.iter().filter(|picture| picture.caption.contains(PLACEHOLDER)).collect();
        if let Some(first) = unfilled.first() {
            return Err(Error::NoTrigger { path: first.path.clone(), count: unfilled.len() });
        }
    }
    let silent = pictures.iter().all(|picture| picture.caption_source == CaptionSource::FolderName);
    if silent && !regularisation {
        return Err(Error::NoCaptions {
            path: dataset.root.clone(),
            pictures: pictures.len(),
            name: fallback.to_owned(),
        });
    }
    Ok(())
}

type Notes = BTreeMap<(NoteKind, String), Vec<String>>;

fn note_duplicates(pictures: &[Picture], notes: &mut Notes) {
    let mut first: BTreeMap<ContentHash, &str> = BTreeMap::new();
    for picture in pictures {
        match first.get(&picture.hash) {
            None => drop(first.insert(picture.hash, &picture.name)),
            Some(same) => {
                let message = "the same bytes as another picture, which is so shown twice".to_owned();
                let files = notes.entry((NoteKind::Duplicate, message)).or_default();
                files.push(format!("{} = {same}", picture.name));
            }
        }
    }
}

/// The name that a folder goes by, also for `.` and links.
fn folder_name(root: &Path) -> String {
    let real = fs::canonicalize(root).unwrap_or_else(|_| root.to_owned());
    let name = real.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    super::gather::kohya(&name).map_or(name, |(_, concept)| concept)
}

struct Examined {
    picture: Picture,
    remarks: Vec<(NoteKind, String)>,
}

/// Why a picture is not used.
#[derive(Debug, thiserror::Error)]
enum Unfit {
    #[error("cannot be read: {0}")]
    Read(#[from] std::io::Error),
    #[error("{} megabytes are too many for a picture", .0 >> 20)]
    File(u64),
    #[error(transparent)]
    Decode(#[from] Unusable),
    #[error(transparent)]
    Bucket(#[from] super::NoBucket),
    #[error("{} × {} pixels are too few: they would have to be enlarged {factor:.0} times", size[0], size[1])]
    Small { size: [u32; 2], factor: f64 },
}

/// Reads and checks one picture and its caption.
fn examine(
    candidate: &Candidate,
    options: &ScanOptions,
    regularisation: bool,
    fallback: &str,
) -> Result<Examined, Unfit> {
    let mut remarks = Vec::new();
    let length = fs::metadata(&candidate.path)?.len();
    if length > MAX_FILE_BYTES {
        return Err(Unfit::File(length));
    }
    let bytes = fs::read(&candidate.path)?;
    let header = decode::header(&bytes)?;
    let fit = options.buckets.fit(header.size)?;
    if fit.scale() > MAX_ENLARGEMENT {
        return Err(Unfit::Small { size: header.size, factor: fit.scale() });
    }
    let promised = promised(&extension(&candidate.path));
    if promised.is_some_and(|format| format != header.format) {
        let message = format!("the content is {}, whatever the name says", format_name(header.format));
        remarks.push((NoteKind::WrongExtension, message));
    }
    if header.animated {
        remarks.push((NoteKind::Animated, "animated: the first frame is used".to_owned()));
    }
    if fit.scale() > NOTED_ENLARGEMENT {
        remarks.push((NoteKind::Enlarged, "much smaller than the training size, and enlarged to it".to_owned()));
    }
    let mut masked_by_alpha = false;
    if options.verify {
        let decoded = decode::decode(&bytes, options.alpha)?;
        if decoded.damaged {
            remarks.push((NoteKind::Damaged, "a little damaged; some pixels may be wrong".to_owned()));
        }
        if decoded.opacity.is_some() {
            masked_by_alpha = options.alpha == Alpha::Mask;
            let message = match options.alpha {
                Alpha::White => "transparent parts are laid on white",
                Alpha::Black => "transparent parts are laid on black",
                Alpha::Mask => "transparent parts do not count in the loss",
            };
            remarks.push((NoteKind::Transparent, message.to_owned()));
        }
    }
    let (caption, caption_source) = caption(candidate, options, fallback, regularisation, &mut remarks);
    let picture = Picture {
        path: candidate.path.clone(),
        name: candidate.name.clone(),
        caption,
        caption_source,
        repeats: candidate.repeats,
        fit,
        hash: Sha256::digest(&bytes).into(),
        mask: candidate.mask.clone(),
        masked_by_alpha,
        weight: 1.0,
    };
    Ok(Examined { picture, remarks })
}

/// The caption of a picture: its own, or what stands for it.
fn caption(
    candidate: &Candidate,
    options: &ScanOptions,
    fallback: &str,
    regularisation: bool,
    remarks: &mut Vec<(NoteKind, String)>,
) -> (String, CaptionSource) {
    let trigger = options.trigger.as_deref();
    let triggered = |caption: String| trigger.map_or(caption.clone(), |trigger| with_trigger(&caption, trigger));
    if let Some(text) = &candidate.text {
        let text = tidy(text);
        if !text.is_empty() {
            return (triggered(text), CaptionSource::Table);
        }
    }
    let mut had_file = candidate.text.is_some();
    if let Some(path) = &candidate.caption {
        had_file = true;
        match read_caption(path) {
            Ok((text, encoding)) => {
                if encoding != Encoding::Utf8 {
                    let name = if encoding == Encoding::Utf16 { "UTF-16" } else { "Latin-1 (Windows-1252)" };
                    remarks.push((NoteKind::CaptionEncoding, format!("captions read as {name}")));
                }
                if !text.is_empty() {
                    return (triggered(text), CaptionSource::File);
                }
            }
            Err(reason) => remarks.push((NoteKind::CaptionMissing, format!("caption cannot be used: {reason}"))),
        }
    }
    let (text, source) = match (trigger, &candidate.concept) {
        (Some(trigger), _) if !regularisation => (trigger.to_owned(), CaptionSource::Trigger),
        (_, Some(concept)) => (concept.clone(), CaptionSource::Concept),
        _ => (fallback.to_owned(), CaptionSource::FolderName),
    };
    if had_file {
        remarks.push((NoteKind::CaptionEmpty, format!("the caption is empty; “{text}” is used")));
    } else {
        remarks.push((NoteKind::CaptionMissing, format!("no caption; “{text}” is used")));
    }
    (text, source)
}

fn read_caption(path: &Path) -> Result<(String, Encoding), String> {
    let length = fs::metadata(path).map_err(|error| error.to_string())?.len();
    if length > MAX_CAPTION_BYTES {
        return Err(format!("{} bytes are no caption", length));
    }
    let bytes = fs::read(path).map_err(|error| error.to_string())?;
    let (text, encoding) = decode_text(&bytes);
    Ok((tidy(&text), encoding))
}
