//! What is kept of a run's steps: lines of numbers, points of curves, and the time that training took.

use std::time::{Duration, Instant};

use lora_cli::run::{EventWriter, Metric, MetricsWriter, RunDir, RunError, Validation};
use lora_torch::Report;
use serde_json::Value;

/// Where the numbers of steps go.
pub(super) struct Log {
    metrics: MetricsWriter,
    /// What TensorBoard shows; samples go there, too.
    pub(super) events: EventWriter,
    /// Steps between two lines.
    every: u64,
    /// The last step of the run, which has a line in any case.
    last: u64,
}

impl Log {
    /// The log of a run that goes on after `first` steps and ends with `last`.
    ///
    /// # Errors
    /// If a file cannot be written, or holds what this program has not written.
    pub(super) fn open(run: &RunDir, first: u64, last: u64, every: u64) -> Result<Self, RunError> {
        let (metrics, events) = (MetricsWriter::after(&run.metrics(), first)?, EventWriter::create(run.root(), first)?);
        Ok(Self { metrics, events, every, last })
    }

    /// Writes what came of a step, if it is the turn of one.
    ///
    /// # Errors
    /// If it cannot be written.
    pub(super) fn step(&mut self, report: &Report, seconds: f64) -> Result<(), RunError> {
        if !report.step.is_multiple_of(self.every) && report.step != self.last && report.step != 1 && report.applied {
            return Ok(());
        }
        let Report { step, loss, gradient_norm: grad_norm, rate: lr, examples, applied } = *report;
        let mut more = serde_json::Map::new();
        more.insert("examples".to_owned(), Value::from(examples as u64));
        if !applied {
            more.insert("applied".to_owned(), Value::from(false));
        }
        self.metrics.write(&Metric { step, loss, lr, grad_norm, seconds, more })?;
        for (tag, value) in [("loss", loss), ("lr", lr), ("grad_norm", grad_norm)] {
            self.events.scalar(step, &format!("train/{tag}"), value)?;
        }
        Ok(())
    }

    /// Writes what was measured of the examples that are kept apart.
    ///
    /// # Errors
    /// If it cannot be written.
    pub(super) fn validation(&mut self, measured: &Validation) -> Result<(), RunError> {
        self.metrics.write_validation(measured)?;
        self.events.scalar(measured.step, "validation/loss", measured.validation_loss)
    }
}

/// Training time over all sessions, without the time that samples take.
pub(super) struct Clock {
    earlier: f64,
    started: Instant,
    paused: Duration,
}

impl Clock {
    /// A clock that has run for so many seconds in earlier sessions.
    pub(super) fn start(earlier: f64) -> Self {
        Self { earlier, started: Instant::now(), paused: Duration::ZERO }
    }

    /// Does something that is no training.
    pub(super) fn pause(&mut self, work: impl FnOnce()) {
        let before = Instant::now();
        work();
        self.paused += before.elapsed();
    }

    /// Seconds of training so far.
    pub(super) fn seconds(&self) -> f64 {
        self.earlier + (self.started.elapsed() - self.paused).as_secs_f64()
    }
}
