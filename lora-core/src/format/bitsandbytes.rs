//! Matrices in 4 bits as transformers saves them for bitsandbytes (`QuantState.as_dict` of `bitsandbytes/functional.py`).
//!
//! ```text
//! X.weight                                U8   [count / 2, 1]  two numbers a byte
//! X.weight.absmax                         F32  [blocks]        a factor a block; U8 if these are quantised too
//! X.weight.quant_map                      F32  [16]            what 4 bits stand for
//! X.weight.nested_absmax                  F32  [blocks / 256]  of quantised factors alone
//! X.weight.nested_quant_map               F32  [256]           of quantised factors alone
//! X.weight.quant_state.bitsandbytes__nf4  U8                   JSON: shape, sizes of blocks, what is added to factors
//! ```
//!
//! The numbers are nobody's business here: only names and shapes are read.

use std::path::Path;

use serde::Deserialize;

use super::Fault;
use crate::{Error, Result};

/// What a name ends in whose bytes describe a matrix; the type of its numbers follows.
const STATE: &str = ".quant_state.bitsandbytes__";

/// What belongs to a matrix, besides its description.
const COMPANIONS: [&str; 4] = ["absmax", "quant_map", "nested_absmax", "nested_quant_map"];

/// Numbers that share a factor, the only size that transformers writes.
const BLOCK: usize = 64;

/// Factors that share a factor.
const NESTED_BLOCK: usize = 256;

/// What is said of a matrix in 4 bits.
#[derive(Debug, Clone, PartialEq)]
pub struct QuantState {
    /// The shape of its numbers, `[out, in]`.
    pub shape: Vec<usize>,
    /// What is added to each factor, if the factors are quantised too.
    pub nested_offset: Option<f32>,
}

/// The fields of the JSON that are read, under their own names.
#[derive(Debug, Deserialize)]
struct Fields {
    quant_type: String,
    blocksize: usize,
    shape: Vec<usize>,
    nested_blocksize: Option<usize>,
    nested_offset: Option<f32>,
}

impl QuantState {
    /// Reads the bytes of the tensor `key` of the file at `path`.
    ///
    /// # Errors
    /// If they are no such description, or one of numbers that are not NF4 in blocks of 64.
    pub fn parse(path: &Path, key: &str, bytes: &[u8]) -> Result<Self> {
        let refuse = |reason: String| Error::file(path, Fault::Quantised { tensor: key.to_owned(), reason });
        let fields: Fields =
            serde_json::from_slice(bytes).map_err(|error| refuse(format!("its description is malformed: {error}")))?;
        let Fields { quant_type, blocksize, shape, nested_blocksize, nested_offset } = fields;
        if quant_type != "nf4" {
            return Err(refuse(format!("it is `{quant_type}`, of 4-bit types only nf4 is read")));
        }
        if blocksize != BLOCK || nested_blocksize.is_some_and(|size| size != NESTED_BLOCK) {
            let nested = nested_blocksize.map_or_else(String::new, |size| format!(" and {size}"));
            return Err(refuse(format!("it has blocks of {blocksize}{nested}, expected {BLOCK} and {NESTED_BLOCK}")));
        }
        if nested_blocksize.is_some() != nested_offset.is_some()
            || nested_offset.is_some_and(|offset| !offset.is_finite())
        {
            return Err(refuse("its factors are quantised, and what is added to them is missing".to_owned()));
        }
        if shape.iter().try_fold(1usize, |count, length| count.checked_mul(*length)).is_none() {
            return Err(refuse(format!("its shape is {shape:?}")));
        }
        Ok(Self { shape, nested_offset })
    }
}

/// The name of what describes the matrix `weight`; `next` gives the first name that does not lie before another.
pub fn state_key<'a>(weight: &str, next: impl Fn(&str) -> Option<&'a str>) -> Option<&'a str> {
    let start = format!("{weight}{STATE}");
    next(&start).filter(|key| key.starts_with(&start))
}

/// The name of a part that belongs to the matrix `weight`: `absmax`, `quant_map`, `nested_absmax`, `nested_quant_map`.
pub fn companion(weight: &str, part: &str) -> String {
    format!("{weight}.{part}")
}

/// The matrix that a name describes, `X.weight` for `X.weight.quant_state.bitsandbytes__nf4`.
pub fn described(key: &str) -> Option<&str> {
    key.split_once(STATE).map(|(weight, _)| weight)
}

/// The matrix that a name belongs to, if it is that of a part or of a description.
pub fn owner(key: &str) -> Option<&str> {
    let part = || {
        let (weight, part) = key.rsplit_once('.')?;
        (weight.ends_with(".weight") && COMPANIONS.contains(&part)).then_some(weight)
    };
    described(key).or_else(part)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<QuantState> {
        QuantState::parse(Path::new("model.safetensors"), "x.weight.quant_state.bitsandbytes__nf4", text.as_bytes())
    }

    #[test]
    fn what_the_peer_writes_is_read() {
        let plain = r#"{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [4, 32]}"#;
        assert_eq!(parse(plain).unwrap(), QuantState { shape: vec![4, 32], nested_offset: None });
        let nested = r#"{"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": [4, 32],
            "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.25}"#;
        assert_eq!(parse(nested).unwrap(), QuantState { shape: vec![4, 32], nested_offset: Some(0.25) });
    }

    #[test]
    fn other_types_sizes_and_no_json_are_refused_by_name() {
        let refused = |text: &str, part: &str| {
            let error = parse(text).unwrap_err();
            let said = format!("{error}: {:?}", std::error::Error::source(&error).map(ToString::to_string));
            assert!(said.contains(part), "{said}");
        };
        refused(r#"{"quant_type": "fp4", "blocksize": 64, "shape": [4, 32]}"#, "fp4");
        refused(r#"{"quant_type": "nf4", "blocksize": 128, "shape": [4, 32]}"#, "128");
        refused(r#"{"quant_type": "nf4", "blocksize": 64, "shape": [4, 32], "nested_blocksize": 256}"#, "missing");
        refused(r#"{"quant_type": "nf4", "blocksize": 64, "shape": [4294967296, 4294967296]}"#, "4294967296");
        refused("\u{0}", "malformed");
    }

    #[test]
    fn parts_know_their_matrix() {
        assert_eq!(owner("a.q_proj.weight.absmax"), Some("a.q_proj.weight"));
        assert_eq!(owner("a.q_proj.weight.quant_state.bitsandbytes__nf4"), Some("a.q_proj.weight"));
        assert_eq!(owner("a.q_proj.weight"), None);
        assert_eq!(owner("a.absmax"), None);
    }
}
