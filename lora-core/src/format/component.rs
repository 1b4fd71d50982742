//! The parts of a model that have files, prefixes and strengths of their own.

use std::fmt;

/// A part of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Component {
    /// The denoiser of Stable Diffusion.
    Unet,
    /// The text encoder; on SDXL the first one (CLIP-L).
    TextEncoder,
    /// The second text encoder of SDXL (OpenCLIP bigG).
    TextEncoder2,
    /// The picture encoder and decoder.
    Vae,
    /// A causal language model, the whole of it.
    LanguageModel,
}

impl Component {
    /// Every part.
    pub const ALL: [Self; 5] = [Self::Unet, Self::TextEncoder, Self::TextEncoder2, Self::Vae, Self::LanguageModel];

    /// The name of its folder in a diffusers model, which is also its prefix in diffusers' adapter files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Unet => "unet",
            Self::TextEncoder => "text_encoder",
            Self::TextEncoder2 => "text_encoder_2",
            Self::Vae => "vae",
            Self::LanguageModel => "language_model",
        }
    }

    /// The part of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|component| component.name() == name)
    }

    /// Whether it turns words into what the denoiser is led by.
    pub fn is_text_encoder(self) -> bool {
        matches!(self, Self::TextEncoder | Self::TextEncoder2)
    }
}

impl fmt::Display for Component {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
