//! From the bytes of a picture file to upright 8-bit RGB, or to the reason why not.
//!
//! Everything is measured against what a person sees: turned by its EXIF tag, transparent parts on white, 16 bits shrunk
//! to 8 (Pillow clips 16-bit grey to white), animations as their first frame. Sizes are checked before memory is taken;
//! a JPEG is decoded strictly, since lenient decoders take half a file for a whole one; a panic of a decoder is an
//! unusable picture and nothing more. This file knows nothing of folders, buckets and tensors.

use std::{
    io::Cursor,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Mutex, PoisonError},
};

use image::{DynamicImage, GrayImage, ImageDecoder, ImageFormat, ImageReader, Limits, RgbImage, metadata::Orientation};
use serde::{Deserialize, Serialize};
use zune_jpeg::{
    JpegDecoder,
    zune_core::{bytestream::ZCursor, colorspace::ColorSpace, options::DecoderOptions},
};

use super::sniff::{Sniffed, format_name, sniff};

/// Longest side of a picture that is decoded, in pixels.
pub const MAX_SIDE: u32 = 16_384;
/// Most pixels of a picture that is decoded: Pillow's limit against decompression bombs.
pub const MAX_PIXELS: u64 = 178_956_970;
/// What a decoder may take: the largest picture at four channels of 16 bits, and something to work with.
const MAX_DECODER_BYTES: u64 = 1_600_000_000;
/// What may be taken for a header; colour profiles are compressed and can be bombs too.
const MAX_HEADER_BYTES: u64 = 64 << 20;
/// Above this many pixels, one picture is decoded at a time, whatever the number of threads.
const LARGE: u64 = 40_000_000;

/// What happens to transparent parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Alpha {
    /// They are laid on white.
    #[default]
    White,
    /// They are laid on black.
    Black,
    /// They are laid on white, and do not count in the loss.
    Mask,
}

/// What the header says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// By content, whatever the name says.
    pub format: ImageFormat,
    /// Width and height once the picture stands upright.
    pub size: [u32; 2],
    /// More frames than one.
    pub animated: bool,
    orientation: Orientation,
}

/// A decoded picture.
#[derive(Debug, Clone)]
pub struct Decoded {
    /// Upright, 8-bit, without transparency.
    pub pixels: RgbImage,
    /// The transparency, where there is any: 0 transparent, 255 opaque.
    pub opacity: Option<GrayImage>,
    /// The file is not quite whole; a few pixels may be wrong.
    pub damaged: bool,
}

/// Why a file cannot be trained on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Unusable {
    /// No bytes.
    #[error("the file is empty")]
    Empty,
    /// A picture's name on something else.
    #[error("not a picture: {what}")]
    NotPicture {
        /// What it is.
        what: String,
    },
    /// A format that is not decoded here.
    #[error("{what} is not supported: convert it to PNG, JPEG or WebP")]
    Unsupported {
        /// The format.
        what: &'static str,
    },
    /// A known format in a form that is not decoded here.
    #[error("this kind of {format} is not supported ({cause}): convert it to PNG, JPEG or WebP")]
    UnsupportedKind {
        /// The format.
        format: &'static str,
        /// In the decoder's words.
        cause: String,
    },
    /// A picture that would take too much memory.
    #[error(
        "{} × {} pixels ({} megapixels) are too many: at most {MAX_SIDE} a side and {} megapixels", size[0], size[1],
        u64::from(size[0]) * u64::from(size[1]) / 1_000_000, MAX_PIXELS / 1_000_000
    )]
    TooLarge {
        /// Width and height.
        size: [u32; 2],
    },
    /// A JPEG without its end.
    #[error("the JPEG is cut off: {cause}")]
    CutOff {
        /// In the decoder's words.
        cause: String,
    },
    /// Bytes that do not decode.
    #[error("the {format} is damaged: {cause}")]
    Damaged {
        /// The format.
        format: &'static str,
        /// In the decoder's words.
        cause: String,
    },
    /// The decoder broke.
    #[error("the {format} made its decoder panic")]
    Panicked {
        /// The format.
        format: &'static str,
    },
}

