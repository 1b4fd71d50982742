//! A file as bytes of UTF-8: unpacked, without its byte order mark, and refused by name if it is something else.

use std::{
    fs,
    io::{self, Read},
    path::Path,
};

use super::{Error, Result};

/// The most bytes that a file unpacks to; a packed file of a few megabytes could otherwise fill the memory.
const MAX_BYTES: u64 = 16 << 30;

/// The contents of a file.
#[derive(Debug, Clone, Default)]
pub(super) struct Source {
    pub(super) bytes: Vec<u8>,
    /// How it was packed.
    pub(super) packed: Option<&'static str>,
    /// Whether it began with a byte order mark.
    pub(super) marked: bool,
}

/// Reads a file.
pub(super) fn read(path: &Path) -> Result<Source> {
    let failed = |source| Error::Read { path: path.to_owned(), source };
    match fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(Error::NotFound { path: path.to_owned() }),
        Err(source) => return Err(failed(source)),
        Ok(data) if data.is_dir() => return Err(Error::Folder { path: path.to_owned() }),
        Ok(_) => {}
    }
    let raw = fs::read(path).map_err(failed)?;
    let (mut bytes, packed) = unpack(raw).map_err(failed)?;
    if bytes.starts_with(b"\xff\xfe") || bytes.starts_with(b"\xfe\xff") || looks_like_utf16(&bytes) {
        return Err(Error::Utf16 { path: path.to_owned() });
    }
    if let Some(what) = foreign(&bytes) {
        return Err(Error::NotTexts { path: path.to_owned(), what });
    }
    let marked = bytes.starts_with(b"\xef\xbb\xbf");
    if marked {
        bytes.drain(..3);
    }
    Ok(Source { bytes, packed, marked })
}

/// Whether a file begins with these bytes; one that is not there does not.
#[cfg(feature = "parquet")]
pub(super) fn begins_with(path: &Path, magic: &[u8]) -> bool {
    let mut head = vec![0; magic.len()];
    path.is_file() && fs::File::open(path).and_then(|mut file| file.read_exact(&mut head)).is_ok() && head == magic
}

/// Packed files are told by their first bytes, whatever they are called.
fn unpack(raw: Vec<u8>) -> io::Result<(Vec<u8>, Option<&'static str>)> {
    if raw.starts_with(b"\x1f\x8b") {
        return Ok((limited(flate2::read::MultiGzDecoder::new(&*raw))?, Some("gzip")));
    }
    if raw.starts_with(b"\x28\xb5\x2f\xfd") {
        let (mut rest, mut bytes) = (&*raw, Vec::new());
        // A file may consist of several frames, one after the other.
        while !rest.is_empty() {
            let frame = ruzstd::decoding::StreamingDecoder::new(&mut rest)
                .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error.to_string()))?;
            bytes.extend(limited(frame)?);
        }
        return Ok((bytes, Some("zstd")));
    }
    Ok((raw, None))
}

fn limited(from: impl Read) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    from.take(MAX_BYTES + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, "unpacks to more than 16 GiB"));
    }
    Ok(bytes)
}

/// Every other byte of English in UTF-16 is zero, also without a mark at the beginning.
fn looks_like_utf16(bytes: &[u8]) -> bool {
    let head = &bytes[..bytes.len().min(64) & !1];
    let zeros = |from: usize| head.iter().skip(from).step_by(2).filter(|byte| **byte == 0).count();
    head.len() >= 8 && (zeros(0) * 4 > head.len() || zeros(1) * 4 > head.len()) && zeros(0).min(zeros(1)) == 0
}

const FOREIGN: &[(&[u8], &str)] = &[
    (b"version https://git-lfs", "a Git LFS pointer"),
    (b"PAR1", "a Parquet file"),
    (b"PK\x03\x04", "a ZIP archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"%PDF", "a PDF"),
    (b"\x89PNG", "a picture"),
    (b"\xff\xd8\xff", "a picture"),
    (b"SQLite format 3", "an SQLite database"),
    (b"ARROW1", "an Arrow file"),
    (b"GGUF", "a GGUF model"),
    (b"\x7fELF", "a program"),
];

fn foreign(bytes: &[u8]) -> Option<&'static str> {
    if let Some((_, what)) = FOREIGN.iter().find(|(signature, _)| bytes.starts_with(signature)) {
        return Some(what);
    }
    let head = String::from_utf8_lossy(&bytes[..bytes.len().min(256)]).trim_start().to_lowercase();
    (head.starts_with("<!doctype html") || head.starts_with("<html")).then_some("a web page")
}
