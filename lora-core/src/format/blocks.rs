//! A large file on its way to the disk: blocks that are filled here and written by a thread of their own.
//!
//! Where the file system takes it, blocks go from here straight to the disk. Otherwise the system copies gigabytes into its
//! cache and throws out other files for them, which costs two cores as much as all the arithmetic of a merge. It does not
//! sync: whoever owns the file does.

use std::{
    fs::File,
    io::{self, Read as _, Seek as _, SeekFrom, Write},
    path::Path,
    sync::mpsc::{Receiver, Sender, channel},
    thread,
};

use super::writeback;
use crate::{Error, Result};

/// Bytes of a block: enough to keep a disk at full speed with one block at a time.
const BLOCK: usize = 8 << 20;

/// Blocks in all: one that is filled, one that is written, and two between them.
const BLOCKS: usize = 4;

/// Direct writing wants places and lengths, in memory and in the file, to be multiples of a sector; 4 KiB are one or more of
/// them on all disks.
const SECTOR: usize = 4096;

/// Writes what `fill` puts into the blocks to the empty file `file`, which becomes `path`, and gives the count of bytes.
///
/// # Errors
/// What `fill` returns, or if the file cannot be written.
pub(super) fn write_blocks(file: &File, path: &Path, fill: impl FnOnce(&mut Blocks) -> Result<()>) -> Result<u64> {
    let failed = |source| Error::Write { path: path.to_owned(), source };
    let ((full, to_write), (back, empty)) = (channel(), channel());
    let spare = back.clone();
    thread::scope(|scope| {
        let writer = scope.spawn(move || write_each(file, &to_write, &back));
        (1..BLOCKS).for_each(|_| drop(spare.send(Block::new())));
        // Held by the writer alone, so that nobody waits for blocks that it cannot give back any more.
        drop(spare);
        let mut blocks = Blocks { current: Block::new(), full, empty, written: 0 };
        let filled = fill(&mut blocks).and_then(|()| blocks.hand_over().map_err(failed));
        let written = blocks.written;
        drop(blocks); // The writer ends when no more can come.
        let wrote = writer.join().unwrap_or_else(|_| Err(io::Error::other("the writing thread failed")));
        // If the writer could not go on, whoever fills has only seen that it is gone.
        wrote.map_err(failed)?;
        filled.map(|()| written)
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

    /// The next `count` bytes of another file.
    pub(super) fn take(&mut self, mut from: &File, count: u64) -> io::Result<()> {
        let mut left = count;
        while left > 0 {
            let room = self.current.room();
            let part = usize::try_from(left).map_or(room.len(), |left| left.min(room.len()));
            from.read_exact(&mut room[..part])?;
            left -= part as u64;
            self.filled(part)?;
        }
        Ok(())
    }

    /// Counts what was put into the room of the current block, and hands the block over if that was all.
    fn filled(&mut self, bytes: usize) -> io::Result<()> {
        self.current.len += bytes;
        self.written += bytes as u64;
        if self.current.len == BLOCK { self.hand_over() } else { Ok(()) }
    }

    fn hand_over(&mut self) -> io::Result<()> {
        let gone = || io::Error::from(io::ErrorKind::BrokenPipe);
        let next = self.empty.recv().map_err(|_| gone())?;
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
    /// Nothing: a block that is not full may not lie before another one.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Block {
    memory: Vec<u8>,
    /// Where the first sector in `memory` begins.
    start: usize,
    len: usize,
}

impl Block {
    fn new() -> Self {
        let memory = vec![0; BLOCK + SECTOR];
        let start = memory.as_ptr().align_offset(SECTOR).min(SECTOR);
        Self { memory, start, len: 0 }
    }

    fn room(&mut self) -> &mut [u8] {
        &mut self.memory[self.start + self.len..self.start + BLOCK]
    }

    fn bytes(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.len]
    }
}

/// Writes blocks, of which all but the last are full, and gives them back.
fn write_each(mut file: &File, blocks: &Receiver<Block>, back: &Sender<Block>) -> io::Result<()> {
    let mut direct = writeback::bypass(file, true);
    let mut written = 0;
    for mut block in blocks {
        let count = block.len as u64;
        if direct && block.len < BLOCK {
            direct = !writeback::bypass(file, false);
        }
        match file.write_all(block.bytes()) {
            // Some file systems agree to direct writing and then refuse it.
            Err(error) if direct && error.kind() == io::ErrorKind::InvalidInput => {
                direct = !writeback::bypass(file, false);
                file.seek(SeekFrom::Start(written))?;
                file.write_all(block.bytes())?;
            }
            result => result?,
        }
        if !direct {
            writeback::begin(file, written, count);
        }
        written += count;
        block.len = 0;
        // Nobody waits for it any more after the last one.
        let _ = back.send(block);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Writes pieces of a known sequence, in turns as bytes and out of a file; `None` if `refuse` says so half-way.
    fn round_trip(pieces: &[usize], refuse: bool) -> Result<(Vec<u8>, Vec<u8>)> {
        let folder = tempfile::tempdir().unwrap();
        let (from, to) = (folder.path().join("from"), folder.path().join("to"));
        let all: Vec<u8> = (0..pieces.iter().sum::<usize>()).map(|index| (index * 7 + index / 251) as u8).collect();
        std::fs::write(&from, &all).unwrap();
        let (source, mut target) = (File::open(&from).unwrap(), File::create(&to).unwrap());
        let written = write_blocks(&target, &to, |blocks| {
            let failed = |source| Error::Write { path: to.clone(), source };
            let mut at = 0;
            for (index, piece) in pieces.iter().enumerate() {
                if index % 2 == 0 {
                    blocks.write_all(&all[at..at + piece]).map_err(failed)?;
                } else {
                    (&source).seek(SeekFrom::Start(at as u64)).unwrap();
                    blocks.take(&source, *piece as u64).map_err(failed)?;
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
        target.flush().unwrap();
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
            let (written, wanted) = round_trip(pieces, false).unwrap();
            assert!(written == wanted, "{pieces:?}");
        }
    }

    #[test]
    fn an_error_of_whoever_fills_ends_it() {
        assert!(round_trip(&[BLOCK, BLOCK, BLOCK, 3 * BLOCK], true).is_err());
    }

    #[test]
    fn an_error_of_the_disk_ends_it_and_is_the_one_that_is_told() {
        // Opened for reading only.
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        std::fs::write(&path, b"old").unwrap();
        let file = File::open(&path).unwrap();
        let bytes = vec![1; 2 * BLOCK];
        let error = write_blocks(&file, &path, |blocks| {
            (0..8)
                .try_for_each(|_| blocks.write_all(&bytes))
                .map_err(|source| Error::Write { path: path.clone(), source })
        });
        let Err(Error::Write { source, .. }) = error else { panic!("{error:?}") };
        assert_ne!(source.kind(), io::ErrorKind::BrokenPipe);
    }
}