/// Reads the header alone; takes no memory for pixels.
///
/// # Errors
/// If the bytes are no picture that is decoded here, or one that is too large.
pub fn header(bytes: &[u8]) -> Result<Header, Unusable> {
    let format = picture_format(bytes)?;
    // The PNG decoder refuses absurd sizes for want of memory before it tells them.
    let claimed = (format == ImageFormat::Png).then(|| png_size(bytes)).flatten();
    claimed.map_or(Ok(()), refuse_large)?;
    guarded(format, || {
        let (size, orientation) = match format {
            ImageFormat::Jpeg => {
                let decoder = jpeg_with_headers(bytes, false)?;
                let size = decoder.dimensions().unwrap_or_default();
                let orientation = decoder.exif().and_then(|exif| Orientation::from_exif_chunk(exif));
                ([size.0, size.1].map(|side| side as u32), orientation.unwrap_or(Orientation::NoTransforms))
            }
            _ => {
                let mut decoder = decoder(bytes, format)?;
                let (width, height) = decoder.dimensions();
                // A broken EXIF block is no reason to leave a picture out.
                ([width, height], decoder.orientation().unwrap_or(Orientation::NoTransforms))
            }
        };
        if size.contains(&0) {
            return Err(damaged(format, "it has no pixels"));
        }
        refuse_large(size)?;
        let turned = matches!(
            orientation,
            Orientation::Rotate90 | Orientation::Rotate270 | Orientation::Rotate90FlipH | Orientation::Rotate270FlipH
        );
        let size = if turned { [size[1], size[0]] } else { size };
        Ok(Header { format, size, animated: animated(bytes, format), orientation })
    })
}

/// Decodes a picture file.
///
/// # Errors
/// If the bytes are no picture that is decoded here, or one that is too large, cut off or damaged.
pub fn decode(bytes: &[u8], alpha: Alpha) -> Result<Decoded, Unusable> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let header = header(bytes)?;
    let _turn = (pixels(header.size) > LARGE).then(|| ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner));
    guarded(header.format, || {
        let (mut picture, damaged) = match header.format {
            ImageFormat::Jpeg => decode_jpeg(bytes)?,
            format => (decode_other(bytes, format)?, false),
        };
        picture.apply_orientation(header.orientation);
        let (pixels, opacity) = flatten(picture, alpha);
        Ok(Decoded { pixels, opacity, damaged })
    })
}

fn refuse_large(size: [u32; 2]) -> Result<(), Unusable> {
    if size.iter().any(|side| *side > MAX_SIDE) || pixels(size) > MAX_PIXELS {
        return Err(Unusable::TooLarge { size });
    }
    Ok(())
}

/// Width and height stand first in the first chunk (PNG specification, third edition, §11.2.1).
fn png_size(bytes: &[u8]) -> Option<[u32; 2]> {
    let side = |at: usize| Some(u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
    Some([side(16)?, side(20)?])
}

fn pixels([width, height]: [u32; 2]) -> u64 {
    u64::from(width) * u64::from(height)
}

fn picture_format(bytes: &[u8]) -> Result<ImageFormat, Unusable> {
    match sniff(bytes) {
        Sniffed::Picture(format) => Ok(format),
        Sniffed::Unsupported(what) => Err(Unusable::Unsupported { what }),
        Sniffed::Other(what) => Err(Unusable::NotPicture { what: what.to_owned() }),
        Sniffed::Text => Err(Unusable::NotPicture { what: format!("text, “{}”", excerpt(bytes)) }),
        Sniffed::Empty => Err(Unusable::Empty),
        Sniffed::Unknown => Err(Unusable::NotPicture { what: "unknown bytes".to_owned() }),
    }
}

/// The first words of a text.
fn excerpt(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(&bytes[..bytes.len().min(160)]);
    let line = text.trim().lines().next().unwrap_or_default();
    let short: String = line.chars().filter(|letter| !letter.is_control()).take(40).collect();
    if short.len() < line.len() { format!("{short}…") } else { short }
}

fn damaged(format: ImageFormat, cause: impl ToString) -> Unusable {
    Unusable::Damaged { format: format_name(format), cause: cause.to_string() }
}

/// Runs a decoder so that its panic is a reason to skip the picture: image-rs says that malicious files make some panic.
fn guarded<T>(format: ImageFormat, work: impl FnOnce() -> Result<T, Unusable>) -> Result<T, Unusable> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or(Err(Unusable::Panicked { format: format_name(format) }))
}

type ZuneDecoder<'a> = JpegDecoder<ZCursor<&'a [u8]>>;

