//! The libtorch room of `lora`: adapters on real models, and their training.
//!
//! | module | holds |
//! |---|---|
//! | [`Torch`] | the tensor operations of [`lora_core::Backend`] on libtorch |
//! | [`Weights`], [`Scope`] | the named tensors of one model component |
//! | [`Projection`], [`Projections`] | frozen layers that carry adapters |
//! | [`BaseWeight`] | the weight of such a layer, in full, in the 16 bits of its file or in 4 |
//! | [`attach`](attach()) | loaded adapter files on projections |
//! | [`Host`] | adapters on any other `tch` model |
//! | [`Model`], [`Objective`], [`Trainer`] | what a model family gives, and the loop that does the rest |
//! | [`arena`], [`optimizer`], [`schedule`] | one flat tensor of factors, the rules that update it, learning rates |
//! | [`memory`], [`matvec`] | tensors on the CPU as numbers, and a matrix times one vector |
//! | [`nf4`] | frozen matrices in 4 bits |
//! | [`recompute`] | gradients in pieces, for memory's sake |
//! | [`checkpoint`] | folders that are complete or absent |
//! | [`random`] | tensors from counter-based randomness |
//! | [`cuda`] | streams, graphs and memory of a CUDA device, opened at run time |
//!
//! It knows nothing of pictures, words and file dialects. `unsafe` code and the C++ shim do not leave this crate.

pub mod arena;
mod attach;
mod backend;
mod backward;
mod base_weight;
pub mod checkpoint;
pub mod cuda;
mod dispatch;
mod error;
mod host;
pub mod matvec;
pub mod memory;
pub mod nf4;
mod objective;
pub mod optimizer;
mod projection;
pub mod random;
pub mod recompute;
pub mod schedule;
mod threads;
mod train;
mod weights;

pub use attach::{Attachments, attach};
pub use backend::Torch;
pub use base_weight::BaseWeight;
pub use error::{Error, Result};
pub use host::Host;
pub use objective::{Batch, Model, Objective};
pub use projection::{Projection, Projections};
pub use threads::use_threads;
pub use train::{NamedAdapter, Report, Resumed, Target, TrainOptions, Trainer};
pub use weights::{Scope, Weights};
