//! Aspect buckets: which size a picture is trained at, and what is cut off to get there.
//!
//! Pictures of one batch must have one size, and a square crop of everything loses what artists put at the edges; so a
//! set of sizes of about equal area is made, and a picture goes to the one of nearest shape (NovelAI 2022; the rule here
//! is that of sd-scripts, `library/train_util.py` `BucketManager`, number for number). Sizes are `[width, height]` in pixels.
//! This file knows nothing of pixels and files.

use serde::Serialize;

/// How buckets are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct BucketRule {
    /// The area of a bucket is at most `resolution²`.
    pub resolution: u32,
    /// Shortest side of a bucket; not applied without upscaling, where the picture decides.
    pub min: u32,
    /// Longest side of a bucket; not applied without upscaling.
    pub max: u32,
    /// Sides are multiples of this: 64 as most trainers, never less than the 8 pixels of a latent.
    pub step: u32,
    /// Never enlarge: small pictures keep their size, rounded down to `step`.
    pub no_upscale: bool,
}

impl BucketRule {
    /// The customary rule for a resolution: sides from half to double of it in steps of 64, or in steps of 8 below 256.
    pub fn new(resolution: u32) -> Self {
        let step = if resolution < 256 { 8 } else { 64 };
        Self {
            resolution,
            min: (resolution / 2 / step * step).max(step),
            max: resolution.saturating_mul(2),
            step,
            no_upscale: false,
        }
    }

    /// One bucket only, a square: what a person asks for who wants no buckets.
    pub fn square(resolution: u32) -> Self {
        Self { min: resolution, max: resolution, ..Self::new(resolution) }
    }

    /// Every bucket, by width and height; empty without upscaling, where each picture makes its own.
    pub fn buckets(&self) -> Vec<[u32; 2]> {
        if self.no_upscale || self.step == 0 {
            return Vec::new();
        }
        let (area, step) = (u64::from(self.resolution).pow(2), self.step as usize);
        let square = self.resolution / self.step * self.step;
        let mut buckets = vec![[square, square]];
        for width in (self.min.max(1)..=self.max).step_by(step) {
            let rows = area / u64::from(width) / u64::from(self.step) * u64::from(self.step);
            let height = rows.min(u64::from(self.max)) as u32;
            if height >= self.min {
                buckets.extend([[width, height], [height, width]]);
            }
        }
        buckets.sort_unstable();
        buckets.dedup();
        buckets
    }

    /// The bucket of a picture, the size it is resized to, and the cut.
    ///
    /// # Errors
    /// If the picture is so narrow that no bucket is left.
    pub fn fit(&self, size: [u32; 2]) -> Result<Fit, NoBucket> {
        let none = NoBucket { size, step: self.step };
        if size.contains(&0) || self.step == 0 {
            return Err(none);
        }
        let (bucket, resized) = if self.no_upscale {
            let resized = self.shrunk(size).ok_or(none)?;
            (resized.map(|side| side / self.step * self.step), resized)
        } else {
            let bucket = nearest(&self.buckets(), size).ok_or(none)?;
            (bucket, covering(bucket, size))
        };
        if bucket.contains(&0) {
            return Err(none);
        }
        Ok(Fit {
            size,
            bucket,
            resized,
            cut: [0, 1].map(|axis| resized[axis].saturating_sub(bucket[axis]) / 2),
            crop: conditioning_crop(bucket, size),
        })
    }

    /// The size without upscaling: as it is up to `resolution²` pixels, else shrunk to that area with that side on a
    /// multiple of `step` whose rounding changes the shape less; `None` if a side vanishes.
    fn shrunk(&self, [width, height]: [u32; 2]) -> Option<[u32; 2]> {
        let area = f64::from(self.resolution).powi(2);
        if f64::from(width) * f64::from(height) <= area {
            return Some([width, height]);
        }
        let ratio = f64::from(width) / f64::from(height);
        let on_step = |side: f64| f64::from((side + 0.5) as u32 / self.step * self.step);
        let exact = (area * ratio).sqrt();
        let wide = on_step(exact);
        let by_width = [wide, on_step(wide / ratio)];
        let tall = on_step(area / exact);
        let by_height = [on_step(tall * ratio), tall];
        if by_width[1] == 0.0 || by_height[1] == 0.0 {
            return None;
        }
        let off = |side: [f64; 2]| (side[0] / side[1] - ratio).abs();
        Some(if off(by_width) < off(by_height) {
            [wide as u32, (wide / ratio + 0.5) as u32]
        } else {
            [(tall * ratio + 0.5) as u32, tall as u32]
        })
    }
}

