//! `metrics.jsonl`: one JSON object per logged step and per measurement in between, the source of every chart.

use std::{
    fs::{self, File},
    io::Write as _,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value};

use super::RunError;

/// What is logged of one step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Metric {
    /// Updates done, counted from 1.
    pub step: u64,
    /// The loss of the step; NaN (stored as `null`) where it was not finite.
    #[serde(deserialize_with = "nan_if_null")]
    pub loss: f64,
    /// The learning rate of the step.
    pub lr: f64,
    /// The norm of all gradients before clipping.
    #[serde(deserialize_with = "nan_if_null")]
    pub grad_norm: f64,
    /// Training time since the run began, over all its sessions.
    pub seconds: f64,
    /// Whatever else a trainer logs.
    #[serde(flatten)]
    pub more: Map<String, Value>,
}

/// What was measured between two steps, on examples that are not trained on; told from a [`Metric`] by its key.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Validation {
    /// Updates done; 0 is the base alone.
    pub step: u64,
    /// Mean loss of the examples that are kept apart; NaN (stored as `null`) where it was not finite.
    #[serde(deserialize_with = "nan_if_null")]
    pub validation_loss: f64,
    /// Training time since the run began, over all its sessions.
    pub seconds: f64,
}

/// Everything that a run has logged.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Metrics {
    /// The steps, in order.
    pub steps: Vec<Metric>,
    /// What was measured in between, in order.
    pub validation: Vec<Validation>,
}

/// Appends to `metrics.jsonl`; every line reaches the operating system before the next step.
#[derive(Debug)]
pub struct MetricsWriter {
    path: PathBuf,
    file: File,
}

impl MetricsWriter {
    /// A writer that goes on after `step` steps (0: from the start): later lines, and a half line, are cut off.
    ///
    /// # Errors
    /// If the file cannot be read, cut or opened, or holds a line that is not a metric.
    pub fn after(path: &Path, step: u64) -> Result<Self, RunError> {
        let mut file =
            File::options().create(true).append(true).read(true).open(path).map_err(RunError::write(path))?;
        let text = fs::read_to_string(path).map_err(RunError::read(path))?;
        // Before the first step there is at most a measurement, which is made anew.
        let kept = if step == 0 { 0 } else { parse(path, &text, Some(step))?.1 };
        // Cut where the kept lines end: they are never rewritten, so a crash here loses none of them.
        file.set_len(kept as u64).map_err(RunError::write(path))?;
        file.flush().map_err(RunError::write(path))?;
        Ok(Self { path: path.to_owned(), file })
    }

    /// Appends the line of a step.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn write(&mut self, metric: &Metric) -> Result<(), RunError> {
        self.append(metric)
    }

    /// Appends the line of a measurement.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn write_validation(&mut self, measured: &Validation) -> Result<(), RunError> {
        self.append(measured)
    }

    fn append(&mut self, record: &impl Serialize) -> Result<(), RunError> {
        let mut line = serde_json::to_string(record)
            .map_err(|error| RunError::Write { path: self.path.clone(), source: error.into() })?;
        line.push('\n');
        // One write a line: a crash leaves a prefix of it at most.
        self.file.write_all(line.as_bytes()).map_err(RunError::write(&self.path))
    }
}

/// All that a run has logged; nothing if it has not begun yet. A half last line, left by a crash, is passed over.
///
/// # Errors
/// If the file cannot be read, or any other line is not a record of this program.
pub fn read_metrics(path: &Path) -> Result<Metrics, RunError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(parse(path, &text, None)?.0),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Metrics::default()),
        Err(source) => Err(RunError::Read { path: path.to_owned(), source }),
    }
}

