//! Language models with low-rank adapters: Llama, Mistral and Qwen.
//!
//! | module | holds |
//! |---|---|
//! | [`config`] | what a `config.json` says of a model |
//! | [`base`] | a transformers folder: found, described, loaded |
//! | [`tokenizer`] | text becomes ids, and ids text |
//! | [`chat`] | conversations become text |
//! | [`data`] | files of texts become examples |
//! | [`example`] | tokenised examples, and the batches that they are packed or padded into |
//! | [`question`] | examples as questions with answers |
//! | [`decoder`] | ids become logits |
//! | [`objective`] | what adapters are trained on |
//! | [`generate`], [`stop`] | from ids to further ids, and what ends them |
//!
//! It knows nothing of diffusion and of the command line. Every frozen layer of the decoder is a
//! [`lora_torch::Projection`], so that an adapter can sit in each of them.

mod attention;
pub mod base;
mod cache;
pub mod chat;
pub mod config;
pub mod data;
pub mod decoder;
mod error;
pub mod example;
pub mod generate;
mod mlp;
mod norm;
pub mod objective;
pub mod question;
mod rope;
mod single;
pub mod stop;
mod team;
pub mod tokenizer;

pub use base::{Base, BaseFiles};
pub use config::LlmConfig;
pub use decoder::Decoder;
pub use error::{Error, Result};
pub use example::Example;
