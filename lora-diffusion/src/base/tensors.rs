//! Tensors of a file under other names than the file's own.

use lora_core::{
    Backend,
    format::{
        Dtype, TensorFile,
        checkpoint::{Source, Transform},
    },
};
use lora_torch::Torch;
use tch::{Kind, Tensor};

use crate::Result;

/// The tensor that a source describes, on the host and in the file's kind where libtorch computes with that.
pub(super) fn read(file: &TensorFile, source: &Source) -> Result<Tensor> {
    let stored =
        file.info(&source.key).zip(source.bytes(file)).and_then(|(info, bytes)| Some((kind(info.dtype)?, bytes)));
    let Some((kind, bytes)) = stored else {
        let array = source.read(file)?;
        return Ok(Torch::CPU.tensor(&array.values, &array.shape)?);
    };
    let shape: Vec<i64> = source.shape.iter().map(|length| *length as i64).collect();
    match (source.transform, &shape[..]) {
        (Transform::Transpose, &[out, inner]) => {
            Ok(Tensor::f_from_data_size(bytes, &[inner, out], kind)?.f_transpose(0, 1)?.f_contiguous()?)
        }
        _ => Ok(Tensor::f_from_data_size(bytes, &shape, kind)?),
    }
}

fn kind(dtype: Dtype) -> Option<Kind> {
    match dtype {
        Dtype::F64 => Some(Kind::Double),
        Dtype::F32 => Some(Kind::Float),
        Dtype::F16 => Some(Kind::Half),
        Dtype::Bf16 => Some(Kind::BFloat16),
        Dtype::I64 => Some(Kind::Int64),
        Dtype::I32 => Some(Kind::Int),
        _ => None,
    }
}
