//! Arguments of the tools that turn files into files.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use lora_core::format;

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
    /// Base model: folder or .safetensors file
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
