//! Files: the safetensors container, checked beyond what its reference reader checks, and what adapters put into it.
//!
//! | module | holds |
//! |---|---|
//! | `dtype` | how numbers are stored |
//! | `header`, `sniff` | what a container says about itself, and what a file is that is none |
//! | `tensor_file` | one checked file, mapped or read |
//! | `write`, `atomic` | files that are there whole or not at all |
//!
//! Nothing here knows libtorch or a network. Formats follow `docs/formats.md`.

mod adapter_file;
mod assemble;
mod atomic;
mod base;
pub mod checkpoint;
mod component;
mod dialect;
mod dtype;
mod family;
mod fault;
mod guess;
mod header;
mod key;
mod ldm;
mod mapping;
mod merge;
mod names;
mod peft_config;
mod sniff;
mod strength;
mod tensor_file;
mod write;

pub use adapter_file::{AdaptedModule, AdapterFile, Reason, Warning};
pub use assemble::Replacement;
pub use atomic::write_atomically;
pub use base::{BaseModel, Layout, Module, ModuleKind};
pub use component::Component;
pub use dialect::Dialect;
pub use dtype::Dtype;
pub use family::Family;
pub use fault::{Fault, Quoted};
pub use header::{HEADER_LIMIT, Header, TensorInfo};
pub use key::{Key, Role};
pub use merge::{Changed, linear_combination, merge};
pub use peft_config::{PeftConfig, PeftKind, PeftStart};
pub use sniff::FileKind;
pub use strength::Strengths;
pub use tensor_file::TensorFile;
pub use write::{TensorData, TensorLayout, stream_tensors, write_tensors};
