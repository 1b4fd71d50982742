//! Tokenised examples, and the tensors that rows of them become.
//!
//! What made an example (chats, documents) is not known here. A row holds one example, or several behind each other that do
//! not see each other ("packed"), which wastes less on padding.

use std::collections::BTreeMap;

use lora_torch::Batch;
use tch::Tensor;

use crate::Result;

/// One tokenised training example.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Example {
    /// Token ids, in order.
    pub ids: Vec<u32>,
    /// Whether the prediction of each id counts in the loss; as many as there are ids.
    pub trained: Vec<bool>,
}

impl Example {
    /// How many of its predictions count. Nothing predicts the first id.
    pub fn targets(&self) -> usize {
        self.trained.iter().skip(1).filter(|trained| **trained).count()
    }
}

/// Puts examples into rows of at most `length` ids, the longest first, each into the fullest row that has room
/// ("best fit decreasing"); returns the indices of each row's examples.
///
/// An example that is longer than a row gets one of its own.
pub fn pack(examples: &[Example], length: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..examples.len()).collect();
    order.sort_by_key(|index| std::cmp::Reverse(examples[*index].ids.len()));
    let mut rows: Vec<Vec<usize>> = Vec::new();
    // Rows by the room that is left in them.
    let mut open: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    for index in order {
        let needed = examples[index].ids.len();
        let found = open.range(needed..).next().map(|(room, _)| *room);
        let (row, room) = match found.and_then(|room| Some((open.get_mut(&room)?.pop()?, room))) {
            Some((row, room)) => {
                if open.get(&room).is_some_and(Vec::is_empty) {
                    open.remove(&room);
                }
                (row, room)
            }
            None => {
                rows.push(Vec::new());
                (rows.len() - 1, length.max(needed))
            }
        };
        rows[row].push(index);
        if room > needed {
            open.entry(room - needed).or_default().push(row);
        }
    }
    rows
}

/// How rows are brought to one length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Padding {
    /// Lengths are rounded up to multiples of this: few lengths mean few CUDA graphs.
    pub multiple: usize,
    /// Whether rows may hold several examples; batches then say which id belongs to which.
    pub packed: bool,
}

/// The tensors of some rows, on the host, whole numbers unless said otherwise:
/// ids `[b, s]`; places of the ids that predict what counts, `[b, m]`; what they should predict, `[b, m]`; what each
/// counts, 32-bit floats `[b, m]`; how many ids of each row are no padding, `[b, 1]`; and if packed, the example of each id,
/// `[b, s]`, and its number within it, `[b, s]`.
///
/// A target counts `weight`; padded ones count nothing. Padding is never seen by what counts, since it comes after it.
///
/// # Errors
/// If memory runs out.
pub fn batch(rows: &[Vec<&Example>], weight: f64, padding: Padding) -> Result<Batch> {
    let up = |longest: Option<usize>| longest.unwrap_or(0).max(1).next_multiple_of(padding.multiple.max(1));
    let count = |row: &Vec<&Example>| row.iter().map(|example| example.ids.len()).sum();
    let lengths: Vec<i64> = rows.iter().map(|row| -> usize { count(row) }).map(|ids| ids as i64).collect();
    let length = up(rows.iter().map(count).max());
    let targets = up(rows.iter().map(|row| row.iter().map(|example| example.targets()).sum()).max());
    let mut ids = vec![0i64; rows.len() * length];
    let mut segments = ids.clone();
    let mut positions = ids.clone();
    let mut places = vec![0i64; rows.len() * targets];
    let mut labels = places.clone();
    let mut weights = vec![0f32; places.len()];
    for (at, row) in rows.iter().enumerate() {
        let (mut next, mut target) = (at * length, at * targets);
        for (segment, example) in row.iter().enumerate() {
            for (position, id) in example.ids.iter().enumerate() {
                ids[next] = i64::from(*id);
                segments[next] = segment as i64 + 1; // 0 is padding
                positions[next] = position as i64;
                if position > 0 && example.trained.get(position) == Some(&true) {
                    places[target] = (next - at * length) as i64 - 1;
                    labels[target] = i64::from(*id);
                    weights[target] = weight as f32;
                    target += 1;
                }
                next += 1;
            }
        }
    }
    let matrix = |values: &[i64], width: usize| -> Result<Tensor> {
        Ok(Tensor::f_from_slice(values)?.f_view([rows.len() as i64, width as i64])?)
    };
    let mut inputs = vec![matrix(&ids, length)?, matrix(&places, targets)?, matrix(&labels, targets)?];
    inputs.push(Tensor::f_from_slice(&weights)?.f_view([rows.len() as i64, targets as i64])?);
    inputs.push(matrix(&lengths, 1)?);
    if padding.packed {
        inputs.extend([matrix(&segments, length)?, matrix(&positions, length)?]);
    }
    let bucket = (rows.len() as u64) << 48 | (length as u64) << 24 | targets as u64;
    Ok(Batch { bucket, inputs, examples: rows.iter().map(Vec::len).sum() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example(length: usize, trained_from: usize) -> Example {
        Example {
            ids: (0..length as u32).map(|id| id + 10).collect(),
            trained: (0..length).map(|at| at >= trained_from).collect(),
        }
    }

    #[test]
    fn packing_keeps_every_example_once_within_the_length() {
        let examples: Vec<Example> = [5, 9, 1, 4, 3, 3, 12, 6].map(|length| example(length, 1)).into();
        let rows = pack(&examples, 10);
        let mut all: Vec<usize> = rows.concat();
        all.sort_unstable();
        assert_eq!(all, (0..8).collect::<Vec<_>>());
        let lengths: Vec<usize> = rows.iter().map(|row| row.iter().map(|i| examples[*i].ids.len()).sum()).collect();
        assert_eq!(lengths, [12, 10, 10, 8, 3]); // 12 is longer than a row
    }

    #[test]
    fn a_batch_says_who_predicts_what() {
        let (a, b) = (example(4, 2), example(3, 0));
        let padding = Padding { multiple: 4, packed: true };
        let Batch { inputs, examples, .. } = batch(&[vec![&a, &b], vec![&b]], 0.5, padding).unwrap();
        let rows = |at: usize| Vec::<Vec<f64>>::try_from(inputs[at].to_kind(tch::Kind::Double)).unwrap();
        assert_eq!(examples, 3);
        assert_eq!(rows(0), [[10., 11., 12., 13., 10., 11., 12., 0.], [10., 11., 12., 0., 0., 0., 0., 0.]]);
        assert_eq!(rows(1), [[1., 2., 4., 5.], [0., 1., 0., 0.]]);
        assert_eq!(rows(2), [[12., 13., 11., 12.], [11., 12., 0., 0.]]);
        assert_eq!(rows(3), [[0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0., 0.]]);
        assert_eq!(rows(4), [[7.], [3.]]);
        assert_eq!(rows(5), [[1., 1., 1., 1., 2., 2., 2., 0.], [1., 1., 1., 0., 0., 0., 0., 0.]]);
        assert_eq!(rows(6), [[0., 1., 2., 3., 0., 1., 2., 0.], [0., 1., 2., 0., 0., 0., 0., 0.]]);
    }
}
