//! Text to token ids and back, as the model's own `tokenizer.json` says.
//!
//! The arithmetic is that of Hugging Face's `tokenizers`. What surrounds it in a model folder is read here: which tokens
//! begin, end and pad a text (`tokenizer_config.json`, `special_tokens_map.json`, `generation_config.json`,
//! `config.json`), by the rules of `transformers` 5 (`tokenization_utils_tokenizers.py`). Chat templates are next door.

mod error;
mod special;
mod stream;

use std::{
    ops::Range,
    path::{Path, PathBuf},
};

pub use error::{Error, Result};
pub use special::SpecialTokens;
pub use stream::TextStream;
use tokenizers::PostProcessorWrapper;

/// A larger `tokenizer.json` is refused; that of Gemma 3, the largest of the known ones, has 33 MB.
const MAX_FILE_BYTES: u64 = 256 << 20;

/// The tokenizer of a model folder.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    special: SpecialTokens,
    path: PathBuf,
    /// One more than the largest id.
    rows: usize,
}

/// Token ids with the part of the text that each stands for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Encoded {
    /// Token ids.
    pub ids: Vec<u32>,
    /// Bytes of the text, one range per id; tokens that share a letter have its whole range, added ones an empty range.
    pub spans: Vec<Range<usize>>,
}

impl Tokenizer {
    /// Reads the tokenizer of a model folder, or one `tokenizer.json` with whatever lies beside it.
    ///
    /// # Errors
    /// When there is no `tokenizer.json`, or it is none.
    pub fn open(path: &Path) -> Result<Self> {
        let (folder, file) = match path.is_dir() {
            true => (path.to_owned(), path.join("tokenizer.json")),
            false => (path.parent().unwrap_or(Path::new("")).to_owned(), path.to_owned()),
        };
        if !file.is_file() {
            return Err(Error::missing(&folder, &file));
        }
        let read = |source| Error::Read { path: file.clone(), source };
        let bytes = std::fs::metadata(&file).map_err(read)?.len();
        if bytes > MAX_FILE_BYTES {
            return Err(Error::Broken { path: file, reason: format!("{} MB are too many", bytes >> 20) });
        }
        let text = std::fs::read(&file).map_err(read)?;
        let mut inner =
            parse(&text).map_err(|error| Error::Broken { path: file.clone(), reason: error.to_string() })?;
        let special = SpecialTokens::read(&folder, &mut inner)?;
        let rows = inner.get_vocab(true).into_values().max().map_or(0, |id| id as usize + 1);
        Ok(Self { inner, special, path: file, rows })
    }

    /// The file it was read from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What begins, ends and pads a text.
    pub fn special(&self) -> &SpecialTokens {
        &self.special
    }

    /// One more than the largest id: so many rows the model's embedding must have, at least.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Refuses a tokenizer whose ids go past the embedding of the model, `rows` long.
    ///
    /// # Errors
    /// When it is that of another model.
    pub fn check_rows(&self, rows: usize) -> Result<()> {
        if self.rows > rows {
            return Err(Error::WrongModel { path: self.path.clone(), tokens: self.rows, rows });
        }
        Ok(())
    }

    /// The ids of a text; with `framed`, between the marks that the tokenizer puts around a text of its own accord.
    ///
    /// Texts from a chat template already have their marks and are not framed.
    ///
    /// # Errors
    /// When the tokenizer refuses the text, for example for want of a token for unknown letters.
    pub fn encode(&self, text: &str, framed: bool) -> Result<Encoded> {
        let frame = &self.special.frame;
        let own_frame = framed && frame.is_none();
        let encoding = self.inner.encode(text, own_frame).map_err(|error| self.refused(&*error))?;
        let mut ids = encoding.get_ids().to_vec();
        let mut spans: Vec<Range<usize>> = encoding.get_offsets().iter().map(|&(start, end)| start..end).collect();
        if let Some(frame) = frame.as_ref().filter(|_| framed) {
            if let Some(first) = frame.first {
                ids.insert(0, first);
                spans.insert(0, 0..0);
            }
            if let Some(last) = frame.last {
                ids.push(last);
                spans.push(text.len()..text.len());
            }
        }
        Ok(Encoded { ids, spans })
    }

    /// The text of ids. Special tokens are left out unless `with_special`; bytes that are no UTF-8 become U+FFFD.
    ///
    /// # Errors
    /// When the tokenizer refuses.
    pub fn decode(&self, ids: &[u32], with_special: bool) -> Result<String> {
        self.inner.decode(ids, !with_special).map_err(|error| self.refused(&*error))
    }

    /// Text from ids that come one after the other; see [`TextStream`].
    pub fn stream(&self, with_special: bool) -> TextStream<'_> {
        TextStream::new(self, with_special)
    }

    /// The id of a token, spelled as in the vocabulary.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// A token as the vocabulary spells it.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The id that the text needs at its end for a model to learn to stop, if the tokenizer knows one.
    pub fn end(&self) -> Option<u32> {
        self.special.end
    }

    fn refused(&self, error: &(dyn std::error::Error + Send + Sync)) -> Error {
        Error::Refused { path: self.path.clone(), reason: error.to_string() }
    }
}

/// Parses the file, with two changes that leave the ids alone.
///
/// Offsets are wanted for every letter, blanks included: with `trim_offsets` a token of blanks alone would stand for
/// nothing, and which side of a boundary it is on could not be told. Padding and truncation are the caller's business.
fn parse(text: &[u8]) -> std::result::Result<tokenizers::Tokenizer, Box<dyn std::error::Error + Send + Sync>> {
    let mut inner = tokenizers::Tokenizer::from_bytes(text)?;
    inner.with_padding(None);
    inner.with_truncation(None)?;
    if let Some(processor) = inner.get_post_processor() {
        let mut settings = serde_json::to_value(processor)?;
        keep_blanks(&mut settings);
        inner.with_post_processor(Some(serde_json::from_value::<PostProcessorWrapper>(settings)?));
    }
    Ok(inner)
}

fn keep_blanks(settings: &mut serde_json::Value) {
    match settings {
        serde_json::Value::Object(fields) => fields.iter_mut().for_each(|(key, value)| match value {
            serde_json::Value::Bool(value) if key == "trim_offsets" => *value = false,
            other => keep_blanks(other),
        }),
        serde_json::Value::Array(items) => items.iter_mut().for_each(keep_blanks),
        _ => {}
    }
}
