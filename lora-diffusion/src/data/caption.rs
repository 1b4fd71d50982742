//! Captions: from the bytes of a text file to the words that the text encoder reads.
//!
//! Captions come out of every editor of the last thirty years, so the encoding is guessed: byte order mark, then UTF-8,
//! then Windows-1252, which every other byte string is. Options follow sd-scripts (`shuffle_caption`, `keep_tokens`,
//! `caption_dropout_rate`, `caption_tag_dropout_rate`) and ai-toolkit (`[trigger]`).

use lora_core::{Draw, Purpose};
use serde::{Deserialize, Serialize};

/// Where the trigger word goes in a caption that says so.
pub const PLACEHOLDER: &str = "[trigger]";

/// How the bytes of a text were read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Encoding {
    /// UTF-8, with or without a byte order mark.
    Utf8,
    /// UTF-16, either byte order.
    Utf16,
    /// Windows-1252, the superset of Latin-1 that old editors write.
    Latin1,
}

/// Text of unknown encoding.
pub fn decode_text(bytes: &[u8]) -> (String, Encoding) {
    let utf16 = |bytes: &[u8], join: fn([u8; 2]) -> u16| {
        let units: Vec<u16> = bytes.chunks_exact(2).map(|pair| join([pair[0], pair[1]])).collect();
        (String::from_utf16_lossy(&units), Encoding::Utf16)
    };
    match bytes {
        [0xef, 0xbb, 0xbf, rest @ ..] => (String::from_utf8_lossy(rest).into_owned(), Encoding::Utf8),
        [0xff, 0xfe, rest @ ..] => utf16(rest, u16::from_le_bytes),
        [0xfe, 0xff, rest @ ..] => utf16(rest, u16::from_be_bytes),
        // Without a mark: Latin letters in UTF-16 have a zero in every other byte, which no other encoding has.
        [first, 0, ..] if *first != 0 && bytes.len().is_multiple_of(2) => utf16(bytes, u16::from_le_bytes),
        [0, second, ..] if *second != 0 && bytes.len().is_multiple_of(2) => utf16(bytes, u16::from_be_bytes),
        _ => match std::str::from_utf8(bytes) {
            Ok(text) => (text.to_owned(), Encoding::Utf8),
            Err(_) => (bytes.iter().map(|byte| windows_1252(*byte)).collect(), Encoding::Latin1),
        },
    }
}

/// One line without control characters: lines are joined by a comma, or by a space after punctuation.
pub fn tidy(text: &str) -> String {
    let mut line = String::new();
    for part in text.lines() {
        let part: String = part.chars().map(|letter| if letter.is_control() { ' ' } else { letter }).collect();
        let part = part.trim();
        if part.is_empty() {
            continue;
        }
        match line.chars().last() {
            None => {}
            Some('.' | ',' | ';' | ':' | '!' | '?' | '。' | '、' | '，') => line.push(' '),
            Some(_) => line.push_str(", "),
        }
        line.push_str(part);
    }
    line
}

/// The caption with the trigger word in it: in place of `[trigger]`, else in front, unless it is there already.
pub fn with_trigger(caption: &str, trigger: &str) -> String {
    if caption.contains(PLACEHOLDER) {
        caption.replace(PLACEHOLDER, trigger)
    } else if holds_words(&caption.to_lowercase(), &trigger.to_lowercase()) {
        caption.to_owned()
    } else {
        format!("{trigger}, {caption}")
    }
}

/// Whether `words` stand in `text` as whole words: `sks` does not stand in `asks`.
fn holds_words(text: &str, words: &str) -> bool {
    text.match_indices(words).any(|(at, _)| {
        let before = text[..at].chars().next_back();
        let after = text[at + words.len()..].chars().next();
        ![before, after].into_iter().flatten().any(char::is_alphanumeric)
    })
}

/// What is changed about a caption from step to step.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct CaptionVariation {
    /// Shuffle the parts between commas.
    pub shuffle: bool,
    /// So many parts at the front stay in place and are never dropped.
    pub keep_tokens: usize,
    /// Chance that a single part is left out, 0..1.
    pub tag_dropout: f32,
    /// Chance that the whole caption is replaced by the empty one, 0..1; what classifier-free guidance is trained by.
    pub dropout: f32,
}

impl CaptionVariation {
    /// Whether the words change, so that their embeddings cannot be computed beforehand.
    pub fn changes_words(&self) -> bool {
        self.shuffle || self.tag_dropout > 0.0
    }

    /// Whether this sample of this step goes without a caption.
    pub fn drops(&self, seed: u64, step: u64, sample: u32) -> bool {
        self.dropout > 0.0 && Draw::new(seed, Purpose::CaptionDropout, step, sample).unit() < self.dropout
    }

