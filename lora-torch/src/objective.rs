//! What a model family knows of its training; the trainer does the rest.

use tch::Tensor;

use crate::{Projection, Result};

/// The inputs of one micro-step, on the host.
#[derive(Debug)]
pub struct Batch {
    /// Batches of one bucket have the same shapes and kinds; on CUDA each bucket is captured as one graph.
    pub bucket: u64,
    /// The tensors that [`Model::loss`] gets, in that order.
    pub inputs: Vec<Tensor>,
    /// How many examples they hold.
    pub examples: usize,
}

/// A model with the loss that its adapters are trained on.
pub trait Model {
    /// The mean loss of a batch, a 32-bit scalar; `inputs` are those of the [`Batch`], on the device.
    ///
    /// On CUDA it may be captured once and replayed for every later batch of the bucket, so it must not wait for the device
    /// or depend on the host: no tensor's value is read there, none is made of numbers that change, nothing is uploaded.
    fn loss(&self, inputs: &[Tensor]) -> Result<Tensor>;

    /// All projections of the model or models, always in the same order; the trainer puts adapters on its targets.
    fn projections(&mut self) -> Vec<&mut Projection>;
}

/// A model and what it learns from.
pub trait Objective: Model {
    /// The batch of a step (counted from 0) and a micro-step of it, on the host.
    ///
    /// A pure function of seed, `step` and `micro`, so that a resumed run goes on as if it had never stopped. On CUDA it
    /// runs while the device is busy with the step before.
    fn batch(&self, step: u64, micro: u64) -> Result<Batch>;

    /// Further copies of the model over the same frozen tensors, which the trainer takes over, on the CPU alone.
    ///
    /// If there are any, each gets a thread of its own and a share of every batch: for small models that is faster than
    /// several threads inside each operation, which start and meet hundreds of times a step. To be shared out, a batch must
    /// have its rows along the first axis of every input, and a loss that is their mean.
    fn replicas(&mut self) -> Vec<Box<dyn Model + Send>> {
        Vec::new()
    }
}
