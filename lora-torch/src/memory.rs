//! The numbers of tensors on the CPU as slices, for loops of our own.

#![expect(unsafe_code, reason = "libtorch hands out the address of a tensor's memory")]

use std::ops::Range;

use half::{bf16, f16};
use tch::{Device, Kind, Tensor};

/// The numbers of a dense tensor, in the kind in which they lie there.
#[derive(Debug, Clone, Copy)]
pub enum Numbers<'a> {
    /// 32 bits.
    F32(&'a [f32]),
    /// 16 bits with the exponent of 32.
    Bf16(&'a [bf16]),
    /// 16 bits of IEEE 754.
    F16(&'a [f16]),
}

impl<'a> Numbers<'a> {
    /// The numbers of a tensor, row by row; `None` if it is on another device, of another kind, or not dense.
    ///
    /// While they are borrowed nobody may change the tensor in place, through this handle or another one.
    pub fn of(tensor: &'a Tensor) -> Option<Self> {
        let count = dense(tensor)?;
        // SAFETY: the tensor is dense, in this process's memory, of the kind that is looked at, and holds `count` numbers
        // until the borrow ends. What is viewed here is frozen: base weights and finished factors.
        unsafe {
            match tensor.f_kind().ok()? {
                Kind::Float => Some(Self::F32(slice(tensor, count))),
                Kind::BFloat16 => Some(Self::Bf16(slice(tensor, count))),
                Kind::Half => Some(Self::F16(slice(tensor, count))),
                _ => None,
            }
        }
    }

    /// Some of them.
    ///
    /// # Panics
    /// If there are not as many.
    pub fn range(self, range: Range<usize>) -> Self {
        match self {
            Self::F32(numbers) => Self::F32(&numbers[range]),
            Self::Bf16(numbers) => Self::Bf16(&numbers[range]),
            Self::F16(numbers) => Self::F16(&numbers[range]),
        }
    }

    /// The numbers, if they are in 32 bits.
    pub fn floats(self) -> Option<&'a [f32]> {
        match self {
            Self::F32(floats) => Some(floats),
            Self::Bf16(_) | Self::F16(_) => None,
        }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        match self {
            Self::F32(numbers) => numbers.len(),
            Self::Bf16(numbers) => numbers.len(),
            Self::F16(numbers) => numbers.len(),
        }
    }

    /// The memory that they take.
    pub fn bytes(&self) -> usize {
        match self {
            Self::F32(numbers) => size_of_val(*numbers),
            Self::Bf16(numbers) => size_of_val(*numbers),
            Self::F16(numbers) => size_of_val(*numbers),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The 32-bit numbers of a tensor that nobody else holds, to be changed; `None` as in [`Numbers::of`].
pub fn floats_mut(tensor: &mut Tensor) -> Option<&mut [f32]> {
    let count = dense(tensor)?;
    if tensor.f_kind().ok()? != Kind::Float {
        return None;
    }
    if count == 0 {
        return Some(&mut []);
    }
    // SAFETY: as above; the handle is borrowed exclusively, and its owner made it and shares it with nobody.
    Some(unsafe { std::slice::from_raw_parts_mut(tensor.data_ptr().cast(), count) })
}

/// How many numbers a dense tensor on the CPU has.
fn dense(tensor: &Tensor) -> Option<usize> {
    (tensor.defined() && tensor.device() == Device::Cpu && tensor.is_contiguous()).then(|| tensor.numel())
}

/// # Safety
/// The tensor is dense, on the CPU, of `T`'s kind, and has `count` numbers.
unsafe fn slice<T>(tensor: &Tensor, count: usize) -> &[T] {
    if count == 0 {
        return &[];
    }
    // SAFETY: as promised by the caller; libtorch aligns memory to 64 bytes, and views begin at whole numbers.
    unsafe { std::slice::from_raw_parts(tensor.data_ptr().cast(), count) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tensor_is_seen_in_its_own_kind() {
        let tensor = Tensor::from_slice(&[1.0f32, -2.5, 3.0, 0.5]).view([2, 2]);
        assert_eq!(Numbers::of(&tensor).unwrap().floats().unwrap(), [1.0, -2.5, 3.0, 0.5]);
        let narrow = tensor.to_kind(Kind::BFloat16);
        let Some(Numbers::Bf16(numbers)) = Numbers::of(&narrow) else { panic!("{narrow:?}") };
        assert_eq!(numbers[1].to_f32(), -2.5);
        let row = tensor.select(0, 1);
        assert_eq!(Numbers::of(&row).unwrap().floats().unwrap(), [3.0, 0.5]);
    }

    #[test]
    fn what_is_not_dense_or_of_another_kind_is_not_seen() {
        let tensor = Tensor::from_slice(&[1.0f32, 2.0, 3.0, 4.0]).view([2, 2]);
        assert!(Numbers::of(&tensor.transpose(0, 1)).is_none());
        assert!(Numbers::of(&tensor.to_kind(Kind::Int64)).is_none());
        assert!(floats_mut(&mut tensor.to_kind(Kind::Half)).is_none());
    }

    #[test]
    fn a_change_arrives_in_the_tensor() {
        let mut tensor = Tensor::from_slice(&[1.0f32, 2.0]);
        floats_mut(&mut tensor).unwrap()[1] = 7.0;
        assert_eq!(tensor.double_value(&[1]), 7.0);
    }
}
