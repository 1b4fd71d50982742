//! The suite of `lora-core` over libtorch on the CPU: the same operations, families and starts as on every backend.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "../../lora-core/tests/suite/mod.rs"]
mod suite;

/// As on the other backends in 32-bit floats; libtorch sums in yet another order.
const F32_TOLERANCE: f32 = 2e-5;

suite::backend_suite!(torch, lora_torch::Torch::CPU, crate::F32_TOLERANCE);

/// A DoRA whose base is bf16 starts within bf16's rounding of the base's own output, not a rounded norm away from it.
#[test]
fn magnitudes_meet_norms_of_32_bits() {
    use lora_core::Backend;
    use tch::{Kind, Tensor};

    tch::manual_seed(3);
    let weight = Tensor::randn([64, 48], tch::kind::FLOAT_CPU).to_kind(Kind::BFloat16);
    let magnitude = weight.to_kind(Kind::Float).norm_scalaropt_dim(2.0, [1i64].as_slice(), false);
    let [up, down] = [[64, 4], [4, 48]].map(|shape| Tensor::randn(shape, (Kind::BFloat16, tch::Device::Cpu)));
    let on = lora_torch::Torch::CPU.with_kind(Kind::BFloat16);
    let start = on.row_factors(&magnitude, &weight, [&up.zeros_like(), &down], 0.7).unwrap();
    assert_eq!(start.kind(), Kind::BFloat16);
    assert_eq!(start.to_kind(Kind::Float).ne(1.0).sum(Kind::Int64).int64_value(&[]), 0);

    let moved = on.row_factors(&magnitude, &weight, [&up, &down], 0.7).unwrap().to_kind(Kind::Float);
    let [weight, up, down] = [&weight, &up, &down].map(|tensor| tensor.to_kind(Kind::Float));
    let norm = (&weight + up.matmul(&down) * 0.7).norm_scalaropt_dim(2.0, [1i64].as_slice(), false);
    let error = (moved * norm / magnitude - 1.0).abs().max().double_value(&[]);
    assert!(error < 0.01, "off by {error}");
}
