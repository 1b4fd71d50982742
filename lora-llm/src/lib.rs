//! Language models with low-rank adapters: Llama, Mistral and Qwen.
//!
//! Knows nothing of diffusion and of the command line.
