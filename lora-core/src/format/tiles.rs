//! Tensors on their way from one file to another, a tile at a time: widened, changed by low-rank products, rounded once.
//!
//! Tiles fit a core's cache; what comes out of them is rounded straight into the block that goes to the disk.

use std::{
    fs::File,
    io::Write as _,
    ops::Range,
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
};

use faer::{Accum, MatMut, MatRef, Par, linalg::matmul::matmul};
use rayon::prelude::*;

use super::{Dtype, Fault, blocks::Blocks};
use crate::{Error, Result};

/// Numbers of a tile: 512 KiB as `f32`, so that it stays in a core's second cache; for each, `down` is packed anew.
const TILE: usize = 1 << 17;

/// Rows of a tile at least: fewer would not be worth the look at the whole of `down`.
const ROWS: usize = 16;

/// Bytes of a mapped file after which what was read is let go of.
const RELEASE: usize = 64 << 20;

/// `W[rows] += factor · up · down`.
pub(super) struct Update {
    /// The rows of the stored tensor.
    pub rows: Range<usize>,
    /// Strength times scale.
    pub factor: f32,
    pub rank: usize,
    /// `[rows, rank]`.
    pub up: Vec<f32>,
    /// `[rank, columns]`.
    pub down: Vec<f32>,
}

/// A tensor as it is stored and as it shall be.
pub(super) struct Tensor<'a> {
    pub name: &'a str,
    pub bytes: &'a [u8],
    pub from: Dtype,
    pub to: Dtype,
    /// Numbers of a row.
    pub columns: usize,
    pub updates: &'a [Update],
}

/// Where tensors go.
pub(super) struct Sink<'a> {
    blocks: &'a mut Blocks,
    /// The name of the file that is to be, for messages.
    path: &'a Path,
    /// Rounded numbers that lie in two blocks.
    between: Vec<u8>,
}

impl<'a> Sink<'a> {
    pub(super) fn new(blocks: &'a mut Blocks, path: &'a Path) -> Self {
        Self { blocks, path, between: Vec::new() }
    }

    /// Bytes so far.
    pub(super) fn written(&self) -> u64 {
        self.blocks.written()
    }

    /// Bytes as they are.
    pub(super) fn bytes(&mut self, bytes: &[u8]) -> Result<()> {
        self.blocks.write_all(bytes).map_err(|source| self.failed(source))
    }

    /// A range of a file as it is.
    pub(super) fn range(&mut self, from: &File, range: Range<u64>) -> Result<()> {
        self.blocks.take(from, range).map_err(|source| self.failed(source))
    }

    /// Numbers, rounded; gives whether what is stored is anything else than `before`.
    ///
    /// # Errors
    /// If one of them is not finite in that type.
    pub(super) fn numbers(&mut self, name: &str, values: &[f32], to: Dtype, before: &[u8]) -> Result<bool> {
        let mut differs = before.len() != values.len() * to.size();
        let mut before = before.chunks(TILE * to.size());
        for values in values.chunks(TILE) {
            self.between.resize(values.len() * to.size(), 0);
            round(name, values, to, &mut self.between).map_err(|fault| Error::file(self.path, fault))?;
            differs |= before.next() != Some(&*self.between);
            self.blocks.write_all(&self.between).map_err(|source| self.failed(source))?;
        }
        Ok(differs)
    }

    /// A tensor through its updates; gives whether what is stored is anything else than before. `release` is called now and
    /// then, when some of its bytes are done with.
    ///
    /// # Errors
    /// If a result is not finite in its type.
    pub(super) fn tensor(&mut self, tensor: &Tensor<'_>, release: &dyn Fn()) -> Result<bool> {
        let columns = tensor.columns.max(1);
        let rows = tensor.bytes.len() / tensor.from.size() / columns;
        let row = columns * tensor.to.size(); // bytes
        let tile = (TILE / columns).max(ROWS); // rows
        let refused = |fault| Error::file(self.path, fault);
        let differs = AtomicBool::new(tensor.from != tensor.to);
        let (mut done, mut held) = (0, 0);
        while done < rows {
            let room = self.blocks.room();
            let whole = (room.len() / row).min(rows - done);
            if whole > 0 {
                let filled = room[..whole * row].par_chunks_mut(tile * row).enumerate();
                filled
                    .try_for_each_init(Vec::new, |values, (index, out)| {
                        tensor.fill(done + index * tile, values, out, &differs)
                    })
                    .map_err(refused)?;
                self.blocks.filled(whole * row).map_err(|source| self.failed(source))?;
            } else {
                self.between.resize(row, 0);
                tensor.fill(done, &mut Vec::new(), &mut self.between, &differs).map_err(refused)?;
                self.blocks.write_all(&self.between).map_err(|source| self.failed(source))?;
            }
            done += whole.max(1);
            held += whole.max(1) * columns * tensor.from.size();
            if held >= RELEASE {
                release();
                held = 0;
            }
        }
        Ok(differs.into_inner())
    }

    fn failed(&self, source: std::io::Error) -> Error {
        Error::Write { path: self.path.to_owned(), source }
    }
}

impl Tensor<'_> {
    /// Computes rows from `first` on, as many as `out` has room for; `values` is memory for their numbers. Sets `differs` if
    /// they are stored otherwise than before.
    fn fill(&self, first: usize, values: &mut Vec<f32>, out: &mut [u8], differs: &AtomicBool) -> Result<(), Fault> {
        let columns = self.columns.max(1);
        let begin = first * columns * self.from.size();
        let bytes = &self.bytes[begin..begin + out.len() / self.to.size() * self.from.size()];
        if !self.from.widen_into(bytes, values) {
            return Err(Fault::NotNumbers { tensor: self.name.to_owned(), dtype: self.from });
        }
        let last = first + values.len() / columns;
        for update in self.updates {
            let common = first.max(update.rows.start)..last.min(update.rows.end);
            if common.is_empty() {
                continue;
            }
            let (count, rank) = (common.len(), update.rank);
            let up = (common.start - update.rows.start) * rank;
            let begin = (common.start - first) * columns;
            matmul(
                MatMut::from_row_major_slice_mut(&mut values[begin..begin + count * columns], count, columns),
                Accum::Add,
                MatRef::from_row_major_slice(&update.up[up..up + count * rank], count, rank),
                MatRef::from_row_major_slice(&update.down, rank, columns),
                update.factor,
                Par::Seq,
            );
        }
        round(self.name, values, self.to, out)?;
        // As a rule the first tile says so already.
        if !differs.load(Ordering::Relaxed) && bytes != out {
            differs.store(true, Ordering::Relaxed);
        }
        Ok(())
    }
}

/// Numbers in their type, all of them finite.
fn round(name: &str, values: &[f32], to: Dtype, bytes: &mut [u8]) -> Result<(), Fault> {
    if !to.narrow_into(values, bytes) {
        return Err(Fault::NotNumbers { tensor: name.to_owned(), dtype: to });
    }
    if to.all_finite(bytes) {
        return Ok(());
    }
    let stored = to.widen(bytes).unwrap_or_default();
    let value = stored.into_iter().find(|value| !value.is_finite()).unwrap_or(f32::NAN);
    Err(Fault::Overflow { tensor: name.to_owned(), value, dtype: to })
}
