//! Counter-based randomness: a number is a function of (seed, purpose, step, sample, index), never of what was drawn before.
//!
//! Philox 4×32 with 10 rounds (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", §3.3). There is no
//! generator state: a resumed run draws what the uninterrupted run would have drawn, and every device sees the same noise.

const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

/// Ten rounds over one 128-bit counter under a 64-bit key.
fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let low = u64::from(MULTIPLIERS[0]) * u64::from(counter[0]);
        let high = u64::from(MULTIPLIERS[1]) * u64::from(counter[2]);
        counter = [
            (high >> 32) as u32 ^ counter[1] ^ key[0],
            high as u32,
            (low >> 32) as u32 ^ counter[3] ^ key[1],
            low as u32,
        ];
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    counter
}

/// What a draw is for; streams of different purposes are independent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Purpose {
    /// First values of an adapter's factors; the sample is the module.
    Init = 1,
    /// Order of the examples in an epoch.
    Order = 2,
    /// Noise added to a latent.
    Noise = 3,
    /// Diffusion timestep.
    Timestep = 4,
    /// Sample of a VAE posterior.
    Posterior = 5,
    /// Whether a caption is dropped.
    CaptionDropout = 6,
    /// Whether a picture is mirrored, and other augmentations.
    Augment = 7,
    /// Noise offset.
    NoiseOffset = 8,
    /// Order of tags in a caption.
    CaptionShuffle = 9,
    /// First latent of a generated picture, and noise that a sampler adds.
    Sample = 10,
    /// Choice of the next token.
    Token = 11,
    /// Start vectors of a randomised decomposition.
    Sketch = 12,
    /// Dropout inside an adapter.
    Dropout = 13,
}

/// One stream of random numbers, read from its beginning.
#[derive(Debug, Clone)]
pub struct Draw {
    key: [u32; 2],
    /// Block index, then (sample, step low, step high and purpose).
    counter: [u32; 4],
    block: [u32; 4],
    used: usize,
}

impl Draw {
    /// The stream of a `seed` for a `purpose`, a `step` (below 2⁴⁸) and a `sample`.
    pub fn new(seed: u64, purpose: Purpose, step: u64, sample: u32) -> Self {
        let high = ((step >> 32) as u32 & 0xFFFF) | (u32::from(purpose as u16) << 16);
        Self {
            key: [seed as u32, (seed >> 32) as u32],
            counter: [0, sample, step as u32, high],
            block: [0; 4],
            used: 4,
        }
    }

    /// The next 32 random bits.
    pub fn bits(&mut self) -> u32 {
        if self.used == 4 {
            self.block = philox(self.counter, self.key);
            self.counter[0] = self.counter[0].wrapping_add(1);
            self.used = 0;
        }
        self.used += 1;
        self.block[self.used - 1]
    }

    /// Uniform in `0..1`, 24 bits.
    pub fn unit(&mut self) -> f32 {
        (self.bits() >> 8) as f32 * (1.0 / 16_777_216.0)
    }

    /// A whole number in `0..n`, without bias (Lemire 2019, "Fast random integer generation in an interval").
    ///
    /// # Panics
    /// If `n` is 0.
    pub fn below(&mut self, n: u32) -> u32 {
        assert!(n > 0, "a number below 0 does not exist");
        let threshold = n.wrapping_neg() % n;
        loop {
            let product = u64::from(self.bits()) * u64::from(n);
            if product as u32 >= threshold {
                return (product >> 32) as u32;
            }
        }
    }

    /// `count` numbers, uniform in `-bound..bound`.
    pub fn uniform(&mut self, count: usize, bound: f64) -> Vec<f32> {
        (0..count).map(|_| ((2.0 * f64::from(self.unit()) - 1.0) * bound) as f32).collect()
    }

    /// `count` normal numbers of mean 0 and the given deviation (Box and Muller 1958).
    pub fn normal(&mut self, count: usize, deviation: f64) -> Vec<f32> {
        let mut values = Vec::with_capacity(count + 1);
        while values.len() < count {
            let radius = (-2.0 * (1.0 - f64::from(self.unit())).ln()).sqrt() * deviation;
            let (sine, cosine) = (std::f64::consts::TAU * f64::from(self.unit())).sin_cos();
            values.push((radius * cosine) as f32);
            values.push((radius * sine) as f32);
        }
        values.truncate(count);
        values
    }

    /// The numbers `0..n` in random order (Fisher and Yates).
    pub fn permutation(&mut self, n: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..n).collect();
        for last in (1..n).rev() {
            order.swap(last, self.below(last as u32 + 1) as usize);
        }
        order
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known answers of the authors' Random123 distribution (`kat_vectors`, philox4x32 with 10 rounds).
    #[test]
    fn philox_gives_the_published_answers() {
        assert_eq!(philox([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox([u32::MAX; 4], [u32::MAX; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        assert_eq!(
            philox([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn streams_of_other_purposes_steps_and_samples_differ() {
        let first = |purpose, step, sample| Draw::new(7, purpose, step, sample).bits();
        let all = [
            first(Purpose::Noise, 0, 0),
            first(Purpose::Timestep, 0, 0),
            first(Purpose::Noise, 1, 0),
            first(Purpose::Noise, 1 << 40, 0),
            first(Purpose::Noise, 0, 1),
        ];
        for (i, a) in all.iter().enumerate() {
            assert!(all[i + 1..].iter().all(|b| a != b));
        }
    }

    #[test]
    fn normal_numbers_have_the_asked_moments() {
        let values = Draw::new(1, Purpose::Noise, 3, 4).normal(200_001, 2.0);
        let mean = values.iter().map(|v| f64::from(*v)).sum::<f64>() / values.len() as f64;
        let variance = values.iter().map(|v| (f64::from(*v) - mean).powi(2)).sum::<f64>() / values.len() as f64;
        assert!(mean.abs() < 0.02 && (variance - 4.0).abs() < 0.05, "mean {mean}, variance {variance}");
    }

    #[test]
    fn a_permutation_holds_every_number_once() {
        let mut order = Draw::new(5, Purpose::Order, 0, 0).permutation(1000);
        assert!(order.windows(2).any(|pair| pair[0] > pair[1]));
        order.sort_unstable();
        assert!(order.iter().copied().eq(0..1000));
    }
}
