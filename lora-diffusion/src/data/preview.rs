//! A sheet of all pictures as training sees them: what is kept in full light, what is cut off in the dark.
//!
//! Pictures are numbered from 1 in the order of the report, so that a picture on the sheet is found in the list.

use std::fs;

use fast_image_resize::{FilterType, ResizeAlg, ResizeOptions, Resizer};
use image::{Rgb, RgbImage, imageops};
use rayon::prelude::*;

use super::{Alpha, Dataset, Error, Picture, Result, decode::decode};

const BACKGROUND: Rgb<u8> = Rgb([24, 24, 27]);
const FRAME: Rgb<u8> = Rgb([250, 204, 21]);
/// Pixels between two pictures.
const GAP: u32 = 8;

/// How the sheet is laid out.
#[derive(Debug, Clone, Copy)]
pub struct SheetOptions {
    /// Longest side of a picture on the sheet, in pixels.
    pub side: u32,
    /// At most so many pictures, spread evenly over all of them.
    pub most: usize,
    /// What happens to transparent parts.
    pub alpha: Alpha,
}

impl Default for SheetOptions {
    fn default() -> Self {
        Self { side: 192, most: 200, alpha: Alpha::White }
    }
}

impl Dataset {
    /// The sheet; a picture that cannot be read any more leaves its place empty.
    ///
    /// # Errors
    /// If there is no picture, or the options leave no room.
    pub fn sheet(&self, options: SheetOptions) -> Result<RgbImage> {
        let wrong = |option, reason: &str| Err(Error::Option { option, reason: reason.to_owned() });
        if self.pictures.is_empty() || options.most == 0 {
            return wrong("preview", "there is no picture to show");
        }
        if !(16..=1024).contains(&options.side) {
            return wrong("side", "expected 16 to 1024 pixels");
        }
        let shown = self.pictures.len().min(options.most);
        let numbers: Vec<usize> = (0..shown).map(|at| at * self.pictures.len() / shown).collect();
        let thumbnails: Vec<Option<RgbImage>> =
            numbers.par_iter().map(|number| thumbnail(&self.pictures[*number], options)).collect::<Result<_>>()?;
        // A little wider than high, as screens are.
        let columns = ((shown as f64 * 1.4).sqrt().ceil() as u32).clamp(1, shown as u32);
        let rows = (shown as u32).div_ceil(columns);
        let cell = options.side + GAP;
        let mut sheet = RgbImage::from_pixel(columns * cell + GAP, rows * cell + GAP, BACKGROUND);
        for (at, (number, thumbnail)) in numbers.iter().zip(thumbnails).enumerate() {
            let (left, top) = (GAP + at as u32 % columns * cell, GAP + at as u32 / columns * cell);
            if let Some(thumbnail) = thumbnail {
                let inset = |side: u32| i64::from((options.side - side) / 2);
                let place = (i64::from(left) + inset(thumbnail.width()), i64::from(top) + inset(thumbnail.height()));
                imageops::replace(&mut sheet, &thumbnail, place.0, place.1);
            }
            write_number(&mut sheet, [left, top], number + 1);
        }
        Ok(sheet)
    }
}

/// The whole picture, small, with what is cut off darkened and a frame around what is kept.
fn thumbnail(picture: &Picture, options: SheetOptions) -> Result<Option<RgbImage>> {
    let Some(decoded) = fs::read(&picture.path).ok().and_then(|bytes| decode(&bytes, options.alpha).ok()) else {
        return Ok(None);
    };
    let whole = decoded.pixels;
    let longest = f64::from(whole.width().max(whole.height()));
    let shrink = |side: u32| ((f64::from(side) * f64::from(options.side) / longest).round() as u32).max(1);
    let mut small = RgbImage::new(shrink(whole.width()), shrink(whole.height()));
    let resize = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(FilterType::Hamming));
    let resized = Resizer::new().resize(&whole, &mut small, &resize);
    resized.map_err(|error| Error::Resize { reason: error.to_string() })?;
    let fit = &picture.fit;
    let size = [small.width(), small.height()];
    let edge =
        |axis: usize, at: u32| (f64::from(at) / f64::from(fit.resized[axis]) * f64::from(size[axis])).round() as u32;
    let start = [0, 1].map(|axis| edge(axis, fit.cut[axis]));
    let end = [0, 1].map(|axis| edge(axis, fit.cut[axis] + fit.bucket[axis]).min(size[axis]));
    for (x, y, pixel) in small.enumerate_pixels_mut() {
        let at = [x, y];
        let kept = (0..2).all(|axis| (start[axis]..end[axis]).contains(&at[axis]));
        let border = (0..2).any(|axis| {
            let cut = start[axis] > 0 || end[axis] < size[axis];
            cut && (at[axis] == start[axis] || at[axis] + 1 == end[axis])
        });
        if !kept {
            pixel.0 = pixel.0.map(|value| value / 4);
        } else if border {
            *pixel = FRAME;
        }
    }
    Ok(Some(small))
}

/// Ten digits, 3 × 5 pixels, a bit per pixel from the top left.
const DIGITS: [u16; 10] = [
    0b111_101_101_101_111,
    0b010_110_010_010_111,
    0b111_001_111_100_111,
    0b111_001_111_001_111,
    0b101_101_111_001_001,
    0b111_100_111_001_111,
    0b111_100_111_101_111,
    0b111_001_010_010_010,
    0b111_101_111_101_111,
    0b111_101_111_001_111,
];

/// A number in the corner of a picture, on a dark ground so that it can be read on any picture.
fn write_number(sheet: &mut RgbImage, [left, top]: [u32; 2], number: usize) {
    const DOT: u32 = 2;
    let digits: Vec<usize> = number.to_string().bytes().map(|digit| usize::from(digit - b'0')).collect();
    let width = digits.len() as u32 * 4 + 1;
    let mut dot = |x: u32, y: u32, colour| {
        for (dx, dy) in (0..DOT).flat_map(|dx| (0..DOT).map(move |dy| (dx, dy))) {
            let (x, y) = (left + x * DOT + dx, top + y * DOT + dy);
            if x < sheet.width() && y < sheet.height() {
                sheet.put_pixel(x, y, colour);
            }
        }
    };
    (0..width).for_each(|x| (0..7).for_each(|y| dot(x, y, BACKGROUND)));
    for (place, digit) in digits.into_iter().enumerate() {
        for (x, y) in (0..3).flat_map(|x| (0..5).map(move |y| (x, y))) {
            if DIGITS[digit] >> (14 - (y * 3 + x)) & 1 == 1 {
                dot(1 + place as u32 * 4 + x, 1 + y, Rgb([255; 3]));
            }
        }
    }
}
