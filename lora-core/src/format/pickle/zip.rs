//! The directory of a zip archive whose entries are stored as they are, with the 64-bit fields that large models need.

use std::{collections::BTreeMap, ops::Range};

use super::refused;
use crate::format::Fault;

/// Most entries: as many as tensors are read, and a few.
const ENTRIES: usize = 1_000_100;

/// Names and places of the entries.
#[derive(Debug)]
pub(super) struct Archive {
    entries: BTreeMap<String, Range<usize>>,
}

impl Archive {
    pub(super) fn of(file: &[u8]) -> Result<Self, Fault> {
        let (mut at, count) =
            directory(file).ok_or_else(|| refused("the zip archive has no directory: it is cut short"))?;
        if count > ENTRIES {
            return Err(refused(format!("the archive claims {count} entries")));
        }
        let mut entries = BTreeMap::new();
        for _ in 0..count {
            let broken = || refused("the directory of the zip archive is damaged");
            let entry = Entry::at(file, at).ok_or_else(broken)?;
            at = entry.next;
            if entry.method != 0 || entry.encrypted {
                return Err(refused(format!(
                    "`{}` is compressed or encrypted, which torch never does",
                    entry.name.escape_debug()
                )));
            }
            let range = entry.range(file).filter(|_| entry.size == entry.packed).ok_or_else(broken)?;
            if let Some(name) = entries.insert(entry.name.clone(), range).map(|_| entry.name) {
                return Err(refused(format!("`{}` occurs twice in the archive", name.escape_debug())));
            }
        }
        Ok(Self { entries })
    }

    /// The bytes of an entry, as a range of the file.
    pub(super) fn get(&self, name: &str) -> Option<Range<usize>> {
        self.entries.get(name).cloned()
    }

    /// The pickle, and what stands before the names of all that belongs to it.
    pub(super) fn pickle(&self) -> Option<(&str, Range<usize>)> {
        let mut found = self.entries.iter().filter_map(|(name, range)| {
            let stem = name.strip_suffix("data.pkl")?;
            (stem.is_empty() || stem.ends_with('/')).then_some((stem, range.clone()))
        });
        found.next()
    }
}

/// One line of the directory.
struct Entry {
    name: String,
    method: u16,
    encrypted: bool,
    size: usize,
    packed: usize,
    local: usize,
    next: usize,
}

impl Entry {
    fn at(file: &[u8], at: usize) -> Option<Self> {
        if file.get(at..at.checked_add(4)?)? != b"PK\x01\x02" {
            return None;
        }
        let (flags, method) = (u16_at(file, at + 8)?, u16_at(file, at + 10)?);
        let (mut packed, mut size) = (u64::from(u32_at(file, at + 20)?), u64::from(u32_at(file, at + 24)?));
        let lengths = [u16_at(file, at + 28)?, u16_at(file, at + 30)?, u16_at(file, at + 32)?].map(usize::from);
        let mut local = u64::from(u32_at(file, at + 42)?);
        let name = file.get(at + 46..at + 46 + lengths[0])?;
        // The wide numbers follow in this order, each only where its narrow field is full.
        let mut extra = file.get(at + 46 + lengths[0]..at + 46 + lengths[0] + lengths[1])?;
        while extra.len() >= 4 {
            let (tag, length) = (u16_at(extra, 0)?, usize::from(u16_at(extra, 2)?));
            let field = extra.get(4..4 + length)?;
            if tag == 1 {
                let mut wide = field.as_chunks::<8>().0.iter().map(|raw| u64::from_le_bytes(*raw));
                for narrow in [&mut size, &mut packed, &mut local] {
                    if *narrow == u64::from(u32::MAX) {
                        *narrow = wide.next()?;
                    }
                }
            }
            extra = &extra[4 + length..];
        }
        Some(Self {
            name: String::from_utf8(name.to_vec()).ok()?,
            method,
            encrypted: flags & 1 != 0,
            size: usize::try_from(size).ok()?,
            packed: usize::try_from(packed).ok()?,
            local: usize::try_from(local).ok()?,
            next: at + 46 + lengths.iter().sum::<usize>(),
        })
    }

    /// Where the bytes lie: behind a second header, whose lengths may differ.
    fn range(&self, file: &[u8]) -> Option<Range<usize>> {
        let at = self.local;
        if file.get(at..at.checked_add(4)?)? != b"PK\x03\x04" {
            return None;
        }
        let start = at + 30 + usize::from(u16_at(file, at + 26)?) + usize::from(u16_at(file, at + 28)?);
        let end = start.checked_add(self.size)?;
        (end <= file.len()).then_some(start..end)
    }
}

/// Where the directory begins, and how many entries it has.
fn directory(file: &[u8]) -> Option<(usize, usize)> {
    // A comment of at most 64 KiB may follow the end record.
    let first = file.len().checked_sub(22)?;
    let at = (first.saturating_sub(usize::from(u16::MAX))..=first)
        .rev()
        .find(|at| file[*at..].starts_with(b"PK\x05\x06"))?;
    let (count, start) = (u16_at(file, at + 10)?, u32_at(file, at + 16)?);
    if count != u16::MAX && start != u32::MAX {
        return Some((usize::try_from(start).ok()?, usize::from(count)));
    }
    let locator = at.checked_sub(20).filter(|at| file[*at..].starts_with(b"PK\x06\x07"))?;
    let at = usize::try_from(u64_at(file, locator + 8)?).ok()?;
    if file.get(at..at.checked_add(4)?)? != b"PK\x06\x06" {
        return None;
    }
    Some((usize::try_from(u64_at(file, at + 48)?).ok()?, usize::try_from(u64_at(file, at + 32)?).ok()?))
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..)?.first_chunk().map(|raw| u16::from_le_bytes(*raw))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|raw| u32::from_le_bytes(*raw))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..)?.first_chunk().map(|raw| u64::from_le_bytes(*raw))
}
