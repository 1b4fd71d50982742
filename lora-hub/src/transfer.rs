//! One file from the hub to its blob: the half of an earlier try is gone on with, and what comes is checked.
//!
//! The bytes go to `blobs/<hash>.incomplete`, each to its own offset, and take the blob's name only when length and hash are
//! right. Two programs that write the same half, on a file system without locks, write the same bytes to the same places; a
//! half that is not to be gone on with is removed, never emptied, so nobody writes behind an end that has moved. Whatever
//! ends the program, the half is left as it is.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read},
    path::PathBuf,
    thread,
    time::Duration,
};

use sha1::Sha1;
use sha2::{Digest as _, Sha256};

use crate::{
    Error, Event, Hash, Result,
    client::{Answer, Client, refusal},
    hub::Planned,
    store::Store,
};

/// Bytes that are read, hashed and written at a time.
const PIECE: usize = 256 << 10;
/// Bytes after which a connection that breaks again counts as a new trouble.
const PROGRESS: u64 = 1 << 20;
/// The longest wait between two tries that no server has asked for.
const LONGEST_WAIT: Duration = Duration::from_secs(30);

/// How often and how long after a failure there is another try.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Patience {
    pub(crate) retries: u32,
    pub(crate) first_wait: Duration,
}

impl Patience {
    /// The wait after `failures` failures in a row; `None` when it is over.
    pub(crate) fn wait(self, failures: u32, asked: Option<Duration>) -> Option<Duration> {
        let doubled = self.first_wait.saturating_mul(1 << failures.saturating_sub(1).min(16)).min(LONGEST_WAIT);
        (failures <= self.retries).then(|| asked.unwrap_or(doubled))
    }
}

/// A file that is to be fetched, and from where.
pub(crate) struct Transfer<'a> {
    pub(crate) client: &'a Client,
    pub(crate) store: &'a Store,
    pub(crate) patience: Patience,
    /// `org/name`.
    pub(crate) repository: &'a str,
    pub(crate) gated: bool,
    pub(crate) address: String,
    pub(crate) file: &'a Planned,
}

/// Why a try has ended early.
enum Break {
    /// There is no use in another one.
    Final(Error),
    /// There may be, after a while.
    Passing { host: String, reason: String, wait: Option<Duration> },
    /// At once, from the first byte.
    Anew,
}

