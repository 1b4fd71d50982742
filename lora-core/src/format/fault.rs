//! What can be wrong inside a file, without the file's name: parsers give these, openers add the path.

use std::fmt;

use super::{Dtype, FileKind};

/// A name out of a file, in backticks, with everything escaped that could move a cursor or hide.
#[derive(Debug, Clone, Copy)]
pub struct Quoted<'a>(pub &'a str);

impl fmt::Display for Quoted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Directional marks reorder a terminal line and are not control characters to `char`.
        let hidden = |c: char| {
            c.is_control()
                || matches!(c, '\u{200B}'..='\u{200F}' | '\u{2028}'..='\u{202E}' | '\u{2066}'..='\u{2069}' | '\u{FEFF}')
        };
        f.write_str("`")?;
        for c in self.0.chars() {
            if hidden(c) { write!(f, "{}", c.escape_default())? } else { fmt::Write::write_char(f, c)? }
        }
        f.write_str("`")
    }
}

/// What is wrong with the content of a file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Fault {
    /// The file is something else.
    #[error("this is {kind}, not a safetensors file; {}", kind.advice())]
    Kind {
        /// What it is.
        kind: FileKind,
    },
    /// Fewer bytes than the length of a header takes.
    #[error("the file has {length} bytes, a safetensors file has at least 8")]
    Short {
        /// Bytes of the file.
        length: u64,
    },
    /// The header is longer than the limit or than the file.
    #[error("the header claims {header} bytes, but {} (limit {limit} bytes)", room(*available))]
    HeaderLength {
        /// Bytes that the header claims.
        header: u64,
        /// Bytes that follow its length.
        available: u64,
        /// The most that is read.
        limit: u64,
    },
    /// The header does not begin with `{`.
    #[error("the header begins with byte {first:#04x} instead of `{{`")]
    HeaderStart {
        /// The byte that is there.
        first: u8,
    },
    /// The header is not UTF-8.
    #[error("the header is not UTF-8 text: byte {position} is invalid")]
    Utf8 {
        /// Offset inside the header.
        position: usize,
    },
    /// The header is no JSON of the expected form.
    #[error("the header is malformed: {message}")]
    Json {
        /// What the parser says.
        message: String,
    },
    /// A name occurs twice.
    #[error("{} occurs twice in the header", Quoted(name))]
    Duplicate {
        /// The tensor or metadata key.
        name: String,
    },
    /// A metadata value is no string.
    #[error("metadata key {} holds {found}, only strings are legal", Quoted(key))]
    Metadata {
        /// The key.
        key: String,
        /// What stands there.
        found: &'static str,
    },
    /// A field of a tensor is missing or malformed.
    #[error("tensor {}: {problem}", Quoted(tensor))]
    Field {
        /// The tensor.
        tensor: String,
        /// What is wrong.
        problem: String,
    },
    /// A number type that nobody defined.
    #[error("tensor {} has the unknown dtype {}; a newer program may have written it", Quoted(tensor), Quoted(dtype))]
    UnknownDtype {
        /// The tensor.
        tensor: String,
        /// Its type as written.
        dtype: String,
    },
    /// Shape, type and byte range do not agree.
    #[error("tensor {}: {dtype} {shape:?} takes {}, its range {begin}..{end} holds {}", Quoted(tensor), bytes(*needed), bytes(Some(end - begin)))]
    Size {
        /// The tensor.
        tensor: String,
        /// Its type.
        dtype: Dtype,
        /// Its shape.
        shape: Vec<usize>,
        /// Bytes that these need; `None` beyond 64 bits.
        needed: Option<u64>,
        /// First byte of the range.
        begin: u64,
        /// Byte after the range.
        end: u64,
    },
    /// A range does not begin where the one before it ends.
    #[error("tensor {} begins at byte {begin} of the data, but {} bytes are taken before it: {}", Quoted(tensor), expected, if begin < expected { "they overlap" } else { "there is a hole" })]
    Tiling {
        /// The tensor.
        tensor: String,
        /// Where it begins.
        begin: u64,
        /// Where it should begin.
        expected: u64,
    },
    /// The ranges do not cover the data exactly.
    #[error("the tensors take {expected} bytes, the file holds {actual}: it is {}", if actual < expected { "cut short" } else { "followed by other bytes" })]
    DataLength {
        /// Bytes that the header describes.
        expected: u64,
        /// Bytes that are there.
        actual: u64,
    },
    /// A tensor is asked for that the file does not hold.
    #[error("there is no tensor {}", Quoted(tensor))]
    Absent {
        /// The tensor.
        tensor: String,
    },
    /// A tensor of a type without plain numbers.
    #[error("tensor {} holds {dtype}, which cannot be turned into numbers here", Quoted(tensor))]
    NotNumbers {
        /// The tensor.
        tensor: String,
        /// Its type.
        dtype: Dtype,
    },
    /// What was read back is not what was written.
    #[error("what was read back differs from what was written: {what}")]
    ReadBack {
        /// The difference.
        what: String,
    },
}

fn room(available: u64) -> String {
    format!("{available} bytes follow its length")
}

fn bytes(count: Option<u64>) -> String {
    count.map_or_else(|| "more bytes than 64 bits can count".to_owned(), |count| format!("{count} bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_cannot_reach_the_terminal_as_commands() {
        assert_eq!(Quoted("a\x1b[2Jb\u{202E}c/é").to_string(), "`a\\u{1b}[2Jb\\u{202e}c/é`");
    }
}
