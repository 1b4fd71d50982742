//! Language models with low-rank adapters: Llama, Mistral and Qwen.
//!
//! Knows nothing of diffusion and of the command line.

pub mod chat;
pub mod example;
pub mod tokenizer;
