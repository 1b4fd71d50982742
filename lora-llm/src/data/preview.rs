//! Examples as text again, in pieces that count in the loss and pieces that do not: what `lora data preview` colours.

use std::fmt;

use serde::Serialize;

use crate::{
    example::Example,
    tokenizer::{Result, Tokenizer},
};

/// A piece of an example.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Piece {
    /// Its text, special tokens spelled out.
    pub text: String,
    /// Whether it counts in the loss.
    pub trained: bool,
    /// Its tokens.
    pub tokens: usize,
}

/// An example as text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Preview {
    /// Its pieces in order; neighbours differ in `trained`.
    pub pieces: Vec<Piece>,
}

impl Preview {
    /// An example as text; a letter of several tokens belongs to the piece in which it is complete.
    ///
    /// # Errors
    /// When the tokenizer refuses an id.
    pub fn new(example: &Example, tokenizer: &Tokenizer) -> Result<Self> {
        let mut pieces: Vec<Piece> = Vec::new();
        let mut stream = tokenizer.stream(true);
        for (id, trained) in example.ids.iter().zip(&example.trained) {
            let text = stream.push(*id)?;
            match pieces.last_mut().filter(|piece| piece.trained == *trained) {
                Some(piece) => {
                    piece.text.push_str(&text);
                    piece.tokens += 1;
                }
                None => pieces.push(Piece { text, trained: *trained, tokens: 1 }),
            }
        }
        let rest = stream.finish()?;
        if let Some(last) = pieces.last_mut() {
            last.text.push_str(&rest);
        }
        Ok(Self { pieces })
    }
}

impl fmt::Display for Preview {
    /// What is trained stands between `⟦` and `⟧`: legible without colour.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.pieces.iter().try_for_each(|piece| match piece.trained {
            true => write!(f, "⟦{}⟧", piece.text),
            false => f.write_str(&piece.text),
        })
    }
}
