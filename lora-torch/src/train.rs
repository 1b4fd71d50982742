//! The training loop, written once for every model family: one [`Trainer::step`] at a time.
//!
//! It knows nothing of pictures and words: an [`Objective`](crate::Objective) gives batches and losses. What it adds:
//! adapters on the targets, the arena, clipping, update rule and schedule, accumulation, a moving average, a guard against
//! numbers that are not finite, CUDA graphs, checkpoints and exact resume.

mod device;
mod gradient;
mod recorder;
mod state;
mod trained;

use std::collections::VecDeque;

use lora_core::{AdapterConfig, Method};
use tch::{Device, Tensor};

use self::{
    device::{DeviceState, Phase, READINGS},
    gradient::{Gradient, Lanes},
    recorder::Recorder,
    trained::Trained,
};
use crate::{
    Error, Objective, Projection, Result, Torch, backend::host_values, cuda::Cuda, optimizer::OptimizerConfig,
    schedule::Schedule,
};

pub use state::Resumed;
pub use trained::{NamedAdapter, Target};

/// After so many broken steps in a row the run stops.
const PATIENCE: u32 = 3;

/// What will run.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainOptions {
    /// Seed of everything that is drawn.
    pub seed: u64,
    /// Steps of the whole run, at least 1.
    pub steps: u64,
    /// Micro-steps whose gradients are averaged in one step, at least 1.
    pub accumulation: u64,
    /// The adapters that are started.
    pub adapter: AdapterConfig,
    /// The update rule.
    pub optimizer: OptimizerConfig,
    /// The base learning rate.
    pub rate: f64,
    /// How many times that of all others the learning rate of `up` factors is: LoRA+ (Hayou et al. 2024, arXiv 2402.12354,
    /// §5). At 1 all learn alike.
    pub up_rate: f64,
    /// How it changes over the run.
    pub schedule: Schedule,
    /// Norm to which longer gradients are scaled down.
    pub clip: Option<f64>,
    /// Decay of a moving average of the adapter, if one is kept.
    pub ema: Option<f64>,
    /// Whether steps are captured as CUDA graphs, where there is CUDA.
    pub graphs: bool,
}

/// What came of one step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Report {
    /// The step, counted from 1.
    pub step: u64,
    /// Mean loss of its micro-steps.
    pub loss: f64,
    /// Norm of the gradient before clipping.
    pub gradient_norm: f64,
    /// The learning rate of modules whose factor is 1.
    pub rate: f64,
    /// Examples in its batches.
    pub examples: usize,
    /// Whether it changed the adapter; it did not if loss or gradient were not finite.
    pub applied: bool,
}

/// An objective in training.
#[derive(Debug)]
pub struct Trainer<O> {
    objective: O,
    options: TrainOptions,
    trained: Trained,
    device: DeviceState,
    /// How steps are enqueued on CUDA.
    recorder: Option<Recorder>,
    /// How a batch is shared out on the CPU, if it is.
    lanes: Option<Lanes>,
    /// Steps that were enqueued.
    step: u64,
    /// Examples of steps whose readings are not known yet.
    examples: VecDeque<usize>,
    broken_in_a_row: u32,
}

impl<O: Objective> Trainer<O> {
    /// Puts adapters on the projections that `select` gives a [`Target`], ready for the first step.
    ///
    /// On CUDA this thread's work moves to a stream of its own; the trainer must stay on the thread.
    ///
    /// # Errors
    /// If nothing is selected, an option cannot be, or memory runs out.
    pub fn new(
        on: &Torch,
        mut objective: O,
        select: &mut dyn FnMut(&Projection) -> Option<Target>,
        options: TrainOptions,
    ) -> Result<Self> {
        options.check()?;
        let recorder = match on.device {
            Device::Cuda(index) => Some(Recorder::new(Cuda::load(index)?, on.device, options.graphs)?),
            _ => None,
        };
        let (trained, arena) = Trained::new(on, &mut objective, select, &options)?;
        let lanes = match on.device {
            Device::Cpu => Lanes::start(objective.replicas(), &trained, &arena)?,
            _ => None,
        };
        let device = DeviceState::new(arena, &trained, &options)?;
        let examples = VecDeque::new();
        Ok(Self { objective, options, trained, device, recorder, lanes, step: 0, examples, broken_in_a_row: 0 })
    }

    /// Runs the next step and returns the reports of steps that are known to be finished: on the CPU that of this step, on
    /// CUDA those of earlier ones, since it does not wait for the device.
    ///
    /// # Errors
    /// Those of the objective; [`Error::NotFinite`] after three broken steps in a row, none of which was applied.
    pub fn step(&mut self) -> Result<Vec<Report>> {
        if self.is_finished() {
            return self.finish();
        }
        let mut examples = 0;
        for micro in 0..self.options.accumulation {
            let batch = self.objective.batch(self.step, micro)?;
            examples += batch.examples;
            let phase = Phase { first: micro == 0, last: micro + 1 == self.options.accumulation };
            let (device, objective, trained, lanes) =
                (&mut self.device, &mut self.objective, &self.trained, &self.lanes);
            let mut work = |inputs: &[Tensor]| {
                let scale = device.loss_scale.as_ref();
                let gradient = match lanes {
                    Some(lanes) => lanes.run(inputs, scale)?,
                    None => Gradient::of(objective, trained, &device.arena, inputs, scale)?,
                };
                device.take(gradient, phase)
            };
            match &mut self.recorder {
                Some(recorder) => recorder.run(&batch, phase, &mut work)?,
                None => work(&batch.inputs)?,
            }
        }
        self.trained.detach(&mut self.objective);
        self.examples.push_back(examples);
        self.step += 1;
        let known = match &mut self.recorder {
            Some(recorder) => recorder.read(self.step, &self.device.readings)?,
            None => {
                let values = host_values(&self.device.readings)?;
                Some((self.step, std::array::from_fn(|i| f64::from(values[i]))))
            }
        };
        known.into_iter().map(|(step, readings)| self.report(step, readings)).collect()
    }

