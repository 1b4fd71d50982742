//! Files: the safetensors container, checked beyond what its reference reader checks, and what adapters put into it.
//!
//! | module | holds |
//! |---|---|
//! | `dtype` | how numbers are stored |
//! | `header`, `sniff` | what a container says about itself, and what a file is that is none |
//! | `tensor_file`, `mapping` | one checked file, mapped or read |
//! | `write`, `atomic`, `unfinished` | files that are there whole or not at all, and nothing of them when a run is stopped |
//! | `json` | configurations in which no name occurs twice |
//! | `base`, `recognise`, [`checkpoint`], `ldm` | a base model by its headers; what it is; single-file checkpoints; the two worlds of names |
//! | [`bitsandbytes`] | matrices in 4 bits by their headers |
//! | `key`, `names`, `guess` | a key taken apart, what it means for a base, what a file seems to be |
//! | `peft_config`, `assemble`, `adapter_file` | adapters of every dialect and family, every key accounted for |
//! | `strength`, `merge` | how strongly an adapter acts, and the plain merge |
//! | `adapter_stream`, `merge_file`, `merge_folder`, `merge_config`, `touches`, `tiles` | merging into files that do not fit into memory |
//! | `alone`, `measure` | adapters read without a base, and how large their updates are |
//! | `check` | what every module of a file comes to on a base |
//! | `standard`, `without_base` | the published models by names and shapes, for files read without a base |
//! | `pickle` | tensors out of Python pickles, nothing run |
//! | `rewrite` | a file written again, with other metadata or in another type |
//! | `write_adapter`, `training_metadata` | the dialects written |
//!
//! A file that [`AdapterFile::read`] took is applied as its program meant it, key by key; what is not applied is in
//! [`AdapterFile::unapplied`] with its reason. Nothing here knows libtorch or a network. Formats follow
//! `docs/formats.md`.

mod adapter_file;
mod adapter_stream;
mod alone;
mod assemble;
mod atomic;
mod base;
pub mod bitsandbytes;
mod blocks;
mod check;
pub mod checkpoint;
mod component;
mod dialect;
mod dtype;
mod exchange;
mod family;
mod fault;
mod guess;
mod header;
mod json;
mod key;
mod ldm;
mod mapping;
mod measure;
mod merge;
mod merge_config;
mod merge_file;
mod merge_folder;
mod names;
mod peft_config;
mod pickle;
mod recognise;
mod rewrite;
mod sniff;
mod sorted_keys;
mod standard;
mod strength;
mod tensor_file;
mod tiles;
mod touches;
mod training_metadata;
mod unfinished;
mod without_base;
mod write;
mod write_adapter;
mod writeback;

pub use adapter_file::{AdaptedModule, AdapterFile, Reason, Warning, adapter_path};
pub use adapter_stream::AdapterStream;
pub use assemble::Replacement;
pub use atomic::{remove_abandoned, write_atomically};
pub use base::{BaseModel, Layout, Module, ModuleKind, weight_files};
pub use check::{Check, CheckedModule, Outcome};
pub use component::Component;
pub use dialect::Dialect;
pub use dtype::Dtype;
pub use family::Family;
pub use fault::{Fault, Misfit, Quoted, is_hidden};
pub use guess::{dialect as guess_dialect, family as guess_family, foreign_family as guess_foreign_family};
pub use header::{HEADER_LIMIT, Header, TensorInfo};
pub use key::{Key, Role};
pub use measure::{Measured, measure};
pub use merge::{Changed, merge};
pub use merge_file::Merger;
pub use names::{Found, Names, Place};
pub use peft_config::{PeftConfig, PeftKind, PeftStart};
pub use pickle::PickleFile;
pub use rewrite::rewrite;
pub use sniff::FileKind;
pub use strength::Strengths;
pub use tensor_file::TensorFile;
pub use unfinished::remove_unfinished;
pub use write::{TensorData, TensorLayout, stream_tensors, tensors_to_bytes, write_tensors};
pub use write_adapter::{describe_network, write_adapter, write_adapter_file, write_alone};
