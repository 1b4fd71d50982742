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

    /// The name of a module of it as a person is told it: after the component's, unless it says so itself, as names from files
    /// do.
    pub fn with(self, module: &str) -> String {
        const SAID: [&str; 6] = ["lora_", "lycoris_", "oft_", "base_model.", "diffusion_model.", "text_encoders."];
        let says_so = SAID.iter().any(|start| module.starts_with(start)) || module.starts_with(self.name());
        match says_so || self == Self::LanguageModel {
            true => module.to_owned(),
            false => format!("{self}.{module}"),
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_component_is_said_once() {
        for (component, module, name) in [
            (Component::Unet, "mid_block.attentions.0", "unet.mid_block.attentions.0"),
            (Component::Unet, "lora_unet_mid_block_attentions_0", "lora_unet_mid_block_attentions_0"),
            (Component::TextEncoder2, "text_encoder_2.text_model.a", "text_encoder_2.text_model.a"),
            (Component::LanguageModel, "model.layers.0", "model.layers.0"),
        ] {
            assert_eq!(component.with(module), name);
        }
    }
}
