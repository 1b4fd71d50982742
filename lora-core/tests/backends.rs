//! The one suite over the backends of this crate's tests; `lora-torch` runs it on libtorch.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod ndarray_backend;
mod suite;

/// Sums of at most a few hundred products in 32-bit floats, in another order; and the inverse of well-conditioned blocks.
const F32_TOLERANCE: f32 = 2e-5;

suite::reference_suite!(cpu, lora_core::Cpu, crate::F32_TOLERANCE);
suite::backend_suite!(ndarray, crate::ndarray_backend::Ndarray, crate::F32_TOLERANCE);
