//! Low-rank adapters: `W' = W + scale · B·A`, `W` frozen, `A` random, `B` zero at first.
//!
//! | module | holds |
//! |---|---|
//! | [`backend`] | the tensor operations that adapters need, and a plain CPU implementation |
//! | [`adapter`] | the [`Adapter`] trait and every family |
//! | [`config`] | what may be set about an adapter |
//! | [`mod@format`] | files: the container, every dialect of adapters, single-file checkpoints |
//! | [`mod@resize`], [`mod@extract`], [`mod@mix`], [`mod@compare`] | other ranks; adapters out of models, out of each other, side by side |
//! | [`target`] | which modules of a model get one |
//! | [`hub`] | models by name, out of the local cache |
//! | [`random`] | counter-based randomness |
//!
//! An adapter on one linear layer, by hand: what it adds to the output is what merging it adds to the weight.
//!
//! ```
//! use lora_core::{Adapter, AdapterConfig, Array, Backend, Cpu, Draw, Geometry, Layer, Lora, Method, Purpose};
//!
//! let base = Array::new([2, 3], vec![1.0, 0.0, 2.0, 0.0, 1.0, 1.0])?; // W, [out, in]
//! let config = AdapterConfig::new(Method::Lora, 1.try_into()?, 2.0)?; // rank 1, alpha 2
//! let mut lora = Lora::init(&Cpu, &base, &config, &mut Draw::new(42, Purpose::Init, 0, 0))?;
//! assert_eq!(lora.merge(&Cpu, &base, 1.0)?, base); // B is zero at first
//!
//! lora.up = Array::new([2, 1], vec![0.5, -1.0])?; // what training would do
//! let x = Array::new([1, 3], vec![1.0, 2.0, 3.0])?;
//! let layer = Layer { weight: &base, bias: None, geometry: Geometry::Linear };
//! let adapted = lora.forward(&Cpu, &layer, &x, &Cpu.linear(&x, &base)?, 0.8)?;
//! let merged = Cpu.linear(&x, &lora.merge(&Cpu, &base, 0.8)?)?;
//! assert!(adapted.values.iter().zip(&merged.values).all(|(a, b)| (a - b).abs() < 1e-5));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! This crate knows nothing of libtorch, of models' forward passes and of terminals.

pub mod adapter;
pub mod backend;
pub mod compare;
pub mod config;
mod error;
pub mod extract;
pub mod format;
pub mod hub;
pub mod mix;
pub mod random;
pub mod resize;
pub mod target;

pub use adapter::{Adapter, AnyAdapter, Geometry, Layer, Lora, Part, UpdateSize};
pub use backend::{Array, Backend, ConvGeometry, Cpu};
pub use config::{AdapterConfig, Init, LoraOptions, Method, ScaleRule};
pub use error::{Error, Result};
pub use random::{Draw, Purpose};
