//! What a file is, told from its first bytes: extensions lie, and a person helped by "this is a web page" is helped at once.
//!
//! Signatures are those of the formats' specifications. Nothing is decoded here.

/// What the first bytes say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sniffed {
    /// A picture format that is decoded.
    Picture(image::ImageFormat),
    /// A picture, film or document format that is not, by name.
    Unsupported(&'static str),
    /// Something else that has a name, for example a web page.
    Other(&'static str),
    /// Readable text.
    Text,
    /// No bytes at all.
    Empty,
    /// Bytes without a known beginning.
    Unknown,
}

/// Reads the beginning of a file; 512 bytes are enough.
pub fn sniff(bytes: &[u8]) -> Sniffed {
    if bytes.is_empty() {
        return Sniffed::Empty;
    }
    let known = PICTURES.iter().find(|(signature, _)| bytes.starts_with(signature));
    if let Some((_, format)) = known {
        return Sniffed::Picture(*format);
    }
    if bytes.len() >= 12 && bytes.starts_with(b"RIFF") {
        return match &bytes[8..12] {
            b"WEBP" => Sniffed::Picture(image::ImageFormat::WebP),
            _ => Sniffed::Other("RIFF sound or film"),
        };
    }
    if bytes.len() >= 12 && &bytes[4..8] == b"ftyp" {
        return Sniffed::Unsupported(match &bytes[8..12] {
            b"avif" | b"avis" => "AVIF",
            b"heic" | b"heix" | b"hevc" | b"mif1" | b"msf1" => "HEIC",
            _ => "MP4 or QuickTime film",
        });
    }
    if let Some((_, name)) = UNSUPPORTED.iter().find(|(signature, _)| bytes.starts_with(signature)) {
        return Sniffed::Unsupported(name);
    }
    if let Some((_, name)) = OTHERS.iter().find(|(signature, _)| bytes.starts_with(signature)) {
        return Sniffed::Other(name);
    }
    text(&bytes[..bytes.len().min(512)])
}

const PICTURES: &[(&[u8], image::ImageFormat)] = &[
    (b"\x89PNG\r\n\x1a\n", image::ImageFormat::Png),
    (b"\xff\xd8\xff", image::ImageFormat::Jpeg),
    (b"GIF87a", image::ImageFormat::Gif),
    (b"GIF89a", image::ImageFormat::Gif),
    (b"BM", image::ImageFormat::Bmp),
    (b"II*\0", image::ImageFormat::Tiff),
    (b"MM\0*", image::ImageFormat::Tiff),
];

const UNSUPPORTED: &[(&[u8], &str)] = &[
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"II+\0", "BigTIFF"),
    (b"8BPS", "Photoshop"),
    (b"qoif", "QOI"),
    (b"\0\0\x01\0", "icon"),
    (b"%PDF", "PDF"),
    (b"gimp xcf", "GIMP"),
    (b"\x76\x2f\x31\x01", "OpenEXR"),
    (b"DDS ", "DDS"),
    (b"FUJIFILMCCD-RAW", "camera raw"),
    (b"IIU\0", "camera raw"),
    (b"\x1aE\xdf\xa3", "Matroska or WebM film"),
];

const OTHERS: &[(&[u8], &str)] = &[
    (b"version https://git-lfs", "Git LFS pointer; `git lfs pull` fetches the picture"),
    (b"PK\x03\x04", "ZIP archive"),
    (b"Rar!", "RAR archive"),
    (b"7z\xbc\xaf\x27\x1c", "7z archive"),
    (b"\x1f\x8b", "gzip archive"),
    (b"\x7fELF", "program"),
    (b"MZ", "program"),
    (b"SQLite format 3", "SQLite database"),
    (b"\x93NUMPY", "NumPy array"),
];

/// Text by kind, or unknown bytes.
fn text(bytes: &[u8]) -> Sniffed {
    let utf16 = bytes.starts_with(b"\xff\xfe") || bytes.starts_with(b"\xfe\xff");
    let control = |byte: &u8| *byte < 0x20 && !b"\t\n\r\x0c\x1b".contains(byte);
    let high = bytes.iter().filter(|byte| **byte >= 0x80).count();
    if utf16 {
        return Sniffed::Text;
    }
    // Latin-1 prose has few high bytes; valid UTF-8 may consist of them, and may be cut within a letter at the end.
    let utf8 = std::str::from_utf8(bytes).map_or_else(|error| error.error_len().is_none(), |_| true);
    if bytes.iter().any(control) || (!utf8 && high * 4 > bytes.len()) {
        return Sniffed::Unknown;
    }
    let lower = String::from_utf8_lossy(bytes).trim_start_matches('\u{feff}').trim_start().to_lowercase();
    if lower.starts_with("<!doctype html") || lower.starts_with("<html") || lower.starts_with("<head") {
        return Sniffed::Other("web page");
    }
    if lower.starts_with("<svg") || (lower.starts_with("<?xml") && lower.contains("<svg")) {
        return Sniffed::Unsupported("SVG");
    }
    Sniffed::Text
}

/// The customary name of a decoded format.
pub fn format_name(format: image::ImageFormat) -> &'static str {
    match format {
        image::ImageFormat::Png => "PNG",
        image::ImageFormat::Jpeg => "JPEG",
        image::ImageFormat::WebP => "WebP",
        image::ImageFormat::Gif => "GIF",
        image::ImageFormat::Tiff => "TIFF",
        image::ImageFormat::Bmp => "BMP",
        _ => "picture",
    }
}

/// What an extension promises; `None` if it is not that of a picture.
pub fn promised(extension: &str) -> Option<image::ImageFormat> {
    Some(match extension.to_ascii_lowercase().as_str() {
        "png" | "apng" => image::ImageFormat::Png,
        "jpg" | "jpeg" | "jpe" | "jfif" => image::ImageFormat::Jpeg,
        "webp" => image::ImageFormat::WebP,
        "gif" => image::ImageFormat::Gif,
        "tif" | "tiff" => image::ImageFormat::Tiff,
        "bmp" | "dib" => image::ImageFormat::Bmp,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_told_from_noise() {
        assert_eq!(sniff("ein Bär".as_bytes()), Sniffed::Text);
        assert_eq!(sniff(b"un caf\xe9 cr\xe8me"), Sniffed::Text);
        assert_eq!(sniff(&[0xde, 0xad, 0xbe, 0xef, 0x90, 0x91]), Sniffed::Unknown);
        assert_eq!(sniff("日本語の説明文です".as_bytes()), Sniffed::Text);
    }

    #[test]
    fn a_web_page_is_named() {
        assert_eq!(sniff(b"\n\n  <!DOCTYPE HTML>..."), Sniffed::Other("web page"));
    }

    #[test]
    fn a_letter_cut_at_the_end_is_still_text() {
        let long = "ö".repeat(400);
        assert_eq!(sniff(&long.as_bytes()[..511]), Sniffed::Text);
    }
}
