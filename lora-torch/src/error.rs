//! Everything that can go wrong in this crate, with what was seen and what was expected as fields.

use std::{io, path::PathBuf};

use tch::TchError;

/// The result of every fallible function here.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// libtorch refused an operation; its message without the C++ stack.
    #[error("libtorch: {message}")]
    Torch {
        /// The first line of libtorch's message.
        message: String,
    },
    /// The device or the host has no memory left for a tensor.
    #[error("out of memory: {message}")]
    OutOfMemory {
        /// The first line of libtorch's message, with sizes.
        message: String,
    },
    /// The adapter core refused something.
    #[error(transparent)]
    Core(#[from] lora_core::Error),
    /// A tensor that a model needs is not among its weights.
    #[error("`{name}` is missing from the weights")]
    MissingTensor {
        /// Its full name.
        name: String,
    },
    /// A tensor has another shape than the model needs.
    #[error("`{name}` is {actual:?}, expected {expected:?}")]
    Shape {
        /// Its full name.
        name: String,
        /// What the model needs.
        expected: Vec<usize>,
        /// What was found.
        actual: Vec<usize>,
    },
    /// Two files of one component hold a tensor of the same name.
    #[error("`{name}` is both in {} and in {}", first.display(), second.display())]
    Duplicate {
        /// The tensor.
        name: String,
        /// Where it was seen first.
        first: PathBuf,
        /// Where it was seen again.
        second: PathBuf,
    },
    /// A tensor of a kind that libtorch has no counterpart for here.
    #[error("`{name}` has the type {kind}, which cannot be used here")]
    Kind {
        /// The tensor.
        name: String,
        /// Its type as the file names it.
        kind: String,
    },
    /// A matrix in 4 bits that does not hold together, or one that cannot be brought into them.
    #[error("`{name}` in 4 bits: {reason}")]
    Quantised {
        /// The tensor.
        name: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A setting that cannot be.
    #[error("{option}: {reason}")]
    Config {
        /// The option as a person writes it.
        option: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// Loss or gradient was not finite for several steps in a row; nothing of them was applied.
    #[error("loss or gradient is not a finite number in {count} steps in a row, the last of them step {step}")]
    NotFinite {
        /// The last of the steps, counted from 1.
        step: u64,
        /// How many in a row.
        count: u32,
    },
    /// A file could not be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file could not be written.
    #[error("cannot write {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A checkpoint that does not fit this run, or is not what was recorded about it.
    #[error("{}: {reason}", path.display())]
    Checkpoint {
        /// The checkpoint's folder or file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// What needs a CUDA device cannot be had.
    #[error("CUDA cannot be used: {reason}")]
    Cuda {
        /// Why.
        reason: String,
    },
    /// An adapter that cannot sit beside a layer, only be merged into the weights.
    #[error("{}: `{name}` is changed in a way that can only be merged into the base", path.display())]
    NotAttachable {
        /// The adapter's file.
        path: PathBuf,
        /// The module or tensor.
        name: String,
    },
    /// A model family's own error.
    #[error("{source}")]
    Model {
        /// Its cause.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl Error {
    /// Wraps an error of a crate above this one, so that it can pass through [`Objective`](crate::Objective).
    pub fn model(source: impl std::error::Error + Send + Sync + 'static) -> Self {
        Self::Model { source: Box::new(source) }
    }
}

impl From<TchError> for Error {
    fn from(error: TchError) -> Self {
        let text = error.to_string();
        // Everything below the first line is a C++ stack.
        let first = text.lines().next().unwrap_or_default();
        let message = first.trim_start_matches("Internal torch error: ").to_owned();
        if message.contains("out of memory") || message.contains("can't allocate memory") {
            Self::OutOfMemory { message }
        } else {
            Self::Torch { message }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_libtorch_error_loses_its_stack_and_keeps_its_reason() {
        let a = tch::Tensor::f_zeros([2, 3], (tch::Kind::Float, tch::Device::Cpu)).unwrap();
        let message = Error::from(a.f_matmul(&a).unwrap_err()).to_string();
        assert!(message.contains("2x3"), "{message}");
        assert!(!message.contains('\n') && !message.contains("Exception raised"), "{message}");
    }

    #[test]
    fn running_out_of_memory_is_told_apart() {
        let huge = tch::Tensor::f_empty([1 << 44], (tch::Kind::Double, tch::Device::Cpu)).unwrap_err();
        assert!(matches!(Error::from(huge), Error::OutOfMemory { .. }));
    }
}
