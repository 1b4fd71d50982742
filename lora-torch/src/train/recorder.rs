//! CUDA's side of the loop: one captured graph a bucket, static inputs, and readings that are looked at late.
//!
//! The first step runs as it is, so that cuBLAS, cuDNN and the allocator set themselves up; from then on the first batch
//! of a bucket is captured and every batch is a copy into static inputs and a replay. All graphs share one memory pool,
//! which is sound because they run one after the other on one stream and everything that outlives a replay lies outside.

use std::collections::{HashMap, VecDeque};

use tch::{Device, Kind, Tensor};

use super::device::{Phase, READINGS};
use crate::{
    Batch, Result,
    backend::host_values,
    cuda::{Cuda, Event, Graph, GraphPool},
    dispatch::{copy_without_waiting, pinned},
};

/// How many steps may be on their way before the host waits for the oldest.
const IN_FLIGHT: usize = 2;

#[derive(Debug)]
pub(super) struct Recorder {
    cuda: Cuda,
    device: Device,
    pool: GraphPool,
    graphs: HashMap<(u64, Phase), Captured>,
    readings: VecDeque<Late>,
    /// A whole step has run without a graph.
    warm: bool,
    /// Why no graph is used, if so.
    eager: Option<String>,
}

#[derive(Debug)]
struct Captured {
    graph: Graph,
    inputs: Vec<Tensor>,
}

/// Readings on their way to the host.
#[derive(Debug)]
struct Late {
    step: u64,
    host: Tensor,
    arrived: Event,
}

impl Recorder {
    /// Moves this thread's work to a stream that can be captured.
    pub(super) fn new(cuda: Cuda, device: Device, graphs: bool) -> Result<Self> {
        cuda.enter_side_stream()?;
        let pool = cuda.graph_pool()?;
        let eager = (!graphs).then(|| "it was switched off".to_owned());
        Ok(Self { cuda, device, pool, graphs: HashMap::new(), readings: VecDeque::new(), warm: false, eager })
    }

    /// Runs `work` on the batch's inputs, by a graph where there can be one.
    pub(super) fn run(
        &mut self,
        batch: &Batch,
        phase: Phase,
        work: &mut dyn FnMut(&[Tensor]) -> Result<()>,
    ) -> Result<()> {
        let inputs: Vec<Tensor> = batch.inputs.iter().map(on_the_way).collect::<Result<_>>()?;
        if !self.warm || self.eager.is_some() {
            self.warm |= phase.last;
            return work(&self.uploaded(&inputs)?);
        }
        let key = (batch.bucket, phase);
        if !self.graphs.contains_key(&key) {
            if self.graphs.is_empty() {
                self.cuda.synchronize()?;
                self.cuda.empty_cache()?; // what the first step held would else lie beside the graphs' pool for good
            }
            let fixed = self.uploaded(&inputs)?;
            match self.cuda.capture(self.pool, || work(&fixed)) {
                Ok(graph) => {
                    self.graphs.insert(key, Captured { graph, inputs: fixed });
                }
                Err(error) => {
                    self.eager = Some(error.to_string());
                    return work(&fixed);
                }
            }
        }
        let Some(Captured { graph, inputs: fixed }) = self.graphs.get(&key) else { return Ok(()) };
        for (target, source) in fixed.iter().zip(&inputs) {
            copy_without_waiting(target, source)?;
        }
        graph.replay()
    }

    /// Sends a step's readings on their way and returns those that must have arrived: of the oldest step in flight.
    pub(super) fn read(&mut self, step: u64, readings: &Tensor) -> Result<Option<(u64, [f64; READINGS])>> {
        let host = pinned(&Tensor::f_zeros([READINGS as i64], (Kind::Float, Device::Cpu))?)?;
        copy_without_waiting(&host, readings)?;
        let arrived = self.cuda.event()?;
        arrived.record()?;
        self.readings.push_back(Late { step, host, arrived });
        if self.readings.len() > IN_FLIGHT { self.next() } else { Ok(None) }
    }

    /// Waits for the oldest readings in flight.
    pub(super) fn next(&mut self) -> Result<Option<(u64, [f64; READINGS])>> {
        let Some(Late { step, host, arrived }) = self.readings.pop_front() else { return Ok(None) };
        arrived.wait()?;
        let values = host_values(&host)?;
        Ok(Some((step, std::array::from_fn(|i| f64::from(values[i])))))
    }

    /// How the steps run, for people.
    pub(super) fn describe(&self) -> String {
        match &self.eager {
            Some(reason) => format!("without a CUDA graph, since {reason}"),
            None => {
                let nodes = self.graphs.values().map(|captured| captured.graph.nodes()).max().unwrap_or(0);
                format!("{} CUDA graphs, the largest of {nodes} nodes", self.graphs.len())
            }
        }
    }

    fn uploaded(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        inputs.iter().map(|input| Ok(input.f_internal_to_copy((input.f_kind()?, self.device), true)?)).collect()
    }
}

/// The tensor in memory that the device can read by itself; one that is on the device stays there.
fn on_the_way(tensor: &Tensor) -> Result<Tensor> {
    if tensor.device() == Device::Cpu { pinned(tensor) } else { Ok(tensor.shallow_clone()) }
}
