//! What can be wrong inside a file, without the file's name: parsers give these, openers add the path.

use std::fmt;

use super::{Dialect, Dtype, Family, FileKind};

/// A name out of a file, in backticks, with everything escaped that could move a cursor or hide, and cut if it is longer
/// than any name that means something.
#[derive(Debug, Clone, Copy)]
pub struct Quoted<'a>(pub &'a str);

/// Characters of the longest name that is shown whole, and of the two ends of a longer one.
const SHOWN: usize = 240;
const ENDS: [usize; 2] = [120, 60];

impl fmt::Display for Quoted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut write = |text: &str| {
            text.chars().try_for_each(|c| match is_hidden(c) {
                true => write!(f, "{}", c.escape_default()),
                false => fmt::Write::write_char(f, c),
            })
        };
        write("`")?;
        match self.0.chars().count() {
            count if count > SHOWN => {
                let at = |index: usize| self.0.char_indices().nth(index).map_or(self.0.len(), |(at, _)| at);
                write(&self.0[..at(ENDS[0])])?;
                write("…")?;
                write(&self.0[at(count - ENDS[1])..])?;
            }
            _ => write(self.0)?,
        }
        write("`")
    }
}

/// Whether a character could move a cursor, hide, or turn a line around on a terminal.
pub fn is_hidden(c: char) -> bool {
    // Directional marks reorder a terminal line and are not control characters to `char`.
    c.is_control()
        || matches!(c, '\u{200B}'..='\u{200F}' | '\u{2028}'..='\u{202E}' | '\u{2066}'..='\u{2069}' | '\u{FEFF}')
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
    #[error("the header claims {header} bytes, but {}", room(*header, *available, *limit))]
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
    #[error("tensor {}: {dtype} {shape:?} takes {}, its range {begin}..{end} holds {} bytes", Quoted(tensor), needed(*dtype, shape), end - begin)]
    Size {
        /// The tensor.
        tensor: String,
        /// Its type.
        dtype: Dtype,
        /// Its shape.
        shape: Vec<usize>,
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
    /// An adapter on the head of a base whose head is its embedding table.
    #[error(
        "the head is the embedding table: an adapter of {} merged into it would change what goes in, too",
        Quoted(tensor)
    )]
    TiedHead {
        /// The tensor that the head would have.
        tensor: String,
    },
    /// A matrix in 4 bits where its numbers are needed.
    #[error("tensor {} is stored in 4 bits, and this needs its numbers in full precision", Quoted(tensor))]
    Packed {
        /// The tensor.
        tensor: String,
    },
    /// A matrix in fewer bits than are read here.
    #[error("the matrix that {} describes cannot be read: {reason}", Quoted(tensor))]
    Quantised {
        /// The tensor that says so.
        tensor: String,
        /// Why.
        reason: String,
    },
    /// A safetensors file that holds no model.
    #[error("no model that is known here: its first tensor is {}", Quoted(first))]
    NotABase {
        /// The first name in it.
        first: String,
    },
    /// A folder without weights, or with several that could be meant.
    #[error("{}", if *found == 0 { "no .safetensors file in this folder (pickles, .bin and .ckpt, are not read)" } else { "several .safetensors files and no index that says which belong together" })]
    NoWeights {
        /// How many safetensors files there are.
        found: usize,
    },
    /// An index whose shard is no file in its folder.
    #[error(
        "the index of shards says that tensor {} is in {}, which is no file name in this folder",
        Quoted(tensor),
        Quoted(name)
    )]
    ShardName {
        /// The tensor.
        tensor: String,
        /// What stands in place of a name.
        name: String,
    },
    /// A tensor of an index that is nowhere.
    #[error("the index of shards says that tensor {} is in {}, and no shard holds it", Quoted(tensor), Quoted(shard))]
    NotInShards {
        /// The tensor.
        tensor: String,
        /// The file that should hold it.
        shard: String,
    },
    /// The folder of an adapter that holds none.
    #[error("neither adapter_model.safetensors nor pytorch_lora_weights.safetensors is in this folder")]
    NoAdapterFile,
    /// No header at all.
    #[error("the file begins with 8 zero bytes, where the length of its header should stand")]
    NoHeader,
    /// A file of tensors that are none of an adapter.
    #[error("it holds {what} and no adapter")]
    NotAnAdapter {
        /// What they are.
        what: &'static str,
    },
    /// A container without tensors.
    #[error("the file holds no tensors: there is nothing to apply")]
    NoTensors,
    /// One tensor of a set is missing.
    #[error("{} is missing: {} needs it", Quoted(missing), Quoted(present))]
    MissingPart {
        /// The key that is not there.
        missing: String,
        /// A key of the same module that is.
        present: String,
    },
    /// A tensor that means nothing without others, and there are none.
    #[error("{} stands alone: its module has no factors", Quoted(key))]
    Alone {
        /// The key.
        key: String,
    },
    /// A tensor does not fit its partners or its module.
    #[error(transparent)]
    Misfit(Box<Misfit>),
    /// A factor without width.
    #[error("{} is {shape:?}: its rank is 0", Quoted(key))]
    RankZero {
        /// The key.
        key: String,
        /// Its shape.
        shape: Vec<usize>,
    },
    /// A number that is no number, or infinite.
    #[error("{} holds {value}, which is not a finite number", Quoted(key))]
    NotFinite {
        /// The key.
        key: String,
        /// The first such value.
        value: f64,
    },
    /// An update without singular values.
    #[error("the update of module {} cannot be decomposed: {reason}", Quoted(module))]
    Indecomposable {
        /// The module.
        module: String,
        /// Why.
        reason: String,
    },
    /// A pickle that is not read.
    #[error("the pickle is not read: {reason}")]
    Pickle {
        /// Why.
        reason: String,
    },
    /// Names that do not tell which model they belong to.
    #[error("the names alone do not say which model it is for{}; the first unknown keys are {}", looks_like(guess.as_deref()), list(keys))]
    NoModel {
        /// What the file seems to be for.
        guess: Option<String>,
        /// Whether that is a family of models that is not read here.
        is_foreign: bool,
        /// The first keys without a place.
        keys: Vec<String>,
    },
    /// A result that its type cannot hold.
    #[error("tensor {} would hold {value} as {dtype}", Quoted(tensor))]
    Overflow {
        /// The tensor.
        tensor: String,
        /// The first such value.
        value: f32,
        /// The type in which it was to be stored.
        dtype: Dtype,
    },
    /// A factor that its type cannot hold.
    #[error("a factor of module {} would hold {value} as {dtype}", Quoted(module))]
    FactorOverflow {
        /// The module.
        module: String,
        /// The first such value.
        value: f32,
        /// The type in which it was to be stored.
        dtype: Dtype,
    },
    /// Integers where factors are expected.
    #[error("{} holds {dtype}; factors are floating-point numbers", Quoted(key))]
    NotFloat {
        /// The key.
        key: String,
        /// Its type.
        dtype: Dtype,
    },
    /// More or fewer than one number.
    #[error("{} has shape {shape:?}; it must be a single number", Quoted(key))]
    NotScalar {
        /// The key.
        key: String,
        /// Its shape.
        shape: Vec<usize>,
    },
    /// Two families for one module.
    #[error("module {} has tensors of two families, {} and {}", Quoted(module), Quoted(first), Quoted(second))]
    TwoFamilies {
        /// The module as the file spells it.
        module: String,
        /// A key of one family.
        first: String,
        /// A key of the other.
        second: String,
    },
    /// Two names for one module, or two keys for one role.
    #[error("module {} is spelled in two ways, by {} and by {}", Quoted(module), Quoted(first), Quoted(second))]
    TwoSpellings {
        /// The module of the base.
        module: String,
        /// One key.
        first: String,
        /// The other.
        second: String,
    },
    /// A module that cannot carry such an adapter.
    #[error(
        "{} is for module {}, whose weight {base:?} belongs to {kind} and cannot carry it",
        Quoted(key),
        Quoted(module)
    )]
    NotAdaptable {
        /// The key.
        key: String,
        /// The module.
        module: String,
        /// The shape of its weight.
        base: Vec<usize>,
        /// What it is.
        kind: &'static str,
    },
    /// A tensor that only the base weight gives a meaning.
    #[error("{} needs the base: {reason}", Quoted(key))]
    NeedsBase {
        /// The key.
        key: String,
        /// Why.
        reason: &'static str,
    },
    /// A tensor whose meaning is known and that still cannot be applied.
    #[error("{} cannot be applied: {reason}", Quoted(key))]
    Unsupported {
        /// The key.
        key: String,
        /// Why.
        reason: String,
    },
    /// No module of the file is one of the base.
    #[error("0 of {modules} modules match this base ({base}){}; the first keys are {}", looks_like(guess.as_deref()), list(keys))]
    NothingMatches {
        /// How many modules the file has.
        modules: usize,
        /// The family of the base.
        base: Family,
        /// What the file seems to be for.
        guess: Option<String>,
        /// Whether that is a family of models that is not read here.
        is_foreign: bool,
        /// The first keys.
        keys: Vec<String>,
    },
    /// A field of a peft configuration that cannot be followed.
    #[error("configuration field `{field}`: {problem}")]
    PeftField {
        /// The field.
        field: String,
        /// What is wrong.
        problem: String,
    },
    /// The configuration that gives the scale is missing.
    #[error("there is no adapter_config.json beside it, which says the scale of {}", Quoted(key))]
    NoPeftConfig {
        /// A key of the file.
        key: String,
    },
    /// An adapter that a dialect has no words for.
    #[error("module {} cannot be written as {dialect}: {reason}", Quoted(module))]
    Unwritable {
        /// The module.
        module: String,
        /// The dialect.
        dialect: Dialect,
        /// Why.
        reason: &'static str,
        /// A dialect that may have words for it.
        other: Option<Dialect>,
    },
    /// A JSON text beside or inside the file that is malformed.
    #[error("{what} is malformed: {message}")]
    Text {
        /// Which text.
        what: &'static str,
        /// What the parser says.
        message: String,
    },
    /// What was read back is not what was written.
    #[error("what was read back differs from what was written: {what}")]
    ReadBack {
        /// The difference.
        what: String,
    },
}

