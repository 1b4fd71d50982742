//! How the container stores numbers, and the way from and to `f32`.
//!
//! The list and its order are those of safetensors 0.8; writers sort by it, so the order is part of the format.

use half::{
    bf16, f16,
    slice::{HalfBitsSliceExt as _, HalfFloatSliceExt as _},
};

/// The type of a stored number.
///
/// Only floats, integers and booleans widen to `f32`; the packed and complex types are listed so that files holding
/// them can be opened and their other tensors used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
#[expect(missing_docs, reason = "the names say it")]
pub enum Dtype {
    Bool,
    F4,
    F6E2M3,
    F6E3M2,
    U8,
    I8,
    F8E5M2,
    F8E4M3,
    F8E8M0,
    F8E4M3Fnuz,
    F8E5M2Fnuz,
    I16,
    U16,
    F16,
    Bf16,
    I32,
    U32,
    F32,
    C64,
    F64,
    I64,
    U64,
}

impl Dtype {
    /// Every type, in the order by which writers sort.
    pub const ALL: [Self; 22] = [
        Self::Bool,
        Self::F4,
        Self::F6E2M3,
        Self::F6E3M2,
        Self::U8,
        Self::I8,
        Self::F8E5M2,
        Self::F8E4M3,
        Self::F8E8M0,
        Self::F8E4M3Fnuz,
        Self::F8E5M2Fnuz,
        Self::I16,
        Self::U16,
        Self::F16,
        Self::Bf16,
        Self::I32,
        Self::U32,
        Self::F32,
        Self::C64,
        Self::F64,
        Self::I64,
        Self::U64,
    ];

