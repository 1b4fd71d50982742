//! The pictures drawn while training: `samples/step-NNNNNN/`, with an index that says which prompt each one shows.

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::{RunDir, RunError, dir::steps_in};

/// One sample.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sample {
    /// The file's name in its folder, such as `00.png` or `00.txt`.
    pub file: String,
    /// What was asked for.
    pub prompt: String,
    /// The seed of its noise.
    pub seed: u64,
}

/// The samples after one number of steps.
#[derive(Debug, Clone)]
pub struct SampleSet {
    /// Updates done; 0 is the base alone.
    pub step: u64,
    /// Their folder.
    pub folder: PathBuf,
    /// In the order of the prompts.
    pub samples: Vec<Sample>,
}

/// Writes the index beside the samples that lie in `folder` already.
///
/// # Errors
/// If it cannot be written.
pub fn write_sample_index(folder: &Path, samples: &[Sample]) -> Result<(), RunError> {
    let path = folder.join("index.json");
    let text = serde_json::to_string_pretty(samples)
        .map_err(|error| RunError::Write { path: path.clone(), source: error.into() })?;
    fs::write(&path, text + "\n").map_err(RunError::write(&path))
}

/// All samples of a run, oldest first. Samples whose file is gone are left out, and so are sets without any.
///
/// # Errors
/// If a folder cannot be listed.
pub fn sample_sets(run: &RunDir) -> Result<Vec<SampleSet>, RunError> {
    let mut sets = Vec::new();
    for step in steps_in(&run.samples())? {
        let folder = run.samples_at(step);
        let index = fs::read_to_string(folder.join("index.json")).ok();
        let samples: Option<Vec<Sample>> = index.and_then(|text| serde_json::from_str(&text).ok());
        let mut samples = match samples {
            Some(samples) => samples,
            None => unindexed(&folder)?,
        };
        // A name with a slash would lead out of the folder.
        samples.retain(|sample| !sample.file.contains(['/', '\\']) && folder.join(&sample.file).is_file());
        if !samples.is_empty() {
            sets.push(SampleSet { step, folder, samples });
        }
    }
    Ok(sets)
}

/// What lies in a folder without a readable index: the files alone.
fn unindexed(folder: &Path) -> Result<Vec<Sample>, RunError> {
    let mut names: Vec<String> = fs::read_dir(folder)
        .map_err(RunError::read(folder))?
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.ends_with(".png") || name.ends_with(".txt"))
        .collect();
    names.sort_unstable();
    Ok(names.into_iter().map(|file| Sample { file, prompt: String::new(), seed: 0 }).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_come_in_the_order_of_steps_with_their_prompts() {
        let folder = tempfile::tempdir().unwrap();
        let run = RunDir::create(&folder.path().join("run"), "").unwrap();
        for step in [100, 0] {
            let at = run.samples_at(step);
            fs::create_dir_all(&at).unwrap();
            fs::write(at.join("00.png"), "x").unwrap();
        }
        let sample = |file: &str| Sample { file: file.into(), prompt: "a house".into(), seed: 7 };
        write_sample_index(&run.samples_at(100), &[sample("00.png"), sample("gone.png"), sample("../00.png")]).unwrap();
        let sets = sample_sets(&run).unwrap();
        assert_eq!(sets.iter().map(|set| set.step).collect::<Vec<_>>(), [0, 100]);
        assert_eq!(sets[1].samples, [sample("00.png")]);
        assert_eq!(sets[0].samples[0].prompt, "");
    }
}