/// A tensor that does not fit its partners or its module.
#[derive(Debug, thiserror::Error)]
#[error("{} is {shape:?}{}, module {} has weight {base:?}: {problem}", Quoted(key), beside(other), Quoted(module))]
pub struct Misfit {
    /// The key.
    pub key: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// The partner that it was compared with, and its shape.
    pub other: Option<(String, Vec<usize>)>,
    /// The module of the base.
    pub module: String,
    /// The shape of the base weight.
    pub base: Vec<usize>,
    /// What does not fit.
    pub problem: String,
}

fn beside(other: &Option<(String, Vec<usize>)>) -> String {
    other.as_ref().map_or_else(String::new, |(key, shape)| format!(" beside {} {shape:?}", Quoted(key)))
}

fn looks_like(guess: Option<&str>) -> String {
    guess.map_or_else(String::new, |guess| format!("; the file looks like one for {guess}"))
}

fn list(keys: &[String]) -> String {
    keys.iter().map(|key| Quoted(key).to_string()).collect::<Vec<_>>().join(", ")
}

fn room(header: u64, available: u64, limit: u64) -> String {
    match header > limit {
        true => format!("no more than {limit} are read"),
        false => format!("{available} bytes follow its length"),
    }
}

/// The bytes of a tensor, or why they cannot be counted.
fn needed(dtype: Dtype, shape: &[usize]) -> String {
    if let Some(bytes) = dtype.bytes_of(shape) {
        return format!("{bytes} bytes");
    }
    let elements = shape.iter().try_fold(1_usize, |product, length| product.checked_mul(*length));
    match elements.and_then(|elements| elements.checked_mul(dtype.bits())) {
        Some(bits) => format!("{bits} bits, which is no whole number of bytes"),
        None => "more bytes than 64 bits can count".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_cannot_reach_the_terminal_as_commands() {
        assert_eq!(Quoted("a\x1b[2Jb\u{202E}c/é").to_string(), "`a\\u{1b}[2Jb\\u{202e}c/é`");
        let long = Quoted(&"é".repeat(100_000)).to_string();
        assert_eq!(long, format!("`{}…{}`", "é".repeat(120), "é".repeat(60)));
    }
}
