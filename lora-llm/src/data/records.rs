//! The JSON objects of a file with the place of each: one per line, or the elements of one array.

use std::{fmt, ops::Range};

use serde::Serialize;
use serde_json::{Map, Value as Json};

/// A longer line is damage, not data.
const MAX_RECORD_BYTES: usize = 256 << 20;

/// Letters of a line that a message shows.
const EXCERPT: usize = 60;

/// A row that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct BadRow {
    /// Line, from 1.
    pub line: usize,
    /// Byte of the line, from 1.
    pub column: usize,
    /// Why not.
    pub reason: String,
    /// The text around the place.
    pub excerpt: String,
}

/// `LINE:COLUMN: REASON`, as it stands behind the name of the file, and the excerpt below.
impl fmt::Display for BadRow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.line, self.column, self.reason)?;
        if !self.excerpt.is_empty() {
            write!(f, "\n  {}", self.excerpt)?;
        }
        Ok(())
    }
}

/// An object and the line that it begins on.
#[derive(Debug, Clone)]
pub(super) struct Record {
    pub(super) line: usize,
    pub(super) fields: Map<String, Json>,
}

/// How the objects of a file are laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Layout {
    Lines,
    Array,
}

/// All objects of a file, each good or bad.
pub(super) fn records(bytes: &[u8]) -> (Layout, Vec<Result<Record, BadRow>>) {
    let first = bytes.iter().find(|byte| !byte.is_ascii_whitespace());
    if first == Some(&b'[') {
        return (Layout::Array, array(bytes));
    }
    // One object over several lines is a row, or holds the rows in a list of its own.
    let first_line = bytes.split(|byte| *byte == b'\n').next().unwrap_or_default();
    if first == Some(&b'{')
        && parse(first_line, 1, first_line).is_err()
        && let Ok(fields) = serde_json::from_slice::<Map<String, Json>>(bytes)
    {
        let line = 1;
        let named = ["data", "rows", "train"].into_iter().find_map(|key| fields.get(key)?.as_array());
        let rows = match named {
            Some(rows) => rows.iter().filter_map(|row| row.as_object().cloned()).collect(),
            None => vec![fields],
        };
        return (Layout::Array, rows.into_iter().map(|fields| Ok(Record { line, fields })).collect());
    }
    (Layout::Lines, lines(bytes))
}

fn lines(bytes: &[u8]) -> Vec<Result<Record, BadRow>> {
    let mut out = Vec::new();
    for (line, text) in (1..).zip(bytes.split(|byte| *byte == b'\n')) {
        let text = text.strip_suffix(b"\r").unwrap_or(text);
        if !text.iter().all(u8::is_ascii_whitespace) {
            out.push(parse(text, line, text).map(|fields| Record { line, fields }));
        }
    }
    out
}

fn array(bytes: &[u8]) -> Vec<Result<Record, BadRow>> {
    let mut out = Vec::new();
    let open = bytes.iter().position(|byte| *byte == b'[').unwrap_or(0);
    let (mut at, mut line, mut line_start) = (open + 1, 1 + count_lines(&bytes[..open]), 0);
    let broken = |line, at: usize, line_start: usize, reason: &str| {
        Err(BadRow {
            line,
            column: at - line_start + 1,
            reason: reason.to_owned(),
            excerpt: excerpt(&bytes[line_start..], at - line_start),
        })
    };
    if let Some(found) = bytes[..open].iter().rposition(|byte| *byte == b'\n') {
        line_start = found + 1;
    }
    let mut closed = false;
    while let Some(byte) = bytes.get(at) {
        match byte {
            b'\n' => {
                line += 1;
                at += 1;
                line_start = at;
            }
            b']' => {
                closed = true;
                break;
            }
            byte if byte.is_ascii_whitespace() || *byte == b',' => at += 1,
            _ => {
                let element = element(bytes, at);
                let text = &bytes[element.clone()];
                let parsed = parse(text, line, text).map_err(|mut bad| {
                    if bad.line == line {
                        bad.column += at - line_start;
                    }
                    bad
                });
                out.push(parsed.map(|fields| Record { line, fields }));
                line += count_lines(text);
                if let Some(found) = text.iter().rposition(|byte| *byte == b'\n') {
                    line_start = at + found + 1;
                }
                at = element.end;
            }
        }
    }
    if !closed && out.last().is_none_or(Result::is_ok) {
        out.push(broken(line, at, line_start, "the array is not closed: the file breaks off"));
    }
    out
}

