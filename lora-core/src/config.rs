//! What a person may set about an adapter, and what will run.

use std::num::NonZeroUsize;

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// The family that is trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// `ΔW = alpha/rank · B·A` (Hu et al. 2021, arXiv 2106.09685).
    #[default]
    Lora,
    /// `ΔW = alpha/√rank · B·A` (Kalajdzievski 2023, arXiv 2312.03732).
    RsLora,
    /// Magnitude and direction apart (Liu et al. 2024, arXiv 2402.09353).
    Dora,
    /// Hadamard product of two low-rank products (Hyeon-Woo et al. 2021, arXiv 2108.06098).
    Loha,
    /// Kronecker product (Yeh et al. 2023, arXiv 2309.14859).
    Lokr,
}

/// How the factors start. `ΔW` is zero in all of them, or made so by taking it out of the base weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Init {
    /// `A` uniform in ±1/√fan-in, `B` zero: what kohya, peft and LyCORIS do.
    #[default]
    Kaiming,
    /// `A` normal with deviation 1/rank, `B` zero: peft's and diffusers' `gaussian`.
    Gaussian,
    /// The leading singular triplets of the base weight (Meng et al. 2024, arXiv 2404.02948, eq. 2–4).
    Pissa,
    /// QR of the base weight (Büyükakyüz 2024, arXiv 2406.01775).
    Olora,
}

/// How `alpha` and the rank make the scale; the one place where they meet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ScaleRule {
    /// `alpha / rank`.
    #[default]
    Rank,
    /// `alpha / √rank` (rsLoRA, Kalajdzievski 2023, arXiv 2312.03732, theorem 3.2).
    RankRoot,
}

impl ScaleRule {
    /// What multiplies the product of the factors.
    pub fn scale(self, alpha: f64, rank: usize) -> f64 {
        match self {
            Self::Rank => alpha / rank as f64,
            Self::RankRoot => alpha / (rank as f64).sqrt(),
        }
    }
}

/// What will run: a checked set of adapter settings.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterConfig {
    /// The family.
    pub method: Method,
    /// Width of the update.
    pub rank: NonZeroUsize,
    /// Numerator of the scale.
    pub alpha: f64,
    /// How the factors start.
    pub init: Init,
    /// LoKr: the wanted size of the first factor; `None` takes the split nearest to a square, as LyCORIS' `factor = -1`.
    pub factor: Option<NonZeroUsize>,
}

impl AdapterConfig {
    /// A checked configuration.
    ///
    /// # Errors
    /// If `alpha` is not finite.
    pub fn new(method: Method, rank: NonZeroUsize, alpha: f64) -> Result<Self> {
        if !alpha.is_finite() {
            return Err(Error::Config { option: "alpha", reason: format!("{alpha} is not a finite number") });
        }
        Ok(Self { method, rank, alpha, init: Init::default(), factor: None })
    }

    /// What multiplies the product of the factors, for a factor pair of the configured rank.
    pub fn scale(&self) -> f64 {
        let rule = if self.method == Method::RsLora { ScaleRule::RankRoot } else { ScaleRule::Rank };
        rule.scale(self.alpha, self.rank.get())
    }
}
