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
/// Bytes of latents that are held in memory; those of 30,000 pictures of 512 pixels. What is beyond is read from the cache
/// when it is its turn.
const IN_MEMORY: usize = 4 << 30;

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
    plain: Vec<Kept>,
    mirrored: Option<Vec<Kept>>,
    cache: Option<Cache>,
    /// Entries that came from the cache.
    pub cached: usize,
    /// Entries that were computed.
    pub computed: usize,
    /// Whether any picture has a mask.
    pub masked: bool,
}

#[derive(Debug)]
enum Kept {
    Here(Latent),
    InCache(Key),
}

impl Latents {
    /// Number of pictures.
    pub fn len(&self) -> usize {
        self.plain.len()
    }

    /// Whether there is no picture.
    pub fn is_empty(&self) -> bool {
        self.plain.is_empty()
    }

    /// Whether there are mirror images, too.
    pub fn has_mirrored(&self) -> bool {
        self.mirrored.is_some()
    }

    /// The latent of a picture, or of its mirror image.
    ///
    /// # Errors
    /// If there is none, or it was in the cache and is not any more.
    pub fn get(&self, picture: usize, mirrored: bool) -> Result<Latent> {
        let list = if mirrored { self.mirrored.as_ref() } else { Some(&self.plain) };
        let found = match list.and_then(|list| list.get(picture)) {
            Some(Kept::Here(latent)) => Some(latent.share()),
            Some(Kept::InCache(key)) => self.cache.as_ref().and_then(|cache| load(cache, *key)),
            None => None,
        };
        let reason = || format!("the latent of picture {picture} is not there any more");
        found.ok_or_else(|| Error::Option { option: "cache", reason: reason() })
    }
}

impl Latent {
    /// A second handle on the same numbers.
    fn share(&self) -> Self {
        Self {
            mean: self.mean.shallow_clone(),
            log_variance: self.log_variance.shallow_clone(),
            mask: self.mask.as_ref().map(Tensor::shallow_clone),
        }
    }

    /// Bytes in memory.
    fn bytes(&self) -> usize {
        let mask = self.mask.as_ref().map_or(0, Tensor::numel);
        4 * (self.mean.numel() + self.log_variance.numel() + mask)
    }
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
    latents_within(IN_MEMORY, dataset, cache, options, encode, progress)
}

fn latents_within(
    limit: usize,
    dataset: &mut Dataset,
    cache: Option<&Cache>,
    options: LatentOptions,
    encode: &mut dyn FnMut(&Tensor) -> crate::Result<Posterior>,
    progress: &mut dyn FnMut(usize, usize),
) -> crate::Result<Latents> {
    let mut made = Latents {
        plain: vec![],
        mirrored: options.flip.then(Vec::new),
        cache: cache.cloned(),
        cached: 0,
        computed: 0,
        masked: false,
    };
    let mut bytes = 0;
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
                let (latent, stored) = match ready {
                    Ready::Cached { key, latent } => {
                        made.cached += 1;
                        (latent, Some(key))
                    }
                    Ready::Pixels { key, pixels, mask } => {
                        made.computed += 1;
                        let latent = encoded(picture, &pixels, mask, encode)?;
                        // A cache that cannot be written costs time next time, nothing else.
                        let stored = cache.is_some_and(|cache| store(cache, key, &latent).is_ok());
                        (latent, stored.then_some(key))
                    }
                };
                made.masked |= latent.mask.is_some();
                bytes += latent.bytes();
                let kept = match stored {
                    Some(key) if bytes > limit => Kept::InCache(key),
                    _ => Kept::Here(latent),
                };
                match (variant, &mut made.mirrored) {
                    (1, Some(mirrored)) => mirrored.push(kept),
                    _ => made.plain.push(kept),
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
    Cached { key: Key, latent: Latent },
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
        if let Some(latent) = cache.and_then(|cache| load(cache, key)) {
            ready.push(Ready::Cached { key, latent });
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

/// The key holds the size, so that what reads back is of the right one.
fn load(cache: &Cache, key: Key) -> Option<Latent> {
    let mut tensors = cache.get(Entry::Latents, key)?;
    let (mean, log_variance) = (tensors.remove("mean")?, tensors.remove("log_variance")?);
    Some(Latent { mean, log_variance, mask: tensors.remove("mask") })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::ScanOptions;

    #[test]
    fn what_does_not_fit_into_memory_is_read_from_the_cache() {
        let folder = tempfile::tempdir().unwrap();
        for number in 0..4u8 {
            let picture = image::RgbImage::from_pixel(64, 64, image::Rgb([number, 10, 20]));
            picture.save(folder.path().join(format!("{number}.png"))).unwrap();
        }
        let mut options = ScanOptions::new(64);
        options.trigger = Some("x".into());
        let mut dataset = Dataset::scan(folder.path(), &options, &|_, _| {}).unwrap();
        let cache = Cache::at(folder.path().join(".cache"));
        let options = LatentOptions { alpha: Alpha::White, flip: true, vae: [0; 32], kind: Kind::Float };
        let mut encode = |pixels: &Tensor| {
            let mean = pixels.f_narrow(2, 0, 8)?.f_narrow(3, 0, 8)?;
            Ok(Posterior { log_variance: mean.f_neg()?, mean })
        };
        let mut run = |limit, cache| latents_within(limit, &mut dataset, cache, options, &mut encode, &mut |_, _| {});
        let (all, few) = (run(IN_MEMORY, Some(&cache)).unwrap(), run(3000, Some(&cache)).unwrap());
        let here = |latents: &Latents| latents.plain.iter().filter(|kept| matches!(kept, Kept::Here(_))).count();
        assert_eq!((here(&all), here(&few)), (4, 1));
        for (picture, mirrored) in (0..4).flat_map(|picture| [(picture, false), (picture, true)]) {
            let (a, b) = (all.get(picture, mirrored).unwrap(), few.get(picture, mirrored).unwrap());
            assert!(a.mean == b.mean && a.log_variance == b.log_variance);
        }
        assert!(few.get(4, false).is_err());
        let none = run(3000, None).unwrap();
        assert_eq!(here(&none), 4, "without a cache all are held");
        fs::remove_dir_all(folder.path().join(".cache")).unwrap();
        assert!(few.get(3, false).unwrap_err().to_string().contains("not there any more"));
    }
}
