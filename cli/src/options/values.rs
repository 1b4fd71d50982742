//! The types of single option values: what a person may write for each, and how it is read and shown.
//!
//! Every type reads the same words from a flag, a variable and a configuration file.

use std::{fmt, str::FromStr};

use clap::ValueEnum;
use serde::{Deserialize, Serialize, de::DeserializeOwned, de::IntoDeserializer};

pub use super::lora_file::{LoraFile, Strength};

/// Where the arithmetic runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Device {
    /// The first GPU where there is one, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// The GPU of this number.
    Cuda(usize),
}

impl FromStr for Device {
    type Err = String;

    fn from_str(word: &str) -> Result<Self, String> {
        match word {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(0)),
            _ => word
                .strip_prefix("cuda:")
                .and_then(|number| number.parse().ok())
                .map(Self::Cuda)
                .ok_or_else(|| format!("`{word}` is not `auto`, `cpu`, `cuda` or `cuda:N`")),
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(number) => write!(f, "cuda:{number}"),
        }
    }
}

/// The precision of the frozen base; the adapter itself is always trained in fp32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// bf16 on a GPU, fp32 on the CPU.
    #[default]
    Auto,
    /// bfloat16.
    Bf16,
    /// IEEE half precision.
    Fp16,
    /// IEEE single precision.
    Fp32,
}

/// How the frozen base lies in memory (Dettmers et al. 2023, arXiv 2305.14314).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Quantize {
    /// As `--dtype` says, or in 4 bits if that is how the base is stored.
    #[default]
    None,
    /// Linear layers in 4 bits (NF4), with a 32-bit factor for 64 weights.
    Nf4,
    /// The same with the factors in 8 bits: "double quantisation".
    Nf4Double,
}

/// Over how many steps the learning rate rises to its value.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "NumberOrWord", into = "NumberOrWord")]
pub enum Warmup {
    /// A number of steps.
    Steps(u64),
    /// A share of all steps, 0..=1, written in percent: `5%`.
    Share(f64),
}

impl Warmup {
    /// The number of steps in a run of `total`.
    pub fn steps(self, total: u64) -> u64 {
        match self {
            Self::Steps(steps) => steps,
            Self::Share(share) => (share * total as f64).round() as u64,
        }
    }
}

impl FromStr for Warmup {
    type Err = String;

    fn from_str(word: &str) -> Result<Self, String> {
        let steps = || word.parse().ok().map(Self::Steps);
        let share = || {
            let percent: f64 = word.strip_suffix('%')?.trim_end().parse().ok()?;
            (0.0..=100.0).contains(&percent).then_some(Self::Share(percent / 100.0))
        };
        steps().or_else(share).ok_or_else(|| format!("`{word}` is neither a number of steps nor a share such as `5%`"))
    }
}

impl fmt::Display for Warmup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Steps(steps) => write!(f, "{steps}"),
            // Twelve decimals hide that 0.07 · 100 is not quite 7; trailing zeros go.
            Self::Share(share) => {
                let percent = format!("{:.12}", share * 100.0);
                write!(f, "{}%", percent.trim_end_matches('0').trim_end_matches('.'))
            }
        }
    }
}

/// A value that a file may hold as a number or as a word.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum NumberOrWord {
    Number(u64),
    Word(String),
}

impl TryFrom<NumberOrWord> for Warmup {
    type Error = String;

    fn try_from(value: NumberOrWord) -> Result<Self, String> {
        match value {
            NumberOrWord::Number(steps) => Ok(Self::Steps(steps)),
            NumberOrWord::Word(word) => word.parse(),
        }
    }
}

impl From<Warmup> for NumberOrWord {
    fn from(warmup: Warmup) -> Self {
        match warmup {
            Warmup::Steps(steps) => Self::Number(steps),
            Warmup::Share(_) => Self::Word(warmup.to_string()),
        }
    }
}

/// The rule that turns gradients into updates.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Optimizer {
    /// Adam with decoupled weight decay (Loshchilov & Hutter 2017, arXiv 1711.05101).
    #[default]
    Adamw,
    /// Sign of the momentum (Chen et al. 2023, arXiv 2302.06675); wants a 3 to 10 times smaller rate.
    Lion,
    /// Adam with factored second moments (Shazeer & Stern 2018, arXiv 1804.04235).
    Adafactor,
    /// Finds its own rate (Mishchenko & Defazio 2023, arXiv 2306.06101); wants `--lr 1`.
    Prodigy,
    /// Plain gradient descent with momentum.
    Sgd,
}

/// How the learning rate moves after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Schedule {
    /// Stays.
    Constant,
    /// Falls to zero in a straight line.
    Linear,
    /// Falls to zero along half a cosine.
    #[default]
    Cosine,
    /// A cosine that starts anew `--cycles` times.
    CosineRestarts,
    /// Falls to zero along a parabola (`--power` sets another exponent).
    Polynomial,
}

/// What the network predicts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Prediction {
    /// What the base's own scheduler configuration says.
    #[default]
    Auto,
    /// The noise.
    Epsilon,
    /// The velocity (Salimans & Ho 2022, arXiv 2202.00512, appendix D).
    V,
}

/// Where the weights of the masked loss come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mask {
    /// No mask: every pixel counts.
    #[default]
    None,
    /// The picture's transparency.
    Alpha,
    /// A grey picture `NAME.mask.png` beside each picture.
    File,
}

/// What of a conversation counts in the loss.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TrainOn {
    /// What the assistant says, or what completes a prompt.
    #[default]
    Completions,
    /// Everything.
    All,
}

