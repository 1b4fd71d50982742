//! Language models with low-rank adapters: Llama, Mistral and Qwen.
//!
//! | module | holds |
//! |---|---|
//! | [`tokenizer`] | text becomes ids, and ids text |
//! | [`chat`] | conversations become text |
//! | [`data`] | files of texts become examples |
//! | [`example`] | tokenised examples |
//! | [`question`] | examples as questions with answers |
//! | [`stop`] | texts that end a generation |
//! | [`hub`] | models by name, out of the local cache |
//!
//! It knows nothing of diffusion and of the command line.

pub mod chat;
pub mod data;
pub mod example;
pub mod hub;
pub mod question;
pub mod stop;
pub mod tokenizer;
