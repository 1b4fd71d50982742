//! lora-diffusion
