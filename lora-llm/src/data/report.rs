//! What would be trained on, and what would be skipped and why: for a person, and as JSON for programs.

use std::fmt;

use serde::Serialize;

use super::{BadRow, Dataset, Long};
use crate::{chat::ChatTemplate, example::Example};

/// Bad rows that are written out before "and N more".
const WRITTEN_OUT: usize = 8;

/// A dataset for people and programs.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// The file.
    pub file: String,
    /// What its rows are, in words.
    pub format: String,
    /// How they lie in the file, in words.
    pub layout: String,
    /// Rows, good and bad.
    pub rows: usize,
    /// Examples to train on.
    pub examples: usize,
    /// Examples to validate with.
    pub validation: usize,
    /// Tokens of the examples to train on.
    pub tokens: Tokens,
    /// The chat template, if there is one.
    pub template: Option<String>,
    /// Rows with too many tokens.
    pub long: Long,
    /// Rows that are not used.
    pub bad: Vec<BadRow>,
    /// What a person should know.
    pub notes: Vec<String>,
    /// SHA-256 of everything that training sees.
    pub hash: String,
}

/// Token counts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Tokens {
    /// All of them.
    pub total: usize,
    /// Those that count in the loss.
    pub trained: usize,
    /// Of the median example.
    pub median: usize,
    /// Of the longest example.
    pub longest: usize,
}

impl Tokens {
    /// Counts the tokens of examples.
    pub fn of(examples: &[Example]) -> Self {
        let mut lengths: Vec<usize> = examples.iter().map(|example| example.ids.len()).collect();
        lengths.sort_unstable();
        Self {
            total: lengths.iter().sum(),
            trained: examples.iter().flat_map(|example| &example.trained).filter(|trained| **trained).count(),
            median: lengths.get(lengths.len() / 2).copied().unwrap_or(0),
            longest: lengths.last().copied().unwrap_or(0),
        }
    }
}

impl Dataset {
    /// The report of a file read with this template.
    pub fn report(&self, template: Option<&ChatTemplate>) -> Report {
        Report {
            file: self.path.display().to_string(),
            format: self.format.to_string(),
            layout: self.layout.clone(),
            rows: self.rows,
            examples: self.train.len(),
            validation: self.validation.len(),
            tokens: Tokens::of(&self.train),
            template: template.map(|template| template.label().to_owned()),
            long: self.long,
            bad: self.bad.clone(),
            notes: self.notes.clone(),
            hash: self.hash().iter().map(|byte| format!("{byte:02x}")).collect(),
        }
    }
}

impl fmt::Display for Report {
    /// What a person needs to see before a run, in half a screen where the file is in order.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}: {} ({}; {})", printable(&self.file), count(self.rows, "row"), self.format, self.layout)?;
        write!(f, "  examples   {}", self.examples)?;
        if self.validation > 0 {
            write!(f, " to train on, {} to validate with", self.validation)?;
        }
        writeln!(f)?;
        let Tokens { total, trained, median, longest } = self.tokens;
        writeln!(f, "  tokens     {total}, median {median}, longest {longest}")?;
        let share = 100.0 * trained as f64 / total.max(1) as f64;
        writeln!(f, "  in loss    {trained} tokens, {share:.0} %")?;
        if let Some(template) = &self.template {
            writeln!(f, "  template   {}", printable(template))?;
        }
        if self.long.rows > 0 {
            let Long { rows, longest, dropped, examples } = self.long;
            let became = match (dropped, examples) {
                (dropped, 0) => format!("{dropped} left out"),
                (0, examples) => format!("kept as {}", count(examples, "example")),
                (dropped, examples) => format!("kept as {}, {dropped} left out", count(examples, "example")),
            };
            writeln!(f, "  too long   {}, up to {longest} tokens: {became} (--on-long)", count(rows, "row"))?;
        }
        self.notes.iter().try_for_each(|note| writeln!(f, "note: {note}"))?;
        if !self.bad.is_empty() {
            writeln!(f, "skipped: {}", count(self.bad.len(), "row"))?;
            let shown = if self.bad.len() <= WRITTEN_OUT + 1 { self.bad.len() } else { WRITTEN_OUT };
            for bad in &self.bad[..shown] {
                writeln!(f, "  {}:{}:{}: {}", printable(&self.file), bad.line, bad.column, printable(&bad.reason))?;
                if !bad.excerpt.is_empty() {
                    writeln!(f, "    {}", printable(&bad.excerpt))?;
                }
            }
            if self.bad.len() > shown {
                writeln!(f, "  and {} more (--json lists all)", self.bad.len() - shown)?;
            }
        }
        Ok(())
    }
}

fn count(number: usize, what: &str) -> String {
    if number == 1 { format!("1 {what}") } else { format!("{number} {what}s") }
}

/// Text without control characters, which could write over a terminal.
fn printable(text: &str) -> String {
    text.chars().map(|letter| if letter.is_control() { '\u{fffd}' } else { letter }).collect()
}
