//! A file of texts as training sees it: every row used, or listed with the reason why not.

use std::{
    path::{Path, PathBuf},
    time::SystemTime,
};

use rayon::prelude::*;
use serde::Serialize;
use serde_json::{Map, Value as Json};
use sha2::{Digest, Sha256};

use super::{
    Error, Format, Result,
    encode::{Encoder, OnLong, Outcome, TrainOn},
    folder::Parts,
    format::fields_of,
    records::{BadRow, Layout, Record, records},
    row::Row,
    source,
};
use crate::{chat::ChatTemplate, example::Example, tokenizer::Tokenizer};

/// What happens to a row that cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnBad {
    /// It ends the reading with an error that names it.
    #[default]
    Stop,
    /// It is listed, and the others are used.
    Skip,
}

/// How a file is read.
#[derive(Debug, Clone)]
pub struct LoadOptions {
    /// What counts in the loss.
    pub train_on: TrainOn,
    /// The most tokens of an example, at least 2.
    pub longest: usize,
    /// What happens to longer ones.
    pub on_long: OnLong,
    /// What happens to rows that cannot be used.
    pub on_bad: OnBad,
    /// Share of the examples that is kept for validation, 0..1.
    pub validation: f64,
    /// Decides which ones.
    pub seed: u64,
    /// What the chat template is told besides the messages.
    pub variables: Map<String, Json>,
    /// The time that a chat template is told, if it asks; without it, the present. Some write the date into every
    /// conversation: a run that is to be repeated or resumed keeps it.
    pub now: Option<SystemTime>,
}

impl LoadOptions {
    /// The customary options.
    pub fn new(longest: usize) -> Self {
        Self {
            train_on: TrainOn::default(),
            longest,
            on_long: OnLong::default(),
            on_bad: OnBad::default(),
            validation: 0.0,
            seed: 0,
            variables: Map::new(),
            now: None,
        }
    }
}

/// What happened to rows with too many tokens.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Long {
    /// Rows that had too many tokens.
    pub rows: usize,
    /// Tokens of the longest.
    pub longest: usize,
    /// Rows that were left out for it.
    pub dropped: usize,
    /// Examples that the others became.
    pub examples: usize,
}

/// A file of texts.
#[derive(Debug, Clone)]
pub struct Dataset {
    /// The file.
    pub path: PathBuf,
    /// What its rows are.
    pub format: Format,
    /// How they lie in the file, in words.
    pub layout: String,
    /// Number of rows, good and bad.
    pub rows: usize,
    /// Examples to train on.
    pub train: Vec<Example>,
    /// Examples to validate with.
    pub validation: Vec<Example>,
    /// The line that each example of `train` comes from.
    pub lines: Vec<usize>,
    /// Rows that are not used, and why.
    pub bad: Vec<BadRow>,
    /// What happened to rows with too many tokens.
    pub long: Long,
    /// What a person should know.
    pub notes: Vec<String>,
}

impl Dataset {
    /// Reads and tokenises a file, or of a folder the [`Parts`] for training and validation.
    ///
    /// # Errors
    /// When it is no file of texts, when a row is bad and [`OnBad::Stop`], when nothing is left, or when conversations have
    /// no template or one with a mistake; when a share is to be kept of a folder that has a part for it.
    pub fn load(
        path: &Path,
        tokenizer: &Tokenizer,
        template: Option<&ChatTemplate>,
        options: &LoadOptions,
    ) -> Result<Self> {
        check(options)?;
        let Some(parts) = Parts::find(path)? else { return Self::load_file(path, tokenizer, template, options) };
        let mut dataset = Self::load_file(&parts.train, tokenizer, template, options)?;
        let name = |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let mut said = format!("{} is trained on", name(&parts.train));
        if let Some(path) = &parts.validation {
            if options.validation > 0.0 {
                let reason = format!("{} is there already, so no share of the rows is kept", path.display());
                return Err(Error::Option { option: "--validation", reason });
            }
            let held = Self::load_file(path, tokenizer, template, options)?;
            said = format!("{said}, {} is validated with", name(path));
            let skipped = held
                .bad
                .iter()
                .map(|bad| format!("skipped: {}:{}:{}: {}", path.display(), bad.line, bad.column, bad.reason));
            dataset.notes.extend(skipped);
            dataset.validation = held.train;
        }
        if let Some(path) = &parts.test {
            said = format!("{said}, {} is left to `lora eval`", name(path));
        }
        dataset.notes.insert(0, said);
        Ok(dataset)
    }

