//! Reading a folder: every picture decoded and put into its bucket, every caption found or made up.

use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    sync::atomic::{AtomicUsize, Ordering},
};

use rayon::prelude::*;
use sha2::{Digest, Sha256};

use super::{
    Alpha, CaptionSource, Dataset, Error, Note, NoteKind, Picture, Result, ScanOptions, Skipped, Unusable,
    caption::{Encoding, PLACEHOLDER, decode_text, tidy, with_trigger},
    dataset::{ContentHash, count},
    decode,
    gather::{Candidate, Gathered, gather, kohya},
    sniff::{format_name, promised},
    walk::{Walk, extension, walk},
};

/// A picture that would have to be enlarged by more than this is skipped: there is nothing to learn from it.
const MAX_ENLARGEMENT: f64 = 8.0;
/// A picture that is enlarged by more than this is noted.
const NOTED_ENLARGEMENT: f64 = 1.5;
/// A picture of which more than this share is cut off is noted.
const NOTED_LOSS: f64 = 0.3;
/// A caption file larger than this is not a caption.
const MAX_CAPTION_BYTES: u64 = 1 << 20;
/// A picture file larger than this is skipped unread.
const MAX_FILE_BYTES: u64 = 1 << 30;

/// Scans one folder; `regularisation` pictures get no trigger word and need no captions.
pub(super) fn scan_folder(
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

fn walk_root(root: &Path) -> Result<Walk> {
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
            strays: dataset.skipped.iter().filter(|file| file.is_text()).map(|file| file.path.clone()).collect(),
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
    kohya(&name).map_or(name, |(_, concept)| concept)
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
    #[error("its mask cannot be used: {reason}")]
    Mask { reason: String },
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
    if fit.lost() > NOTED_LOSS {
        let message = "far from every bucket's shape: more than 30 % of the picture is cut off".to_owned();
        remarks.push((NoteKind::Cropped, message));
    }
    if let Some(mask) = &candidate.mask {
        let unfit = |reason: String| Unfit::Mask { reason };
        let bytes = fs::read(mask).map_err(|error| unfit(error.to_string()))?;
        decode::decode(&bytes, Alpha::Black).map_err(|error| unfit(error.to_string()))?;
    }
    let mut masked_by_alpha = options.alpha == Alpha::Mask;
    if options.verify {
        let decoded = decode::decode(&bytes, options.alpha)?;
        if decoded.damaged {
            remarks.push((NoteKind::Damaged, "a little damaged; some pixels may be wrong".to_owned()));
        }
        masked_by_alpha &= decoded.opacity.is_some();
        if decoded.opacity.is_some() {
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
