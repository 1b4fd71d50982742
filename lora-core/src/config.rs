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

/// What a person may set about an adapter, by flag or in a file; `None` means "not said".
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct LoraOptions {
    /// Family of the adapter [default: lora]
    pub method: Option<Method>,
    /// Width of the update: more rank, more capacity and a larger file [default: 16]
    pub rank: Option<NonZeroUsize>,
    /// Numerator of the scale `alpha / rank` [default: the rank, so that the scale is 1]
    pub alpha: Option<f64>,
    /// How the factors start [default: kaiming]
    pub init: Option<Init>,
    /// LoKr: wanted size of the first factor [default: the split nearest to a square]
    pub factor: Option<NonZeroUsize>,
}

impl LoraOptions {
    /// `self` where it speaks, `lower` where it is silent: flags over file.
    #[must_use]
    pub fn or(self, lower: Self) -> Self {
        let Self { method, rank, alpha, init, factor } = self; // a new field does not compile until it is handled here
        Self {
            method: method.or(lower.method),
            rank: rank.or(lower.rank),
            alpha: alpha.or(lower.alpha),
            init: init.or(lower.init),
            factor: factor.or(lower.factor),
        }
    }

    /// Fills in the defaults.
    ///
    /// # Errors
    /// If the settings do not go together, see [`AdapterConfig::checked`].
    pub fn resolve(self) -> Result<AdapterConfig> {
        let rank = self.rank.unwrap_or(DEFAULT_RANK);
        AdapterConfig {
            method: self.method.unwrap_or_default(),
            rank,
            alpha: self.alpha.unwrap_or(rank.get() as f64),
            init: self.init.unwrap_or_default(),
            factor: self.factor,
        }
        .checked()
    }
}

const DEFAULT_RANK: NonZeroUsize = NonZeroUsize::new(16).expect("16 is not 0");

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
    /// A checked configuration with the default start.
    ///
    /// # Errors
    /// If `alpha` is not finite.
    pub fn new(method: Method, rank: NonZeroUsize, alpha: f64) -> Result<Self> {
        Self { method, rank, alpha, init: Init::default(), factor: None }.checked()
    }

    /// The same configuration, if it is one that an adapter can have.
    ///
    /// # Errors
    /// If `alpha` is not finite, a start other than the default is wanted for LoHa or LoKr (which have one of their
    /// own), or a size of the first factor is wanted for another family than LoKr.
    pub fn checked(self) -> Result<Self> {
        let refuse = |option, reason| Err(Error::Config { option, reason });
        if !self.alpha.is_finite() {
            return refuse("alpha", format!("{} is not a finite number", self.alpha));
        }
        if self.init != Init::default() && matches!(self.method, Method::Loha | Method::Lokr) {
            return refuse("init", format!("{:?} is a start for LoRA, not for {:?}", self.init, self.method));
        }
        if self.factor.is_some() && self.method != Method::Lokr {
            return refuse("factor", format!("it splits a LoKr, and the method is {:?}", self.method));
        }
        Ok(self)
    }

    /// What multiplies the product of the factors, for a factor pair of the configured rank.
    pub fn scale(&self) -> f64 {
        let rule = if self.method == Method::RsLora { ScaleRule::RankRoot } else { ScaleRule::Rank };
        rule.scale(self.alpha, self.rank.get())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alpha_defaults_to_rank() {
        let rank = NonZeroUsize::new(6);
        let config = LoraOptions { rank, ..LoraOptions::default() }.resolve().unwrap();
        assert_eq!((config.alpha, config.scale()), (6.0, 1.0));
    }

    #[test]
    fn the_scale_divides_by_the_rank_or_by_its_root() {
        let rank = NonZeroUsize::new(16).unwrap();
        assert_eq!(AdapterConfig::new(Method::Lora, rank, 8.0).unwrap().scale(), 0.5);
        assert_eq!(AdapterConfig::new(Method::RsLora, rank, 8.0).unwrap().scale(), 2.0);
    }

    #[test]
    fn flags_win_over_the_file_field_by_field() {
        let flags = LoraOptions { alpha: Some(3.0), ..LoraOptions::default() };
        let file = LoraOptions { alpha: Some(1.0), method: Some(Method::Dora), ..LoraOptions::default() };
        let both = flags.or(file);
        assert_eq!((both.alpha, both.method, both.rank), (Some(3.0), Some(Method::Dora), None));
    }

    #[test]
    fn files_are_kebab_case_and_unknown_keys_are_errors() {
        let options: LoraOptions = serde_json::from_str(r#"{"method": "rslora", "rank": 4}"#).unwrap();
        assert_eq!((options.method, options.rank), (Some(Method::RsLora), NonZeroUsize::new(4)));
        assert!(serde_json::from_str::<LoraOptions>(r#"{"ranks": 4}"#).is_err());
        assert!(serde_json::from_str::<LoraOptions>(r#"{"rank": 0}"#).is_err());
    }

    #[test]
    fn settings_of_other_families_are_refused() {
        let refused = |options: LoraOptions| match options.resolve() {
            Err(Error::Config { option, .. }) => option,
            other => panic!("{other:?}"),
        };
        let loha = LoraOptions { method: Some(Method::Loha), ..LoraOptions::default() };
        assert_eq!(refused(LoraOptions { init: Some(Init::Pissa), ..loha.clone() }), "init");
        assert_eq!(refused(LoraOptions { factor: NonZeroUsize::new(4), ..loha.clone() }), "factor");
        assert_eq!(refused(LoraOptions { alpha: Some(f64::NAN), ..loha }), "alpha");
    }
}