/// The bytes of an element, up to the comma or bracket that ends it.
fn element(bytes: &[u8], start: usize) -> Range<usize> {
    let (mut depth, mut quoted, mut escaped) = (0usize, false, false);
    for (at, byte) in bytes.iter().enumerate().skip(start) {
        if quoted {
            quoted = escaped || *byte != b'"';
            escaped = !escaped && *byte == b'\\';
            continue;
        }
        match byte {
            b'"' => quoted = true,
            b'{' | b'[' => depth += 1,
            b'}' | b']' if depth > 0 => depth -= 1,
            b',' | b']' if depth == 0 => return start..at,
            _ => {}
        }
    }
    start..bytes.len()
}

/// One object; `within` is the text for the excerpt, and `line` the line that it begins on.
fn parse(text: &[u8], line: usize, within: &[u8]) -> Result<Map<String, Json>, BadRow> {
    let bad = |line_off: usize, column: usize, reason: String| {
        let offset = within.split(|byte| *byte == b'\n').take(line_off).map(|part| part.len() + 1).sum::<usize>();
        let part = within.get(offset..).unwrap_or_default();
        BadRow { line: line + line_off, column, reason, excerpt: excerpt(part, column.saturating_sub(1)) }
    };
    if text.len() > MAX_RECORD_BYTES {
        return Err(bad(0, 1, format!("{} MB in one row", text.len() >> 20)));
    }
    if let Some(at) = text.iter().position(|byte| *byte == 0) {
        return Err(bad(0, at + 1, "a zero byte: the file is damaged".to_owned()));
    }
    let unicode = std::str::from_utf8(text);
    if let Err(error) = unicode {
        return Err(bad(0, error.valid_up_to() + 1, "not UTF-8".to_owned()));
    }
    match serde_json::from_slice(text) {
        Ok(Json::Object(fields)) => Ok(fields),
        Ok(other) => Err(bad(0, 1, format!("{}, expected an object", kind(&other)))),
        Err(error) => {
            let full = error.to_string();
            let message = full.rsplit_once(" at line ").map_or(&*full, |(message, _)| message);
            let reason = match error.is_eof() {
                true => format!("the row breaks off: {message}"),
                false => message.to_owned(),
            };
            Err(bad(error.line().saturating_sub(1), error.column().max(1), reason))
        }
    }
}

/// What a JSON value is, with its article.
pub(super) fn kind(value: &Json) -> &'static str {
    match value {
        Json::Null => "null",
        Json::Bool(_) => "true or false",
        Json::Number(_) => "a number",
        Json::String(_) => "a text",
        Json::Array(_) => "a list",
        Json::Object(_) => "an object",
    }
}

fn count_lines(bytes: &[u8]) -> usize {
    bytes.iter().filter(|byte| **byte == b'\n').count()
}

/// The line around a place, without control characters.
fn excerpt(text: &[u8], at: usize) -> String {
    let line = text.split(|byte| *byte == b'\n').next().unwrap_or_default();
    let start = at.min(line.len()).saturating_sub(EXCERPT / 2);
    let end = (start + EXCERPT).min(line.len());
    let part = String::from_utf8_lossy(&line[start..end]);
    let shown: String =
        part.trim_matches('\u{fffd}').chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect();
    let dots = |cut: bool| if cut { "…" } else { "" };
    format!("{}{shown}{}", dots(start > 0), dots(end < line.len()))
}
