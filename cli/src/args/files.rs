//! Arguments of the tools that turn files into files.

use std::{path::PathBuf, str::FromStr};

use clap::{Args, ValueEnum};
use lora_core::format;

use super::Spelling;
use crate::options::values::LoraFile;

/// How numbers are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Stored {
    /// IEEE single precision.
    Fp32,
    /// IEEE half precision.
    Fp16,
    /// bfloat16.
    Bf16,
}

impl From<Stored> for format::Dtype {
    fn from(stored: Stored) -> Self {
        match stored {
            Stored::Fp32 => Self::F32,
            Stored::Fp16 => Self::F16,
            Stored::Bf16 => Self::Bf16,
        }
    }
}

/// Arguments of `lora merge`.
#[derive(Debug, Clone, Args)]
pub struct MergeArgs {
    /// Base model: folder, .safetensors file or org/name from the hub
    #[arg(long, value_name = "BASE")]
    pub base: PathBuf,
    /// Adapter with its strength (0.8, or unet=0.8,te=0.4); repeat for several
    #[arg(long, value_name = "FILE[:STRENGTH]", required = true)]
    pub lora: Vec<LoraFile>,
    /// Where the merged model goes: a folder for a folder, a file for a file
    #[arg(long, value_name = "OUT")]
    pub out: PathBuf,
    /// How numbers are stored [default: as in the base]
    #[arg(long, value_name = "DTYPE", value_enum)]
    pub dtype: Option<Stored>,
    /// Merge what fits, and list the keys that do not
    #[arg(long)]
    pub allow_unmatched: bool,
}

/// Arguments of `lora convert`.
#[derive(Debug, Clone, Args)]
#[command(after_help = "Examples: lora convert neon.safetensors other.safetensors --to diffusers
          lora convert old.ckpt new.safetensors      (nothing in it is run)")]
pub struct ConvertArgs {
    /// A .safetensors file, a folder of peft, or a pickle (.pt, .ckpt, .bin)
    #[arg(value_name = "IN")]
    pub input: PathBuf,
    /// Where the result goes, a folder for peft; may be IN itself
    #[arg(value_name = "OUT")]
    pub out: PathBuf,
    /// The spelling to write [default: the keys as they are]
    #[arg(long, value_name = "SPELLING", value_enum)]
    pub to: Option<Spelling>,
    /// Base model, where names alone do not say which model it is
    #[arg(long, value_name = "BASE")]
    pub base: Option<PathBuf>,
    /// How numbers are stored [default: as in IN]
    #[arg(long, value_name = "DTYPE", value_enum)]
    pub dtype: Option<Stored>,
    /// With --to, write what is an adapter, and list the keys that are none
    #[arg(long)]
    pub allow_unmatched: bool,
}

/// Arguments of `lora metadata`.
#[derive(Debug, Clone, Args)]
#[command(after_help = "Without --set, --remove and --strip the metadata is shown. Numbers are never touched.")]
pub struct MetadataArgs {
    /// A .safetensors file
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// Set an entry; repeatable
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<Entry>,
    /// Remove an entry; repeatable
    #[arg(long, value_name = "KEY")]
    pub remove: Vec<String>,
    /// Remove everything, before --set
    #[arg(long)]
    pub strip: bool,
    /// Where the result goes [default: FILE itself]
    #[arg(long, value_name = "OUT")]
    pub out: Option<PathBuf>,
}

/// A metadata entry, `KEY=VALUE`; the value may hold further equals signs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// What stands before the first equals sign.
    pub key: String,
    /// What stands behind it.
    pub value: String,
}

impl FromStr for Entry {
    type Err = String;

    fn from_str(word: &str) -> Result<Self, String> {
        match word.split_once('=') {
            Some((key, value)) if !key.is_empty() => Ok(Self { key: key.to_owned(), value: value.to_owned() }),
            _ => Err("write KEY=VALUE, as `modelspec.title=Neon`".to_owned()),
        }
    }
}
