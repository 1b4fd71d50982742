//! Arguments of the tools that change, make and compare low-rank adapters.

use std::{num::NonZeroUsize, path::PathBuf};

use clap::{ArgGroup, Args, ValueEnum};
use lora_core::format;

use super::Stored;
use crate::options::values::LoraFile;

/// Arguments of `lora resize`.
#[derive(Debug, Clone, Args)]
#[command(
    group = ArgGroup::new("kept").required(true).multiple(true).args(["rank", "energy"]),
    after_help = "Example: lora resize big.safetensors small.safetensors --rank 32"
)]
pub struct ResizeArgs {
    /// The adapter
    #[arg(value_name = "IN")]
    pub input: PathBuf,
    /// Where the smaller one goes; may be IN itself
    #[arg(value_name = "OUT")]
    pub out: PathBuf,
    /// The rank; with --energy the most that a module may have
    #[arg(long, allow_negative_numbers = true, value_name = "N")]
    pub rank: Option<NonZeroUsize>,
    /// Share of the squared norm of the update to keep, module by module, as 0.95
    #[arg(long, allow_negative_numbers = true, value_name = "SHARE")]
    pub energy: Option<f64>,
    /// How numbers are stored [default: as in IN]
    #[arg(long, value_name = "DTYPE", value_enum)]
    pub dtype: Option<Stored>,
    /// Base model; only families other than LoRA can need it
    #[arg(long, value_name = "BASE")]
    pub base: Option<PathBuf>,
    /// Go on where keys belong to no adapter that is known, and list them
    #[arg(long)]
    pub allow_unmatched: bool,
}

/// Arguments of `lora extract`.
#[derive(Debug, Clone, Args)]
#[command(
    group = ArgGroup::new("kept").required(true).multiple(true).args(["rank", "energy"]),
    override_usage = "lora extract [OPTIONS] --base <BASE> --tuned <TUNED> --out <FILE>\n                    \
                      <--rank <N>|--energy <SHARE>>",
    after_help = "Example: lora extract --base BASE --tuned TUNED --rank 32 --out tuned.safetensors"
)]
pub struct ExtractArgs {
    /// The model before training: folder or .safetensors file
    #[arg(long, value_name = "BASE")]
    pub base: PathBuf,
    /// The model after training; it may lie in another layout
    #[arg(long, value_name = "TUNED")]
    pub tuned: PathBuf,
    /// Where the adapter goes
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
    /// The rank; with --energy the most that a module may have
    #[arg(long, allow_negative_numbers = true, value_name = "N")]
    pub rank: Option<NonZeroUsize>,
    /// Rank of convolutions with kernels larger than 1×1 [default: as --rank]
    #[arg(long, allow_negative_numbers = true, value_name = "N")]
    pub conv_rank: Option<NonZeroUsize>,
    /// Share of the squared norm of the difference to keep, module by module
    #[arg(long, allow_negative_numbers = true, value_name = "SHARE")]
    pub energy: Option<f64>,
    /// Decompose whole matrices: at most a hundredth better, many times slower
    #[arg(long)]
    pub exact: bool,
    /// Spelling of the file [default: kohya; peft for language models]
    #[arg(long, value_name = "FORMAT", value_enum)]
    pub format: Option<Spelling>,
    /// How numbers are stored [default: as in TUNED]
    #[arg(long, value_name = "DTYPE", value_enum)]
    pub dtype: Option<Stored>,
}

/// Arguments of `lora mix`.
#[derive(Debug, Clone, Args)]
#[command(after_help = "Example: lora mix --lora a.safetensors:0.7 --lora b.safetensors --out both.safetensors")]
pub struct MixArgs {
    /// Adapter with its strength (0.8, or unet=0.8,te=0.4); repeat for several
    #[arg(long, value_name = "FILE[:STRENGTH]", required = true)]
    pub lora: Vec<LoraFile>,
    /// Where the mixture goes
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
    /// How adapters of one module become one
    #[arg(long, value_name = "METHOD", value_enum, default_value = "concat")]
    pub method: Mixing,
    /// Rank of `svd` [default: the largest of the parts]
    #[arg(long, allow_negative_numbers = true, value_name = "N")]
    pub rank: Option<NonZeroUsize>,
    /// Share of the squared norm of the sum that `svd` keeps
    #[arg(long, allow_negative_numbers = true, value_name = "SHARE")]
    pub energy: Option<f64>,
    /// How numbers are stored [default: as the most precise part]
    #[arg(long, value_name = "DTYPE", value_enum)]
    pub dtype: Option<Stored>,
    /// Base model, for files whose spellings differ
    #[arg(long, value_name = "BASE")]
    pub base: Option<PathBuf>,
    /// Mix what is understood, and list the keys that are not
    #[arg(long)]
    pub allow_unmatched: bool,
}

/// Arguments of `lora diff`.
#[derive(Debug, Clone, Args)]
#[command(after_help = "Exit code, as of diff: 0 the same update, 1 different, 2 trouble. Metadata does not count.")]
pub struct DiffArgs {
    /// The one adapter
    #[arg(value_name = "A")]
    pub first: PathBuf,
    /// The other
    #[arg(value_name = "B")]
    pub second: PathBuf,
    /// Base model, for files whose spellings differ
    #[arg(long, value_name = "BASE")]
    pub base: Option<PathBuf>,
    /// Distance up to which two updates are the same, as a share of the larger
    #[arg(long, allow_negative_numbers = true, value_name = "SHARE", default_value = "1e-5")]
    pub tolerance: f64,
}

/// How adapters of one module become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Mixing {
    /// The exact sum; ranks add up.
    Concat,
    /// The sum, cut to a rank.
    Svd,
    /// peft's sum of factors: not the sum of the updates, since cross terms come in.
    Linear,
}

/// A spelling of adapter files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Spelling {
    /// sd-scripts, A1111, ComfyUI.
    Kohya,
    /// diffusers.
    Diffusers,
    /// A folder of peft.
    Peft,
    /// ComfyUI's own.
    Comfy,
}

impl From<Spelling> for format::Dialect {
    fn from(spelling: Spelling) -> Self {
        match spelling {
            Spelling::Kohya => Self::Kohya,
            Spelling::Diffusers => Self::Diffusers,
            Spelling::Peft => Self::Peft,
            Spelling::Comfy => Self::Comfy,
        }
    }
}
