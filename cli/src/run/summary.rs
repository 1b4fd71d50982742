//! A run in a few words, for lists and comparisons.

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde::Serialize;
use serde_json::{Map, Value};

use super::{Metrics, RunDir, RunError, read_metrics};
use crate::{plan::Plan, text};

/// A run in a few words.
#[derive(Debug, Clone, Serialize)]
pub struct Summary {
    /// The folder.
    #[serde(serialize_with = "text::lossy")]
    pub run: PathBuf,
    /// `finished`, `running` or `stopped`.
    pub state: &'static str,
    /// Updates done.
    pub step: u64,
    /// Updates planned, if the plan is known.
    pub steps: Option<u64>,
    /// Mean loss over the last tenth of the logged steps.
    pub loss: Option<f64>,
    /// The last loss that was measured on examples kept apart, if any was.
    pub validation_loss: Option<f64>,
    /// Seconds of training.
    pub seconds: f64,
    /// The adapter file, once there is one.
    #[serde(serialize_with = "text::lossy_if_any")]
    pub adapter: Option<PathBuf>,
    /// Every option of the run.
    pub config: Map<String, Value>,
}

/// What can be said of the run in `root`.
///
/// # Errors
/// If it is not a run or its files cannot be read.
pub fn summarise(root: &Path) -> Result<Summary, RunError> {
    let run = RunDir::open(root)?;
    let Metrics { steps: metrics, validation } = read_metrics(&run.metrics())?;
    let validation_loss = validation.last().map(|measured| measured.validation_loss);
    let config = read_config(&run.config())?;
    let plan: Option<Plan> = fs::read_to_string(run.plan()).ok().and_then(|text| serde_json::from_str(&text).ok());
    let step = metrics.last().map_or(0, |metric| metric.step);
    let steps = plan.map(|plan| plan.steps).or_else(|| config.get("steps").and_then(Value::as_u64));
    let name = config.get("name").and_then(Value::as_str).unwrap_or("adapter");
    let adapter = [run.adapter(name), run.adapter("adapter_model")].into_iter().find(|path| path.is_file());
    let state = match (run.is_running(), &adapter) {
        (true, _) => "running",
        (false, Some(_)) if steps.is_none_or(|steps| step >= steps) => "finished",
        _ => "stopped",
    };
    let tail = &metrics[metrics.len() - metrics.len().div_ceil(10)..];
    let loss = (!tail.is_empty()).then(|| tail.iter().map(|metric| metric.loss).sum::<f64>() / tail.len() as f64);
    let seconds = metrics.last().map_or(0.0, |metric| metric.seconds);
    Ok(Summary { run: root.to_owned(), state, step, steps, loss, validation_loss, seconds, adapter, config })
}

/// The runs at `path`: itself, or those in it or in its folder `runs`, by name.
///
/// # Errors
/// If the folder cannot be listed.
pub fn find_runs(path: &Path) -> Result<Vec<PathBuf>, RunError> {
    if RunDir::open(path).is_ok() {
        return Ok(vec![path.to_owned()]);
    }
    let mut runs = Vec::new();
    for folder in [path.to_owned(), path.join("runs")] {
        let entries = match fs::read_dir(&folder) {
            Ok(entries) => entries,
            Err(_) if folder != path => continue,
            Err(source) => return Err(RunError::Read { path: folder, source }),
        };
        let paths = entries.flatten().map(|entry| entry.path());
        // `./runs/neon-1` reads better without its first two characters.
        let plain = |path: PathBuf| path.strip_prefix(".").map(Path::to_owned).unwrap_or(path);
        runs.extend(paths.filter(|path| RunDir::open(path).is_ok()).map(plain));
    }
    runs.sort_by_cached_key(|run| natural(run));
    Ok(runs)
}

/// A key under which `neon-10` comes after `neon-9`.
fn natural(run: &Path) -> (String, u64) {
    let text = run.to_string_lossy().into_owned();
    match text.rsplit_once('-').map(|(stem, number)| (stem.to_owned(), number.parse())) {
        Some((stem, Ok(number))) => (stem, number),
        _ => (text, 0),
    }
}

fn read_config(path: &Path) -> Result<Map<String, Value>, RunError> {
    let text = fs::read_to_string(path).map_err(RunError::read(path))?;
    toml::from_str(&text).map_err(|error| RunError::Read {
        path: path.to_owned(),
        source: std::io::Error::new(std::io::ErrorKind::InvalidData, error.message().to_owned()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::{Metric, MetricsWriter};

    #[test]
    fn a_run_is_finished_when_all_steps_are_done_and_the_file_is_there() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("runs/neon-1");
        let run = RunDir::create(&root, "name = \"neon\"\nsteps = 2\n").unwrap();
        assert_eq!(summarise(&root).unwrap().state, "running");
        let mut writer = MetricsWriter::after(&run.metrics(), 0).unwrap();
        for step in 1..=2 {
            let metric = Metric { step, loss: step as f64, lr: 1.0, grad_norm: 1.0, seconds: 9.0, more: Map::new() };
            writer.write(&metric).unwrap();
        }
        drop(run);
        assert_eq!(summarise(&root).unwrap().state, "stopped");
        fs::write(root.join("neon.safetensors"), "x").unwrap();
        let summary = summarise(&root).unwrap();
        assert_eq!((summary.state, summary.step, summary.loss), ("finished", 2, Some(2.0)));
        assert_eq!(find_runs(folder.path()).unwrap(), std::slice::from_ref(&root));
        assert_eq!(find_runs(&root).unwrap(), [root]);
    }

    #[test]
    fn runs_are_in_the_order_of_their_numbers() {
        assert!(natural(Path::new("runs/neon-9")) < natural(Path::new("runs/neon-10")));
    }
}
