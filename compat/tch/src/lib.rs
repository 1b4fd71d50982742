//! `tch` 0.24 under the version number 0.13.9, so that `diffusers` 0.3.1 builds on today's libtorch.
pub use tch_new::*;