impl Transfer<'_> {
    /// Fetches the file; gives the bytes that came over the network.
    ///
    /// # Errors
    /// If it does not come, or not as it should.
    pub(crate) fn run(&self, on: &mut dyn FnMut(Event<'_>)) -> Result<u64> {
        self.store.prepare()?;
        let _held = self.store.hold(&self.file.hash, || on(Event::Waiting { file: self.file }))?;
        let blob = self.store.blob(&self.file.hash);
        if fs::metadata(&blob).is_ok_and(|found| found.len() == self.file.size) {
            return Ok(0); // somebody else has fetched it meanwhile
        }
        let mut half = Half::open(self.store.incomplete(&self.file.hash), self.file.size, &self.file.hash)?;
        on(Event::File { file: self.file, have: half.length });
        let (mut failures, mut fetched, mut is_resumed) = (0, 0, half.length > 0);
        loop {
            let before = fetched;
            match self.stream(&mut half, &mut fetched, on) {
                Ok(()) => match half.check(&self.file.hash) {
                    Ok(()) => break,
                    // The half of an earlier try may have been another's: once more from the beginning.
                    Err(_) if is_resumed => {
                        is_resumed = false;
                        half.restart(&self.file.hash)?;
                        on(Event::Back { bytes: self.file.size });
                    }
                    Err(actual) => {
                        half.remove()?;
                        let (file, expected) = (self.file.name.clone(), self.file.hash.clone());
                        return Err(Error::WrongHash { file, expected, actual });
                    }
                },
                Err(Break::Final(error)) => return Err(error),
                Err(Break::Anew) => {
                    on(Event::Back { bytes: half.length });
                    half.restart(&self.file.hash)?;
                    is_resumed = false;
                }
                Err(Break::Passing { host, reason, wait }) => {
                    failures = if fetched - before >= PROGRESS { 1 } else { failures + 1 };
                    let Some(wait) = self.patience.wait(failures, wait) else {
                        return Err(self.given_up(host, reason, half.length));
                    };
                    on(Event::Retry { what: &self.file.name, reason: &reason, wait });
                    thread::sleep(wait);
                }
            }
        }
        half.finish(blob)?;
        Ok(fetched)
    }

    fn given_up(&self, host: String, reason: String, kept: u64) -> Error {
        match kept {
            0 => Error::Unreachable { host, reason },
            kept => Error::Lost { file: self.file.name.clone(), kept, size: self.file.size, reason },
        }
    }

    /// One connection: goes on behind the half until the file's end.
    fn stream(&self, half: &mut Half, fetched: &mut u64, on: &mut dyn FnMut(Event<'_>)) -> Result<(), Break> {
        if half.length == self.file.size {
            return Ok(());
        }
        let answer = self.client.get(&self.address, half.length).map_err(|error| match error.may_pass {
            true => Break::Passing { host: error.host, reason: error.reason, wait: None },
            false => Break::Final(error.into_error()),
        })?;
        match answer.status {
            200 if half.length > 0 => {
                // The server knows nothing of ranges.
                on(Event::Back { bytes: half.length });
                half.restart(&self.file.hash).map_err(Break::Final)?;
            }
            200 => {}
            206 if starts_at(&answer, half.length) => {}
            206 | 416 if half.length > 0 => return Err(Break::Anew),
            _ if answer.may_pass() => {
                let reason = format!("status {} from {}", answer.status, answer.host);
                return Err(Break::Passing { host: answer.host.clone(), reason, wait: answer.wait() });
            }
            _ => {
                let error = refusal(self.client, &answer, self.repository, self.gated, &self.file.name);
                return Err(Break::Final(error));
            }
        }
        let host = answer.host.clone();
        let mut reader = answer.into_reader();
        let mut piece = vec![0; PIECE];
        loop {
            let count = match reader.read(&mut piece) {
                Ok(0) if half.length == self.file.size => return Ok(()),
                Ok(0) => {
                    return Err(Break::Passing { host, reason: "the connection was closed early".into(), wait: None });
                }
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    let reason = crate::client::in_words(&ureq::Error::from(error));
                    return Err(Break::Passing { host, reason, wait: None });
                }
            };
            if half.length + count as u64 > self.file.size {
                half.remove().map_err(Break::Final)?;
                return Err(Break::Final(Error::TooLong { host, file: self.file.name.clone(), size: self.file.size }));
            }
            half.append(&piece[..count]).map_err(Break::Final)?;
            *fetched += count as u64;
            on(Event::Bytes { count: count as u64 });
        }
    }
}

/// Whether a part of a file is the one that was asked for.
fn starts_at(answer: &Answer, from: u64) -> bool {
    let range = answer.header("content-range").and_then(|range| range.trim().strip_prefix("bytes "));
    range.and_then(|range| range.split_once('-')).is_some_and(|(start, _)| start.trim().parse() == Ok(from))
}

/// A file that is not whole yet, and the hash of what there is of it.
struct Half {
    path: PathBuf,
    file: File,
    length: u64,
    size: u64,
    hasher: Hasher,
}

impl Half {
    /// What an earlier try has left, or nothing.
    fn open(path: PathBuf, size: u64, hash: &Hash) -> Result<Self> {
        let failed = |source| Error::Store { path: path.clone(), source };
        let mut file = create(&path).map_err(failed)?;
        let mut hasher = Hasher::new(hash, size);
        let length = file.metadata().map_err(failed)?.len();
        if length > size {
            let mut half = Self { path, file, length, size, hasher };
            half.restart(hash)?;
            return Ok(half);
        }
        let mut piece = vec![0; PIECE];
        loop {
            match file.read(&mut piece) {
                Ok(0) => break,
                Ok(count) => hasher.update(&piece[..count]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(failed(error)),
            }
        }
        Ok(Self { path, file, length, size, hasher })
    }

    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        write_at(&mut self.file, bytes, self.length).map_err(|source| self.failed(source))?;
        self.hasher.update(bytes);
        self.length += bytes.len() as u64;
        Ok(())
    }

