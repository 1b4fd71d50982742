//! What a graph over layers in 4 bits keeps until its backward pass: nothing of the size of a matrix.
//!
//! A program of its own, since the memory of a process is what is measured.
#![cfg(target_os = "linux")]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;

use lora_torch::nf4::{Nf4, Scheme};
use tch::{Device, Kind, Tensor};

/// Rows and columns of the matrix: 64 MiB in 32 bits, beyond what any allocator keeps for later.
const SIZE: i64 = 4096;

/// How many layers the graph has.
const LAYERS: usize = 6;

/// Bytes of this process that are in memory.
fn resident() -> i64 {
    let facts = fs::read_to_string("/proc/self/status").unwrap();
    let line = facts.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<i64>().unwrap() * 1024
}

#[test]
fn a_graph_over_layers_in_4_bits_keeps_no_matrix() {
    let matrix = Tensor::f_randn([SIZE, SIZE], (Kind::Float, Device::Cpu)).unwrap() * (1.0 / SIZE as f64).sqrt();
    let weight = Nf4::quantise(&matrix, Scheme::Nf4Double).unwrap();
    let x = Tensor::f_randn([2, SIZE], (Kind::Float, Device::Cpu)).unwrap().set_requires_grad(true);
    // Once before, so that whatever is set up on first use does not count.
    let layers = |run: &dyn Fn(&Tensor) -> Tensor| (0..LAYERS).fold(x.shallow_clone(), |x, _| run(&x).tanh());
    drop(layers(&|x| weight.linear(x, None).unwrap()));

    let before = resident();
    let y = layers(&|x| weight.linear(x, None).unwrap());
    let kept = resident() - before;
    let one = SIZE * SIZE * 4;
    assert!(kept < one / 2, "{kept} bytes are kept by {LAYERS} layers");
    let gradient = Tensor::f_run_backward(&[y.sum(Kind::Float)], &[&x], false, false).unwrap();
    assert!(resident() - before < one / 2, "{} bytes are left of the backward pass", resident() - before);

    // The measure sees what it should: the same layers in full do keep theirs, each made for its use.
    let before = resident();
    let full = layers(&|x| x.f_linear(&weight.matrix(Kind::Float).unwrap(), None::<&Tensor>).unwrap());
    let kept = resident() - before;
    assert!(kept > (LAYERS as i64 - 1) * one, "{kept} bytes are kept by {LAYERS} layers in full");
    let expected = Tensor::f_run_backward(&[full.sum(Kind::Float)], &[&x], false, false).unwrap();
    assert!((&gradient[0] - &expected[0]).abs().max().double_value(&[]) < 1e-4);
}
