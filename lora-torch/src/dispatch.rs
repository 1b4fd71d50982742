//! Calls libtorch operators that `tch` leaves out, through the C functions that libtorch itself exports.
//!
//! `tch` generates no binding for fused optimizers and none for a copy that does not block. `torch_call_dispatcher` takes
//! any operator by name (`torch/csrc/stable/c/shim.h`); arguments are 64-bit words, in the order of the operator's schema
//! (`torch/csrc/stable/stableivalue_conversions.h`): numbers by their bits, a tensor as an owned handle, a list as an
//! owned list handle, an optional value as a pointer to a word made with C++ `new`. A handle is an `at::Tensor*`, the
//! same thing that a [`tch::Tensor`] holds.
#![expect(unsafe_code, reason = "the C interface of libtorch")]

use std::ffi::{CStr, c_char, c_void};

use tch::Tensor;

use crate::{Error, Result};

/// Version of the calling convention that this file was written for, as `TORCH_ABI_VERSION` packs it: 2.11.
const CONVENTION: u64 = (2 << 56) | (11 << 48);

unsafe extern "C" {
    fn torch_call_dispatcher(operator: *const c_char, overload: *const c_char, stack: *mut u64, version: u64) -> i32;
    fn aoti_torch_new_tensor_handle(tensor: *mut c_void, handle: *mut *mut c_void) -> i32;
    fn aoti_torch_copy_(target: *mut c_void, source: *mut c_void, non_blocking: i32) -> i32;
    fn torch_new_list_reserve_size(size: usize, list: *mut *mut c_void) -> i32;
    fn torch_list_push_back(list: *mut c_void, element: u64) -> i32;
    /// `operator new(size_t)`: libtorch frees optional words with `delete`.
    fn _Znwm(size: usize) -> *mut c_void;
}

/// One argument of an operator.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Argument<'a> {
    Tensor(&'a Tensor),
    Tensors(&'a [&'a Tensor]),
    Optional(Option<&'a Tensor>),
    Number(f64),
    Flag(bool),
}

/// Runs an operator that returns nothing.
///
/// # Errors
/// If libtorch refuses it; libtorch prints its reason on stderr.
pub(crate) fn call(operator: &'static CStr, overload: &'static CStr, arguments: &[Argument<'_>]) -> Result<()> {
    dispatch(operator, overload, arguments).map(drop)
}

/// A copy of a host tensor in memory that a device reads by itself, so that an upload need not be waited for.
///
/// `tch` passes a device that libtorch warns is deprecated.
pub(crate) fn pinned(tensor: &Tensor) -> Result<Tensor> {
    call_for_tensor(c"aten::pin_memory", c"", &[Argument::Tensor(tensor), Argument::Optional(None)])
}

/// Runs an operator that returns one tensor.
fn call_for_tensor(operator: &'static CStr, overload: &'static CStr, arguments: &[Argument<'_>]) -> Result<Tensor> {
    let word = dispatch(operator, overload, arguments)?;
    // SAFETY: after the call the first word is an owned handle, an `at::Tensor*`, which the new tensor takes over.
    Ok(unsafe { Tensor::from_ptr(word as *mut _) })
}

/// Runs an operator and returns the first word of its stack.
fn dispatch(operator: &'static CStr, overload: &'static CStr, arguments: &[Argument<'_>]) -> Result<u64> {
    let mut stack = Vec::with_capacity(arguments.len().max(1));
    for argument in arguments {
        stack.push(argument.word()?);
    }
    // SAFETY: the names are C strings, the stack holds one word per argument of the schema, in the convention described
    // above, and the call takes over every handle in it. The operators used here return one value at most, and every one
    // has an argument, so that the stack has room for it.
    let code = unsafe { torch_call_dispatcher(operator.as_ptr(), overload.as_ptr(), stack.as_mut_ptr(), CONVENTION) };
    checked(code, operator)?;
    Ok(stack.first().copied().unwrap_or_default())
}

/// Copies `source` into `target`; with pinned memory on one side the host does not wait.
pub(crate) fn copy_without_waiting(target: &Tensor, source: &Tensor) -> Result<()> {
    // SAFETY: both pointers are live `at::Tensor*`; the call borrows them.
    let code = unsafe { aoti_torch_copy_(target.as_ptr() as *mut c_void, source.as_ptr() as *mut c_void, 1) };
    checked(code, c"aten::copy_")
}

impl Argument<'_> {
    fn word(self) -> Result<u64> {
        Ok(match self {
            Self::Tensor(tensor) => handle(tensor)? as u64,
            Self::Tensors(tensors) => {
                let mut list = std::ptr::null_mut();
                // SAFETY: `list` is a place for the new handle; every element is an owned handle that the list takes.
                unsafe {
                    checked(torch_new_list_reserve_size(tensors.len(), &mut list), c"new list")?;
                    for tensor in tensors {
                        checked(torch_list_push_back(list, handle(tensor)? as u64), c"list")?;
                    }
                }
                list as u64
            }
            Self::Optional(None) => 0,
            Self::Optional(Some(tensor)) => {
                let word = handle(tensor)? as u64;
                // SAFETY: `operator new` never gives null, and memory for a `u64` is aligned for one.
                unsafe {
                    let place = _Znwm(size_of::<u64>()).cast::<u64>();
                    place.write(word);
                    place as u64
                }
            }
            Self::Number(number) => number.to_bits(),
            Self::Flag(flag) => u64::from(flag),
        })
    }
}

/// A new reference to the same tensor, to be taken over by libtorch.
fn handle(tensor: &Tensor) -> Result<*mut c_void> {
    let mut new = std::ptr::null_mut();
    // SAFETY: the pointer is a live `at::Tensor*`, `new` a place for the handle.
    let code = unsafe { aoti_torch_new_tensor_handle(tensor.as_ptr() as *mut c_void, &mut new) };
    checked(code, c"new handle")?;
    Ok(new)
}

fn checked(code: i32, operator: &CStr) -> Result<()> {
    if code == 0 {
        return Ok(());
    }
    Err(Error::Torch { message: format!("{} failed", operator.to_string_lossy()) })
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;

    #[test]
    fn an_operator_is_called_by_name_and_gives_its_tensor() {
        let x = Tensor::f_from_slice(&[1.0_f32, -2.0]).unwrap();
        let negated = call_for_tensor(c"aten::neg", c"", &[Argument::Tensor(&x)]).unwrap();
        assert_eq!(Vec::<f32>::try_from(negated).unwrap(), [-1.0, 2.0]);
        assert_eq!(Vec::<f32>::try_from(x).unwrap(), [1.0, -2.0]);
    }

    #[test]
    fn what_libtorch_refuses_is_an_error() {
        let [left, right] = [[2, 3], [4, 5]].map(|shape| Tensor::f_zeros(shape, (Kind::Float, Device::Cpu)).unwrap());
        assert!(call_for_tensor(c"aten::mm", c"", &[Argument::Tensor(&left), Argument::Tensor(&right)]).is_err());
        assert!(call(c"aten::no_such_operator", c"", &[Argument::Tensor(&left)]).is_err());
    }

    #[test]
    fn a_copy_without_waiting_copies() {
        let [source, target] = [3.0, 0.0].map(|value| Tensor::f_full([4], value, (Kind::Float, Device::Cpu)).unwrap());
        copy_without_waiting(&target, &source).unwrap();
        assert_eq!(target, source);
    }
}
