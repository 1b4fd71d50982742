//! From a decoded picture to what the VAE reads: resized to cover its bucket, cut in the middle, mirrored or not.
//!
//! Shrinking uses a Hamming window, which passes what the area filter of sd-scripts (`cv2.INTER_AREA`) passes: shrunk 2.5
//! times, sine waves keep 0.97, 0.88, 0.75 and 0.63 of their height at a quarter, half, three quarters and nineteen
//! twentieths of the new resolution, against 0.97, 0.91, 0.77 and 0.65. Neither kernel is negative anywhere, so that hard
//! edges of drawings get no halo for a style to learn; Lanczos overshoots an edge of 40 to 200 by 8 on either side.
//! Enlarging uses Lanczos, as sd-scripts does. Values are filtered as they are stored (sRGB), as by every peer.

use fast_image_resize::{FilterType, ResizeAlg, ResizeOptions, Resizer};
use image::{GrayImage, RgbImage, imageops};
use tch::{Kind, Tensor};

use super::{Error, Fit, Result};

/// One side of a square of pixels that becomes one latent.
pub const LATENT: u32 = 8;

/// The picture at its bucket's size.
///
/// # Errors
/// If the picture has another size than the fit was made for.
pub fn fit_picture(picture: &RgbImage, fit: &Fit, flip: bool) -> Result<RgbImage> {
    let [width, height] = fit.bucket;
    check_size(picture.dimensions(), fit)?;
    let mut cut = if fit.resized == fit.size {
        imageops::crop_imm(picture, fit.cut[0], fit.cut[1], width, height).to_image()
    } else {
        let mut cut = RgbImage::new(width, height);
        Resizer::new().resize(picture, &mut cut, &covering(fit)).map_err(resize_error)?;
        cut
    };
    if flip {
        imageops::flip_horizontal_in_place(&mut cut);
    }
    Ok(cut)
}

/// Pixels as the VAE takes them: `[3, height, width]`, f32 in −1..1.
pub fn to_tensor(picture: &RgbImage) -> Result<Tensor> {
    let (width, height) = picture.dimensions();
    let bytes = Tensor::f_from_slice(picture.as_raw())?.f_view([i64::from(height), i64::from(width), 3])?;
    let planes = bytes.f_permute([2, 0, 1])?.f_to_kind(Kind::Float)?;
    Ok(planes.f_div_scalar(127.5)?.f_sub_scalar(1.0)?.f_contiguous()?)
}

/// A loss mask at the latent's size, row-major, 0..1: fitted as its picture, then the mean over 8×8 squares.
///
/// A mask of another size than its picture is stretched to it first.
pub fn fit_mask(mask: &GrayImage, fit: &Fit, flip: bool) -> Result<Vec<f32>> {
    let [width, height] = fit.bucket;
    let stretched;
    let mask = if mask.dimensions() == fit.size.into() {
        mask
    } else {
        let mut whole = GrayImage::new(fit.size[0], fit.size[1]);
        let options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(FilterType::Bilinear));
        Resizer::new().resize(mask, &mut whole, &options).map_err(resize_error)?;
        stretched = whole;
        &stretched
    };
    let mut cut = if fit.resized == fit.size {
        imageops::crop_imm(mask, fit.cut[0], fit.cut[1], width, height).to_image()
    } else {
        let mut cut = GrayImage::new(width, height);
        Resizer::new().resize(mask, &mut cut, &covering(fit)).map_err(resize_error)?;
        cut
    };
    if flip {
        imageops::flip_horizontal_in_place(&mut cut);
    }
    let values: Vec<f32> = cut.as_raw().iter().map(|value| f32::from(*value) / 255.0).collect();
    Ok(square_means(&values, width as usize))
}

/// The means of 8×8 squares of a row-major picture, row-major: what `area` interpolation to the latent's size gives.
///
/// Rows and columns that fill no square are left out.
pub fn square_means(values: &[f32], width: usize) -> Vec<f32> {
    const SIDE: usize = LATENT as usize;
    let height = values.len().checked_div(width).unwrap_or(0);
    let mean = |row: usize, column: usize| {
        let rows = (row * SIDE..(row + 1) * SIDE).map(|y| &values[y * width + column * SIDE..][..SIDE]);
        rows.flatten().map(|value| f64::from(*value)).sum::<f64>() / (SIDE * SIDE) as f64
    };
    let squares = (0..height / SIDE).flat_map(|row| (0..width / SIDE).map(move |column| (row, column)));
    squares.map(|(row, column)| mean(row, column) as f32).collect()
}

