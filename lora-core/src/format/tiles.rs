//! Tensors on their way from one file to another, a tile at a time: widened, changed by low-rank products, rounded once.
//!
//! Tiles fit a core's cache and take turns in two sets, so that one set is computed while the other goes to the writer.

use std::{fs::File, io::Write as _, ops::Range, path::Path};

use faer::{Accum, MatMut, MatRef, Par, linalg::matmul::matmul};
use rayon::prelude::*;

use super::{Dtype, Fault, blocks::Blocks};
use crate::{Error, Result};

/// Numbers of a tile: 256 KiB as `f32`, so that it stays in a core's second cache with what it is made of.
const TILE: usize = 1 << 16;

/// Rows of a tile at least: fewer would not be worth the look at the whole of `down`.
const ROWS: usize = 16;

/// Tiles that are computed before they are written.
const TILES: usize = 16;

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
    sets: [[Tile; TILES]; 2],
}

impl<'a> Sink<'a> {
    pub(super) fn new(blocks: &'a mut Blocks, path: &'a Path) -> Self {
        Self { blocks, path, sets: Default::default() }
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
    pub(super) fn range(&mut self, mut from: &File, range: Range<u64>) -> Result<()> {
        use std::io::{Seek as _, SeekFrom};
        from.seek(SeekFrom::Start(range.start))
            .and_then(|_| self.blocks.take(from, range.end - range.start))
            .map_err(|source| self.failed(source))
    }

    /// Numbers, rounded.
    ///
    /// # Errors
    /// If one of them is not finite in that type.
    pub(super) fn numbers(&mut self, name: &str, values: &[f32], to: Dtype) -> Result<()> {
        let mut bytes = Vec::new();
        for values in values.chunks(TILE) {
            round(name, values, to, &mut bytes).map_err(|fault| Error::file(self.path, fault))?;
            self.bytes(&bytes)?;
        }
        Ok(())
    }

    /// A tensor through its updates; `release` is called now and then, when some of its bytes are done with.
    ///
    /// # Errors
    /// If a result is not finite in its type.
    pub(super) fn tensor(&mut self, tensor: &Tensor<'_>, release: &(dyn Fn() + Sync)) -> Result<()> {
        let columns = tensor.columns.max(1);
        let count = tensor.bytes.len() / tensor.from.size();
        let rows = (TILE / columns).max(ROWS); // of a tile
        let tiles = count.div_ceil(rows * columns);
        let Self { blocks, path, sets: [current, next] } = self;
        let (mut current, mut next) = (current, next);
        let fill = |set: &mut [Tile; TILES], first: usize| -> Result<usize> {
            let count = TILES.min(tiles - first);
            let filled = set[..count]
                .par_iter_mut()
                .enumerate()
                .try_for_each(|(index, tile)| tensor.fill(tile, (first + index) * rows, rows));
            filled.map_err(|fault| Error::file(path, fault))?;
            Ok(count)
        };
        let mut ready = fill(current, 0)?;
        let (mut first, mut held) = (ready, 0);
        while ready > 0 {
            let (filled, written) = rayon::join(
                || fill(next, first),
                || current[..ready].iter().try_for_each(|tile| blocks.write_all(&tile.bytes)),
            );
            written.map_err(|source| Error::Write { path: path.to_path_buf(), source })?;
            held += ready * rows * columns * tensor.from.size();
            ready = filled?;
            first += ready;
            std::mem::swap(&mut current, &mut next);
            if held >= RELEASE {
                release();
                held = 0;
            }
        }
        Ok(())
    }

    fn failed(&self, source: std::io::Error) -> Error {
        Error::Write { path: self.path.to_owned(), source }
    }
}

/// The numbers of a tile and what is stored of them; used again and again.
#[derive(Default)]
struct Tile {
    values: Vec<f32>,
    bytes: Vec<u8>,
}

impl Tensor<'_> {
    /// Computes `rows` rows from `first` on, or as many as there are.
    fn fill(&self, Tile { values, bytes: stored }: &mut Tile, first: usize, rows: usize) -> Result<(), Fault> {
        let size = self.from.size();
        let columns = self.columns.max(1);
        let end = ((first + rows) * columns * size).min(self.bytes.len());
        let bytes = &self.bytes[first * columns * size..end];
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
        round(self.name, values, self.to, stored)
    }
}

/// Numbers in their type, all of them finite.
fn round(name: &str, values: &[f32], to: Dtype, bytes: &mut Vec<u8>) -> Result<(), Fault> {
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
