//! Frozen matrices in 4 bits: NF4 (Dettmers et al. 2023, arXiv 2305.14314, §3), in the layout of bitsandbytes.
//!
//! Blocks of 64 numbers in row-major order share a factor, the largest magnitude among them; each number becomes the nearest
//! of 16 quantiles of a normal distribution, two to a byte, the first in the upper half. What a model computes with is
//! [`Nf4::matrix`], made anew for each use: only with activations that are computed again in the backward pass
//! ([`recompute`](crate::recompute)) does no more than one layer exist in full at a time.

use tch::{Kind, Tensor};

use crate::{Error, Result};

/// Numbers that share a factor.
pub const BLOCK: i64 = 64;

/// The quantiles: `create_normal_map` of `bitsandbytes/functional.py`, which the paper's appendix E prints.
const QUANTILES: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// A matrix, or any other tensor, in 4 bits a number.
#[derive(Debug)]
pub struct Nf4 {
    /// `[count / 2]`, bytes.
    packed: Tensor,
    /// `[blocks]`, 32-bit.
    factors: Tensor,
    /// `[256, 2]`: the two numbers of a byte, before their factor; 32-bit.
    pairs: Tensor,
    shape: Vec<i64>,
}

/// Factors that were quantised to 8 bits themselves ("double quantisation"): `code[byte] · scale + offset`.
#[derive(Debug)]
pub struct NestedFactors<'a> {
    /// `[blocks]`, bytes.
    pub bytes: &'a Tensor,
    /// `[256]`, 32-bit: what a byte stands for.
    pub code: &'a Tensor,
    /// One for each 256 factors, 32-bit.
    pub scales: &'a Tensor,
    /// Added to all, 32-bit, one number.
    pub offset: &'a Tensor,
}

impl Nf4 {
    /// The nearest numbers that 4 bits have, on the tensor's device.
    ///
    /// # Errors
    /// If the tensor is not whole blocks, or memory runs out.
    pub fn quantise(tensor: &Tensor) -> Result<Self> {
        let _no_grad = tch::no_grad_guard();
        let count = tensor.numel() as i64;
        if count % BLOCK != 0 {
            let reason = format!("a matrix of {:?} is not whole blocks of {BLOCK} numbers", tensor.size());
            return Err(Error::Config { option: "quantise", reason });
        }
        let blocks = tensor.f_to_kind(Kind::Float)?.f_reshape([-1, BLOCK])?;
        let factors = blocks.f_abs()?.f_amax([1i64].as_slice(), true)?; // [blocks, 1]
        // A block of zeros has no factor to be divided by.
        let scaled = blocks.f_div(&factors.f_masked_fill(&factors.f_eq(0.0)?, 1.0)?)?;
        let borders: Vec<f32> = QUANTILES.windows(2).map(|pair| (pair[0] + pair[1]) / 2.0).collect();
        let borders = Tensor::f_from_slice(&borders)?.f_to_device(tensor.device())?;
        let codes = scaled.f_bucketize(&borders, true, false)?.f_view([-1, 2])?; // [count / 2, 2]
        let packed = codes.f_select(1, 0)?.f_mul_scalar(16)?.f_add(&codes.f_select(1, 1)?)?.f_to_kind(Kind::Uint8)?;
        Self::of_parts(packed, factors.f_view([-1])?, &tensor.size())
    }

    /// A tensor that was quantised before: `packed` bytes in any shape, and the block's factors, 32-bit.
    ///
    /// # Errors
    /// If the sizes do not agree.
    pub fn of_parts(packed: Tensor, factors: Tensor, shape: &[i64]) -> Result<Self> {
        let count: i64 = shape.iter().product();
        let (bytes, blocks) = (packed.numel() as i64, factors.numel() as i64);
        if count != 2 * bytes || blocks != (count + BLOCK - 1) / BLOCK || count % BLOCK != 0 {
            let reason = format!("{bytes} bytes and {blocks} factors are no 4-bit matrix of {shape:?}");
            return Err(Error::Config { option: "quantise", reason });
        }
        let pair = |byte: usize| [QUANTILES[byte >> 4], QUANTILES[byte & 15]];
        let pairs: Vec<f32> = (0..256).flat_map(pair).collect();
        Ok(Self {
            pairs: Tensor::f_from_slice(&pairs)?.f_view([256, 2])?.f_to_device(packed.device())?,
            packed: packed.f_view([-1])?,
            factors: factors.f_view([-1])?,
            shape: shape.to_vec(),
        })
    }

