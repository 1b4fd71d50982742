//! Matrices that were in 4 bits already when they were saved; names and meanings are
//! [`lora_core::format::bitsandbytes`]'s.

use lora_core::format::bitsandbytes::{QuantState, companion, state_key};
use tch::{Kind, Tensor};

use super::{Weights, naming};
use crate::{
    BaseWeight, Error, Result, Torch,
    nf4::{NestedFactors, Nf4, QUANTILES},
};

/// Files have the quantiles in 32 bits, as they are here; another table is another type of numbers.
const QUANTILE_TOLERANCE: f64 = 1e-6;

impl Weights {
    /// What its file says of the tensor `name` if that is a matrix in 4 bits.
    ///
    /// # Errors
    /// If it is one of a kind that is not read.
    pub(super) fn quant_state(&self, name: &str) -> Result<Option<QuantState>> {
        let Some(key) =
            state_key(name, |start| self.entries.range(start.to_owned()..).next().map(|(key, _)| key.as_str()))
        else {
            return Ok(None);
        };
        let bytes: Vec<u8> = Vec::try_from(self.stored(key)?.f_view([-1])?)?;
        Ok(Some(QuantState::parse(self.file(name).unwrap_or(name.as_ref()), key, &bytes)?))
    }

    /// The matrix `name` with what belongs to it, on its device.
    pub(super) fn load_packed(&self, name: &str, on: &Torch, state: &QuantState) -> Result<BaseWeight> {
        let read = || {
            let stored = |name: &str, kind: Kind| -> Result<Tensor> {
                let tensor = self.stored(name)?;
                match tensor.f_kind()? {
                    actual if actual == kind => Ok(tensor.f_to_device(on.device)?),
                    actual => Err(Error::Kind { name: name.to_owned(), kind: format!("{actual:?}") }),
                }
            };
            let part = |part: &str, kind| stored(&companion(name, part), kind);
            let quantiles = part("quant_map", Kind::Float)?;
            let own = Tensor::f_from_slice(&QUANTILES)?.f_to_device(on.device)?;
            if quantiles.size() != own.size()
                || quantiles.f_sub(&own)?.f_abs()?.f_max()?.f_double_value(&[])? > QUANTILE_TOLERANCE
            {
                let reason = "the numbers that 4 bits stand for are not those of NF4".to_owned();
                return Err(Error::Quantised { name: name.to_owned(), reason });
            }
            let shape: Vec<i64> = state.shape.iter().map(|length| *length as i64).collect();
            let packed = stored(name, Kind::Uint8)?;
            let nf4 = match state.nested_offset {
                None => Nf4::of_parts(packed, part("absmax", Kind::Float)?, &shape)?,
                Some(offset) => {
                    let nested = NestedFactors {
                        bytes: part("absmax", Kind::Uint8)?,
                        code: part("nested_quant_map", Kind::Float)?,
                        scales: part("nested_absmax", Kind::Float)?,
                        offset: Tensor::f_from_slice(&[offset])?.f_to_device(on.device)?,
                    };
                    Nf4::of_nested(packed, nested, &shape)?
                }
            };
            Ok(BaseWeight::Nf4(nf4))
        };
        // What stands beside the matrix belongs to it.
        let start = format!("{name}.");
        for (_, entry) in self.entries.range(start.clone()..).take_while(|(key, _)| key.starts_with(&start)) {
            entry.read.set(true);
        }
        self.held(name, on, read).map_err(naming(name))
    }
}
