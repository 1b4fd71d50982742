//! Tensors on their way from one file to another, a tile at a time: widened, changed by low-rank products, rounded once.
//!
//! Tiles fit a core's cache and take turns in two sets of buffers, so that one set is computed while the other is written.

use std::{fs::File, io::Write as _, ops::Range, path::Path};

use faer::{Accum, MatMut, MatRef, Par, linalg::matmul::matmul};
use rayon::prelude::*;

use super::{Dtype, Fault, writeback};
use crate::{Error, Result};

/// Numbers of a tile: 1 MiB as `f32`.
const TILE: usize = 1 << 18;

/// Tiles that are computed before they are written.
const TILES: usize = 8;

/// Bytes after which the system is asked to begin writing.
const BEGIN: u64 = 64 << 20;

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
    out: &'a File,
    /// The name of the file that is to be, for messages.
    path: &'a Path,
    written: u64,
    /// Bytes that the system was asked to write already.
    begun: u64,
    sets: [Vec<Vec<u8>>; 2],
}

impl<'a> Sink<'a> {
    pub(super) fn new(out: &'a File, path: &'a Path) -> Self {
        Self { out, path, written: 0, begun: 0, sets: [vec![Vec::new(); TILES], vec![Vec::new(); TILES]] }
    }

    /// Bytes so far.
    pub(super) fn written(&self) -> u64 {
        self.written
    }

    /// Bytes as they are.
    pub(super) fn bytes(&mut self, bytes: &[u8]) -> Result<()> {
        self.out.write_all(bytes).map_err(|source| self.failed(source))?;
        self.count(bytes.len() as u64);
        Ok(())
    }

    fn count(&mut self, bytes: u64) {
        self.written += bytes;
        if self.written - self.begun >= BEGIN {
            writeback::begin(self.out, self.begun, self.written - self.begun);
            self.begun = self.written;
        }
    }

    /// A range of a file as it is: the system copies it without bringing it here.
    pub(super) fn range(&mut self, from: &File, range: Range<u64>) -> Result<()> {
        use std::io::{Read as _, Seek as _, SeekFrom};
        let mut from = from;
        from.seek(SeekFrom::Start(range.start)).map_err(|source| self.failed(source))?;
        let mut left = range.end - range.start;
        while left > 0 {
            let part = left.min(BEGIN);
            let copied = std::io::copy(&mut from.take(part), &mut &*self.out).map_err(|source| self.failed(source))?;
            if copied != part {
                return Err(self.failed(std::io::ErrorKind::UnexpectedEof.into()));
            }
            self.count(copied);
            left -= part;
        }
        Ok(())
    }

    /// Numbers, rounded.
    ///
    /// # Errors
    /// If one of them is not finite in that type.
    pub(super) fn numbers(&mut self, name: &str, values: &[f32], to: Dtype) -> Result<()> {
        for values in values.chunks(TILE) {
            let bytes = rounded(name, values, to).map_err(|fault| Error::file(self.path, fault))?;
            self.bytes(&bytes)?;
        }
        Ok(())
    }

    /// A tensor through its updates; `release` is called whenever some of its bytes are done with.
    ///
    /// # Errors
    /// If a result is not finite in its type.
    pub(super) fn tensor(&mut self, tensor: &Tensor<'_>, release: &(dyn Fn() + Sync)) -> Result<()> {
        let columns = tensor.columns.max(1);
        let count = tensor.bytes.len() / tensor.from.size();
        let rows = (TILE / columns).max(1); // of a tile
        let tiles = count.div_ceil(rows * columns);
        let mut sets = std::mem::take(&mut self.sets);
        let [current, next] = &mut sets;
        let fill = |set: &mut [Vec<u8>], first: usize| -> Result<usize, Fault> {
            let count = TILES.min(tiles.saturating_sub(first));
            set[..count].par_iter_mut().enumerate().try_for_each(|(index, bytes)| {
                *bytes = tensor.tile((first + index) * rows, rows)?;
                Ok(())
            })?;
            Ok(count)
        };
        let at_path = |fault| Error::file(self.path, fault);
        let mut ready = fill(current, 0).map_err(at_path)?;
        let mut first = ready;
        while ready > 0 {
            let (filled, written) = rayon::join(
                || fill(next, first),
                || current[..ready].iter().try_for_each(|bytes| (&mut &*self.out).write_all(bytes)),
            );
            written.map_err(|source| self.failed(source))?;
            self.count(current[..ready].iter().map(|bytes| bytes.len() as u64).sum());
            ready = filled.map_err(|fault| Error::file(self.path, fault))?;
            first += ready;
            std::mem::swap(current, next);
            release();
        }
        self.sets = sets;
        Ok(())
    }

    fn failed(&self, source: std::io::Error) -> Error {
        Error::Write { path: self.path.to_owned(), source }
    }
}

impl Tensor<'_> {
    /// The bytes of `rows` rows from `first` on, or as many as there are.
    fn tile(&self, first: usize, rows: usize) -> Result<Vec<u8>, Fault> {
        let size = self.from.size();
        let columns = self.columns.max(1);
        let end = ((first + rows) * columns * size).min(self.bytes.len());
        let bytes = &self.bytes[first * columns * size..end];
        let not_numbers = || Fault::NotNumbers { tensor: self.name.to_owned(), dtype: self.from };
        let mut values = self.from.widen(bytes).ok_or_else(not_numbers)?;
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
        rounded(self.name, &values, self.to)
    }
}

/// Numbers in their type, all of them finite.
fn rounded(name: &str, values: &[f32], to: Dtype) -> Result<Vec<u8>, Fault> {
    let bytes = to.narrow(values).ok_or_else(|| Fault::NotNumbers { tensor: name.to_owned(), dtype: to })?;
    // An exponent of all ones is infinity or no number.
    let halves =
        |exponent: u16| !bytes.as_chunks::<2>().0.iter().any(|raw| u16::from_le_bytes(*raw) & exponent == exponent);
    let finite = match to {
        Dtype::F16 => halves(0x7C00),
        Dtype::Bf16 => halves(0x7F80),
        Dtype::F32 => !values.iter().any(|value| !value.is_finite()),
        _ => to.widen(&bytes).is_some_and(|stored| stored.iter().all(|value| value.is_finite())),
    };
    if finite {
        return Ok(bytes);
    }
    let stored = to.widen(&bytes).unwrap_or_default();
    let value = stored.into_iter().find(|value| !value.is_finite()).unwrap_or(f32::NAN);
    Err(Fault::Overflow { tensor: name.to_owned(), value, dtype: to })
}