    fn load_file(
        path: &Path,
        tokenizer: &Tokenizer,
        template: Option<&ChatTemplate>,
        options: &LoadOptions,
    ) -> Result<Self> {
        let Contents { layout, format, plain, rows: parsed, notes } = contents(path)?;
        if matches!(format, Format::Messages | Format::ShareGpt) && template.is_none() {
            return Err(Error::NoTemplate { path: path.to_owned(), format });
        }
        // A book is one row, and every part of it is as good as its beginning.
        let on_long = if plain { OnLong::Split } else { options.on_long };
        let now = options.now.unwrap_or_else(SystemTime::now);
        let encoder = Encoder { tokenizer, template, train_on: options.train_on, variables: &options.variables, now };
        let outcomes = parsed
            .into_par_iter()
            .map(|row| match row {
                Err(bad) => Ok((0, Err(bad))),
                Ok((line, row)) => encoder.examples(&row, options.longest, on_long).map(|outcome| (line, Ok(outcome))),
            })
            .collect::<Result<Vec<(usize, Result<Outcome, BadRow>)>>>()?;
        let mut dataset = Self::gathered(path, format, layout, outcomes);
        dataset.notes.splice(0..0, notes);
        if let (OnBad::Stop, Some(first)) = (options.on_bad, dataset.bad.first()) {
            let (first, bad) = (first.clone(), dataset.bad.len());
            return Err(Error::Bad { path: path.to_owned(), first, bad, rows: dataset.rows });
        }
        if dataset.train.is_empty() {
            return Err(Error::Nothing { path: path.to_owned(), reason: dataset.remains() });
        }
        dataset.note_ends(tokenizer);
        dataset.split(options.validation, options.seed);
        Ok(dataset)
    }

    fn gathered(path: &Path, format: Format, layout: String, outcomes: Vec<(usize, Result<Outcome, BadRow>)>) -> Self {
        let mut dataset = Self {
            path: path.to_owned(),
            format,
            layout,
            rows: outcomes.len(),
            train: Vec::new(),
            validation: Vec::new(),
            lines: Vec::new(),
            bad: Vec::new(),
            long: Long::default(),
            notes: Vec::new(),
        };
        for (line, outcome) in outcomes {
            let outcome = match outcome {
                Ok(outcome) => outcome,
                Err(bad) => {
                    dataset.bad.push(bad);
                    continue;
                }
            };
            if let Some(length) = outcome.too_long {
                dataset.long.rows += 1;
                dataset.long.longest = dataset.long.longest.max(length);
                dataset.long.examples += outcome.examples.len();
                dataset.long.dropped += usize::from(outcome.examples.is_empty());
            }
            if let Some(reason) = outcome.reason.filter(|_| outcome.too_long.is_none()) {
                dataset.bad.push(BadRow { line, column: 1, reason, excerpt: String::new() });
            }
            dataset.lines.extend(outcome.examples.iter().map(|_| line));
            dataset.train.extend(outcome.examples);
        }
        dataset
    }

    /// Keeps a share for validation, by the hash of the ids: the same examples whatever the order of the rows, and two
    /// equal ones on the same side.
    fn split(&mut self, share: f64, seed: u64) {
        let count = (self.train.len() as f64 * share).round() as usize;
        let count = if share > 0.0 { count.clamp(1, self.train.len().saturating_sub(1)) } else { 0 };
        if count == 0 {
            return;
        }
        let scores: Vec<[u8; 32]> = self.train.iter().map(|example| hash(seed, example)).collect();
        let mut sorted = scores.clone();
        sorted.sort_unstable();
        let limit = sorted[count - 1];
        // Copies of one example could be all there are.
        if sorted.last() == Some(&limit) {
            self.notes.push("all rows are alike: none is kept for validation".to_owned());
            return;
        }
        let (train, lines) = (std::mem::take(&mut self.train), std::mem::take(&mut self.lines));
        for ((example, line), score) in train.into_iter().zip(lines).zip(scores) {
            if score <= limit {
                self.validation.push(example);
            } else {
                self.train.push(example);
                self.lines.push(line);
            }
        }
    }

    /// SHA-256 of everything that training sees.
    pub fn hash(&self) -> [u8; 32] {
        let mut all = Sha256::new();
        for example in self.train.iter().chain(&self.validation) {
            all.update(hash(0, example));
        }
        all.update((self.train.len() as u64).to_le_bytes());
        all.finalize().into()
    }

    /// A model learns to stop from the end marks alone.
    fn note_ends(&mut self, tokenizer: &Tokenizer) {
        let special = tokenizer.special();
        let ends = |example: &Example| {
            example.ids.iter().zip(&example.trained).any(|(id, trained)| *trained && special.is_end(*id))
        };
        let with = self.train.iter().filter(|example| ends(example)).count();
        if with == 0 {
            self.notes
                .push("no example ends with a trained end token: the model will not learn when to stop".to_owned());
        }
    }

    fn remains(&self) -> String {
        match (self.rows, &self.bad[..]) {
            (0, _) => "the file is empty".to_owned(),
            (_, [first, ..]) => {
                let path = self.path.display();
                format!("{} of {} rows cannot be used\n  {path}:{first}", self.bad.len(), self.rows)
            }
            _ => format!("all {} rows have too many tokens, up to {}", self.rows, self.long.longest),
        }
    }
}

fn hash(seed: u64, example: &Example) -> [u8; 32] {
    let mut state = Sha256::new();
    state.update(seed.to_le_bytes());
    for (id, trained) in example.ids.iter().zip(&example.trained) {
        state.update(id.to_le_bytes());
        state.update([u8::from(*trained)]);
    }
    state.finalize().into()
}

