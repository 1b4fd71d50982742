//! A large file on its way to the disk: blocks that are filled here and written by threads of their own.
//!
//! Where the file system takes it, blocks go from here straight to the disk, some at a time. Otherwise the system copies gigabytes into its
//! cache and throws out other files for them, which costs two cores as much as all the arithmetic of a merge. It does not
//! sync: whoever owns the file does.

use std::{
    fs::File,
    io::{self, Write},
    ops::Range,
    path::Path,
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, Sender, channel},
    },
    thread,
};

use rayon::prelude::*;

use super::writeback;
use crate::{Error, Result};

/// Bytes of a block.
const BLOCK: usize = 4 << 20;

/// Blocks that are written at a time: a disk that others use as well is slow for who asks for one thing after the other.
const WRITERS: usize = 4;

/// Blocks in all: those that are written, one that is filled, and some between.
const BLOCKS: usize = WRITERS + 16;

/// Bytes of another file that a thread reads at a time; all of a block where reading moves the file's only position.
const PIECE: usize = if cfg!(unix) { 1 << 19 } else { BLOCK };

/// Direct writing wants places and lengths, in memory and in the file, to be multiples of a sector; 4 KiB are one or more of
/// them on all disks.
const SECTOR: usize = 4096;

/// Writes what `fill` puts into the blocks to the empty file `file`, which becomes `path`, and gives the count of bytes.
/// `expected` says how many there will be, so that the system can make room for all at once.
///
/// # Errors
/// What `fill` returns, or if the file cannot be written.
pub(super) fn write_blocks(
    file: &File,
    path: &Path,
    expected: u64,
    fill: impl FnOnce(&mut Blocks) -> Result<()>,
) -> Result<u64> {
    let failed = |source| Error::Write { path: path.to_owned(), source };
    let ((full, to_write), (spare, empty)) = (channel(), channel());
    let direct = AtomicBool::new(writeback::bypass(file, true));
    let writers = match direct.load(Ordering::Relaxed) && writeback::reserve(file, expected) {
        true => WRITERS,
        false => 1,
    };
    let to_write = Mutex::new(to_write);
    thread::scope(|scope| {
        let (to_write, direct) = (&to_write, &direct);
        let write_some = |_| {
            let back = spare.clone();
            scope.spawn(move || write_each(file, to_write, direct, &back))
        };
        let writers: Vec<_> = (0..writers).map(write_some).collect();
        (1..BLOCKS).for_each(|_| drop(spare.send(Block::new())));
        // Held by the writers alone, so that nobody waits for blocks that they cannot give back any more.
        drop(spare);
        let mut blocks = Blocks { current: Block::new(), full, empty, written: 0 };
        let filled = fill(&mut blocks).and_then(|()| blocks.hand_over().map_err(failed));
        let written = blocks.written;
        drop(blocks); // The writers end when no more can come.
        let lost = || io::Error::other("a writing thread failed");
        let wrote = writers.into_iter().map(|writer| writer.join().unwrap_or_else(|_| Err(lost())));
        // If a writer could not go on, whoever fills has only seen that it is gone.
        wrote.fold(Ok(()), io::Result::and).map_err(failed)?;
        filled?;
        if written != expected {
            file.set_len(written).map_err(failed)?;
        }
        Ok(written)
    })
}

/// The blocks of one file, from the side that fills them.
pub(super) struct Blocks {
    current: Block,
    full: Sender<Block>,
    empty: Receiver<Block>,
    written: u64,
}

impl Blocks {
    /// Bytes so far.
    pub(super) fn written(&self) -> u64 {
        self.written
    }

    /// A range of another file.
    pub(super) fn take(&mut self, from: &File, mut range: Range<u64>) -> io::Result<()> {
        while !range.is_empty() {
            let room = self.current.room();
            let part = usize::try_from(range.end - range.start).map_or(room.len(), |left| left.min(room.len()));
            let pieces = room[..part].par_chunks_mut(PIECE).enumerate();
            pieces.try_for_each(|(index, piece)| read_at(from, piece, range.start + (index * PIECE) as u64))?;
            range.start += part as u64;
            self.filled(part)?;
        }
        Ok(())
    }

    /// What is left of the current block, never nothing: whoever puts bytes there says so with [`filled`](Self::filled).
    pub(super) fn room(&mut self) -> &mut [u8] {
        self.current.room()
    }

    /// Counts what was put into the room of the current block, and hands the block over if that was all.
    pub(super) fn filled(&mut self, bytes: usize) -> io::Result<()> {
        self.current.len += bytes;
        self.written += bytes as u64;
        if self.current.len == BLOCK { self.hand_over() } else { Ok(()) }
    }

    fn hand_over(&mut self) -> io::Result<()> {
        let gone = || io::Error::from(io::ErrorKind::BrokenPipe);
        let mut next = self.empty.recv().map_err(|_| gone())?;
        (next.offset, next.len) = (self.written, 0);
        self.full.send(std::mem::replace(&mut self.current, next)).map_err(|_| gone())
    }
}

impl Write for Blocks {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let room = self.current.room();
        let part = bytes.len().min(room.len());
        room[..part].copy_from_slice(&bytes[..part]);
        self.filled(part)?;
        Ok(part)
    }
    /// Nothing: blocks go when they are full.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Block {
    memory: Vec<u8>,
    /// Where the first sector in `memory` begins.
    start: usize,
    len: usize,
    /// Where in the file it belongs.
    offset: u64,
}

