//! lora-torch