fn jpeg_with_headers(bytes: &[u8], strict: bool) -> Result<ZuneDecoder<'_>, Unusable> {
    let options = DecoderOptions::default()
        .set_strict_mode(strict)
        .set_max_width(usize::from(u16::MAX))
        .set_max_height(usize::from(u16::MAX))
        .jpeg_set_out_colorspace(ColorSpace::RGB);
    let mut decoder = JpegDecoder::new_with_options(ZCursor::new(bytes), options);
    decoder.decode_headers().map_err(|cause| jpeg_error(bytes, &cause))?;
    Ok(decoder)
}

fn jpeg_error(bytes: &[u8], cause: &dyn std::fmt::Debug) -> Unusable {
    let cause = format!("{cause:?}");
    let cause = cause.trim_matches('"').to_owned();
    if has_end(bytes) { damaged(ImageFormat::Jpeg, cause) } else { Unusable::CutOff { cause } }
}

/// Strict where the end is missing, so that half a file is refused; with its end in place, a flipped bit spoils a few
/// blocks at most, and such a picture is taken and called damaged.
fn decode_jpeg(bytes: &[u8]) -> Result<(DynamicImage, bool), Unusable> {
    let run = |strict| -> Result<DynamicImage, Unusable> {
        let mut decoder = jpeg_with_headers(bytes, strict)?;
        let values = decoder.decode().map_err(|cause| jpeg_error(bytes, &cause))?;
        let (width, height) = decoder.dimensions().unwrap_or_default();
        let picture = RgbImage::from_raw(width as u32, height as u32, values);
        Ok(DynamicImage::ImageRgb8(picture.ok_or_else(|| damaged(ImageFormat::Jpeg, "its size and data disagree"))?))
    };
    match (run(true), has_end(bytes)) {
        (Ok(picture), whole) => Ok((picture, !whole)),
        (Err(_), true) => Ok((run(false)?, true)),
        (Err(error), false) => Err(error),
    }
}

/// Whether the end-of-image marker follows the start of the first scan.
///
/// Segments before it are walked over, because a thumbnail inside them has an end of its own; within a scan the byte
/// 0xFF is always followed by 0 or a restart marker (ITU T.81, B.1.1.5), so the marker cannot occur by chance.
fn has_end(bytes: &[u8]) -> bool {
    let mut at = 2;
    loop {
        match bytes.get(at..at + 4) {
            Some([0xff, 0xff, ..]) => at += 1,
            Some([0xff, 0xda, ..]) => return bytes[at..].windows(2).any(|pair| pair == [0xff, 0xd9]),
            Some([0xff, _, high, low]) => at += 2 + usize::from(u16::from_be_bytes([*high, *low])),
            Some(_) => at += 1,
            None => return false,
        }
    }
}

fn decoder(bytes: &[u8], format: ImageFormat) -> Result<impl ImageDecoder + '_, Unusable> {
    let mut reader = ImageReader::with_format(Cursor::new(bytes), format);
    let mut limits = Limits::no_limits();
    limits.max_alloc = Some(MAX_HEADER_BYTES);
    reader.limits(limits);
    reader.into_decoder().map_err(|error| image_error(format, &error))
}

fn decode_other(bytes: &[u8], format: ImageFormat) -> Result<DynamicImage, Unusable> {
    let mut decoder = decoder(bytes, format)?;
    let mut limits = Limits::no_limits();
    limits.max_alloc = Some(MAX_DECODER_BYTES);
    // `from_decoder` does not look at the limit by itself.
    limits.reserve(decoder.total_bytes()).map_err(|error| image_error(format, &error))?;
    decoder.set_limits(limits).map_err(|error| image_error(format, &error))?;
    DynamicImage::from_decoder(decoder).map_err(|error| image_error(format, &error))
}

fn image_error(format: ImageFormat, error: &image::ImageError) -> Unusable {
    let text = error.to_string().replace('\n', " ");
    // The crate's own frame around the decoder's words, and the decoder's internals behind them.
    let frame = format!("Format error decoding {format:?}: ");
    let cause = text.split(" while decoding ").next().unwrap_or_default();
    let cause = cause.strip_prefix(&frame).unwrap_or(cause).trim_end_matches('.').to_owned();
    match error {
        image::ImageError::Unsupported(_) => Unusable::UnsupportedKind { format: format_name(format), cause },
        _ => Unusable::Damaged { format: format_name(format), cause },
    }
}

