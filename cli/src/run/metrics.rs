//! `metrics.jsonl`: one JSON object per logged step, the source of every chart.

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
        let (_, kept) = parse(path, &text, Some(step))?;
        // Cut where the kept lines end: they are never rewritten, so a crash here loses none of them.
        file.set_len(kept as u64).map_err(RunError::write(path))?;
        file.flush().map_err(RunError::write(path))?;
        Ok(Self { path: path.to_owned(), file })
    }

    /// Appends one line.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn write(&mut self, metric: &Metric) -> Result<(), RunError> {
        let mut line = serde_json::to_string(metric)
            .map_err(|error| RunError::Write { path: self.path.clone(), source: error.into() })?;
        line.push('\n');
        // One write a line: a crash leaves a prefix of it at most.
        self.file.write_all(line.as_bytes()).map_err(RunError::write(&self.path))
    }
}

/// All metrics of a run; none if it has not logged yet. A half last line, left by a crash, is passed over.
///
/// # Errors
/// If the file cannot be read, or any other line is not a metric.
pub fn read_metrics(path: &Path) -> Result<Vec<Metric>, RunError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(parse(path, &text, None)?.0),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(source) => Err(RunError::Read { path: path.to_owned(), source }),
    }
}

/// The metrics up to `last` steps and the bytes that their lines take.
fn parse(path: &Path, text: &str, last: Option<u64>) -> Result<(Vec<Metric>, usize), RunError> {
    let mut metrics = Vec::new();
    let mut kept = 0;
    for (index, line) in text.split_inclusive('\n').enumerate() {
        if !line.ends_with('\n') {
            break; // a crash while writing; the step is done again
        }
        let metric: Metric = serde_json::from_str(line).map_err(|source| RunError::Record {
            path: path.to_owned(),
            line: index + 1,
            source,
        })?;
        if last.is_some_and(|last| metric.step > last) {
            break;
        }
        metrics.push(metric);
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
        let read = read_metrics(&path).unwrap();
        assert_eq!(read[0], metric(1));
        assert!(read[1].loss.is_nan());
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
        assert_eq!(read_metrics(&path).unwrap().len(), 4);
        // The newest checkpoint is of step 3.
        let mut writer = MetricsWriter::after(&path, 3).unwrap();
        assert_eq!(read_metrics(&path).unwrap().last().unwrap().step, 3);
        writer.write(&metric(4)).unwrap();
        writer.write(&metric(5)).unwrap();
        assert_eq!(fs::read(&path).unwrap(), whole);
    }

    #[test]
    fn a_damaged_line_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        fs::write(&path, "{\"step\":1,\"loss\":1,\"lr\":1,\"grad_norm\":1,\"seconds\":1}\nrubbish\n").unwrap();
        assert!(matches!(read_metrics(&path), Err(RunError::Record { line: 2, .. })));
    }
}