fn check(options: &LoadOptions) -> Result<()> {
    let refuse = |option, reason: String| Err(Error::Option { option, reason });
    if options.longest < 2 {
        return refuse("--max-len", format!("{} tokens are too few to learn from, at least 2", options.longest));
    }
    if !(0.0..1.0).contains(&options.validation) {
        return refuse(
            "--validation",
            format!("{} is no share, expected 0 up to, but not with, 1", options.validation),
        );
    }
    Ok(())
}

/// What a file holds.
struct Contents {
    layout: String,
    format: Format,
    /// Whether it is one text.
    plain: bool,
    rows: Vec<Parsed>,
    notes: Vec<String>,
}

fn contents(path: &Path) -> Result<Contents> {
    #[cfg(feature = "parquet")]
    if source::begins_with(path, super::parquet::MAGIC) {
        let (format, rows) = rows(path, super::parquet::records(path)?)?;
        let layout = "Parquet; lines are numbers of rows".to_owned();
        return Ok(Contents { layout, format, plain: false, rows, notes: Vec::new() });
    }
    let source = source::read(path)?;
    let packed =
        |kind: &str| source.packed.map_or_else(|| kind.to_owned(), |packed| format!("{kind}, packed with {packed}"));
    let mark = "begins with a byte order mark, which is left out".to_owned();
    let notes = if source.marked { vec![mark] } else { Vec::new() };
    if is_plain_text(path, &source.bytes) {
        let rows = vec![whole_text(&source.bytes)];
        return Ok(Contents { layout: packed("one text"), format: Format::Text, plain: true, rows, notes });
    }
    let (layout, records) = records(&source.bytes);
    let (format, rows) = rows(path, records)?;
    let kind = match layout {
        Layout::Lines => "one JSON object per line",
        Layout::Array => "a JSON array",
    };
    Ok(Contents { layout: packed(kind), format, plain: false, rows, notes })
}

/// By its name, or because it does not begin as JSON does.
fn is_plain_text(path: &Path, bytes: &[u8]) -> bool {
    let name = path.file_name().map(|name| name.to_string_lossy().to_lowercase()).unwrap_or_default();
    let name = name.trim_end_matches(".gz").trim_end_matches(".zst");
    if name.ends_with(".json") || name.ends_with(".jsonl") || name.ends_with(".ndjson") {
        return false;
    }
    let first = bytes.iter().find(|byte| !byte.is_ascii_whitespace());
    name.ends_with(".txt") || name.ends_with(".md") || first.is_some_and(|first| !b"{[".contains(first))
}

/// A row that was read, with its line.
type Parsed = Result<(usize, Row), BadRow>;

fn whole_text(bytes: &[u8]) -> Parsed {
    match std::str::from_utf8(bytes) {
        Ok(text) if text.trim().is_empty() => {
            Err(BadRow { line: 1, column: 1, reason: "no text".to_owned(), excerpt: String::new() })
        }
        Ok(text) => Ok((1, Row::Text(text.replace("\r\n", "\n")))),
        Err(error) => {
            let before = &bytes[..error.valid_up_to()];
            let line = before.iter().filter(|byte| **byte == b'\n').count() + 1;
            let column = before.iter().rev().take_while(|byte| **byte != b'\n').count() + 1;
            Err(BadRow { line, column, reason: "not UTF-8".to_owned(), excerpt: String::new() })
        }
    }
}

/// What the objects of a file say; all must be in the format of the first.
fn rows(path: &Path, records: Vec<Result<Record, BadRow>>) -> Result<(Format, Vec<Parsed>)> {
    if records.is_empty() {
        return Err(Error::Nothing { path: path.to_owned(), reason: "the file is empty".to_owned() });
    }
    let format = records.iter().flatten().find_map(|record| Format::of(&record.fields));
    let Some(format) = format else {
        // Nothing but bad rows: the first says what is wrong with the file.
        let bad = records.iter().filter(|record| record.is_err()).count();
        return Err(match records.iter().flatten().next() {
            Some(Record { line, fields }) => {
                Error::Format { path: path.to_owned(), line: *line, found: fields_of(fields) }
            }
            None => match records.into_iter().find_map(Result::err) {
                Some(first) => Error::Bad { path: path.to_owned(), first, bad, rows: bad },
                None => Error::Nothing { path: path.to_owned(), reason: "the file is empty".to_owned() },
            },
        });
    };
    let parsed = records.into_iter().map(|record| record.and_then(|record| row(format, record))).collect();
    Ok((format, parsed))
}

fn row(format: Format, Record { line, fields }: Record) -> Parsed {
    let bad = |reason| BadRow { line, column: 1, reason, excerpt: String::new() };
    match Format::of(&fields) {
        Some(found) if found == format => format.row(&fields).map(|row| (line, row)).map_err(bad),
        Some(found) => Err(bad(format!("in another format ({found}) than the rows before ({format})"))),
        None if fields.contains_key("chosen") && fields.contains_key("rejected") => {
            Err(bad("a pair of `chosen` and `rejected`: preferences are not trained on".to_owned()))
        }
        None => Err(bad(format!("in no known format, with {}", fields_of(&fields)))),
    }
}
