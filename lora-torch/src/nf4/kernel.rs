//! How the numbers of 4 bits are made: by libtorch's own operations anywhere, on CUDA by one kernel of ours.
//!
//! The operations write and read 32-bit numbers in between, 14 bytes a weight where the kernel moves 2.6; both give the same
//! bits. The kernel is compiled on the machine that it runs on, and used only after it has shown there that it does.

use std::sync::OnceLock;

use tch::{Device, Kind, Tensor};

use super::BLOCK;
use crate::{Error, Result, cuda::Cuda};

/// The kernel, once it was tried, or why there is none.
static KERNEL: OnceLock<std::result::Result<Cuda, String>> = OnceLock::new();

/// Why matrices on CUDA are made without the kernel, if they are; `None` also where no matrix is on CUDA.
pub fn kernel_fault() -> Option<&'static str> {
    KERNEL.get()?.as_ref().err().map(String::as_str)
}

/// Tries the kernel if `device` is the first CUDA device that is met: compiling it waits for the device, which a step that
/// is being captured must not.
pub(super) fn prepare(device: Device, pairs: &Tensor) {
    if let Device::Cuda(index) = device {
        KERNEL.get_or_init(|| tried(index, pairs).map_err(|error| error.to_string()));
    }
}

/// The numbers of `packed` `[bytes]`, times `factors` `[blocks]`, `[blocks, 64]` in `kind`; `pairs` `[256, 2]` are the two
/// numbers of each byte.
pub(super) fn unpacked(packed: &Tensor, factors: &Tensor, pairs: &Tensor, kind: Kind) -> Result<Tensor> {
    match KERNEL.get() {
        Some(Ok(cuda)) if packed.device() != Device::Cpu && matches!(kind, Kind::BFloat16 | Kind::Half) => {
            cuda.unpack_nf4(&packed.f_view([-1, BLOCK / 2])?, &factors.f_unsqueeze(1)?, kind == Kind::Half)
        }
        _ => plain(packed, factors, pairs, kind),
    }
}

fn plain(packed: &Tensor, factors: &Tensor, pairs: &Tensor, kind: Kind) -> Result<Tensor> {
    let pairs = pairs.f_index_select(0, &packed.f_to_kind(Kind::Int)?)?; // [bytes, 2]
    let blocks = pairs.f_view([-1, BLOCK])?;
    // The product of 32 bits is rounded once, on its way out.
    let matrix = Tensor::f_empty(blocks.size(), (kind, blocks.device()))?;
    Ok(blocks.f_mul_out(&matrix, &factors.f_unsqueeze(1)?)?)
}

/// The kernel, if for every byte and some factors it gives what the operations give.
fn tried(device: usize, pairs: &Tensor) -> Result<Cuda> {
    let cuda = Cuda::load(device)?;
    let device = pairs.device();
    let packed = Tensor::f_arange(256, (Kind::Uint8, device))?;
    let factors = Tensor::f_linspace(1e-3, 3.0, 256 * 2 / BLOCK, (Kind::Float, device))?;
    for kind in [Kind::BFloat16, Kind::Half] {
        let made = cuda.unpack_nf4(&packed.f_view([-1, BLOCK / 2])?, &factors.f_unsqueeze(1)?, kind == Kind::Half)?;
        if !made.f_equal(&plain(&packed, &factors, pairs, kind)?)? {
            return Err(Error::Cuda { reason: format!("the kernel gives other numbers in {kind:?}") });
        }
    }
    Ok(cuda)
}
