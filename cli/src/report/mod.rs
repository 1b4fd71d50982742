//! `report.html`: what a run was, how it went, and what it learnt, on one page that needs nothing beside it.
//!
//! Everything is read back from the run's folder, so the page can be written at any time, during the run too. Pictures
//! are embedded; there is no script and no request to anywhere.

mod base64;
mod chart;
mod page;

use std::{fs, path::Path};

use serde_json::{Map, Value};

use crate::{
    plan::Plan,
    run::{Metrics, RunDir, RunError, SampleSet, Summary, read_metrics, sample_sets, summarise},
};

/// Bytes of pictures on one page. Beyond it steps in the middle are left out, evenly.
const PICTURE_BYTES: u64 = 24 << 20;

/// Everything that the page shows.
struct Content {
    summary: Summary,
    plan: Option<Plan>,
    metrics: Metrics,
    sets: Vec<SampleSet>,
    /// Sets that are in the folder but not on the page.
    left_out: usize,
}

/// Writes the report of `run` from what its folder holds.
///
/// # Errors
/// If a file of the run cannot be read, or the page cannot be written.
pub fn write(run: &RunDir) -> Result<(), RunError> {
    let summary = summarise(run.root())?;
    let plan = fs::read_to_string(run.plan()).ok().and_then(|text| serde_json::from_str(&text).ok());
    let metrics = read_metrics(&run.metrics())?;
    let all = sample_sets(run)?;
    let count = all.len();
    let sets = within_budget(all, PICTURE_BYTES);
    let left_out = count - sets.len();
    let html = page::render(&Content { summary, plan, metrics, sets, left_out });
    // A reader that reloads while training never sees half a page.
    let path = run.report();
    let part = run.root().join(".report.html.part");
    fs::write(&part, html).map_err(RunError::write(&part))?;
    fs::rename(&part, &path).map_err(RunError::write(&path))
}

/// First and last set always, and of the rest as many as fit, evenly spread.
fn within_budget(sets: Vec<SampleSet>, budget: u64) -> Vec<SampleSet> {
    let bytes = |set: &SampleSet| -> u64 {
        set.samples
            .iter()
            .filter_map(|sample| fs::metadata(set.folder.join(&sample.file)).ok())
            .map(|meta| meta.len())
            .sum()
    };
    let largest = sets.iter().map(bytes).max().unwrap_or(0).max(1);
    // The first and the last set are shown twice: also as before and after.
    let room = usize::try_from(budget / largest).unwrap_or(usize::MAX).saturating_sub(2).max(2);
    let last = sets.len().saturating_sub(1);
    if sets.len() <= room {
        return sets;
    }
    let kept: Vec<usize> = (0..room).map(|index| (index * last + (room - 1) / 2) / (room - 1)).collect();
    sets.into_iter().enumerate().filter(|(index, _)| kept.contains(index)).map(|(_, set)| set).collect()
}

/// A file as a `data:` address.
fn embedded(path: &Path) -> Option<String> {
    let bytes = fs::read(path).ok()?;
    let kind = match bytes.get(..4)? {
        [0x89, b'P', b'N', b'G'] => "image/png",
        [0xff, 0xd8, ..] => "image/jpeg",
        b"RIFF" => "image/webp",
        _ => return None,
    };
    Some(format!("data:{kind};base64,{}", base64::encode(&bytes)))
}

/// A word of the run's configuration.
fn word<'a>(config: &'a Map<String, Value>, key: &str) -> &'a str {
    config.get(key).and_then(Value::as_str).unwrap_or_default()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::run::{Metric, MetricsWriter, Sample, Validation, write_sample_index};

    /// The smallest PNG: one grey pixel.
    pub(crate) const PIXEL: [u8; 67] = [
        0x89, 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a, 0x00, 0x00, 0x00, 0x0d, 0x49, 0x48, 0x44, 0x52, 0x00, 0x00,
        0x00, 0x01, 0x00, 0x00, 0x00, 0x01, 0x08, 0x00, 0x00, 0x00, 0x00, 0x3a, 0x7e, 0x9b, 0x55, 0x00, 0x00, 0x00,
        0x0a, 0x49, 0x44, 0x41, 0x54, 0x78, 0xda, 0x63, 0x68, 0x00, 0x00, 0x00, 0x82, 0x00, 0x81, 0xda, 0x45, 0x08,
        0x3b, 0x00, 0x00, 0x00, 0x00, 0x49, 0x45, 0x4e, 0x44, 0xae, 0x42, 0x60, 0x82,
    ];

    fn synthetic(folder: &Path, sets: u64) -> RunDir {
        let config = "name = \"neon\"\nbase = \"sd15\"\nsteps = 40\ntrigger = \"<b>neon</b>\"\n";
        let run = RunDir::create(&folder.join("run"), config).unwrap();
        fs::write(run.plan(), serde_json::to_string(&crate::plan::tests::example()).unwrap()).unwrap();
        let mut metrics = MetricsWriter::after(&run.metrics(), 0).unwrap();
        for step in 1..=40 {
            let loss = if step == 7 { f64::NAN } else { 1.0 / step as f64 };
            metrics
                .write(&Metric { step, loss, lr: 1e-4, grad_norm: 0.5, seconds: step as f64, more: Map::new() })
                .unwrap();
        }
        for step in [0, 20, 40] {
            let validation_loss = 2.0 - step as f64 / 100.0;
            metrics.write_validation(&Validation { step, validation_loss, seconds: step as f64 }).unwrap();
        }
        for set in 0..sets {
            let at = run.samples_at(set * 10);
            fs::create_dir_all(&at).unwrap();
            fs::write(at.join("00.png"), PIXEL).unwrap();
            let sample = Sample { file: "00.png".into(), prompt: "a <red> house & \"garden\"".into(), seed: 7 };
            write_sample_index(&at, &[sample]).unwrap();
        }
        run
    }

    #[test]
    fn the_page_stands_alone_and_escapes_what_people_wrote() {
        let folder = tempfile::tempdir().unwrap();
        let run = synthetic(folder.path(), 5);
        fs::write(run.adapter("neon"), "x").unwrap();
        write(&run).unwrap();
        let html = fs::read_to_string(run.report()).unwrap();
        for foreign in ["<script", "http://", "https://", "url(", "@import", "<link"] {
            assert!(!html.contains(foreign), "{foreign}");
        }
        assert!(html.contains("a &lt;red&gt; house &amp; &quot;garden&quot;"));
        assert!(!html.contains("<b>neon</b>") && !html.contains("<red>"));
        assert_eq!(html.matches("data:image/png;base64,").count(), 5 + 2);
        assert!(html.contains("class=\"second\"") && html.contains("2 → 1.6"), "the validation loss is shown");
        assert!(!html.contains("NaN"), "a step without a finite loss leaves a gap");
    }

    #[test]
    fn a_run_without_samples_and_steps_has_a_report() {
        let folder = tempfile::tempdir().unwrap();
        let run = RunDir::create(&folder.path().join("run"), "name = \"x\"\n").unwrap();
        write(&run).unwrap();
        assert!(fs::read_to_string(run.report()).unwrap().contains("</html>"));
    }

    #[test]
    fn the_middle_is_thinned_when_pictures_are_large() {
        let folder = tempfile::tempdir().unwrap();
        let run = synthetic(folder.path(), 21);
        let sets = within_budget(sample_sets(&run).unwrap(), 67 * 8);
        let steps: Vec<_> = sets.iter().map(|set| set.step).collect();
        assert_eq!(steps, [0, 40, 80, 120, 160, 200]);
    }
}