    /// The same with factors in 8 bits.
    ///
    /// # Errors
    /// If the sizes do not agree.
    pub fn of_nested(packed: Tensor, nested: &NestedFactors<'_>, shape: &[i64]) -> Result<Self> {
        let _no_grad = tch::no_grad_guard();
        let bytes = nested.bytes.f_view([-1])?.f_to_kind(Kind::Int64)?;
        let blocks = bytes.numel() as i64;
        let scales = nested.scales.f_view([-1, 1])?.f_expand([-1, 256], false)?.f_reshape([-1])?;
        if (scales.numel() as i64) < blocks {
            let reason = format!("{} scales are too few for {blocks} factors", nested.scales.numel());
            return Err(Error::Config { option: "quantise", reason });
        }
        let values = nested.code.f_index_select(0, &bytes)?.f_mul(&scales.f_narrow(0, 0, blocks)?)?;
        Self::of_parts(packed, values.f_add(&nested.offset.f_view([1])?)?, shape)
    }

    /// The numbers, in their own shape and in `kind`.
    ///
    /// # Errors
    /// If memory runs out.
    pub fn matrix(&self, kind: Kind) -> Result<Tensor> {
        let _no_grad = tch::no_grad_guard();
        let pairs = self.pairs.f_index_select(0, &self.packed.f_to_kind(Kind::Int)?)?; // [count / 2, 2]
        let mut blocks = pairs.f_view([-1, BLOCK])?;
        let _ = blocks.f_mul_(&self.factors.f_unsqueeze(1)?)?;
        Ok(blocks.f_view(self.shape.as_slice())?.f_to_kind(kind)?)
    }

    /// Bytes that it takes.
    pub fn bytes(&self) -> usize {
        self.packed.numel() + 4 * self.factors.numel()
    }

    /// The bytes, two numbers each, `[count / 2]`.
    pub fn packed(&self) -> &Tensor {
        &self.packed
    }

    /// The factor of each block, `[blocks]`, 32-bit.
    pub fn factors(&self) -> &Tensor {
        &self.factors
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use tch::Device;

    use super::*;
    use crate::{Torch, Weights};

    /// `tests/fixtures/nf4.py` writes what bitsandbytes 0.50.2 gives.
    fn peer() -> impl Fn(&str) -> Tensor {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/nf4.safetensors");
        let weights = Weights::open(&[path]).unwrap();
        move |name| weights.root(&Torch::CPU).tensor(name, &weights.shape(name).unwrap()).unwrap()
    }

    #[test]
    fn quantising_gives_the_peers_bits() {
        let peer = peer();
        let mine = Nf4::quantise(&peer("weight")).unwrap();
        assert_eq!(mine.packed(), &peer("plain.packed"));
        assert_eq!(mine.factors(), &peer("plain.absmax"));
        assert_eq!(mine.bytes(), 24 * 448 / 2 + 168 * 4);
    }

    #[test]
    fn what_comes_back_is_the_peers_bit_for_bit() {
        let peer = peer();
        let plain = Nf4::of_parts(peer("plain.packed"), peer("plain.absmax"), &[24, 448]).unwrap();
        let nested = NestedFactors {
            bytes: &peer("nested.absmax"),
            code: &peer("nested.state_code"),
            scales: &peer("nested.state_absmax"),
            offset: &peer("nested.offset"),
        };
        let nested = Nf4::of_nested(peer("nested.packed"), &nested, &[24, 448]).unwrap();
        for (name, mine) in [("plain", plain), ("nested", nested)] {
            assert_eq!(mine.matrix(Kind::Float).unwrap(), peer(&format!("{name}.f32")), "{name}");
            let half = mine.matrix(Kind::BFloat16).unwrap().to_kind(Kind::Float);
            assert_eq!(half, peer(&format!("{name}.bf16")), "{name}");
        }
    }

    #[test]
    fn sizes_that_do_not_agree_are_refused() {
        let zeros = |shape: &[i64], kind| Tensor::f_zeros(shape, (kind, Device::Cpu)).unwrap();
        assert!(Nf4::quantise(&zeros(&[3, 5], Kind::Float)).is_err());
        let (bytes, factors) = (zeros(&[64], Kind::Uint8), zeros(&[3], Kind::Float));
        assert!(Nf4::of_parts(bytes, factors, &[2, 64]).is_err());
    }
}
