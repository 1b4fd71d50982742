//! Byte-pair merges: the letters of a piece are joined, lowest rank first, until no pair is left in the table.

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, HashMap},
};

/// Marks the last letter of a piece.
const SUFFIX: &str = "</w>";

/// A vocabulary and its table of merges.
#[derive(Debug)]
pub(super) struct Merges {
    vocabulary: HashMap<String, u32>,
    /// Left and right symbol to (rank, joined symbol).
    pairs: HashMap<(u32, u32), (u32, u32)>,
    /// The letter of every byte; the second list has [`SUFFIX`] appended.
    letters: [Vec<Option<u32>>; 2],
}

impl Merges {
    /// Pairs are in order of rank; one that needs a word outside of the vocabulary can never apply and is left out.
    pub(super) fn new(vocabulary: HashMap<String, u32>, pairs: &[(String, String)]) -> Self {
        let pairs = pairs
            .iter()
            .enumerate()
            .filter_map(|(rank, (left, right))| {
                let joined = vocabulary.get(&format!("{left}{right}"))?;
                Some(((*vocabulary.get(left)?, *vocabulary.get(right)?), (rank as u32, *joined)))
            })
            .collect();
        let letters = ["", SUFFIX].map(|suffix| {
            (0..=255).map(|byte| vocabulary.get(&format!("{}{suffix}", byte_letter(byte))).copied()).collect()
        });
        Self { vocabulary, pairs, letters }
    }

    /// The id of a word as the vocabulary spells it.
    pub(super) fn id(&self, word: &str) -> Option<u32> {
        self.vocabulary.get(word).copied()
    }

    /// Appends the ids of one piece; a letter that the vocabulary lacks becomes `unknown`.
    ///
    /// A heap of candidate pairs over a linked list of symbols: n letters take n·log n steps, whatever they are.
    pub(super) fn encode(&self, piece: &str, unknown: u32, ids: &mut Vec<u32>) {
        let bytes = piece.as_bytes();
        let Some(last) = bytes.len().checked_sub(1) else { return };
        let mut symbols: Vec<Symbol> = bytes
            .iter()
            .enumerate()
            .map(|(at, byte)| Symbol {
                id: self.letters[usize::from(at == last)][usize::from(*byte)].unwrap_or(unknown),
                before: at.checked_sub(1),
                after: (at < last).then_some(at + 1),
                live: true,
            })
            .collect();
        let mut candidates = BinaryHeap::new();
        for left in 0..last {
            self.offer(&symbols, left, &mut candidates);
        }
        while let Some(Reverse(Candidate { left, joined, pair, .. })) = candidates.pop() {
            let Some(right) = symbols[left].after else { continue };
            if !symbols[left].live || (symbols[left].id, symbols[right].id) != pair {
                continue; // one of the two has been merged since
            }
            symbols[left].id = joined;
            symbols[left].after = symbols[right].after;
            symbols[right].live = false;
            if let Some(after) = symbols[right].after {
                symbols[after].before = Some(left);
                self.offer(&symbols, left, &mut candidates);
            }
            if let Some(before) = symbols[left].before {
                self.offer(&symbols, before, &mut candidates);
            }
        }
        ids.extend(symbols.iter().filter(|symbol| symbol.live).map(|symbol| symbol.id));
    }

    fn offer(&self, symbols: &[Symbol], left: usize, candidates: &mut BinaryHeap<Reverse<Candidate>>) {
        let Some(right) = symbols[left].after else { return };
        let pair = (symbols[left].id, symbols[right].id);
        if let Some(&(rank, joined)) = self.pairs.get(&pair) {
            candidates.push(Reverse(Candidate { rank, left, joined, pair }));
        }
    }
}

/// One symbol in the linked list of a piece.
struct Symbol {
    id: u32,
    before: Option<usize>,
    after: Option<usize>,
    live: bool,
}

/// A merge that may apply; compared by rank, then from left to right.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Candidate {
    rank: u32,
    left: usize,
    joined: u32,
    pair: (u32, u32),
}

/// GPT-2's printable letter for a byte: itself where it prints, else one of the letters from U+0100 on.
pub(super) fn byte_letter(byte: u8) -> char {
    let prints = |byte: u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    if prints(byte) {
        return char::from(byte);
    }
    let shift = (0..byte).filter(|earlier| !prints(*earlier)).count() as u32;
    char::from_u32(0x100 + shift).unwrap_or(char::REPLACEMENT_CHARACTER)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_that_do_not_print_get_letters_from_256_on() {
        assert_eq!(byte_letter(b'a'), 'a');
        assert_eq!(byte_letter(0), '\u{100}');
        assert_eq!(byte_letter(b' '), '\u{120}');
        assert_eq!(byte_letter(0xAD), '\u{143}');
        let all: std::collections::HashSet<char> = (0..=255).map(byte_letter).collect();
        assert_eq!(all.len(), 256);
    }

    /// `ab` has rank 1 and `bc` rank 0: the merge of lower rank wins although it stands further right.
    #[test]
    fn lower_ranks_merge_first() {
        let words = ["a", "b", "c", "c</w>", "ab", "bc</w>", "a</w>", "b</w>"];
        let vocabulary = words.iter().zip(0..).map(|(word, id)| ((*word).to_owned(), id)).collect();
        let pairs = [("b", "c</w>"), ("a", "b")].map(|(left, right)| (left.to_owned(), right.to_owned()));
        let merges = Merges::new(vocabulary, &pairs);
        let mut ids = Vec::new();
        merges.encode("abc", 99, &mut ids);
        assert_eq!(ids, [0, 5]);
        ids.clear();
        merges.encode("abz", 99, &mut ids);
        assert_eq!(ids, [4, 99]);
    }
}