/// What happens to a text with too many tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnLong {
    /// Its end is cut off.
    #[default]
    Truncate,
    /// It is left out.
    Drop,
    /// It becomes several examples.
    Split,
}

/// What happens to a row that cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnBad {
    /// It ends the command with an error that names it.
    #[default]
    Stop,
    /// It is listed, and the others are used.
    Skip,
}

/// The layout of a saved adapter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// `lora_unet_…` keys with alphas: what ComfyUI, A1111 and kohya's own tools read; diffusers reads it too.
    #[default]
    Kohya,
    /// `unet.….lora_A.weight`: what diffusers writes today.
    Diffusers,
    /// A folder with `adapter_model.safetensors` and `adapter_config.json`.
    Peft,
}

/// How a picture is drawn from noise.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum, Serialize, Deserialize)]
pub enum Sampler {
    /// Song et al. 2020, arXiv 2010.02502.
    #[default]
    #[value(name = "ddim")]
    #[serde(rename = "ddim")]
    Ddim,
    /// Karras et al. 2022, arXiv 2206.00364, algorithm 2 without its second order.
    #[value(name = "euler")]
    #[serde(rename = "euler")]
    Euler,
    /// Euler with fresh noise in every step.
    #[value(name = "euler-a", alias = "euler-ancestral")]
    #[serde(rename = "euler-a", alias = "euler-ancestral")]
    EulerAncestral,
    /// Lu et al. 2022, arXiv 2211.01095, second order, multistep.
    #[value(name = "dpm++2m", alias = "dpmpp-2m")]
    #[serde(rename = "dpm++2m", alias = "dpmpp-2m")]
    DpmPlusPlus2m,
    /// The same on the noise levels of Karras et al. 2022, eq. 5.
    #[value(name = "dpm++2m-karras", alias = "dpmpp-2m-karras")]
    #[serde(rename = "dpm++2m-karras", alias = "dpmpp-2m-karras")]
    DpmPlusPlus2mKarras,
}

/// Width and height of a picture in pixels: `512` or `512x768`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "NumberOrWord", into = "NumberOrWord")]
pub struct Size {
    /// Pixels from left to right.
    pub width: u32,
    /// Pixels from top to bottom.
    pub height: u32,
}

impl FromStr for Size {
    type Err = String;

    fn from_str(word: &str) -> Result<Self, String> {
        let (width, height) = word.split_once(['x', '×']).unwrap_or((word, word));
        let side = |text: &str| text.trim().parse::<u32>().ok().filter(|side| (8..=16384).contains(side));
        match (side(width), side(height)) {
            (Some(width), Some(height)) => Ok(Self { width, height }),
            _ => Err(format!("`{word}` is not a size such as `512` or `512x768` (sides of 8 to 16384)")),
        }
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}x{}", self.width, self.height)
    }
}

impl TryFrom<NumberOrWord> for Size {
    type Error = String;

    fn try_from(value: NumberOrWord) -> Result<Self, String> {
        match value {
            NumberOrWord::Number(side) => side.to_string().parse(),
            NumberOrWord::Word(word) => word.parse(),
        }
    }
}

impl From<Size> for NumberOrWord {
    fn from(size: Size) -> Self {
        Self::Word(size.to_string())
    }
}

/// `TryFrom<String>` and `Into<String>` for serde, through `FromStr` and `Display`.
macro_rules! as_word {
    ($($type:ty),*) => {$(
        impl TryFrom<String> for $type {
            type Error = String;
            fn try_from(word: String) -> Result<Self, String> {
                word.parse()
            }
        }
        impl From<$type> for String {
            fn from(value: $type) -> String {
                value.to_string()
            }
        }
    )*};
}
as_word!(Device);
pub(super) use as_word;

/// A clap parser for a serde enum of another crate, whose variants are the given words.
pub(crate) fn choice<T: DeserializeOwned + Clone + Send + Sync + 'static>(
    words: &'static [&'static str],
) -> impl clap::builder::TypedValueParser<Value = T> {
    use clap::builder::{PossibleValuesParser, TypedValueParser};
    PossibleValuesParser::new(words).try_map(|word| {
        let deserializer: serde::de::value::StringDeserializer<serde::de::value::Error> = word.into_deserializer();
        T::deserialize(deserializer).map_err(|error| error.to_string())
    })
}

/// The word that a value is written as.
pub(crate) fn word<T: Serialize>(value: &T) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(word)) => word,
        Ok(other) => other.to_string(),
        Err(_) => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warm_up_is_steps_or_a_share() {
        assert_eq!("20".parse(), Ok(Warmup::Steps(20)));
        assert_eq!("7%".parse::<Warmup>().unwrap().steps(200), 14);
        assert_eq!("7%".parse::<Warmup>().unwrap().to_string(), "7%");
        assert_eq!("2.5%".parse::<Warmup>().unwrap().to_string(), "2.5%");
        for wrong in ["", "-1", "101%", "x%", "1.5"] {
            assert!(wrong.parse::<Warmup>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn devices_have_numbers() {
        assert_eq!("cuda:3".parse(), Ok(Device::Cuda(3)));
        assert_eq!("cuda".parse(), Ok(Device::Cuda(0)));
        assert!("cuda:x".parse::<Device>().is_err());
    }

    #[test]
    fn sizes_are_squares_unless_said() {
        assert_eq!("512".parse(), Ok(Size { width: 512, height: 512 }));
        assert_eq!("512x768".parse(), Ok(Size { width: 512, height: 768 }));
        assert!("0x768".parse::<Size>().is_err());
    }
}