/// Where a picture goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
pub struct Fit {
    /// The picture as it is, turned upright.
    pub size: [u32; 2],
    /// What is trained on.
    pub bucket: [u32; 2],
    /// What the picture is resized to, to cover the bucket.
    pub resized: [u32; 2],
    /// Where the bucket begins in the resized picture, `[left, top]`: the middle is kept.
    pub cut: [u32; 2],
    /// What SDXL's size conditioning is told, `[left, top]`.
    ///
    /// As sd-scripts computes it (`get_crop_ltrb`): as if the picture were fitted inside the bucket, so this is not
    /// [`cut`](Self::cut). Adapters of the community are trained with these numbers.
    pub crop: [u32; 2],
}

impl Fit {
    /// By how much the picture is enlarged, or shrunk if below 1.
    pub fn scale(&self) -> f64 {
        f64::from(self.resized[0]) / f64::from(self.size[0])
    }

    /// The share of the picture that is cut off, 0..1.
    pub fn lost(&self) -> f64 {
        let area = |[width, height]: [u32; 2]| f64::from(width) * f64::from(height);
        (1.0 - area(self.bucket) / area(self.resized)).max(0.0)
    }

    /// SDXL's six numbers: height and width of the picture, top and left of the crop, height and width of the bucket.
    pub fn time_ids(&self) -> [f32; 6] {
        let ([width, height], [left, top], [bucket_width, bucket_height]) = (self.size, self.crop, self.bucket);
        [height, width, top, left, bucket_height, bucket_width].map(|number| number as f32)
    }
}

/// A picture that fits no bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{} × {} pixels are too narrow for a bucket in steps of {step}", size[0], size[1])]
pub struct NoBucket {
    /// The picture's size.
    pub size: [u32; 2],
    /// The rule's step.
    pub step: u32,
}

/// The bucket of exactly this size, else the one whose shape is nearest; the first in order on a tie.
fn nearest(buckets: &[[u32; 2]], size: [u32; 2]) -> Option<[u32; 2]> {
    if buckets.contains(&size) {
        return Some(size);
    }
    let shape = |[width, height]: [u32; 2]| f64::from(width) / f64::from(height);
    let off = |bucket: &[u32; 2]| (shape(*bucket) - shape(size)).abs();
    buckets.iter().copied().min_by(|a, b| off(a).total_cmp(&off(b)))
}

/// The size at which a picture just covers the bucket.
fn covering(bucket: [u32; 2], size: [u32; 2]) -> [u32; 2] {
    let [width, height] = size.map(f64::from);
    let [bucket_width, bucket_height] = bucket.map(f64::from);
    let scale =
        if width / height > bucket_width / bucket_height { bucket_height / height } else { bucket_width / width };
    [width, height].map(|side| (side * scale + 0.5) as u32)
}

/// The margins left and above, if the picture were fitted inside the bucket.
fn conditioning_crop(bucket: [u32; 2], size: [u32; 2]) -> [u32; 2] {
    let [width, height] = bucket.map(f64::from);
    let shape = f64::from(size[0]) / f64::from(size[1]);
    let inside = if width / height > shape { [height * shape, height] } else { [width, width / shape] };
    [((width - inside[0]) / 2.0).floor() as u32, ((height - inside[1]) / 2.0).floor() as u32]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_picture_covers_its_bucket_and_the_middle_is_kept() {
        for size in [[1920, 1080], [500, 1700], [64, 64], [1, 1], [16_384, 3]] {
            let fit = BucketRule::new(512).fit(size).unwrap();
            for axis in [0, 1] {
                assert!(fit.resized[axis] >= fit.bucket[axis], "{fit:?}");
                let right = fit.resized[axis] - fit.bucket[axis] - fit.cut[axis];
                assert!(right - fit.cut[axis] <= 1, "{fit:?}");
            }
        }
    }

    #[test]
    fn a_square_rule_has_one_bucket() {
        assert_eq!(BucketRule::square(512).buckets(), [[512, 512]]);
        assert_eq!(BucketRule::square(128).fit([300, 200]).unwrap().bucket, [128, 128]);
    }

    #[test]
    fn small_resolutions_have_buckets_on_whole_latents() {
        let buckets = BucketRule::new(128).buckets();
        assert!(buckets.len() > 5 && buckets.iter().flatten().all(|side| side % 8 == 0), "{buckets:?}");
    }

    #[test]
    fn time_ids_are_height_before_width() {
        let fit = BucketRule::new(1024).fit([1920, 1080]).unwrap();
        assert_eq!(fit.time_ids()[..2], [1080.0, 1920.0]);
        assert_eq!(fit.time_ids()[4..], [fit.bucket[1] as f32, fit.bucket[0] as f32]);
    }
}
