//! Frozen matrices in 4 bits: NF4 (Dettmers et al. 2023, arXiv 2305.14314, §3), in the layout of bitsandbytes.
//!
//! Blocks of 64 numbers in row-major order share a factor, the largest magnitude among them; each number becomes the nearest
//! of 16 quantiles of a normal distribution, two to a byte, the first in the upper half. The factors can be quantised once
//! more, to 8 bits ("double quantisation", §3.2). What a layer computes with is [`Nf4::matrix`], made anew for each use, in
//! the backward pass as in the forward pass ([`Nf4::linear`]), so that one matrix at a time exists in full.

mod kernel;

use tch::{Device, Kind, Tensor};

pub use kernel::kernel_fault;

use crate::{Error, Result, backward::with_slope};

/// Numbers that share a factor.
pub const BLOCK: i64 = 64;

/// Factors that share a factor of their own, where they are quantised too.
pub const NESTED_BLOCK: i64 = 256;

/// The quantiles: `create_normal_map` of `bitsandbytes/functional.py`, which the paper's appendix E prints.
pub const QUANTILES: [f32; 16] = [
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

/// How matrices are quantised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scheme {
    /// 4 bits a number and 32 a block: 4.5 bits a number.
    Nf4,
    /// The same with 8 bits a block: 4.13 bits a number.
    Nf4Double,
}

impl Scheme {
    /// Bytes that so many numbers take.
    pub fn bytes(self, count: u64) -> u64 {
        let blocks = count.div_ceil(BLOCK as u64);
        let factors = match self {
            Self::Nf4 => 4 * blocks,
            Self::Nf4Double => blocks + 4 * blocks.div_ceil(NESTED_BLOCK as u64),
        };
        count.div_ceil(2) + factors
    }
}

/// A matrix, or any other tensor, in 4 bits a number.
#[derive(Debug)]
pub struct Nf4 {
    /// `[count / 2]`, bytes.
    packed: Tensor,
    factors: Factors,
    /// `[256, 2]`: the two numbers of a byte, before their factor; 32-bit.
    pairs: Tensor,
    shape: Vec<i64>,
}

/// The factors of the blocks.
#[derive(Debug)]
enum Factors {
    /// `[blocks]`, 32-bit.
    Full(Tensor),
    Nested(NestedFactors),
}

/// Factors that were quantised to 8 bits themselves: `code[byte] · scale + offset`.
#[derive(Debug)]
pub struct NestedFactors {
    /// `[blocks]`, bytes.
    pub bytes: Tensor,
    /// `[256]`, 32-bit: what a byte stands for.
    pub code: Tensor,
    /// One for each [`NESTED_BLOCK`] factors, 32-bit.
    pub scales: Tensor,
    /// Added to all, 32-bit, `[1]`.
    pub offset: Tensor,
}

impl Nf4 {
    /// The nearest numbers that 4 bits have, on the tensor's device.
    ///
    /// # Errors
    /// If the tensor is not whole blocks, or memory runs out.
    pub fn quantise(tensor: &Tensor, scheme: Scheme) -> Result<Self> {
        let _no_grad = tch::no_grad_guard();
        let count = tensor.numel() as i64;
        if count % BLOCK != 0 {
            let reason = format!("a matrix of {:?} is not whole blocks of {BLOCK} numbers", tensor.size());
            return Err(Error::Config { option: "quantize", reason });
        }
        let blocks = tensor.f_to_kind(Kind::Float)?.f_reshape([-1, BLOCK])?;
        let factors = blocks.f_abs()?.f_amax([1i64].as_slice(), true)?; // [blocks, 1]
        // A block of zeros has no factor to be divided by.
        let scaled = blocks.f_div(&factors.f_masked_fill(&factors.f_eq(0.0)?, 1.0)?)?;
        let borders: Vec<f32> = QUANTILES.windows(2).map(|pair| (pair[0] + pair[1]) / 2.0).collect();
        let borders = Tensor::f_from_slice(&borders)?.f_to_device(tensor.device())?;
        let codes = scaled.f_bucketize(&borders, true, false)?.f_view([-1, 2])?; // [count / 2, 2]
        let packed = codes.f_select(1, 0)?.f_mul_scalar(16)?.f_add(&codes.f_select(1, 1)?)?.f_to_kind(Kind::Uint8)?;
        let factors = factors.f_view([-1])?;
        match scheme {
            Scheme::Nf4 => Self::of_parts(packed, factors, &tensor.size()),
            Scheme::Nf4Double => Self::of_nested(packed, NestedFactors::quantise(&factors)?, &tensor.size()),
        }
    }

