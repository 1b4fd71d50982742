//! Examples as questions: what a model is asked, and the answer that counts as right.
//!
//! The question ends where the last stretch of trained ids begins; so a model is asked exactly as it was taught.

use crate::{
    example::Example,
    tokenizer::{Result, Tokenizer},
};

/// A question with its answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    /// Ids to go on from.
    pub prompt: Vec<u32>,
    /// The text to go on with, without special tokens.
    pub answer: String,
    /// Tokens of the answer, end mark included.
    pub tokens: usize,
}

impl Question {
    /// The question in an example; `None` if nothing comes before what is trained, or nothing is trained.
    ///
    /// # Errors
    /// When the tokenizer refuses an id.
    pub fn of(example: &Example, tokenizer: &Tokenizer) -> Result<Option<Self>> {
        let Some(last) = example.trained.iter().rposition(|trained| *trained) else { return Ok(None) };
        let first = example.trained[..last].iter().rposition(|trained| !trained).map_or(0, |before| before + 1);
        if first == 0 {
            return Ok(None);
        }
        let (prompt, rest) = example.ids.split_at(first);
        let answer = &rest[..=last - first];
        Ok(Some(Self { prompt: prompt.to_vec(), answer: tokenizer.decode(answer, false)?, tokens: answer.len() }))
    }

    /// Whether a text is the answer, blanks around it aside.
    ///
    /// A model that was never taught to end there goes on with further lines; as many count as the answer has.
    pub fn is_answered_by(&self, text: &str) -> bool {
        let lines = self.answer.trim().lines().count();
        self.answer.trim().lines().eq(text.trim().lines().take(lines))
    }
}
