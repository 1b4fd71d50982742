//! What a file is that is no safetensors file, judged by its first bytes.
//!
//! Failed downloads are the most frequent "broken LoRA": a Git LFS pointer or a login page under the right name.

use std::fmt;

/// A recognised kind of file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum FileKind {
    /// The text file that Git LFS keeps in place of a large file.
    LfsPointer,
    /// A web page.
    Html,
    /// A zip archive, which is also what `torch.save` writes.
    Zip,
    /// A bare Python pickle: what `torch.save` wrote before 1.6.
    Pickle,
    /// A model or adapter of llama.cpp.
    Gguf,
    /// JSON text without the container's length.
    Json,
    /// Gzip-compressed data.
    Gzip,
    /// A picture.
    Picture,
    /// Plain text.
    Text,
}

impl FileKind {
    /// The kind of a file that begins with these bytes; `None` if nothing is recognised.
    pub fn of(start: &[u8]) -> Option<Self> {
        let text = start.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(start).trim_ascii_start();
        let tag = |name: &[u8]| text.get(..name.len()).is_some_and(|found| found.eq_ignore_ascii_case(name));
        Some(match start {
            [b'P', b'K', 3 | 5, 4 | 6, ..] => Self::Zip,
            [b'G', b'G', b'U', b'F', ..] => Self::Gguf,
            [0x1F, 0x8B, ..] => Self::Gzip,
            [0x89, b'P', b'N', b'G', ..] | [0xFF, 0xD8, 0xFF, ..] => Self::Picture,
            [0x80, 2..=5, b'}' | b'c' | b'(' | b']' | b'\x8A' | b'\x95' | b'X', ..] => Self::Pickle,
            _ if text.starts_with(b"version https://git-lfs") => Self::LfsPointer,
            _ if tag(b"<!doctype") || tag(b"<html") || tag(b"<head") || tag(b"<?xml") => Self::Html,
            [b'{' | b'[', b'"' | b'{' | b' ' | b'\n' | b'\r' | b'}' | b']', ..] => Self::Json,
            _ if is_text(start) => Self::Text,
            _ => return None,
        })
    }

    /// What to do about it.
    pub fn advice(self) -> &'static str {
        match self {
            Self::LfsPointer => "the real file was not downloaded (`git lfs pull` fetches it)",
            Self::Html => "the download gave a page, perhaps a login or an error: open it in a browser",
            Self::Zip | Self::Pickle => {
                "pickles can run code when they are opened and are refused: look for a .safetensors version, or use `lora convert IN OUT`, which runs nothing"
            }
            Self::Gguf => "llama.cpp files are not read here: look for the original adapter",
            Self::Json => "the tensors of it are missing",
            Self::Gzip => "unpack it first",
            Self::Picture => "the preview of a model was saved under the model's name",
            Self::Text => "the download may have given a message: open it in an editor",
        }
    }
}

impl fmt::Display for FileKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::LfsPointer => "a Git LFS pointer",
            Self::Html => "a web page (HTML)",
            Self::Zip => "a zip archive (a PyTorch pickle file, or a packed download)",
            Self::Pickle => "a Python pickle (an old PyTorch file)",
            Self::Gguf => "a GGUF file of llama.cpp",
            Self::Json => "a JSON text",
            Self::Gzip => "gzip-compressed data",
            Self::Picture => "a picture",
            Self::Text => "a text",
        })
    }
}

/// Whether these bytes are letters and lines: a header's length, little-endian, would end in zeros.
fn is_text(start: &[u8]) -> bool {
    let plain = |byte: &u8| byte.is_ascii_graphic() || byte.is_ascii_whitespace();
    start.len() > 8 && start.iter().all(plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frequent_wrong_files_are_named() {
        let kinds: &[(&[u8], FileKind)] = &[
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", FileKind::LfsPointer),
            (b"<!DOCTYPE html><html>", FileKind::Html),
            (b"\n <html lang=en>", FileKind::Html),
            (b"PK\x03\x04\0\0", FileKind::Zip),
            (b"\x80\x02}q\0", FileKind::Pickle),
            (b"GGUF\x03\0\0\0", FileKind::Gguf),
            (b"{\"error\":\"not found\"}", FileKind::Json),
            (b"\x89PNG\r\n\x1a\n", FileKind::Picture),
            (b"Access denied\n", FileKind::Text),
        ];
        for (start, kind) in kinds {
            assert_eq!(FileKind::of(start), Some(*kind));
        }
        assert_eq!(FileKind::of(&[0x80, 2, 0, 0, 0, 0, 0, 0, b'{']), None, "a header of 640 bytes is no pickle");
        assert_eq!(FileKind::of(b""), None);
    }
}
