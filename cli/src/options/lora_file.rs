//! An adapter file with its strength, as `--lora` takes it: `FILE`, `FILE:0.8`, `FILE:unet=0.8,te=0.4`.

use std::{fmt, path::PathBuf, str::FromStr};

use serde::{Deserialize, Serialize};

use super::values::as_word;

/// What a person multiplies a loaded adapter by, per part of the model: `0.8` or `unet=0.8,te=0.4`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Strength {
    /// For the UNet.
    pub unet: f64,
    /// For the text encoders.
    pub text_encoder: f64,
}

impl Strength {
    /// The adapter as it was trained.
    pub const ONE: Self = Self { unet: 1.0, text_encoder: 1.0 };
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
            let strength = number(word)?;
            return Ok(Self { unet: strength, text_encoder: strength });
        }
        let mut strength = Self::ONE;
        for part in word.split(',') {
            match part.split_once('=') {
                Some(("unet", value)) => strength.unet = number(value)?,
                Some(("te", value)) => strength.text_encoder = number(value)?,
                _ => return Err(format!("`{part}` is not `unet=STRENGTH` or `te=STRENGTH`")),
            }
        }
        Ok(strength)
    }
}

impl fmt::Display for Strength {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.unet == self.text_encoder {
            write!(f, "{}", self.unet)
        } else {
            write!(f, "unet={},te={}", self.unet, self.text_encoder)
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
        assert_eq!("-0.5".parse(), Ok(Strength { unet: -0.5, text_encoder: -0.5 }));
        assert_eq!("te=0.4".parse(), Ok(Strength { unet: 1.0, text_encoder: 0.4 }));
        assert_eq!("unet=0.8,te=0.4".parse(), Ok(Strength { unet: 0.8, text_encoder: 0.4 }));
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
