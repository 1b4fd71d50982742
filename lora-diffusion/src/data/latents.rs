//! The latents of all pictures, from the cache or from the VAE.
//!
//! What is kept is the posterior, mean and log variance, not a sample of it: sd-scripts and diffusers train on a sample,
//! and drawing it anew at every step, by counter, is both closer to that than one frozen draw and just as repeatable.

use std::fs;

use rayon::prelude::*;
use sha2::{Digest, Sha256};
use tch::{Kind, Tensor};

use super::{
    Dataset, Error, Picture, Result, Skipped,
    cache::{Cache, Entry, Key},
    dataset::ContentHash,
    decode::{Alpha, decode},
    pixels::{fit_mask, fit_picture, to_tensor},
};
use crate::vae::Posterior;

/// Pictures that are decoded at the same time, to be ready when the VAE is.
const AHEAD: usize = 8;

/// One picture as the UNet will see it, on the host in 32 bits.
#[derive(Debug)]
pub struct Latent {
    /// Mean of the posterior, `[4, h, w]`, unscaled.
    pub mean: Tensor,
    /// Logarithm of its variance, `[4, h, w]`.
    pub log_variance: Tensor,
    /// Where the loss counts, `[1, h, w]` in 0..1; `None` is everywhere.
    pub mask: Option<Tensor>,
}

/// The latents of a dataset, in the order of its pictures.
#[derive(Debug)]
pub struct Latents {
    /// As the pictures are.
    pub plain: Vec<Latent>,
    /// Mirrored left to right, if that was asked for.
    pub mirrored: Option<Vec<Latent>>,
    /// Entries that came from the cache.
    pub cached: usize,
    /// Entries that were computed.
    pub computed: usize,
}

/// What latents depend on beside the picture.
#[derive(Debug, Clone, Copy)]
pub struct LatentOptions {
    /// What happens to transparent parts; as at the scan.
    pub alpha: Alpha,
    /// Whether mirrored latents are wanted too.
    pub flip: bool,
    /// Hash of the VAE's weights.
    pub vae: ContentHash,
    /// What the VAE computes in.
    pub kind: Kind,
}

/// Makes the latents of all pictures; `encode` takes pixels `[1, 3, height, width]` in −1..1 on the host.
///
/// A picture that has vanished or changed since the scan, and is not in the cache, moves from the used to the skipped
/// ones of the dataset. `progress` hears of latents done and of all.
///
/// # Errors
/// If the VAE fails or gives numbers that are not finite, or no picture is left.
pub fn latents(
    dataset: &mut Dataset,
    cache: Option<&Cache>,
    options: LatentOptions,
    encode: &mut dyn FnMut(&Tensor) -> crate::Result<Posterior>,
    progress: &mut dyn FnMut(usize, usize),
) -> crate::Result<Latents> {
    let mut made = Latents { plain: vec![], mirrored: options.flip.then(Vec::new), cached: 0, computed: 0 };
    let total = dataset.pictures.len() * if options.flip { 2 } else { 1 };
    let mut used = Vec::with_capacity(dataset.pictures.len());
    for group in dataset.pictures.chunks(AHEAD) {
        let ready: Vec<Result<Vec<Ready>>> =
            group.par_iter().map(|picture| variants(picture, cache, options)).collect();
        for (picture, ready) in group.iter().zip(ready) {
            let ready = match ready {
                Ok(ready) => ready,
                Err(error) => {
                    let reason = error.to_string();
                    dataset.skipped.push(Skipped { path: picture.name.clone(), reason, bad: true });
                    continue;
                }
            };
            for (variant, ready) in ready.into_iter().enumerate() {
                let latent = match ready {
                    Ready::Cached(latent) => {
                        made.cached += 1;
                        latent
                    }
                    Ready::Pixels { key, pixels, mask } => {
                        made.computed += 1;
                        let latent = encoded(picture, &pixels, mask, encode)?;
                        // A cache that cannot be written costs time next time, nothing else.
                        let _ = cache.map(|cache| store(cache, key, &latent));
                        latent
                    }
                };
                match (variant, &mut made.mirrored) {
                    (1, Some(mirrored)) => mirrored.push(latent),
                    _ => made.plain.push(latent),
                }
                progress(made.cached + made.computed, total);
            }
            used.push(picture.clone());
        }
    }
    if used.is_empty() {
        let found = "all of them have vanished or changed since they were looked at".to_owned();
        return Err(Error::NoPictures { path: dataset.root.clone(), found, all_bad: true }.into());
    }
    dataset.pictures = used;
    Ok(made)
}

enum Ready {
    Cached(Latent),
    Pixels { key: Key, pixels: Tensor, mask: Option<Tensor> },
}

