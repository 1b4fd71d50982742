//! An adapter file with its strength, as `--lora` takes it: `FILE`, `FILE:0.8`, `FILE:unet=0.8,te=0.4`;
//! `te1` and `te2` tell SDXL's text encoders apart.

use std::{fmt, path::PathBuf, str::FromStr};

use lora_core::format::{Component, Strengths};
use serde::{Deserialize, Serialize};

use super::values::as_word;

/// What a person multiplies a loaded adapter by, per part of the model: `0.8` or `unet=0.8,te=0.4`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Strength {
    /// For the UNet.
    pub unet: f64,
    /// For the text encoder; on SDXL the first one.
    pub text_encoder: f64,
    /// For the second text encoder of SDXL.
    pub text_encoder_2: f64,
}

impl Strength {
    /// The adapter as it was trained.
    pub const ONE: Self = Self::all(1.0);

    /// One strength for every part.
    pub const fn all(strength: f64) -> Self {
        Self { unet: strength, text_encoder: strength, text_encoder_2: strength }
    }
}

/// The UNet's number is also that of a language model.
impl From<Strength> for Strengths {
    fn from(strength: Strength) -> Self {
        Self::all(strength.unet)
            .with(Component::TextEncoder, strength.text_encoder)
            .with(Component::TextEncoder2, strength.text_encoder_2)
    }
}

impl FromStr for Strength {
    type Err = String;

    fn from_str(word: &str) -> Result<Self, String> {
        let number = |text: &str| {
            text.parse::<f64>().ok().filter(|number| number.is_finite()).ok_or_else(|| {
                format!("`{text}` is not a strength; write a number such as `0.8`, or `unet=0.8,te=0.4` per part")
            })
        };
        if !word.contains('=') {
            return number(word).map(Self::all);
        }
        let mut strength = Self::ONE;
        let mut said: Vec<&str> = Vec::new();
        for part in word.split(',') {
            let parts: &[&str] = match part.split_once('=') {
                Some(("te", _)) => &["te1", "te2"],
                Some((part, _)) => &[part],
                None => &[],
            };
            if parts.iter().any(|part| said.contains(part)) {
                return Err(format!("`{part}` gives a strength to a part that has one already"));
            }
            said.extend(parts);
            match part.split_once('=') {
                Some(("unet", value)) => strength.unet = number(value)?,
                Some(("te", value)) => {
                    strength.text_encoder = number(value)?;
                    strength.text_encoder_2 = strength.text_encoder;
                }
                Some(("te1", value)) => strength.text_encoder = number(value)?,
                Some(("te2", value)) => strength.text_encoder_2 = number(value)?,
                _ => return Err(format!("`{part}` is not `unet=`, `te=`, `te1=` or `te2=` and a strength")),
            }
        }
        Ok(strength)
    }
}

impl fmt::Display for Strength {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { unet, text_encoder, text_encoder_2 } = self;
        if text_encoder != text_encoder_2 {
            write!(f, "unet={unet},te1={text_encoder},te2={text_encoder_2}")
        } else if unet != text_encoder {
            write!(f, "unet={unet},te={text_encoder}")
        } else {
            write!(f, "{unet}")
        }
    }
}

/// An adapter file and how strongly it acts: `FILE[:STRENGTH]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct LoraFile {
    /// The file.
    pub path: PathBuf,
    /// 1 where nothing is said.
    pub strength: Strength,
}

impl FromStr for LoraFile {
    type Err = String;

    fn from_str(word: &str) -> Result<Self, String> {
        if word.is_empty() {
            return Err("an adapter file is needed: `FILE` or `FILE:STRENGTH`".into());
        }
        // A colon may belong to the name: what follows the last one is a strength only if no such file exists.
        match word.rsplit_once(':') {
            Some((path, strength)) if !path.is_empty() && !PathBuf::from(word).exists() => {
                Ok(Self { path: path.into(), strength: strength.parse()? })
            }
            _ => Ok(Self { path: word.into(), strength: Strength::ONE }),
        }
    }
}

impl fmt::Display for LoraFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.path.display())?;
        if self.strength == Strength::ONE { Ok(()) } else { write!(f, ":{}", self.strength) }
    }
}

as_word!(LoraFile);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strength_may_differ_by_part() {
        assert_eq!("-0.5".parse(), Ok(Strength::all(-0.5)));
        assert_eq!("te=0.4".parse(), Ok(Strength { unet: 1.0, text_encoder: 0.4, text_encoder_2: 0.4 }));
        assert_eq!("unet=0.8,te=0.4".parse(), Ok(Strength { unet: 0.8, text_encoder: 0.4, text_encoder_2: 0.4 }));
        let each: Strength = "unet=0.8,te1=0.4,te2=0.2".parse().unwrap();
        assert_eq!((each.text_encoder, each.text_encoder_2), (0.4, 0.2));
        assert_eq!(each.to_string().parse(), Ok(each));
        for twice in ["unet=1,unet=2", "te=1,te2=2", "te1=1,te=1", "te2=1,te2=1"] {
            let part = twice.split(',').next_back().unwrap();
            assert!(twice.parse::<Strength>().unwrap_err().contains(part), "{twice}");
        }
        for wrong in ["", "x", "nan", "inf", "vae=1", "unet=0.8,"] {
            assert!(wrong.parse::<Strength>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_follows_the_last_colon_is_the_strength() {
        let file: LoraFile = "a:b.safetensors:0.8".parse().unwrap();
        assert_eq!((file.path, file.strength.unet), ("a:b.safetensors".into(), 0.8));
        let file: LoraFile = "a.safetensors".parse().unwrap();
        assert_eq!(file.strength, Strength::ONE);
        assert!("a.safetensors:strong".parse::<LoraFile>().is_err());
    }
}