/// Lays a picture on its background.
fn flatten(picture: DynamicImage, alpha: Alpha) -> (RgbImage, Option<GrayImage>) {
    if !picture.color().has_alpha() {
        return (picture.into_rgb8(), None);
    }
    let rgba = picture.into_rgba8();
    if rgba.pixels().all(|pixel| pixel[3] == 255) {
        return (DynamicImage::ImageRgba8(rgba).into_rgb8(), None);
    }
    let background: u32 = if alpha == Alpha::Black { 0 } else { 255 };
    let (width, height) = rgba.dimensions();
    let opacity = GrayImage::from_fn(width, height, |x, y| image::Luma([rgba.get_pixel(x, y)[3]]));
    let pixels = RgbImage::from_fn(width, height, |x, y| {
        let image::Rgba([red, green, blue, opacity]) = *rgba.get_pixel(x, y);
        let opacity = u32::from(opacity);
        let lay = |value: u8| ((u32::from(value) * opacity + background * (255 - opacity) + 127) / 255) as u8;
        image::Rgb([lay(red), lay(green), lay(blue)])
    });
    (pixels, Some(opacity))
}

/// Whether the file holds more frames than the first.
fn animated(bytes: &[u8], format: ImageFormat) -> bool {
    match format {
        // The animation control chunk stands before the pixels (PNG specification, third edition, §11.3.6).
        ImageFormat::Png => png_chunks(bytes).take_while(|kind| kind != b"IDAT").any(|kind| &kind == b"acTL"),
        // Bit 1 of the extended header's flags (RFC 9649, §2.7).
        ImageFormat::WebP => bytes.get(12..16) == Some(b"VP8X") && bytes.get(20).is_some_and(|flags| flags & 2 != 0),
        ImageFormat::Gif => gif_frames(bytes) > 1,
        _ => false,
    }
}

fn png_chunks(bytes: &[u8]) -> impl Iterator<Item = [u8; 4]> + '_ {
    let mut at = 8;
    std::iter::from_fn(move || {
        let length = u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?);
        let kind = bytes.get(at + 4..at + 8)?.try_into().ok()?;
        at = at.checked_add(length as usize)?.checked_add(12)?;
        Some(kind)
    })
}

/// The number of image descriptors (GIF89a specification, §17 to §27), as far as the file can be followed.
fn gif_frames(bytes: &[u8]) -> usize {
    let colours = |flags: u8| if flags & 0x80 == 0 { 0 } else { 3usize << ((flags & 7) + 1) };
    let mut at = 13 + bytes.get(10).map_or(0, |flags| colours(*flags));
    let mut frames = 0;
    loop {
        match bytes.get(at) {
            Some(0x2c) => {
                frames += 1;
                at += 11 + bytes.get(at + 9).map_or(0, |flags| colours(*flags));
            }
            Some(0x21) => at += 2,
            _ => return frames,
        }
        while let Some(length) = bytes.get(at).filter(|length| **length > 0) {
            at += 1 + usize::from(*length);
        }
        at += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_bytes_behind_a_signature_give_an_answer() {
        let mut draw = lora_core::Draw::new(3, lora_core::Purpose::Augment, 0, 0);
        for start in [&b"\x89PNG\r\n\x1a\n"[..], b"\xff\xd8\xff\xe0", b"GIF89a", b"BM", b"II*\0", b"RIFF....WEBPVP8 "] {
            for length in [0, 1, 7, 60, 300] {
                let mut bytes = start.to_vec();
                bytes.extend((0..length).map(|_| draw.bits() as u8));
                assert!(decode(&bytes, Alpha::White).is_err(), "{start:?} {length}");
            }
        }
    }

    #[test]
    fn a_panic_of_a_decoder_is_an_unusable_picture() {
        let result: Result<(), Unusable> = guarded(ImageFormat::Tiff, || panic!("as decoders do on malicious files"));
        assert!(matches!(result, Err(Unusable::Panicked { format: "TIFF" })));
    }

    #[test]
    fn every_shorter_piece_of_a_picture_gives_an_answer() {
        let picture = RgbImage::from_fn(24, 16, |x, y| image::Rgb([x as u8 * 9, y as u8 * 15, 77]));
        for format in [ImageFormat::Png, ImageFormat::Jpeg, ImageFormat::WebP, ImageFormat::Gif, ImageFormat::Tiff] {
            let mut bytes = Cursor::new(Vec::new());
            picture.write_to(&mut bytes, format).unwrap();
            let bytes = bytes.into_inner();
            assert!(decode(&bytes, Alpha::White).is_ok(), "{format:?}");
            for length in 0..bytes.len() / 2 {
                assert!(decode(&bytes[..length], Alpha::White).is_err(), "{format:?} {length}");
            }
        }
    }
}
