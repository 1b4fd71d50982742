//! Stable Diffusion 1.5, 2.1 and XL: models, samplers, data and the training objective.
//!
//! | module | holds |
//! |---|---|
//! | [`adapters`] | loaded adapters on a base |
//! | [`base`] | a base model: found, described, loaded |
//! | [`tokenizer`] | a prompt becomes ids |
//! | [`clip`], [`text`] | ids become what the UNet is conditioned on |
//! | [`vae`] | pictures become latents, and latents pictures |
//! | [`unet`] | the network that predicts noise |
//! | [`data`] | folders of pictures, captions, buckets, caches, batches |
//! | [`objective`] | what adapters are trained on |
//! | [`schedule`] | noise schedules, samplers, loss weights |
//! | [`sample`] | from a prompt to pictures |
//!
//! This crate knows nothing of language models and of the command line. Every frozen layer of its models is a
//! [`lora_torch::Projection`], so that an adapter can sit in each of them.

pub mod adapters;
pub mod base;
pub mod clip;
mod config;
pub mod data;
mod error;
mod layers;
pub mod objective;
mod resnet;
pub mod sample;
pub mod schedule;
pub mod text;
pub mod tokenizer;
pub mod unet;
pub mod vae;

pub use base::{Base, BaseFiles};
pub use config::PerLevel;
pub use error::{Error, Result};