    /// A tensor that was quantised before: `packed` bytes in any shape, and the blocks' factors, 32-bit.
    ///
    /// # Errors
    /// If the sizes do not agree.
    pub fn of_parts(packed: Tensor, factors: Tensor, shape: &[i64]) -> Result<Self> {
        Self::check(&packed, &factors, shape)?;
        Self::new(packed, Factors::Full(factors.f_view([-1])?), shape)
    }

    /// The same with factors in 8 bits.
    ///
    /// # Errors
    /// If the sizes do not agree.
    pub fn of_nested(packed: Tensor, nested: NestedFactors, shape: &[i64]) -> Result<Self> {
        Self::check(&packed, &nested.bytes, shape)?;
        let NestedFactors { bytes, code, scales, offset } = nested;
        let (blocks, groups) = (bytes.numel() as i64, scales.numel() as i64);
        if groups != (blocks + NESTED_BLOCK - 1) / NESTED_BLOCK || code.numel() != 256 || offset.numel() != 1 {
            let reason = format!("{groups} scales and {} codes do not fit {blocks} factors", code.numel());
            return Err(Error::Config { option: "quantize", reason });
        }
        let nested = NestedFactors {
            bytes: bytes.f_view([-1])?,
            code: code.f_view([-1])?,
            scales: scales.f_view([-1])?,
            offset: offset.f_view([1])?,
        };
        Self::new(packed, Factors::Nested(nested), shape)
    }

    fn check(packed: &Tensor, factors: &Tensor, shape: &[i64]) -> Result<()> {
        let count: i64 = shape.iter().product();
        let (bytes, blocks) = (packed.numel() as i64, factors.numel() as i64);
        if count == 2 * bytes && count == BLOCK * blocks {
            return Ok(());
        }
        let reason = format!("{bytes} bytes and {blocks} factors are no 4-bit matrix of {shape:?}");
        Err(Error::Config { option: "quantize", reason })
    }

    fn new(packed: Tensor, factors: Factors, shape: &[i64]) -> Result<Self> {
        let pair = |byte: usize| [QUANTILES[byte >> 4], QUANTILES[byte & 15]];
        let pairs: Vec<f32> = (0..256).flat_map(pair).collect();
        let pairs = Tensor::f_from_slice(&pairs)?.f_view([256, 2])?.f_to_device(packed.device())?;
        kernel::prepare(packed.device(), &pairs);
        Ok(Self { pairs, packed: packed.f_view([-1])?, factors, shape: shape.to_vec() })
    }

    /// `x · Wᵀ + bias` for the matrix `W` `[out, in]`, in the kind of `x`: `x` `[rows, in]` → `[rows, out]`.
    ///
    /// Differentiable in `x` alone. What is kept for that are the 4 bits: the backward pass makes the matrix again.
    ///
    /// # Errors
    /// If the shapes do not fit, or memory runs out.
    pub fn linear(&self, x: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        let kind = x.f_kind()?;
        let y = {
            let _no_grad = tch::no_grad_guard();
            x.f_linear(&self.matrix(kind)?, bias)?
        };
        let weight = self.share();
        with_slope(y, x, move |slope| Ok(slope.f_mm(&weight.matrix(kind)?)?))
    }

