//! Low-rank adapters: `W' = W + scale · B·A`, `W` frozen, `A` random, `B` zero at first.
//!
//! | module | holds |
//! |---|---|
//! | [`backend`] | the tensor operations that adapters need, and a plain CPU implementation |
//! | [`adapter`] | the [`Adapter`] trait and every family |
//! | [`config`] | what may be set about an adapter |
//! | [`format`] | files: the container, every dialect of adapters, single-file checkpoints |
//! | [`target`] | which modules of a model get one |
//! | [`random`] | counter-based randomness |
//!
//! This crate knows nothing of libtorch, of models' forward passes and of terminals.

pub mod adapter;
pub mod backend;
pub mod config;
mod error;
pub mod format;
pub mod random;
pub mod target;

pub use adapter::{Adapter, AnyAdapter, Geometry, Layer, Part};
pub use backend::{Array, Backend, ConvGeometry, Cpu};
pub use config::{AdapterConfig, Init, LoraOptions, Method, ScaleRule};
pub use error::{Error, Result};
pub use random::{Draw, Purpose};