/// Resizes only what is kept: a 3 × 4000 picture would otherwise become one of gigabytes on its way to a bucket.
fn covering(fit: &Fit) -> ResizeOptions {
    let per_pixel = [0, 1].map(|axis| f64::from(fit.size[axis]) / f64::from(fit.resized[axis]));
    let start = [0, 1].map(|axis| f64::from(fit.cut[axis]) * per_pixel[axis]);
    let length = [0, 1].map(|axis| {
        let length = f64::from(fit.bucket[axis]) * per_pixel[axis];
        length.min(f64::from(fit.size[axis]) - start[axis]) // rounding must not reach beyond the edge
    });
    let filter = if fit.scale() < 1.0 { FilterType::Hamming } else { FilterType::Lanczos3 };
    ResizeOptions::new().resize_alg(ResizeAlg::Convolution(filter)).crop(start[0], start[1], length[0], length[1])
}

fn check_size((width, height): (u32, u32), fit: &Fit) -> Result<()> {
    if [width, height] == fit.size {
        return Ok(());
    }
    Err(Error::Resize {
        reason: format!("the picture is {width} × {height}, expected {} × {}", fit.size[0], fit.size[1]),
    })
}

fn resize_error(error: fast_image_resize::ResizeError) -> Error {
    Error::Resize { reason: error.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::BucketRule;

    fn stripes(width: u32, height: u32) -> RgbImage {
        RgbImage::from_fn(width, height, |x, y| {
            image::Rgb([(x * 255 / width) as u8, (y * 255 / height) as u8, if x < width / 2 { 0 } else { 255 }])
        })
    }

    #[test]
    fn a_picture_of_its_buckets_size_is_untouched() {
        let picture = stripes(128, 128);
        let fit = BucketRule::square(128).fit([128, 128]).unwrap();
        assert_eq!(fit_picture(&picture, &fit, false).unwrap(), picture);
    }

    #[test]
    fn the_middle_is_kept_and_flipping_mirrors_it() {
        let picture = stripes(400, 200);
        let fit = BucketRule::square(128).fit([400, 200]).unwrap();
        let cut = fit_picture(&picture, &fit, false).unwrap();
        // 400 × 200 covers the square at 256 × 128: columns 64 to 192 are kept, of values 255·(64..192)/256.
        assert!((62..=66).contains(&cut.get_pixel(0, 64)[0]), "{:?}", cut.get_pixel(0, 64));
        assert!((188..=192).contains(&cut.get_pixel(127, 64)[0]), "{:?}", cut.get_pixel(127, 64));
        let mirrored = fit_picture(&picture, &fit, true).unwrap();
        assert!((0..128).all(|x| mirrored.get_pixel(x, 9) == cut.get_pixel(127 - x, 9)));
    }

    #[test]
    fn shrinking_puts_no_halo_beside_an_edge() {
        let picture = RgbImage::from_fn(900, 900, |x, _| image::Rgb([if x < 431 { 40 } else { 200 }; 3]));
        let fit = BucketRule::square(128).fit([900, 900]).unwrap();
        let cut = fit_picture(&picture, &fit, false).unwrap();
        assert!(cut.pixels().all(|pixel| (40..=200).contains(&pixel[0])));
    }

    #[test]
    fn extreme_shapes_stay_small() {
        for size in [[1, 1], [3, 4000], [16_000, 200], [16_384, 1]] {
            let fit = BucketRule::new(512).fit(size).unwrap();
            let cut = fit_picture(&RgbImage::new(size[0], size[1]), &fit, false).unwrap();
            assert_eq!(cut.dimensions(), fit.bucket.into());
        }
    }

    #[test]
    fn pixels_are_planes_in_minus_one_to_one() {
        let mut picture = RgbImage::new(2, 1);
        picture.put_pixel(1, 0, image::Rgb([255, 0, 51]));
        let tensor = to_tensor(&picture).unwrap();
        assert_eq!(tensor.size(), [3, 1, 2]);
        let values: Vec<f32> = tensor.f_view([-1]).unwrap().try_into().unwrap();
        assert_eq!(values, [-1.0, 1.0, -1.0, -1.0, -1.0, -0.6]);
    }

    #[test]
    fn a_mask_is_shrunk_to_the_mean_of_its_squares() {
        let mask = GrayImage::from_fn(128, 128, |x, y| image::Luma([if x < 4 && y < 8 { 255 } else { 0 }]));
        let fit = BucketRule::square(128).fit([128, 128]).unwrap();
        let squares = fit_mask(&mask, &fit, false).unwrap();
        assert_eq!((squares.len(), squares[0], squares[1]), (256, 0.5, 0.0));
        assert_eq!(fit_mask(&mask, &fit, true).unwrap()[15], 0.5);
    }
}
