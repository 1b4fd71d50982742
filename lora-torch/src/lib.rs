//! The libtorch room of `lora`: adapters on real models, and their training.
//!
//! | module | holds |
//! |---|---|
//! | [`Torch`] | the tensor operations of [`lora_core::Backend`] on libtorch |
//! | [`Weights`], [`Scope`] | the named tensors of one model component |
//! | [`Projection`], [`Projections`] | frozen layers that carry adapters |
//!
//! It knows nothing of pictures, words and file dialects. `unsafe` code and the C++ shim do not leave this crate.

pub mod arena;
mod backend;
pub mod checkpoint;
pub mod cuda;
mod dispatch;
mod error;
mod host;
mod objective;
pub mod optimizer;
mod projection;
pub mod random;
pub mod schedule;
mod threads;
mod train;
mod weights;

pub use backend::Torch;
pub use error::{Error, Result};
pub use host::Host;
pub use objective::{Batch, Objective};
pub use projection::{Projection, Projections};
pub use threads::use_threads;
pub use train::{NamedAdapter, Report, Resumed, Target, TrainOptions, Trainer};
pub use weights::{Scope, Weights};