    /// Waits for all steps that are on their way.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn finish(&mut self) -> Result<Vec<Report>> {
        let mut reports = Vec::new();
        while let Some(recorder) = &mut self.recorder {
            let Some((step, readings)) = recorder.next()? else { break };
            reports.push(self.report(step, readings)?);
        }
        Ok(reports)
    }

    /// Whether all steps were enqueued; [`finish`](Self::finish) then gives the last reports.
    pub fn is_finished(&self) -> bool {
        self.step >= self.options.steps
    }

    /// Steps that were enqueued so far.
    pub fn steps_done(&self) -> u64 {
        self.step
    }

    /// What runs.
    pub fn options(&self) -> &TrainOptions {
        &self.options
    }

    /// How many numbers are trained.
    pub fn trainable_parameters(&self) -> usize {
        self.device.arena.trainable()
    }

    /// How many modules carry an adapter in training.
    pub fn modules(&self) -> usize {
        self.trained.count()
    }

    /// How steps run on CUDA, for people; `None` on the CPU.
    pub fn graphs(&self) -> Option<String> {
        self.recorder.as_ref().map(Recorder::describe)
    }

    /// The adapters as they are now, or their moving average if there is one and it is asked for; copies.
    pub fn adapters(&self, average: bool) -> Result<Vec<NamedAdapter>> {
        let _no_grad = tch::no_grad_guard();
        let flat = crate::backend::copied(&self.values(average)?)?;
        self.trained.adapters(&self.device.arena, &flat)
    }

    /// The objective, without the adapters in training.
    pub fn objective(&mut self) -> &mut O {
        &mut self.objective
    }

    /// Runs `work` on the objective with the adapters (or their moving average) on it and no gradients: for samples and
    /// evaluation between steps.
    pub fn with_adapters<R>(&mut self, average: bool, work: impl FnOnce(&mut O) -> Result<R>) -> Result<R> {
        let _no_grad = tch::no_grad_guard();
        let flat = self.values(average)?;
        self.trained.attach_values(&mut self.objective, &self.device.arena, &flat)?;
        let result = work(&mut self.objective);
        self.trained.detach(&mut self.objective);
        result
    }

    /// Gives the objective back, without the adapters.
    pub fn into_objective(self) -> O {
        self.objective
    }

    fn values(&self, average: bool) -> Result<Tensor> {
        match &self.device.average {
            Some(average_values) if average => Ok(average_values.shallow_clone()),
            _ => self.device.arena.values(),
        }
    }

    fn report(&mut self, step: u64, [loss, gradient_norm, broken]: [f64; READINGS]) -> Result<Report> {
        let applied = broken == 0.0;
        self.broken_in_a_row = if applied { 0 } else { self.broken_in_a_row + 1 };
        if self.broken_in_a_row >= PATIENCE {
            return Err(Error::NotFinite { step, count: self.broken_in_a_row });
        }
        let rate = self.options.rate * self.options.schedule.factor(step - 1, self.options.steps);
        let examples = self.examples.pop_front().unwrap_or(0);
        Ok(Report { step, loss, gradient_norm, rate, examples, applied })
    }
}

impl TrainOptions {
    fn check(&self) -> Result<()> {
        let refuse = |option, reason: &str| Err(Error::Config { option, reason: reason.to_owned() });
        if self.steps == 0 || self.accumulation == 0 {
            return refuse(if self.steps == 0 { "steps" } else { "accum" }, "must be at least 1");
        }
        if !self.rate.is_finite() || self.rate < 0.0 {
            return refuse("lr", "must be a finite number and not negative");
        }
        if !self.up_rate.is_finite() || self.up_rate <= 0.0 {
            return refuse("lora-plus", "must be a finite number greater than 0");
        }
        if self.up_rate != 1.0 && matches!(self.optimizer, OptimizerConfig::Prodigy { .. }) {
            return refuse("lora-plus", "Prodigy estimates one step size for all factors");
        }
        if self.up_rate != 1.0 && matches!(self.adapter.method, Method::Loha | Method::Lokr) {
            return refuse("lora-plus", "LoHa and LoKr have no `up` that starts at zero");
        }
        if self.clip.is_some_and(|limit| limit.is_nan() || limit <= 0.0) {
            return refuse("clip", "must be greater than 0");
        }
        if self.ema.is_some_and(|decay| !(0.0..1.0).contains(&decay)) {
            return refuse("ema", "must be at least 0 and less than 1");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