    /// Begins a new file.
    fn restart(&mut self, hash: &Hash) -> Result<()> {
        self.remove()?;
        self.file = create(&self.path).map_err(|source| self.failed(source))?;
        self.length = 0;
        self.hasher = Hasher::new(hash, self.size);
        Ok(())
    }

    fn remove(&self) -> Result<()> {
        match fs::remove_file(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(self.failed(error)),
            _ => Ok(()),
        }
    }

    /// The digits of what is there, if they are not those of `hash`.
    fn check(&self, hash: &Hash) -> Result<(), String> {
        let digits = self.hasher.digits();
        if digits == hash.digits() { Ok(()) } else { Err(digits) }
    }

    /// Gives the file its name.
    fn finish(self, blob: PathBuf) -> Result<()> {
        self.file.sync_all().map_err(|source| self.failed(source))?;
        match fs::rename(&self.path, &blob) {
            // Where there are no locks somebody else may have been faster.
            Err(_) if fs::metadata(&blob).is_ok_and(|found| found.len() == self.size) => Ok(()),
            Err(source) => Err(Error::Store { path: blob, source }),
            Ok(()) => Ok(()),
        }
    }

    fn failed(&self, source: io::Error) -> Error {
        Error::Store { path: self.path.clone(), source }
    }
}

fn create(path: &std::path::Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)
}

#[cfg(unix)]
fn write_at(file: &mut File, bytes: &[u8], offset: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::write_all_at(file, bytes, offset)
}

#[cfg(not(unix))]
fn write_at(file: &mut File, bytes: &[u8], offset: u64) -> io::Result<()> {
    use std::io::{Seek as _, SeekFrom, Write as _};
    file.seek(SeekFrom::Start(offset))?;
    file.write_all(bytes)
}

/// The hash of the bytes so far.
#[derive(Clone)]
enum Hasher {
    Sha256(Sha256),
    Git(Sha1),
}

impl Hasher {
    fn new(hash: &Hash, size: u64) -> Self {
        match hash {
            Hash::Sha256(_) => Self::Sha256(Sha256::new()),
            Hash::Git(_) => Self::Git(Sha1::new_with_prefix(format!("blob {size}\0"))),
        }
    }

    fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha256(hash) => hash.update(bytes),
            Self::Git(hash) => hash.update(bytes),
        }
    }

    fn digits(&self) -> String {
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        match self.clone() {
            Self::Sha256(hash) => hex(&hash.finalize()),
            Self::Git(hash) => hex(&hash.finalize()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hashes_are_those_of_sha256sum_and_git() {
        let digits = |hash: Hash, bytes: &[u8]| {
            let mut hasher = Hasher::new(&hash, bytes.len() as u64);
            hasher.update(bytes);
            hasher.digits()
        };
        let git = |bytes| digits(Hash::Git(String::new()), bytes);
        assert_eq!(git(b""), "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391");
        assert_eq!(git(b"hello\n"), "ce013625030ba8dba906f756967f9e9ca394464a");
        let empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(digits(Hash::Sha256(String::new()), b""), empty);
    }

    #[test]
    fn waits_double_up_to_half_a_minute_and_then_it_is_over() {
        let patience = Patience { retries: 8, first_wait: Duration::from_secs(1) };
        let waits: Vec<_> = (1..=9).map(|failures| patience.wait(failures, None).map(|wait| wait.as_secs())).collect();
        assert_eq!(waits, [Some(1), Some(2), Some(4), Some(8), Some(16), Some(30), Some(30), Some(30), None]);
        assert_eq!(patience.wait(1, Some(Duration::from_secs(7))), Some(Duration::from_secs(7)));
        assert_eq!(Patience { retries: 0, ..patience }.wait(1, None), None);
    }
}
