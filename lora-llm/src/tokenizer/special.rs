//! The tokens that begin, end and pad a text, out of the four files that may name them.
//!
//! Precedence is that of `transformers`: `tokenizer_config.json` over `special_tokens_map.json`; the ids in
//! `generation_config.json` and `config.json` add further ends (Llama 3 has three) and fill gaps.

use std::{collections::BTreeMap, path::Path};

use serde_json::{Map, Value};

use super::{Error, Result};

/// The names under which templates see special tokens.
const NAMES: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// What begins, ends and pads a text.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SpecialTokens {
    /// The id that begins a text.
    pub begin: Option<u32>,
    /// The id that ends a text or a turn, the tokenizer's first choice.
    pub end: Option<u32>,
    /// All ids at which generation stops, [`end`](Self::end) first.
    pub ends: Vec<u32>,
    /// The id that fills up a batch; training never counts it.
    pub pad: Option<u32>,
    /// Special tokens by the name that a template knows them by, such as `bos_token`.
    pub named: BTreeMap<String, String>,
    /// The most tokens that the tokenizer was made for, if it says something sensible.
    pub longest: Option<usize>,
    /// Set when the configuration overrules the marks that `tokenizer.json` puts around a text.
    pub(super) frame: Option<Frame>,
}

/// Marks around a text.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Frame {
    pub(super) first: Option<u32>,
    pub(super) last: Option<u32>,
}

impl SpecialTokens {
    /// Reads the files of a folder; those that are not there say nothing. Tokens that only the configuration names are
    /// added to the tokenizer.
    pub(super) fn read(folder: &Path, tokenizer: &mut tokenizers::Tokenizer) -> Result<Self> {
        let config = object(&folder.join("tokenizer_config.json"))?;
        let map = object(&folder.join("special_tokens_map.json"))?;
        add_declared(&config, tokenizer);
        let mut named = BTreeMap::new();
        for source in [&map, &config] {
            for name in NAMES {
                if let Some(content) = source.get(name).and_then(content) {
                    named.insert(name.to_owned(), content.to_owned());
                }
            }
        }
        let extra = config.get("extra_special_tokens").and_then(Value::as_object);
        for (name, token) in extra.into_iter().flatten() {
            if let Some(content) = content(token) {
                named.insert(name.clone(), content.to_owned());
            }
        }
        let id = |name: &str| named.get(name).and_then(|token| tokenizer.token_to_id(token));
        let mut special = Self { begin: id("bos_token"), end: id("eos_token"), pad: id("pad_token"), ..Self::default() };
        special.ends.extend(special.end);
        for file in ["generation_config.json", "config.json"] {
            let path = folder.join(file);
            let fields = object(&path)?;
            let ends = ids(&fields, "eos_token_id", &path)?;
            special.ends.extend(ends);
            special.begin = special.begin.or(ids(&fields, "bos_token_id", &path)?.first().copied());
            special.pad = special.pad.or(ids(&fields, "pad_token_id", &path)?.first().copied());
        }
        let known: Vec<u32> = special.ends.iter().copied().filter(|id| tokenizer.id_to_token(*id).is_some()).collect();
        special.ends.clear();
        for id in known {
            if !special.ends.contains(&id) {
                special.ends.push(id);
            }
        }
        special.end = special.end.or(special.ends.first().copied());
        special.frame = frame(&config, tokenizer, &special);
        // Tokenizers without a limit say 10^30.
        special.longest = config.get("model_max_length").and_then(Value::as_u64).map(|length| length as usize);
        special.named = named;
        Ok(special)
    }

    /// Whether generation stops at an id.
    pub fn is_end(&self, id: u32) -> bool {
        self.ends.contains(&id)
    }
}

/// A configuration that says `add_bos_token` or `add_eos_token` replaces the frame of `tokenizer.json`.
fn frame(config: &Map<String, Value>, tokenizer: &tokenizers::Tokenizer, special: &SpecialTokens) -> Option<Frame> {
    let said = ["add_bos_token", "add_eos_token"].iter().any(|key| config.contains_key(*key));
    if !said && tokenizer.get_post_processor().is_some() {
        return None;
    }
    let wanted = |key: &str| config.get(key).and_then(Value::as_bool).unwrap_or(false);
    Some(Frame {
        first: special.begin.filter(|_| wanted("add_bos_token")),
        last: special.end.filter(|_| wanted("add_eos_token")),
    })
}

/// Tokens of `added_tokens_decoder` that `tokenizer.json` lacks.
fn add_declared(config: &Map<String, Value>, tokenizer: &mut tokenizers::Tokenizer) {
    let Some(declared) = config.get("added_tokens_decoder").and_then(Value::as_object) else { return };
    let mut missing: Vec<(u32, &Value)> = declared
        .iter()
        .filter_map(|(id, token)| Some((id.parse().ok()?, token)))
        .filter(|(_, token)| content(token).is_some_and(|content| tokenizer.token_to_id(content).is_none()))
        .collect();
    missing.sort_by_key(|(id, _)| *id);
    for (id, token) in missing {
        let flag = |key: &str| token.get(key).and_then(Value::as_bool).unwrap_or(false);
        let Some(content) = content(token) else { continue };
        // Ids are given out in order; one that would come out differently is better left unknown.
        if id as usize != tokenizer.get_vocab_size(true) {
            continue;
        }
        let added = tokenizers::AddedToken::from(content.to_owned(), flag("special"))
            .lstrip(flag("lstrip"))
            .rstrip(flag("rstrip"))
            .single_word(flag("single_word"))
            .normalized(flag("normalized"));
        // It can only be refused for a pattern that does not compile, and it is then as unknown as before.
        let _ = if flag("special") { tokenizer.add_special_tokens([added]) } else { tokenizer.add_tokens([added]) };
    }
}

/// A token is written as a string or as an object with `content`.
fn content(token: &Value) -> Option<&str> {
    token.as_str().or_else(|| token.get("content").and_then(Value::as_str))
}

/// One id, several, or none.
fn ids(fields: &Map<String, Value>, key: &str, path: &Path) -> Result<Vec<u32>> {
    let wrong = || Error::Setting { path: path.to_owned(), key: key.to_owned(), reason: "is no token id".to_owned() };
    let one = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok()).ok_or_else(wrong);
    match fields.get(key) {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::Array(several)) => several.iter().map(one).collect(),
        // Some configurations say -1 for "none".
        Some(value) if value.as_i64() == Some(-1) => Ok(Vec::new()),
        Some(value) => one(value).map(|id| vec![id]),
    }
}

/// A file of settings; one that is not there is empty.
fn object(path: &Path) -> Result<Map<String, Value>> {
    let text = match std::fs::read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Map::new()),
        Err(source) => return Err(Error::Read { path: path.to_owned(), source }),
    };
    match serde_json::from_slice(&text) {
        Ok(Value::Object(fields)) => Ok(fields),
        Ok(_) => Err(Error::Broken { path: path.to_owned(), reason: "no JSON object".to_owned() }),
        Err(error) => Err(Error::Broken { path: path.to_owned(), reason: error.to_string() }),
    }
}