    /// The name in a header.
    pub fn name(self) -> &'static str {
        match self {
            Self::Bool => "BOOL",
            Self::F4 => "F4",
            Self::F6E2M3 => "F6_E2M3",
            Self::F6E3M2 => "F6_E3M2",
            Self::U8 => "U8",
            Self::I8 => "I8",
            Self::F8E5M2 => "F8_E5M2",
            Self::F8E4M3 => "F8_E4M3",
            Self::F8E8M0 => "F8_E8M0",
            Self::F8E4M3Fnuz => "F8_E4M3FNUZ",
            Self::F8E5M2Fnuz => "F8_E5M2FNUZ",
            Self::I16 => "I16",
            Self::U16 => "U16",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::I32 => "I32",
            Self::U32 => "U32",
            Self::F32 => "F32",
            Self::C64 => "C64",
            Self::F64 => "F64",
            Self::I64 => "I64",
            Self::U64 => "U64",
        }
    }

    /// The type of that name in a header.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|dtype| dtype.name() == name)
    }

    /// Bits of one number.
    pub fn bits(self) -> usize {
        match self {
            Self::F4 => 4,
            Self::F6E2M3 | Self::F6E3M2 => 6,
            Self::Bool | Self::U8 | Self::I8 => 8,
            Self::F8E5M2 | Self::F8E4M3 | Self::F8E8M0 | Self::F8E4M3Fnuz | Self::F8E5M2Fnuz => 8,
            Self::I16 | Self::U16 | Self::F16 | Self::Bf16 => 16,
            Self::I32 | Self::U32 | Self::F32 => 32,
            Self::C64 | Self::F64 | Self::I64 | Self::U64 => 64,
        }
    }

    /// Bytes of one number; packed types count as one.
    pub fn size(self) -> usize {
        self.bits().div_ceil(8)
    }

    /// Bytes of a tensor of that shape; `None` if that overflows or is no whole number of bytes.
    pub fn bytes_of(self, shape: &[usize]) -> Option<usize> {
        let elements = shape.iter().try_fold(1_usize, |product, length| product.checked_mul(*length))?;
        let bits = elements.checked_mul(self.bits())?;
        bits.is_multiple_of(8).then_some(bits / 8)
    }

    /// Whether it holds real numbers with a fraction.
    pub fn is_float(self) -> bool {
        matches!(self, Self::F64 | Self::F32 | Self::F16 | Self::Bf16 | Self::F8E4M3 | Self::F8E5M2)
    }

    /// Stored numbers as `f64`, which holds all of them but the largest 64-bit integers; `None` for the types that have
    /// no plain value.
    pub fn widen_to_f64(self, bytes: &[u8]) -> Option<Vec<f64>> {
        Some(match self {
            Self::F64 => each(bytes, f64::from_le_bytes),
            Self::I64 => each(bytes, |raw| i64::from_le_bytes(raw) as f64),
            Self::U64 => each(bytes, |raw| u64::from_le_bytes(raw) as f64),
            Self::I32 => each(bytes, |raw| f64::from(i32::from_le_bytes(raw))),
            Self::U32 => each(bytes, |raw| f64::from(u32::from_le_bytes(raw))),
            _ => self.widen(bytes)?.into_iter().map(f64::from).collect(),
        })
    }

    /// Stored numbers as `f32`; `None` for the types that have no plain value.
    ///
    /// Exact for all but `F64` and wide integers, which are rounded to the nearest.
    pub fn widen(self, bytes: &[u8]) -> Option<Vec<f32>> {
        let mut values = Vec::new();
        self.widen_into(bytes, &mut values).then_some(values)
    }

    /// [`widen`](Self::widen) into memory that is there already; `false` where it gives `None`.
    pub(super) fn widen_into(self, bytes: &[u8], values: &mut Vec<f32>) -> bool {
        if self != Self::F16 {
            values.clear();
        }
        match self {
            Self::F64 => extend(values, bytes, |raw| f64::from_le_bytes(raw) as f32),
            Self::F32 => extend(values, bytes, f32::from_le_bytes),
            Self::F16 => halves_to_f32(bytes, values),
            Self::Bf16 => extend(values, bytes, |raw| f32::from_bits(u32::from(u16::from_le_bytes(raw)) << 16)),
            Self::F8E4M3 => extend(values, bytes, |[raw]| e4m3_to_f32(raw)),
            Self::F8E5M2 => extend(values, bytes, |[raw]| e5m2_to_f32(raw)),
            Self::Bool => extend(values, bytes, |[raw]| f32::from(u8::from(raw != 0))),
            Self::U8 => extend(values, bytes, |[raw]| f32::from(raw)),
            Self::I8 => extend(values, bytes, |raw| f32::from(i8::from_le_bytes(raw))),
            Self::I16 => extend(values, bytes, |raw| f32::from(i16::from_le_bytes(raw))),
            Self::U16 => extend(values, bytes, |raw| f32::from(u16::from_le_bytes(raw))),
            Self::I32 => extend(values, bytes, |raw| i32::from_le_bytes(raw) as f32),
            Self::U32 => extend(values, bytes, |raw| u32::from_le_bytes(raw) as f32),
            Self::I64 => extend(values, bytes, |raw| i64::from_le_bytes(raw) as f32),
            Self::U64 => extend(values, bytes, |raw| u64::from_le_bytes(raw) as f32),
            Self::F4 | Self::F6E2M3 | Self::F6E3M2 | Self::F8E8M0 | Self::C64 => return false,
            Self::F8E4M3Fnuz | Self::F8E5M2Fnuz => return false,
        }
        true
    }

    /// `f32` numbers as stored ones, rounded to the nearest, ties to even; `None` for anything but floats.
    ///
    /// What is out of range becomes infinite, or NaN in `F8_E4M3`, which has no infinity.
    pub fn narrow(self, values: &[f32]) -> Option<Vec<u8>> {
        let mut bytes = vec![0; values.len() * self.size()];
        self.narrow_into(values, &mut bytes).then_some(bytes)
    }

    /// [`narrow`](Self::narrow) into memory of that many bytes; `false` where it gives `None`.
    pub(super) fn narrow_into(self, values: &[f32], bytes: &mut [u8]) -> bool {
        match self {
            Self::F64 => store(values, bytes, |value| f64::from(value).to_le_bytes()),
            Self::F32 => store(values, bytes, f32::to_le_bytes),
            Self::F16 => f32_to_halves(values, bytes),
            Self::Bf16 => store(values, bytes, |value| bf16::from_f32(value).to_le_bytes()),
            Self::F8E4M3 => store(values, bytes, |value| [f32_to_f8(value, e4m3_to_f32, 0x7E, 464.0, 0x7F)]),
            Self::F8E5M2 => store(values, bytes, |value| [f32_to_f8(value, e5m2_to_f32, 0x7B, 61_440.0, 0x7C)]),
            _ => return false,
        }
        true
    }

    /// Whether none of the stored numbers is NaN or infinite; of types without a plain value `false`.
    pub(super) fn all_finite(self, bytes: &[u8]) -> bool {
        // An exponent of all ones is infinity or no number. Loops without an early end look at many numbers at a time, and
        // nearly always all are finite.
        let halves = |exponent: u16| {
            let bytes = bytes.as_chunks::<2>().0;
            bytes.iter().fold(true, |finite, raw| finite & (u16::from_le_bytes(*raw) & exponent != exponent))
        };
        match self {
            Self::F16 => halves(0x7C00),
            Self::Bf16 => halves(0x7F80),
            Self::F32 => {
                let bytes = bytes.as_chunks::<4>().0;
                bytes.iter().fold(true, |finite, raw| finite & f32::from_le_bytes(*raw).is_finite())
            }
            Self::F64 => bytes.as_chunks::<8>().0.iter().all(|raw| f64::from_le_bytes(*raw).is_finite()),
            _ => self.widen(bytes).is_some_and(|values| values.iter().all(|value| value.is_finite())),
        }
    }
}