/// The records up to `last` steps and the bytes that their lines take.
fn parse(path: &Path, text: &str, last: Option<u64>) -> Result<(Metrics, usize), RunError> {
    let mut metrics = Metrics::default();
    let mut kept = 0;
    for (index, line) in text.split_inclusive('\n').enumerate() {
        if !line.ends_with('\n') {
            break; // a crash while writing; the step is done again
        }
        let damaged = |source| RunError::Record { path: path.to_owned(), line: index + 1, source };
        let record: Map<String, Value> = serde_json::from_str(line).map_err(damaged)?;
        let beyond = |step| last.is_some_and(|last| step > last);
        if record.contains_key("validation_loss") {
            let measured: Validation = serde_json::from_value(Value::Object(record)).map_err(damaged)?;
            if beyond(measured.step) {
                break;
            }
            metrics.validation.push(measured);
        } else {
            let metric: Metric = serde_json::from_value(Value::Object(record)).map_err(damaged)?;
            if beyond(metric.step) {
                break;
            }
            metrics.steps.push(metric);
        }
        kept += line.len();
    }
    Ok((metrics, kept))
}

fn nan_if_null<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Option::<f64>::deserialize(deserializer)?.unwrap_or(f64::NAN))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metric(step: u64) -> Metric {
        let more = Map::from_iter([("epoch".to_owned(), Value::from(step / 10))]);
        Metric { step, loss: 0.5 / step as f64, lr: 1e-4, grad_norm: 0.1, seconds: step as f64, more }
    }

    #[test]
    fn what_was_written_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let mut writer = MetricsWriter::after(&path, 0).unwrap();
        writer.write(&metric(1)).unwrap();
        writer.write(&Metric { loss: f64::NAN, ..metric(2) }).unwrap();
        let measured = Validation { step: 2, validation_loss: 0.75, seconds: 2.0 };
        writer.write_validation(&measured).unwrap();
        let read = read_metrics(&path).unwrap();
        assert_eq!(read.steps[0], metric(1));
        assert!(read.steps[1].loss.is_nan());
        assert_eq!((read.steps.len(), read.validation), (2, vec![measured]));
        let keys: Value = serde_json::from_str(fs::read_to_string(&path).unwrap().lines().next().unwrap()).unwrap();
        for key in ["step", "loss", "lr", "grad_norm", "seconds", "epoch"] {
            assert!(keys.get(key).is_some(), "{key}");
        }
    }

    #[test]
    fn a_half_last_line_is_passed_over_and_cut_on_resume() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let mut writer = MetricsWriter::after(&path, 0).unwrap();
        for step in 1..=5 {
            writer.write(&metric(step)).unwrap();
        }
        let whole = fs::read(&path).unwrap();
        fs::write(&path, &whole[..whole.len() - 9]).unwrap();
        assert_eq!(read_metrics(&path).unwrap().steps.len(), 4);
        // The newest checkpoint is of step 3.
        let mut writer = MetricsWriter::after(&path, 3).unwrap();
        assert_eq!(read_metrics(&path).unwrap().steps.last().unwrap().step, 3);
        writer.write(&metric(4)).unwrap();
        writer.write(&metric(5)).unwrap();
        assert_eq!(fs::read(&path).unwrap(), whole);
    }

    #[test]
    fn a_measurement_is_kept_with_the_steps_before_it_and_made_anew_from_the_start() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let mut writer = MetricsWriter::after(&path, 0).unwrap();
        let measured = |step| Validation { step, validation_loss: f64::NAN, seconds: 0.0 };
        writer.write_validation(&measured(0)).unwrap();
        for step in 1..=4 {
            writer.write(&metric(step)).unwrap();
            writer.write_validation(&measured(step)).unwrap();
        }
        drop(MetricsWriter::after(&path, 3).unwrap());
        let read = read_metrics(&path).unwrap();
        assert_eq!(read.validation.iter().map(|measured| measured.step).collect::<Vec<_>>(), [0, 1, 2, 3]);
        assert!(read.validation[3].validation_loss.is_nan());
        drop(MetricsWriter::after(&path, 0).unwrap());
        assert_eq!(read_metrics(&path).unwrap(), Metrics::default());
    }

    #[test]
    fn a_damaged_line_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        fs::write(&path, "{\"step\":1,\"loss\":1,\"lr\":1,\"grad_norm\":1,\"seconds\":1}\nrubbish\n").unwrap();
        assert!(matches!(read_metrics(&path), Err(RunError::Record { line: 2, .. })));
    }
}
