//! Loaded adapters on a base: beside its layers, or merged into its weights before they are loaded.
//!
//! Beside costs a little in every step and can be taken off again; merged costs nothing afterwards. Both give the same
//! pictures. Files and their dialects are [`lora_core::format`]'s business.

use lora_core::format::{AdapterFile, BaseModel, Changed, Strengths, merge};

pub use lora_torch::attach;

use crate::Result;

/// The tensors of a base that adapters change, in f32, for [`BaseFiles::change`](crate::BaseFiles::change).
///
/// # Errors
/// If a tensor cannot be read, or an adapter was read against another base.
pub fn merge_into(base: &BaseModel, adapters: &[(&AdapterFile, &Strengths)]) -> Result<Changed> {
    Ok(merge(&mut |component, name| base.read(component, name), adapters)?)
}