    /// The numbers, in their own shape and in `kind`; memory of their own.
    ///
    /// # Errors
    /// If memory runs out.
    pub fn matrix(&self, kind: Kind) -> Result<Tensor> {
        let _no_grad = tch::no_grad_guard();
        let blocks = kernel::unpacked(&self.packed, &self.factors()?, &self.pairs, kind)?; // [blocks, 64]
        Ok(blocks.f_view(self.shape.as_slice())?)
    }

    /// The same tensors once more.
    pub fn share(&self) -> Self {
        let Self { packed, factors, pairs, shape } = self;
        let factors = match factors {
            Factors::Full(factors) => Factors::Full(factors.shallow_clone()),
            Factors::Nested(nested) => Factors::Nested(nested.share()),
        };
        Self { packed: packed.shallow_clone(), factors, pairs: pairs.shallow_clone(), shape: shape.clone() }
    }

    /// The shape of the numbers.
    pub fn shape(&self) -> &[i64] {
        &self.shape
    }

    /// Bytes that it takes.
    pub fn bytes(&self) -> usize {
        let factors = match &self.factors {
            Factors::Full(factors) => 4 * factors.numel(),
            Factors::Nested(nested) => nested.bytes.numel() + 4 * nested.scales.numel(),
        };
        self.packed.numel() + factors
    }

    /// The bytes, two numbers each, `[count / 2]`.
    pub fn packed(&self) -> &Tensor {
        &self.packed
    }

    /// The factor of each block, `[blocks]`, 32-bit.
    ///
    /// # Errors
    /// If memory runs out.
    pub fn factors(&self) -> Result<Tensor> {
        match &self.factors {
            Factors::Full(factors) => Ok(factors.shallow_clone()),
            Factors::Nested(nested) => nested.values(),
        }
    }

    /// The factors as they are kept, if they were quantised too.
    pub fn nested(&self) -> Option<&NestedFactors> {
        match &self.factors {
            Factors::Full(_) => None,
            Factors::Nested(nested) => Some(nested),
        }
    }
}

impl NestedFactors {
    /// The nearest factors that 8 bits have. The peer's CPU kernel decides some that lie about in the middle (0.2 % of those
    /// of the bundled model) for the other side.
    fn quantise(factors: &Tensor) -> Result<Self> {
        let offset = factors.f_mean(Kind::Float)?.f_view([1])?;
        let blocks = factors.numel() as i64;
        let groups = (blocks + NESTED_BLOCK - 1) / NESTED_BLOCK;
        let centred = factors.f_sub(&offset)?.f_constant_pad_nd([0, groups * NESTED_BLOCK - blocks])?;
        let centred = centred.f_view([-1, NESTED_BLOCK])?;
        let scales = centred.f_abs()?.f_amax([1i64].as_slice(), true)?; // [groups, 1]
        let scaled = centred.f_div(&scales.f_masked_fill(&scales.f_eq(0.0)?, 1.0)?)?;
        let code = dynamic_code()?.f_to_device(factors.device())?; // [256]
        let borders = code.f_narrow(0, 0, 255)?.f_add(&code.f_narrow(0, 1, 255)?)?.f_div_scalar(2.0)?;
        let bytes = scaled.f_bucketize(&borders, true, false)?.f_to_kind(Kind::Uint8)?.f_view([-1])?;
        Ok(Self { bytes: bytes.f_narrow(0, 0, blocks)?.f_contiguous()?, code, scales: scales.f_view([-1])?, offset })
    }

    fn values(&self) -> Result<Tensor> {
        let blocks = self.bytes.numel() as i64;
        let scales = self.scales.f_view([-1, 1])?.f_expand([-1, NESTED_BLOCK], false)?.f_reshape([-1])?;
        let mut values = self.code.f_index_select(0, &self.bytes.f_to_kind(Kind::Int)?)?;
        let _ = values.f_mul_(&scales.f_narrow(0, 0, blocks)?)?.f_add_(&self.offset)?;
        Ok(values)
    }

