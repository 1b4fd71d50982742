//! The spellings in which adapters are written.

use std::fmt;

/// A spelling of adapter files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dialect {
    /// sd-scripts and LyCORIS: flattened names under `lora_unet_`, `alpha` beside the factors.
    Kohya,
    /// diffusers: dotted names under the component, scale in `lora_adapter_metadata`.
    Diffusers,
    /// peft: a folder with `adapter_config.json`.
    Peft,
    /// ComfyUI's own: dotted LDM names under `diffusion_model.`.
    Comfy,
}

impl Dialect {
    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kohya => "kohya",
            Self::Diffusers => "diffusers",
            Self::Peft => "peft",
            Self::Comfy => "comfy",
        }
    }
}

impl fmt::Display for Dialect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
