//! What would be trained on, and what would be skipped and why: for a person, and as JSON for programs.
//!
//! Every picture has its line: bucket, share that is cut off, how often it will be shown, how much of its caption is
//! read. These are what other trainers decide in silence.

use std::{collections::BTreeMap, fmt};

use serde::Serialize;

use super::{
    CaptionSource, Dataset, Note, Order, Skipped,
    dataset::{count, hex},
};

/// What a report needs to know of the run.
#[derive(Clone, Copy)]
pub struct ReportOptions<'a> {
    /// How many ids a caption needs, both marks included; without it, no token counts are given.
    pub tokens: Option<&'a dyn Fn(&str) -> usize>,
    /// So many ids are read.
    pub token_limit: usize,
    /// Pictures in a batch.
    pub batch: usize,
    /// Batches of the whole run; without it, of one epoch.
    pub batches: Option<u64>,
    /// The run's seed, which decides who is shown once more than others.
    pub seed: u64,
}

/// A dataset for people and programs.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// The folder.
    pub folder: String,
    /// Its layout in words.
    pub layout: String,
    /// Pictures that are trained on.
    pub used: usize,
    /// Pictures in an epoch, repeats counted.
    pub exposures: u64,
    /// Pictures in a batch, cut down if there are not so many.
    pub batch: usize,
    /// Batches in the first epoch.
    pub batches: u64,
    /// Hash of everything that training sees.
    pub hash: String,
    /// Captions at a glance.
    pub captions: Captions,
    /// Buckets, by size.
    pub buckets: Vec<BucketLine>,
    /// Every picture.
    pub pictures: Vec<PictureLine>,
    /// Files that are not trained on.
    pub skipped: Vec<Skipped>,
    /// What a person should know.
    pub notes: Vec<Note>,
    /// Hidden files and file managers' leftovers that were passed over.
    pub ignored: usize,
}

/// Captions at a glance.
#[derive(Debug, Clone, Serialize)]
pub struct Captions {
    /// Pictures with a caption of their own, in a file or a table.
    pub own: usize,
    /// Pictures that go by the name of their folder.
    pub from_folder: usize,
    /// Pictures that go by the trigger word alone.
    pub from_trigger: usize,
    /// Up to three captions, as the text encoder reads them.
    pub samples: Vec<String>,
    /// Ids of the longest caption.
    pub longest: Option<usize>,
    /// Captions whose end is not read.
    pub truncated: usize,
}

/// One bucket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct BucketLine {
    /// Width and height.
    pub size: [u32; 2],
    /// Pictures in it.
    pub pictures: usize,
    /// The same, repeats counted.
    pub exposures: u64,
}

/// One picture.
#[derive(Debug, Clone, Serialize)]
pub struct PictureLine {
    /// Its path below the folder.
    pub path: String,
    /// Width and height, upright.
    pub size: [u32; 2],
    /// The bucket's width and height.
    pub bucket: [u32; 2],
    /// By how much it is enlarged, or shrunk if below 1.
    pub scale: f64,
    /// Percent of its area that is cut off.
    pub crop_percent: f64,
    /// How often it is shown in an epoch.
    pub repeats: u32,
    /// How often it is shown in the whole run, or in the first epoch.
    pub exposures: u64,
    /// What the text encoder reads.
    pub caption: String,
    /// Where that came from.
    pub caption_source: CaptionSource,
    /// Ids of the caption, both marks included.
    pub tokens: Option<usize>,
    /// Whether it has a mask of the loss.
    pub masked: bool,
}

impl Dataset {
    /// The report of a run over this dataset.
    pub fn report(&self, options: ReportOptions<'_>) -> Report {
        let sizes = self.pictures.iter().map(|picture| (picture.fit.bucket, picture.repeats));
        let order = Order::new(sizes, options.batch, options.seed);
        let epoch = order.as_ref().map_or(0, |order| order.batches(1));
        let shown = order.as_ref().map(|order| order.shown(options.batches.unwrap_or(epoch))).unwrap_or_default();
        let mut buckets: BTreeMap<[u32; 2], BucketLine> = BTreeMap::new();
        for picture in &self.pictures {
            let size = picture.fit.bucket;
            let line = buckets.entry(size).or_insert(BucketLine { size, pictures: 0, exposures: 0 });
            line.pictures += 1;
            line.exposures += u64::from(picture.repeats);
        }
        let rounded = |value: f64, digits: f64| (value * digits).round() / digits;
        let pictures: Vec<PictureLine> = self
            .pictures
            .iter()
            .enumerate()
            .map(|(at, picture)| PictureLine {
                path: picture.name.clone(),
                size: picture.fit.size,
                bucket: picture.fit.bucket,
                scale: rounded(picture.fit.scale(), 1000.0),
                crop_percent: rounded(picture.fit.lost() * 100.0, 10.0),
                repeats: picture.repeats,
                exposures: shown.get(at).copied().unwrap_or(0),
                caption: picture.caption.clone(),
                caption_source: picture.caption_source,
                tokens: options.tokens.map(|tokens| tokens(&picture.caption)),
                masked: picture.mask.is_some() || picture.masked_by_alpha,
            })
            .collect();
        Report {
            folder: self.root.display().to_string(),
            layout: self.layout.clone(),
            used: pictures.len(),
            exposures: self.exposures(),
            batch: order.as_ref().map_or(0, Order::batch_size),
            batches: epoch,
            hash: hex(&self.hash()),
            captions: captions(&pictures, options.token_limit),
            buckets: buckets.into_values().collect(),
            pictures,
            skipped: self.skipped.clone(),
            notes: self.notes.clone(),
            ignored: self.ignored,
        }
    }
}

