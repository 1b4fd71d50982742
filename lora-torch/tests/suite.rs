//! The suite of `lora-core` over libtorch on the CPU: the same operations, families and starts as on every backend.

#[path = "../../lora-core/tests/suite/mod.rs"]
mod suite;

/// As on the other backends in 32-bit floats; libtorch sums in yet another order.
const F32_TOLERANCE: f32 = 2e-5;

backend_suite!(torch, lora_torch::Torch::CPU, crate::F32_TOLERANCE);
