//! Where vocabularies come from: the files of a tokenizer folder, or the one that ships with this program.

use std::{collections::HashMap, fs, io::Read as _, path::Path};

use serde::Deserialize;
use serde_json::Value;

use super::{BEGIN, END, bpe::byte_letter};
use crate::{Error, Result};

/// Words with their ids, and merges in order of rank.
pub(super) type Vocabulary = (HashMap<String, u32>, Vec<(String, String)>);

pub(super) const OPENAI_NAME: &str = "bpe_simple_vocab_16e6.txt.gz";

/// OpenAI's file under its MIT licence; see `assets/clip/README.md`.
static OPENAI: &[u8] = include_bytes!("../../../assets/clip/bpe_simple_vocab_16e6.txt.gz");

/// Number of merges that CLIP uses: 49,408 words less 512 letters and 2 marks.
const OPENAI_MERGES: usize = 48_894;

/// Reads `vocab.json` and `merges.txt`, or `tokenizer.json` where the first is missing.
pub(super) fn vocabulary(folder: &Path) -> Result<Vocabulary> {
    let vocab = folder.join("vocab.json");
    if vocab.is_file() {
        let words = parse(&vocab, &read(&vocab)?)?;
        let merges = folder.join("merges.txt");
        return Ok((words, pairs(read(&merges)?.lines().filter(|line| !line.starts_with("#version")))));
    }
    let whole = folder.join("tokenizer.json");
    if !whole.is_file() {
        return Err(Error::Vocabulary {
            path: folder.into(),
            reason: "neither `vocab.json` nor `tokenizer.json` is there".into(),
        });
    }
    let file: TokenizerFile = parse(&whole, &read(&whole)?)?;
    let mut words = file.model.vocab;
    words.extend(file.added_tokens.into_iter().map(|token| (token.content, token.id)));
    let merges = file.model.merges.into_iter().filter_map(|merge| match merge {
        Merge::Pair(left, right) => Some((left, right)),
        Merge::Line(line) => split(&line),
    });
    Ok((words, merges.collect()))
}

/// The padding word that a tokenizer folder names.
pub(super) fn padding(folder: &Path) -> Result<Option<String>> {
    for name in ["tokenizer_config.json", "special_tokens_map.json"] {
        let path = folder.join(name);
        if !path.is_file() {
            continue;
        }
        let file: Value = parse(&path, &read(&path)?)?;
        // Either the word itself or an object that describes it.
        let pad = &file["pad_token"];
        if let Some(word) = pad.as_str().or_else(|| pad["content"].as_str()) {
            return Ok(Some(word.to_owned()));
        }
    }
    Ok(None)
}

/// The vocabulary that the merges imply: byte letters, the same at the end of a word, one word a merge, the two marks.
pub(super) fn openai() -> Result<Vocabulary> {
    let mut text = String::new();
    flate2::read::GzDecoder::new(OPENAI)
        .read_to_string(&mut text)
        .map_err(|source| Error::Read { path: OPENAI_NAME.into(), source })?;
    let pairs = pairs(text.lines().skip(1).take(OPENAI_MERGES));
    // The byte letters in the order of the letters, those of bytes that do not print last.
    let mut letters: Vec<char> = (0..=255).map(byte_letter).collect();
    letters.sort_unstable();
    let words = letters
        .iter()
        .map(char::to_string)
        .chain(letters.iter().map(|letter| format!("{letter}</w>")))
        .chain(pairs.iter().map(|(left, right)| format!("{left}{right}")))
        .chain([BEGIN.to_owned(), END.to_owned()])
        .zip(0..)
        .collect();
    Ok((words, pairs))
}

#[derive(Deserialize)]
struct TokenizerFile {
    model: Model,
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
}

#[derive(Deserialize)]
struct Model {
    vocab: HashMap<String, u32>,
    merges: Vec<Merge>,
}

/// Written as a pair by today's tokenizers, as a line by older ones.
#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    Pair(String, String),
    Line(String),
}

#[derive(Deserialize)]
struct AddedToken {
    id: u32,
    content: String,
}

fn pairs<'a>(lines: impl Iterator<Item = &'a str>) -> Vec<(String, String)> {
    lines.filter_map(split).collect()
}

fn split(line: &str) -> Option<(String, String)> {
    let (left, right) = line.trim_end().split_once(' ')?;
    Some((left.to_owned(), right.to_owned()))
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).map_err(|source| Error::Read { path: path.into(), source })
}

fn parse<T: serde::de::DeserializeOwned>(path: &Path, text: &str) -> Result<T> {
    serde_json::from_str(text).map_err(|source| Error::Json { path: path.into(), source })
}