/// The picture, and mirrored if wanted: from the cache, or as pixels.
fn variants(picture: &Picture, cache: Option<&Cache>, options: LatentOptions) -> Result<Vec<Ready>> {
    let mask_file = match &picture.mask {
        None => None,
        Some(path) => Some(fs::read(path).map_err(|source| Error::Read { path: path.clone(), source })?),
    };
    let mut decoded = None;
    let flips: &[bool] = if options.flip { &[false, true] } else { &[false] };
    let mut ready = Vec::with_capacity(flips.len());
    for flip in flips {
        let key = key(picture, *flip, mask_file.as_deref(), options);
        if let Some(latent) = cache.and_then(|cache| load(cache, key, picture)) {
            ready.push(Ready::Cached(latent));
            continue;
        }
        let picture_now = match &decoded {
            Some(decoded) => decoded,
            None => decoded.insert(read(picture, options.alpha)?),
        };
        let pixels = to_tensor(&fit_picture(&picture_now.pixels, &picture.fit, *flip)?)?;
        let mask = match (&mask_file, &picture_now.opacity) {
            (Some(bytes), _) => {
                let path = picture.mask.clone().unwrap_or_default();
                let mask = decode(bytes, Alpha::Black).map_err(|source| Error::Picture { path, source })?;
                Some(image::DynamicImage::ImageRgb8(mask.pixels).into_luma8())
            }
            (None, Some(opacity)) if picture.masked_by_alpha => Some(opacity.clone()),
            _ => None,
        };
        let [width, height] = picture.fit.bucket.map(|side| i64::from(side / super::pixels::LATENT));
        let mask = match mask {
            None => None,
            Some(mask) => {
                let values = fit_mask(&mask, &picture.fit, *flip)?;
                Some(Tensor::f_from_slice(&values)?.f_view([1, height, width])?)
            }
        };
        ready.push(Ready::Pixels { key, pixels: pixels.f_unsqueeze(0)?, mask });
    }
    Ok(ready)
}

fn read(picture: &Picture, alpha: Alpha) -> Result<super::decode::Decoded> {
    let path = || picture.path.clone();
    let bytes = fs::read(&picture.path).map_err(|source| Error::Read { path: path(), source })?;
    if Sha256::digest(&bytes)[..] != picture.hash {
        let reason = "the picture has changed since it was looked at".to_owned();
        return Err(Error::Changed { path: path(), reason });
    }
    decode(&bytes, alpha).map_err(|source| Error::Picture { path: path(), source })
}

fn key(picture: &Picture, flip: bool, mask: Option<&[u8]>, options: LatentOptions) -> Key {
    let fit = &picture.fit;
    let place = format!("{:?} {:?} {:?} {:?} {flip}", fit.size, fit.bucket, fit.resized, fit.cut);
    let alpha = format!("{:?} {}", options.alpha, picture.masked_by_alpha);
    let kind = format!("{:?}", options.kind);
    let mask = mask.map(|bytes| Sha256::digest(bytes).to_vec()).unwrap_or_default();
    Key::of(&[&picture.hash, place.as_bytes(), alpha.as_bytes(), &mask, &options.vae, kind.as_bytes()])
}

fn encoded(
    picture: &Picture,
    pixels: &Tensor,
    mask: Option<Tensor>,
    encode: &mut dyn FnMut(&Tensor) -> crate::Result<Posterior>,
) -> crate::Result<Latent> {
    let posterior = tch::no_grad(|| encode(pixels))?;
    let host = |tensor: &Tensor| -> crate::Result<Tensor> {
        let tensor = tensor.f_squeeze_dim(0)?.f_to_kind(Kind::Float)?.f_to_device(tch::Device::Cpu)?;
        let finite = tensor.f_isfinite()?.f_all()?.f_int64_value(&[])? == 1;
        if finite { Ok(tensor) } else { Err(Error::NotFinite { what: picture.name.clone(), model: "VAE" }.into()) }
    };
    Ok(Latent { mean: host(&posterior.mean)?, log_variance: host(&posterior.log_variance)?, mask })
}

fn store(cache: &Cache, key: Key, latent: &Latent) -> Result<()> {
    let mut tensors = vec![("mean", &latent.mean), ("log_variance", &latent.log_variance)];
    tensors.extend(latent.mask.as_ref().map(|mask| ("mask", mask)));
    cache.put(Entry::Latents, key, &tensors)
}

fn load(cache: &Cache, key: Key, picture: &Picture) -> Option<Latent> {
    let mut tensors = cache.get(Entry::Latents, key)?;
    let (mean, log_variance) = (tensors.remove("mean")?, tensors.remove("log_variance")?);
    let [width, height] = picture.fit.bucket.map(|side| i64::from(side / super::pixels::LATENT));
    let fits = mean.size().get(1..) == Some(&[height, width]) && mean.size() == log_variance.size();
    fits.then(|| Latent { mean, log_variance, mask: tensors.remove("mask") })
}
