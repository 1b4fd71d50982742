//! Tensors whose gradient is a function of ours: what libtorch calls a custom autograd function.
//!
//! Autograd keeps for the backward pass of a product what it multiplied by, be it a matrix that was made for this one use
//! and could be made again. Neither `tch` nor libtorch's C interface lets a caller say otherwise, so a node of its graph
//! that calls back is written in C++ (`shim/autograd.cpp`).
#![expect(unsafe_code, reason = "the C interface of a shim of our own")]

use std::{
    ffi::{CStr, c_char, c_void},
    mem,
};

use tch::Tensor;

use crate::{Error, Result};

/// From the gradient of a value to that of its input.
type Slope = dyn Fn(&Tensor) -> Result<Tensor> + Send;

type SlopeCall = unsafe extern "C" fn(*mut c_void, *mut c_void, *mut c_char, usize) -> *mut c_void;

unsafe extern "C" {
    fn lora_autograd_attach(
        value: *const c_void,
        input: *const c_void,
        slope: SlopeCall,
        state: *mut c_void,
        free: unsafe extern "C" fn(*mut c_void),
        reason: *mut c_char,
        capacity: usize,
    ) -> i32;
}

/// `value` as a function of `input` whose gradient in `input` is `slope` of its own; of nothing else is it a function.
///
/// `value` was computed without a graph, in memory of its own. `slope` runs without gradients, on the thread of the backward
/// pass, and what it holds is all that is kept until then. Where nobody asks for gradients this does nothing.
///
/// # Errors
/// If `value` has a history already. An error of `slope` is one of the backward pass.
pub(crate) fn with_slope(
    value: Tensor,
    input: &Tensor,
    slope: impl Fn(&Tensor) -> Result<Tensor> + Send + 'static,
) -> Result<Tensor> {
    let state: Box<Box<Slope>> = Box::new(Box::new(slope));
    let mut reason = [0; 512];
    // SAFETY: both tensors are live `at::Tensor*` that the call borrows. The state is what `call` and `free` expect, and
    // the shim takes it over and frees it once. The buffer has the size that is stated.
    let code = unsafe {
        lora_autograd_attach(
            value.as_ptr() as *const c_void,
            input.as_ptr() as *const c_void,
            call,
            Box::into_raw(state).cast(),
            free,
            reason.as_mut_ptr(),
            reason.len(),
        )
    };
    if code == 0 {
        return Ok(value);
    }
    let bytes = reason.map(|byte: c_char| byte as u8);
    let message = CStr::from_bytes_until_nul(&bytes).unwrap_or_default().to_string_lossy();
    Err(Error::Torch { message: message.lines().next().unwrap_or_default().to_owned() })
}

/// # Safety
/// `state` must be a live `Box<Slope>`, `gradient` an owned `at::Tensor*`, `reason` a buffer of `capacity` > 0 bytes.
unsafe extern "C" fn call(
    state: *mut c_void,
    gradient: *mut c_void,
    reason: *mut c_char,
    capacity: usize,
) -> *mut c_void {
    // SAFETY: promised by the caller; the node calls under a lock, so that nobody else uses the state meanwhile.
    let (slope, gradient) = unsafe { (&*state.cast::<Box<Slope>>(), Tensor::from_ptr(gradient.cast())) };
    match slope(&gradient) {
        Ok(mut slope) => {
            let handle = slope.as_mut_ptr();
            mem::forget(slope); // the shim owns it now
            handle.cast()
        }
        Err(error) => {
            let text = error.to_string();
            let length = text.len().min(capacity - 1);
            // SAFETY: the buffer has room for `length` bytes and the final 0.
            unsafe {
                reason.cast::<u8>().copy_from_nonoverlapping(text.as_ptr(), length);
                reason.add(length).write(0);
            }
            std::ptr::null_mut()
        }
    }
}

/// # Safety
/// `state` must come from [`with_slope`] and not be used again.
unsafe extern "C" fn free(state: *mut c_void) {
    // SAFETY: promised by the caller.
    drop(unsafe { Box::from_raw(state.cast::<Box<Slope>>()) });
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    };

    use tch::Kind;

    use super::*;

    fn leaf() -> Tensor {
        Tensor::f_from_slice(&[1.0f32, 2.0]).unwrap().f_set_requires_grad(true).unwrap()
    }

    #[test]
    fn the_slope_that_was_given_is_the_gradient() {
        let (x, y) = (leaf(), tch::no_grad(|| leaf().f_mul_scalar(3.0).unwrap()));
        // Not the true one, so that nothing else can have made it.
        let y = with_slope(y, &x, |slope| Ok(slope.f_mul_scalar(5.0)?)).unwrap();
        assert!(y.requires_grad());
        // A history may go on in place.
        let mut y = y;
        let loss = y.f_mul_scalar_(2.0).unwrap().f_square().unwrap().f_sum(Kind::Float).unwrap(); // (2·3·x)², by y: 2·6x·2
        let gradient = Tensor::f_run_backward(&[loss], &[&x], false, false).unwrap();
        assert_eq!(Vec::<f32>::try_from(&gradient[0]).unwrap(), [5.0 * 24.0, 5.0 * 48.0]);
    }

    #[test]
    fn an_error_of_the_slope_is_one_of_the_backward_pass() {
        let x = leaf();
        let y = with_slope(x.f_detach().unwrap().copy(), &x, |_| {
            Err(Error::OutOfMemory { message: "CUDA out of memory".to_owned() })
        });
        let loss = y.unwrap().f_sum(Kind::Float).unwrap();
        let error = Tensor::f_run_backward(&[loss], &[&x], false, false).unwrap_err();
        assert!(matches!(Error::from(error), Error::OutOfMemory { .. }));
    }

    /// Counts how many of it there are.
    struct Counted(Arc<AtomicUsize>);

    impl Drop for Counted {
        fn drop(&mut self) {
            self.0.fetch_sub(1, Ordering::SeqCst);
        }
    }

    #[test]
    fn what_the_slope_holds_goes_with_the_graph_or_at_once_without_one() {
        let count = Arc::new(AtomicUsize::new(2));
        let x = leaf();
        let attach = |value: Tensor| {
            let held = Counted(Arc::clone(&count));
            with_slope(value, &x, move |slope| {
                let _ = &held;
                Ok(slope.shallow_clone())
            })
            .unwrap()
        };
        let y = attach(x.f_detach().unwrap().copy());
        assert_eq!(count.load(Ordering::SeqCst), 2);
        let unasked = tch::no_grad(|| attach(x.f_detach().unwrap().copy()));
        assert!(!unasked.requires_grad());
        assert_eq!(count.load(Ordering::SeqCst), 1);
        drop(y);
        assert_eq!(count.load(Ordering::SeqCst), 0);
    }
}
