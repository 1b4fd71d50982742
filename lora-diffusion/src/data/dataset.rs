//! A folder of pictures as training sees it: every file used, or listed with the reason why not.
//!
//! Layouts are detected, not configured: pictures with captions beside them; kohya's `N_name` folders, whose pictures are
//! shown `N` times an epoch (sd-scripts `docs/train_README`); `metadata.jsonl`. They may be mixed and nested.

use std::path::{Path, PathBuf};

use serde::Serialize;
use sha2::{Digest, Sha256};

use super::{Alpha, BucketRule, Error, Fit, Result, scan::scan_folder};

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
    /// How often it is shown in an epoch; not at all if it is kept for validation.
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

impl Skipped {
    /// Why a caption is not used.
    pub(super) const STRAY_CAPTION: &str = "a caption without its picture";
    /// Why another text is not used.
    pub(super) const TEXT: &str = "not a picture: text";

    /// Whether it might have been meant as a caption.
    pub(super) fn is_text(&self) -> bool {
        [Self::STRAY_CAPTION, Self::TEXT].contains(&self.reason.as_str())
    }
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
    /// Shapes that lose much to their bucket.
    Cropped,
    /// None could be kept for validation.
    Validation,
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

    /// Keeps a share of the pictures, 0..1, out of every epoch, by letting them have no repeats.
    ///
    /// They are chosen by their content: the same ones whatever the files are called, and two equal pictures on the same
    /// side. At least one stays on either side, unless all are alike. Regularisation pictures are not chosen.
    pub fn keep_apart(&mut self, share: f64, seed: u64) {
        let score =
            |picture: &Picture| Sha256::new_with_prefix(seed.to_le_bytes()).chain_update(picture.hash).finalize();
        let own = self.pictures.iter().filter(|picture| picture.weight == 1.0);
        let mut scores: Vec<_> = own.map(score).collect();
        let count = (scores.len() as f64 * share).round() as usize;
        let count = if share > 0.0 { count.clamp(1, scores.len().saturating_sub(1).max(1)) } else { 0 };
        scores.sort_unstable();
        let Some(limit) = count.checked_sub(1).and_then(|last| scores.get(last).copied()) else { return };
        if scores.last() == Some(&limit) {
            let message = "all pictures are alike: none is kept for validation".to_owned();
            self.notes.push(Note { kind: NoteKind::Validation, message, files: Vec::new() });
            return;
        }
        for picture in &mut self.pictures {
            if picture.weight == 1.0 && score(picture) <= limit {
                picture.repeats = 0;
            }
        }
    }

    /// The places of the pictures that no epoch shows.
    pub fn kept_apart(&self) -> impl Iterator<Item = usize> {
        self.pictures.iter().enumerate().filter(|(_, picture)| picture.repeats == 0).map(|(place, _)| place)
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

/// "1 file", "2 files".
pub(super) fn count(number: usize, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}
