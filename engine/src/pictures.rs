//! Drawing and writing pictures: what `generate` and the samples of a training share.

use std::{io::Cursor, path::Path};

use image::{ExtendedColorType, ImageEncoder as _, codecs::png::PngEncoder};
use lora_cli::{Failure, options::values};
use lora_core::format::write_atomically;
use lora_diffusion::{sample::Picture, schedule::sampler::SamplerKind};

use crate::failures::Explain as _;

/// The library's sampler of an option.
pub(crate) fn sampler(option: values::Sampler) -> SamplerKind {
    match option {
        values::Sampler::Ddim => SamplerKind::Ddim,
        values::Sampler::Euler => SamplerKind::Euler,
        values::Sampler::EulerAncestral => SamplerKind::EulerAncestral,
        values::Sampler::DpmPlusPlus2m => SamplerKind::DpmPp2m,
        values::Sampler::DpmPlusPlus2mKarras => SamplerKind::DpmPp2mKarras,
    }
}

/// The picture as a PNG.
pub(crate) fn png(picture: &Picture) -> Result<Vec<u8>, Failure> {
    let mut bytes = Cursor::new(Vec::new());
    let (width, height) = (picture.width as u32, picture.height as u32);
    PngEncoder::new(&mut bytes)
        .write_image(&picture.rgb, width, height, ExtendedColorType::Rgb8)
        .map_err(|error| Failure::from_error("png", &error))?;
    Ok(bytes.into_inner())
}

/// Writes a file whole or not at all.
pub(crate) fn write(path: &Path, bytes: &[u8]) -> Result<(), Failure> {
    write_atomically(path, |file| file.write_all(bytes)).explain()
}
