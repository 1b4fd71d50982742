//! A run's folder: what lies where, and the files that are written while training.
//!
//! ```text
//! RUN/  NAME.safetensors   config.toml   plan.json   metrics.jsonl   events.out.tfevents.*   report.html
//!       samples/step-000100/{00.png, .., index.json}       checkpoints/step-000250/
//! ```
//! Who trains knows this module, and this module knows nothing of training. `checkpoints/` are written by the trainer.

mod dir;
mod error;
mod events;
mod metrics;
mod samples;
mod summary;

pub use dir::RunDir;
pub use error::RunError;
pub use events::EventWriter;
pub use metrics::{Metric, Metrics, MetricsWriter, Validation, read_metrics};
pub use samples::{Sample, SampleSet, sample_sets, write_sample_index};
pub use summary::{Summary, find_runs, summarise};