impl std::fmt::Display for Dtype {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// One value per `N` bytes.
fn each<const N: usize, T>(bytes: &[u8], load: impl Fn([u8; N]) -> T) -> Vec<T> {
    let mut values = Vec::new();
    extend(&mut values, bytes, load);
    values
}

/// One value more per `N` bytes.
fn extend<const N: usize, T>(values: &mut Vec<T>, bytes: &[u8], load: impl Fn([u8; N]) -> T) {
    values.extend(bytes.as_chunks::<N>().0.iter().map(|raw| load(*raw)));
}

/// `N` bytes per value, in place of what `bytes` held.
fn store<const N: usize>(values: &[f32], bytes: &mut [u8], store: impl Fn(f32) -> [u8; N]) {
    bytes.as_chunks_mut::<N>().0.iter_mut().zip(values).for_each(|(raw, value)| *raw = store(*value));
}

/// Halves that are converted at a time: the processor has instructions for many, and asking whether it has them costs more
/// than one conversion.
const RUN: usize = 1024;

fn halves_to_f32(bytes: &[u8], values: &mut Vec<f32>) {
    let halves = bytes.as_chunks::<2>().0;
    values.resize(halves.len(), 0.0);
    let mut run = [0; RUN];
    for (halves, values) in halves.chunks(RUN).zip(values.chunks_mut(RUN)) {
        let run = &mut run[..halves.len()];
        run.iter_mut().zip(halves).for_each(|(bits, raw)| *bits = u16::from_le_bytes(*raw));
        run.reinterpret_cast::<f16>().convert_to_f32_slice(values);
    }
}

fn f32_to_halves(values: &[f32], bytes: &mut [u8]) {
    let mut run = [f16::ZERO; RUN];
    for (values, bytes) in values.chunks(RUN).zip(bytes.as_chunks_mut::<2>().0.chunks_mut(RUN)) {
        let run = &mut run[..values.len()];
        run.convert_from_f32_slice(values);
        bytes.iter_mut().zip(run.reinterpret_cast()).for_each(|(raw, bits)| *raw = bits.to_le_bytes());
    }
}

/// Sign, 4 bits of exponent (bias 7), 3 of mantissa; no infinity, all ones is NaN (arXiv 2209.05433, table 1).
fn e4m3_to_f32(raw: u8) -> f32 {
    let exponent = i32::from((raw >> 3) & 0xF);
    let mantissa = f32::from(raw & 7);
    let magnitude = match (exponent, raw & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa * (-9_f32).exp2(),
        _ => (8.0 + mantissa) * ((exponent - 10) as f32).exp2(),
    };
    if raw & 0x80 == 0 { magnitude } else { -magnitude }
}

/// The upper half of an IEEE half (arXiv 2209.05433, table 1).
fn e5m2_to_f32(raw: u8) -> f32 {
    f16::from_bits(u16::from(raw) << 8).to_f32()
}

/// The nearest 8-bit float, ties to even; `largest` is the code of the largest finite number, from `limit` on (half a
/// step above it) the result is `beyond`.
fn f32_to_f8(value: f32, decode: fn(u8) -> f32, largest: u8, limit: f32, beyond: u8) -> u8 {
    let sign = if value.is_sign_negative() { 0x80 } else { 0 };
    let magnitude = value.abs();
    if magnitude.is_nan() {
        return sign | 0x7F;
    }
    if magnitude >= limit {
        return sign | beyond;
    }
    // Codes of positive numbers are in the order of their values.
    let (mut low, mut high) = (0, largest);
    while low < high {
        let middle = low + (high - low).div_ceil(2);
        if decode(middle) <= magnitude { low = middle } else { high = middle - 1 }
    }
    if low == largest {
        return sign | low;
    }
    let (below, above) = (magnitude - decode(low), decode(low + 1) - magnitude);
    let up = above < below || (above == below && low % 2 == 1);
    sign | (low + u8::from(up))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_leads_back_to_its_type_and_the_order_is_the_declared_one() {
        for (index, dtype) in Dtype::ALL.into_iter().enumerate() {
            assert_eq!(Dtype::from_name(dtype.name()), Some(dtype));
            assert_eq!(dtype as usize, index);
        }
        assert_eq!(Dtype::from_name("F31"), None);
    }

    #[test]
    fn narrowing_what_was_widened_gives_the_same_bytes() {
        for dtype in [Dtype::F8E4M3, Dtype::F8E5M2] {
            for raw in 0..=255_u8 {
                let value = dtype.widen(&[raw]).unwrap();
                let back = dtype.narrow(&value).unwrap();
                assert!(back == [raw] || value[0].is_nan(), "{dtype} {raw:#x} became {back:?}");
            }
        }
        for dtype in [Dtype::F16, Dtype::Bf16] {
            for raw in 0..=u16::MAX {
                let value = dtype.widen(&raw.to_le_bytes()).unwrap();
                let back = dtype.narrow(&value).unwrap();
                assert!(back == raw.to_le_bytes() || value[0].is_nan(), "{dtype} {raw:#x} became {back:?}");
            }
        }
    }

    #[test]
    fn eight_bit_floats_have_the_published_values() {
        let e4m3 = |raw| e4m3_to_f32(raw);
        assert_eq!([e4m3(0x7E), e4m3(0x01), e4m3(0x08), e4m3(0xB8)], [448.0, 0.001_953_125, 0.015_625, -1.0]);
        assert!(e4m3(0x7F).is_nan());
        assert_eq!(
            [e5m2_to_f32(0x7B), e5m2_to_f32(0x01), e5m2_to_f32(0x7C)],
            [57344.0, 2_f32.powi(-16), f32::INFINITY]
        );
    }

    #[test]
    fn ties_go_to_the_even_code_and_overflow_is_not_clamped() {
        assert_eq!(Dtype::F8E4M3.narrow(&[1.0625, 1.1875, 463.9, 464.0]).unwrap(), [0x38, 0x3A, 0x7E, 0x7F]);
        assert_eq!(Dtype::F8E5M2.narrow(&[61_439.0, 61_440.0, -0.0]).unwrap(), [0x7B, 0x7C, 0x80]);
    }

    #[test]
    fn a_single_number_that_is_not_finite_is_seen_wherever_it_stands() {
        for dtype in [Dtype::F64, Dtype::F32, Dtype::F16, Dtype::Bf16, Dtype::F8E4M3, Dtype::F8E5M2] {
            let fine: Vec<f32> = (0..67).map(|index| index as f32 - 30.0).collect();
            assert!(dtype.all_finite(&dtype.narrow(&fine).unwrap()), "{dtype}");
            for (place, value) in [(0, f32::NAN), (33, f32::INFINITY), (66, f32::NEG_INFINITY)] {
                let mut values = fine.clone();
                values[place] = value;
                assert!(!dtype.all_finite(&dtype.narrow(&values).unwrap()), "{dtype} at {place}");
            }
        }
        assert!(!Dtype::F4.all_finite(&[0]));
    }

    #[test]
    fn memory_that_held_other_numbers_is_used_again() {
        let mut values = vec![7.0; 3000];
        for dtype in [Dtype::F16, Dtype::F32, Dtype::Bf16, Dtype::F16, Dtype::F64] {
            for count in [1, 1024, 2500] {
                let numbers: Vec<f32> = (0..count).map(|index| index as f32 / 8.0 - 3.0).collect();
                let mut bytes = vec![9; count * dtype.size()];
                assert!(dtype.narrow_into(&numbers, &mut bytes) && dtype.widen_into(&bytes, &mut values));
                assert_eq!(values, dtype.widen(&dtype.narrow(&numbers).unwrap()).unwrap(), "{count} of {dtype}");
                assert_eq!(values.len(), count);
            }
        }
    }

    #[test]
    fn sizes_that_overflow_have_no_answer() {
        assert_eq!(Dtype::F32.bytes_of(&[3, 5]), Some(60));
        assert_eq!(Dtype::F32.bytes_of(&[]), Some(4));
        assert_eq!(Dtype::F32.bytes_of(&[usize::MAX, 2]), None);
        assert_eq!(Dtype::F4.bytes_of(&[3]), None);
    }
}