impl Block {
    fn new() -> Self {
        let memory = vec![0; BLOCK + SECTOR];
        let start = memory.as_ptr().align_offset(SECTOR).min(SECTOR);
        Self { memory, start, len: 0, offset: 0 }
    }

    fn room(&mut self) -> &mut [u8] {
        &mut self.memory[self.start + self.len..self.start + BLOCK]
    }

    fn bytes(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.len]
    }
}

/// Writes blocks, of which all but the last are full, and gives them back; one of some threads that do.
fn write_each(
    file: &File,
    blocks: &Mutex<Receiver<Block>>,
    direct: &AtomicBool,
    back: &Sender<Block>,
) -> io::Result<()> {
    let next = || blocks.lock().ok()?.recv().ok();
    let write_as_usual = |block: &Block| {
        direct.store(!writeback::bypass(file, false), Ordering::Relaxed);
        write_at(file, block.bytes(), block.offset)
    };
    while let Some(block) = next() {
        // The end is no whole number of sectors.
        let is_last = block.len < BLOCK;
        let written = match is_last && direct.load(Ordering::Relaxed) {
            true => write_as_usual(&block),
            false => write_at(file, block.bytes(), block.offset),
        };
        match written {
            // Some file systems agree to direct writing and then refuse it.
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => write_as_usual(&block)?,
            result => result?,
        }
        if !direct.load(Ordering::Relaxed) {
            writeback::begin(file, block.offset, block.len as u64);
        }
        // Nobody waits for it any more after the last one.
        let _ = back.send(block);
    }
    Ok(())
}

#[cfg(unix)]
fn read_at(file: &File, bytes: &mut [u8], offset: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, bytes, offset)
}

#[cfg(unix)]
fn write_at(file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::write_all_at(file, bytes, offset)
}

#[cfg(not(unix))]
fn read_at(mut file: &File, bytes: &mut [u8], offset: u64) -> io::Result<()> {
    use std::io::{Read as _, Seek as _};
    file.seek(io::SeekFrom::Start(offset))?;
    file.read_exact(bytes)
}

/// Only ever called by one writer: nothing else writes directly.
#[cfg(not(unix))]
fn write_at(mut file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
    use std::io::Seek as _;
    file.seek(io::SeekFrom::Start(offset))?;
    file.write_all(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Writes pieces of a known sequence, in turns as bytes and out of a file, after announcing some more; an error half-way
    /// if `refuse` says so.
    fn round_trip(pieces: &[usize], extra: u64, refuse: bool) -> Result<(Vec<u8>, Vec<u8>)> {
        let folder = tempfile::tempdir().unwrap();
        let (from, to) = (folder.path().join("from"), folder.path().join("to"));
        let all: Vec<u8> = (0..pieces.iter().sum::<usize>()).map(|index| (index * 7 + index / 251) as u8).collect();
        std::fs::write(&from, &all).unwrap();
        let (source, target) = (File::open(&from).unwrap(), File::create(&to).unwrap());
        let written = write_blocks(&target, &to, all.len() as u64 + extra, |blocks| {
            let failed = |source| Error::Write { path: to.clone(), source };
            let mut at = 0;
            for (index, piece) in pieces.iter().enumerate() {
                if index % 2 == 0 {
                    blocks.write_all(&all[at..at + piece]).map_err(failed)?;
                } else {
                    blocks.take(&source, at as u64..(at + piece) as u64).map_err(failed)?;
                }
                at += piece;
                if refuse && index == 1 {
                    return Err(failed(io::ErrorKind::StorageFull.into()));
                }
            }
            assert_eq!(blocks.written(), at as u64);
            Ok(())
        })?;
        assert_eq!(written, all.len() as u64);
        Ok((std::fs::read(&to).unwrap(), all))
    }

    #[test]
    fn whatever_the_pieces_the_file_is_their_sequence() {
        for pieces in [
            &[][..],
            &[1],
            &[BLOCK],
            &[3, BLOCK - 3],
            &[5, BLOCK, 4096, 1],
            &[BLOCK - 1, 2, 3 * BLOCK + 17, BLOCK, BLOCK / 2],
            &[6 * BLOCK + 1],
        ] {
            for extra in [0, 5] {
                let (written, wanted) = round_trip(pieces, extra, false).unwrap();
                assert!(written == wanted, "{pieces:?}, {extra} more announced");
            }
        }
    }

    #[test]
    fn an_error_of_whoever_fills_ends_it() {
        assert!(round_trip(&[BLOCK, BLOCK, BLOCK, 3 * BLOCK], 0, true).is_err());
    }

    #[test]
    fn an_error_of_the_disk_ends_it_and_is_the_one_that_is_told() {
        // Opened for reading only.
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        std::fs::write(&path, b"old").unwrap();
        let file = File::open(&path).unwrap();
        let bytes = vec![1; 2 * BLOCK];
        let error = write_blocks(&file, &path, 16 * BLOCK as u64, |blocks| {
            (0..8)
                .try_for_each(|_| blocks.write_all(&bytes))
                .map_err(|source| Error::Write { path: path.clone(), source })
        });
        let Err(Error::Write { source, .. }) = error else { panic!("{error:?}") };
        assert_ne!(source.kind(), io::ErrorKind::BrokenPipe);
    }
}