fn captions(pictures: &[PictureLine], limit: usize) -> Captions {
    let from =
        |sources: &[CaptionSource]| pictures.iter().filter(|picture| sources.contains(&picture.caption_source)).count();
    let mut samples: Vec<String> = Vec::new();
    // From beginning, middle and end: neighbours are often alike.
    for at in [0, pictures.len() / 2, pictures.len().saturating_sub(1)] {
        if let Some(picture) = pictures.get(at)
            && !samples.contains(&picture.caption)
        {
            samples.push(picture.caption.clone());
        }
    }
    Captions {
        own: from(&[CaptionSource::File, CaptionSource::Table]),
        from_folder: from(&[CaptionSource::Concept, CaptionSource::FolderName]),
        from_trigger: from(&[CaptionSource::Trigger]),
        samples,
        longest: pictures.iter().filter_map(|picture| picture.tokens).max(),
        truncated: pictures.iter().filter(|picture| picture.tokens.is_some_and(|tokens| tokens > limit)).count(),
    }
}

/// Files of a note, or skipped files, that are written out before "and N more".
const WRITTEN_OUT: usize = 8;

impl fmt::Display for Report {
    /// What a person needs to see before a run, in a screen or less where the folder is in order.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}: {} ({})", printable(&self.folder), count(self.used, "picture"), self.layout)?;
        let captions = &self.captions;
        let mut kinds = Vec::new();
        for (number, what) in [
            (captions.own, "of their own"),
            (captions.from_folder, "from the folder's name"),
            (captions.from_trigger, "from the trigger word"),
        ] {
            if number > 0 {
                kinds.push(format!("{number} {what}"));
            }
        }
        write!(f, "  captions   {}", kinds.join(", "))?;
        if let Some(longest) = captions.longest {
            write!(f, "; the longest has {}", count(longest, "token"))?;
        }
        if captions.truncated > 0 {
            write!(f, ", the end of {} is not read", captions.truncated)?;
        }
        writeln!(f)?;
        for sample in &captions.samples {
            writeln!(f, "             “{}”", shortened(sample, 90))?;
        }
        for (at, bucket) in self.buckets.iter().enumerate() {
            let repeated = bucket.exposures != bucket.pictures as u64;
            let exposures = if repeated { format!(", {} an epoch", bucket.exposures) } else { String::new() };
            let [width, height] = bucket.size;
            let name = if at == 0 { "buckets" } else { "" };
            writeln!(f, "  {name:<10} {width:>4} × {height:<4}  {}{exposures}", count(bucket.pictures, "picture"))?;
        }
        let most = self.pictures.iter().max_by(|a, b| a.crop_percent.total_cmp(&b.crop_percent));
        if let Some(most) = most.filter(|most| most.crop_percent >= 0.1) {
            let mean = self.pictures.iter().map(|picture| picture.crop_percent).sum::<f64>() / self.used as f64;
            let (share, path) = (most.crop_percent, printable(&most.path));
            writeln!(f, "  cut off    {mean:.1} % on average, at most {share:.1} % ({path})")?;
        }
        writeln!(
            f,
            "  an epoch   {} of {}",
            if self.batches == 1 { "1 batch".to_owned() } else { format!("{} batches", self.batches) },
            self.batch
        )?;
        for note in &self.notes {
            writeln!(f, "note: {} ({})", note.message, count(note.files.len(), "file"))?;
            list(f, note.files.iter().map(|file| printable(file)))?;
        }
        if !self.skipped.is_empty() {
            writeln!(f, "skipped: {}", count(self.skipped.len(), "file"))?;
            // What was meant to be trained on comes first.
            let mut files: Vec<&Skipped> = self.skipped.iter().collect();
            files.sort_by_key(|file| !file.bad);
            list(f, files.into_iter().map(|file| format!("{}: {}", printable(&file.path), printable(&file.reason))))?;
        }
        Ok(())
    }
}

fn list(f: &mut fmt::Formatter<'_>, lines: impl ExactSizeIterator<Item = String>) -> fmt::Result {
    let total = lines.len();
    let shown = if total <= WRITTEN_OUT + 1 { total } else { WRITTEN_OUT };
    lines.take(shown).try_for_each(|line| writeln!(f, "  {line}"))?;
    if total > shown {
        writeln!(f, "  and {} more (--json lists all)", total - shown)?;
    }
    Ok(())
}

/// A name without line breaks and other control characters, which could write over a terminal.
fn printable(name: &str) -> String {
    name.chars().map(|letter| if letter.is_control() { '\u{fffd}' } else { letter }).collect()
}

fn shortened(text: &str, letters: usize) -> String {
    if text.chars().count() <= letters {
        return printable(text);
    }
    let short: String = text.chars().take(letters - 1).collect();
    format!("{}…", printable(short.trim_end()))
}
