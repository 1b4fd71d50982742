//! Text from ids that come one after the other, for a terminal: never half a letter, never a letter twice.
//!
//! A token may hold a part of a letter's bytes, and some tokenizers decode a token differently at the beginning of a
//! text. Hence a short window is decoded with and without the new id, and the difference is the new text.

use super::{Result, Tokenizer};

/// Gives out the text of ids as soon as its letters are whole.
#[derive(Debug, Clone)]
pub struct TextStream<'t> {
    tokenizer: &'t Tokenizer,
    with_special: bool,
    /// The last ids that gave text, then those that have given none yet.
    window: Vec<u32>,
    /// So many ids of the window have been given out.
    given: usize,
}

impl<'t> TextStream<'t> {
    pub(super) fn new(tokenizer: &'t Tokenizer, with_special: bool) -> Self {
        Self { tokenizer, with_special, window: Vec::new(), given: 0 }
    }

    /// Takes the next id; gives the text that is certain now, which may be none.
    ///
    /// # Errors
    /// When the tokenizer refuses the id.
    pub fn push(&mut self, id: u32) -> Result<String> {
        self.window.push(id);
        let text = self.pending()?;
        // U+FFFD at the end stands for bytes that may yet become a letter.
        if text.is_empty() || text.ends_with('\u{fffd}') {
            return Ok(String::new());
        }
        self.window.drain(..self.given);
        self.given = self.window.len();
        Ok(text)
    }

    /// Gives what is left; bytes that never became a letter are U+FFFD.
    ///
    /// # Errors
    /// When the tokenizer refuses.
    pub fn finish(self) -> Result<String> {
        self.pending()
    }

    fn pending(&self) -> Result<String> {
        let before = self.tokenizer.decode(&self.window[..self.given], self.with_special)?;
        let after = self.tokenizer.decode(&self.window, self.with_special)?;
        // A decoder that tidies up may change what came before; that has been given out and stays as it was.
        let common = before.chars().zip(after.chars()).take_while(|(a, b)| a == b).map(|(a, _)| a.len_utf8()).sum();
        Ok(after.get(common..).unwrap_or_default().to_owned())
    }
}
