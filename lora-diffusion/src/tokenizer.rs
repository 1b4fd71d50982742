//! CLIP's tokenizer: a prompt becomes 77 numbers.
//!
//! The prompt is cleaned (NFC, runs of white space become one space, lower case), split into pieces, each piece spelt in
//! the 256 byte letters of GPT-2, and its letters merged by the table of byte pairs (Sennrich et al. 2016, arXiv
//! 1508.07909) with `</w>` marking the end of a piece. Ids equal those of transformers' `CLIPTokenizer`; OpenAI's own
//! program also repairs text (ftfy) and reads HTML entities, which changes a few prompts. Prompt weights such as
//! `(word:1.2)` are not known here.

mod bpe;
mod files;

use std::path::Path;

use regex::Regex;
use unicode_normalization::UnicodeNormalization;

use bpe::Merges;

use crate::{Error, Result};

/// Number of ids that CLIP reads.
pub const LENGTH: usize = 77;

const BEGIN: &str = "<|startoftext|>";
const END: &str = "<|endoftext|>";

/// What fills the places after the end mark.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Padding {
    /// The end mark: SD 1.5, and the first encoder of SDXL.
    End,
    /// Id 0: SD 2.1, and the second encoder of SDXL.
    Zero,
}

/// A vocabulary with its merges.
#[derive(Debug)]
pub struct Tokenizer {
    merges: Merges,
    pieces: Regex,
    begin: u32,
    end: u32,
    pad: u32,
}

impl Tokenizer {
    /// The tokenizer of a diffusers folder: `vocab.json` and `merges.txt`, or `tokenizer.json`; the padding from
    /// `tokenizer_config.json` or `special_tokens_map.json`.
    ///
    /// # Errors
    /// If files are missing or do not hold together.
    pub fn open(folder: &Path) -> Result<Self> {
        let (vocabulary, pairs) = files::vocabulary(folder)?;
        let mut tokenizer = Self::new(Merges::new(vocabulary, &pairs), folder)?;
        if let Some(pad) = files::padding(folder)? {
            tokenizer.pad = tokenizer.merges.id(&pad).ok_or_else(|| Error::Vocabulary {
                path: folder.into(),
                reason: format!("the padding `{pad}` is not a word of the vocabulary"),
            })?;
        }
        Ok(tokenizer)
    }

    /// OpenAI's vocabulary of 49,408 words, which SD 1.5, SD 2.1 and SDXL use.
    ///
    /// # Errors
    /// If the embedded file cannot be unpacked, which means that the program was built wrongly.
    pub fn openai(padding: Padding) -> Result<Self> {
        let (vocabulary, pairs) = files::openai()?;
        let mut tokenizer = Self::new(Merges::new(vocabulary, &pairs), Path::new(files::OPENAI_NAME))?;
        if padding == Padding::Zero {
            tokenizer.pad = 0;
        }
        Ok(tokenizer)
    }

    /// The ids of a prompt between the two marks, neither cut nor filled up.
    pub fn encode(&self, prompt: &str) -> Vec<u32> {
        let mut ids = vec![self.begin];
        let mut rest = clean(prompt);
        // The two marks may be written out in a prompt; they are found before anything is split.
        while let Some((at, mark, id)) = [(BEGIN, self.begin), (END, self.end)]
            .into_iter()
            .filter_map(|(mark, id)| Some((rest.find(mark)?, mark, id)))
            .min_by_key(|(at, ..)| *at)
        {
            self.encode_text(&rest[..at], &mut ids);
            ids.push(id);
            rest.drain(..at + mark.len());
        }
        self.encode_text(&rest, &mut ids);
        ids.push(self.end);
        ids
    }

    /// What the text encoder reads: exactly [`LENGTH`] ids, a longer prompt cut before the end mark.
    pub fn ids(&self, prompt: &str) -> Vec<i64> {
        let mut ids = self.encode(prompt);
        if ids.len() > LENGTH {
            ids.truncate(LENGTH - 1);
            ids.push(self.end);
        }
        ids.resize(LENGTH, self.pad);
        ids.into_iter().map(i64::from).collect()
    }

    /// How many ids a prompt needs, the two marks included; more than [`LENGTH`] means that its end is not read.
    pub fn count(&self, prompt: &str) -> usize {
        self.encode(prompt).len()
    }

    /// The id after the last word of a prompt.
    pub fn end(&self) -> u32 {
        self.end
    }

    fn new(merges: Merges, path: &Path) -> Result<Self> {
        let mark = |mark: &str| {
            merges.id(mark).ok_or_else(|| Error::Vocabulary {
                path: path.into(),
                reason: format!("`{mark}` is not a word of the vocabulary"),
            })
        };
        let (begin, end) = (mark(BEGIN)?, mark(END)?);
        let pieces = Regex::new(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")
            .expect("a constant pattern that the tests compile");
        Ok(Self { merges, pieces, begin, end, pad: end })
    }

    fn encode_text(&self, text: &str, ids: &mut Vec<u32>) {
        for piece in self.pieces.find_iter(text) {
            self.merges.encode(piece.as_str(), self.end, ids);
        }
    }
}

/// NFC, one space for every run of white space, lower case letter by letter (without the rule for a final sigma).
fn clean(prompt: &str) -> String {
    let mut cleaned = String::with_capacity(prompt.len());
    let mut gap = false;
    for letter in prompt.nfc() {
        if letter.is_whitespace() {
            gap = true;
            continue;
        }
        if std::mem::take(&mut gap) {
            cleaned.push(' ');
        }
        cleaned.extend(letter.to_lowercase());
    }
    cleaned
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_prompt_keeps_its_first_76_ids_and_an_end() {
        let tokenizer = Tokenizer::openai(Padding::End).unwrap();
        let prompt = "cat ".repeat(100);
        let ids = tokenizer.ids(&prompt);
        assert_eq!(ids.len(), LENGTH);
        assert_eq!(ids[0], 49406);
        assert_eq!(ids[LENGTH - 1], 49407);
        assert!(ids[1..LENGTH - 1].iter().all(|id| *id == 2368));
        assert_eq!(tokenizer.count(&prompt), 102);
    }

    #[test]
    fn padding_is_the_end_mark_or_zero() {
        let ids = |padding| Tokenizer::openai(padding).unwrap().ids("a");
        assert_eq!(ids(Padding::End)[..4], [49406, 320, 49407, 49407]);
        assert_eq!(ids(Padding::Zero)[..4], [49406, 320, 49407, 0]);
    }

    #[test]
    fn marks_written_out_become_their_ids() {
        let tokenizer = Tokenizer::openai(Padding::End).unwrap();
        assert_eq!(tokenizer.encode("!<|startoftext|>a"), [49406, 256, 49406, 320, 49407]);
    }

    #[test]
    fn a_word_of_a_hundred_thousand_letters_takes_no_quadratic_time() {
        let tokenizer = Tokenizer::openai(Padding::End).unwrap();
        let start = std::time::Instant::now();
        let ids = tokenizer.encode(&"ab".repeat(50_000));
        assert!(ids.len() > 1000);
        assert!(start.elapsed().as_secs() < 20, "{:?}", start.elapsed());
    }
}
