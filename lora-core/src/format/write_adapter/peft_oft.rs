//! What a peft configuration must say so that peft cuts the columns into the blocks that there are.
//!
//! peft knows either the size of a block or the count of blocks of a layer, one number for all layers, and whether one block
//! serves all of a layer's (`tuners/oft/layer.py`).

use serde_json::{Map, Value, json};

use crate::{Array, adapter::oft, format::header::count};

/// The blocks of one layer.
pub(super) struct Blocks {
    size: usize,
    /// Into how many the columns are cut.
    groups: usize,
    /// Whether one block turns all of them.
    shared: bool,
}

impl Blocks {
    /// The blocks `[blocks, b(b−1)/2]` of an adapter on a weight `[out, in, ..]`; `None` if they cannot be cut so.
    pub(super) fn of(blocks: &Array, weight: &[usize]) -> Option<Self> {
        let &[stored, packed] = &blocks.shape[..] else { return None };
        let size = oft::block_size(packed)?;
        let columns = count(weight.get(1..)?);
        if size == 0 || !columns.is_multiple_of(size) {
            return None;
        }
        let groups = columns / size;
        Some(Self { size, groups, shared: stored == 1 && groups > 1 })
    }
}

/// The configuration's fields; `None` if it cannot say it.
pub(super) fn options(blocks: &[Blocks]) -> Option<Map<String, Value>> {
    let first = blocks.first()?;
    let shared = blocks.iter().any(|blocks| blocks.shared);
    // Of a layer that is one block it makes no difference.
    if blocks.iter().any(|blocks| blocks.shared != shared && blocks.groups > 1) {
        return None;
    }
    let (size, groups) = match first {
        _ if blocks.iter().all(|other| other.size == first.size) => (first.size, 0),
        _ if blocks.iter().all(|other| other.groups == first.groups) => (0, first.groups),
        _ => return None,
    };
    let fields = [("oft_block_size", json!(size)), ("r", json!(groups)), ("block_share", json!(shared))];
    Some(fields.map(|(name, value)| (name.to_owned(), value)).into_iter().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(layers: &[(usize, usize, usize)]) -> Option<String> {
        let layers = layers.iter().map(|(stored, size, columns)| {
            Blocks::of(&Array::full([*stored, size * (size - 1) / 2], 0.0), &[7, *columns]).unwrap()
        });
        options(&layers.collect::<Vec<_>>()).map(|fields| Value::Object(fields).to_string())
    }

    #[test]
    fn one_size_or_one_count_can_be_said_and_blocks_may_be_shared() {
        let size = r#"{"oft_block_size":4,"r":0,"block_share":false}"#;
        assert_eq!(said(&[(2, 4, 8), (4, 4, 16)]).as_deref(), Some(size));
        let count = r#"{"oft_block_size":0,"r":3,"block_share":false}"#;
        assert_eq!(said(&[(3, 4, 12), (3, 8, 24)]).as_deref(), Some(count));
        let shared = r#"{"oft_block_size":4,"r":0,"block_share":true}"#;
        assert_eq!(said(&[(1, 4, 8), (1, 4, 4), (1, 4, 16)]).as_deref(), Some(shared));
        assert_eq!(said(&[(2, 4, 8), (3, 8, 24)]), None);
        assert_eq!(said(&[(1, 4, 8), (4, 4, 16)]), None);
        assert!(Blocks::of(&Array::full([2, 6], 0.0), &[7, 9]).is_none());
    }
}
