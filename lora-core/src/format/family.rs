//! Which model a file belongs to.

use std::fmt;

/// A family of models whose members take each other's adapters.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Family {
    /// Stable Diffusion 1.x: CLIP-L, convolutions around the attention.
    Sd1,
    /// Stable Diffusion 2.x: OpenCLIP H, linear layers around the attention.
    Sd2,
    /// Stable Diffusion XL: two text encoders, size conditioning.
    Sdxl,
    /// A causal language model, with its `model_type` (`llama`, `mistral`, `qwen2`, …).
    Language(String),
    /// Any other model of transformers, with its `model_type` (`bert`, `t5`, `vit`, …).
    Transformers(String),
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sd1 => f.write_str("Stable Diffusion 1.x"),
            Self::Sd2 => f.write_str("Stable Diffusion 2.x"),
            Self::Sdxl => f.write_str("Stable Diffusion XL"),
            Self::Language(kind) => write!(f, "{kind} language model"),
            Self::Transformers(kind) => write!(f, "{kind} model"),
        }
    }
}