    fn share(&self) -> Self {
        let Self { bytes, code, scales, offset } = self;
        Self {
            bytes: bytes.shallow_clone(),
            code: code.shallow_clone(),
            scales: scales.shallow_clone(),
            offset: offset.shallow_clone(),
        }
    }
}

/// What a byte stands for in bitsandbytes' 8-bit type: a sign, a power of ten in unary, and a fraction that takes what is
/// left of the bits (Dettmers 2015, arXiv 1511.04561, §2; `create_dynamic_map` of `bitsandbytes/functional.py`).
fn dynamic_code() -> Result<Tensor> {
    let mut code = vec![Tensor::f_from_slice(&[0.0f32, 1.0])?];
    for power in 0..7 {
        let parts = 1 << power;
        let borders = Tensor::f_linspace(0.1, 1.0, parts + 1, (Kind::Float, Device::Cpu))?;
        let middles = borders.f_narrow(0, 0, parts)?.f_add(&borders.f_narrow(0, 1, parts)?)?.f_div_scalar(2.0)?;
        let values = middles.f_mul_scalar(10f64.powi(power - 6))?;
        code.extend([values.f_neg()?, values]);
    }
    Ok(Tensor::f_cat(&code, 0)?.f_sort(0, false)?.0)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

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
        let mine = Nf4::quantise(&peer("weight"), Scheme::Nf4).unwrap();
        assert_eq!(mine.packed(), &peer("plain.packed"));
        assert_eq!(mine.factors().unwrap(), peer("plain.absmax"));
        assert_eq!(mine.bytes(), 24 * 448 / 2 + 168 * 4);
        assert_eq!(mine.bytes() as u64, Scheme::Nf4.bytes(24 * 448));
    }

    #[test]
    fn quantising_factors_gives_the_peers_bits() {
        let peer = peer();
        let mine = Nf4::quantise(&peer("weight"), Scheme::Nf4Double).unwrap();
        let nested = mine.nested().unwrap();
        assert_eq!(mine.packed(), &peer("nested.packed"));
        assert_eq!(nested.code, peer("nested.state_code"));
        assert_eq!(nested.offset, peer("nested.offset"));
        assert_eq!(nested.scales, peer("nested.state_absmax"));
        assert_eq!(nested.bytes, peer("nested.absmax"));
        assert_eq!(mine.bytes() as u64, Scheme::Nf4Double.bytes(24 * 448));
    }

    #[test]
    fn what_comes_back_is_the_peers_bit_for_bit() {
        let peer = peer();
        let plain = Nf4::of_parts(peer("plain.packed"), peer("plain.absmax"), &[24, 448]).unwrap();
        let nested = NestedFactors {
            bytes: peer("nested.absmax"),
            code: peer("nested.state_code"),
            scales: peer("nested.state_absmax"),
            offset: peer("nested.offset"),
        };
        let nested = Nf4::of_nested(peer("nested.packed"), nested, &[24, 448]).unwrap();
        for (name, mine) in [("plain", plain), ("nested", nested)] {
            assert_eq!(mine.matrix(Kind::Float).unwrap(), peer(&format!("{name}.f32")), "{name}");
            let half = mine.matrix(Kind::BFloat16).unwrap().to_kind(Kind::Float);
            assert_eq!(half, peer(&format!("{name}.bf16")), "{name}");
        }
    }

    #[test]
    fn sizes_that_do_not_agree_are_refused() {
        let zeros = |shape: &[i64], kind| Tensor::f_zeros(shape, (kind, Device::Cpu)).unwrap();
        assert!(Nf4::quantise(&zeros(&[3, 5], Kind::Float), Scheme::Nf4).is_err());
        let (bytes, factors) = (zeros(&[64], Kind::Uint8), zeros(&[3], Kind::Float));
        assert!(Nf4::of_parts(bytes, factors, &[2, 64]).is_err());
    }
}
