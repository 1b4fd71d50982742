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

mod atomic;
pub mod checkpoint;
mod component;
mod dtype;
mod family;
mod fault;
mod header;
mod ldm;
mod mapping;
mod sniff;
mod tensor_file;
mod write;

pub use atomic::write_atomically;
pub use component::Component;
pub use dtype::Dtype;
pub use family::Family;
pub use fault::{Fault, Quoted};
pub use header::{HEADER_LIMIT, Header, TensorInfo};
pub use sniff::FileKind;
pub use tensor_file::TensorFile;
pub use write::{TensorData, TensorLayout, stream_tensors, write_tensors};