    /// The words of this sample of this step; the caption itself where nothing is to change.
    pub fn words(&self, caption: &str, seed: u64, step: u64, sample: u32) -> String {
        if !self.changes_words() {
            return caption.to_owned();
        }
        let mut draw = Draw::new(seed, Purpose::CaptionShuffle, step, sample);
        let parts: Vec<&str> = caption.split(',').map(str::trim).filter(|part| !part.is_empty()).collect();
        let (kept, free) = parts.split_at(self.keep_tokens.min(parts.len()));
        let order = if self.shuffle { draw.permutation(free.len()) } else { (0..free.len()).collect() };
        let mut words = kept.to_vec();
        words.extend(order.into_iter().filter(|_| draw.unit() >= self.tag_dropout).map(|at| free[at]));
        words.join(", ")
    }
}

/// The letter of a byte; five bytes have none and stay control characters (WHATWG Encoding, index windows-1252).
fn windows_1252(byte: u8) -> char {
    const HIGH: [char; 32] = [
        '€', '\u{81}', '‚', 'ƒ', '„', '…', '†', '‡', 'ˆ', '‰', 'Š', '‹', 'Œ', '\u{8d}', 'Ž', '\u{8f}', '\u{90}', '‘',
        '’', '“', '”', '•', '–', '—', '˜', '™', 'š', '›', 'œ', '\u{9d}', 'ž', 'Ÿ',
    ];
    match byte {
        0x80..=0x9f => HIGH[usize::from(byte - 0x80)],
        _ => char::from(byte),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_of_every_encoding_reads_the_same() {
        let caption = "a café – “blue” ärmel";
        let utf16 = |big: bool| -> Vec<u8> {
            caption.encode_utf16().flat_map(|unit| if big { unit.to_be_bytes() } else { unit.to_le_bytes() }).collect()
        };
        let check = |bytes: Vec<u8>, encoding| assert_eq!(decode_text(&bytes), (caption.to_owned(), encoding));
        check(caption.as_bytes().to_vec(), Encoding::Utf8);
        check([b"\xef\xbb\xbf", caption.as_bytes()].concat(), Encoding::Utf8);
        check([b"\xff\xfe".to_vec(), utf16(false)].concat(), Encoding::Utf16);
        check([b"\xfe\xff".to_vec(), utf16(true)].concat(), Encoding::Utf16);
        check(utf16(false), Encoding::Utf16);
        check(utf16(true), Encoding::Utf16);
        check(b"a caf\xe9 \x96 \x93blue\x94 \xe4rmel".to_vec(), Encoding::Latin1);
    }

    #[test]
    fn lines_become_one() {
        assert_eq!(tidy("  a cat\r\nred\r\n\r\n sits. \r\nOn a\tmat\0 "), "a cat, red, sits. On a mat");
        assert_eq!(tidy(" \r\n\t"), "");
    }

    #[test]
    fn the_trigger_goes_where_it_is_asked_for() {
        assert_eq!(with_trigger("a [trigger] cat", "sks"), "a sks cat");
        assert_eq!(with_trigger("a cat", "sks"), "sks, a cat");
        assert_eq!(with_trigger("she asks", "sks"), "sks, she asks");
        assert_eq!(with_trigger("a cat in Neon Style", "neon style"), "a cat in Neon Style");
    }

    #[test]
    fn shuffling_keeps_the_words_and_the_front() {
        let variation = CaptionVariation { shuffle: true, keep_tokens: 1, ..Default::default() };
        let caption = "sks, a, b, c, d, e, f";
        let shuffled: Vec<String> = (0..20).map(|step| variation.words(caption, 1, step, 0)).collect();
        for words in &shuffled {
            assert!(words.starts_with("sks, "), "{words}");
            let mut parts: Vec<&str> = words.split(", ").collect();
            parts.sort_unstable();
            assert_eq!(parts, ["a", "b", "c", "d", "e", "f", "sks"]);
        }
        assert!(shuffled.windows(2).any(|pair| pair[0] != pair[1]));
        assert_eq!(variation.words(caption, 1, 7, 0), shuffled[7], "the same step has the same words");
    }

    #[test]
    fn captions_drop_out_at_their_rate() {
        let variation = CaptionVariation { dropout: 0.25, tag_dropout: 0.5, ..Default::default() };
        let dropped = (0..4000).filter(|step| variation.drops(9, *step, 1)).count();
        assert!((900..1100).contains(&dropped), "{dropped} of 4000");
        let kept: usize = (0..1000).map(|step| variation.words("a, b, c, d", 9, step, 0).split(", ").count()).sum();
        assert!((1850..2250).contains(&kept), "{kept} of 4000");
    }
}
