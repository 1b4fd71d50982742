//! Checkpoints that are complete or absent: a folder per step, made aside and renamed, with a record of what is in it.
//!
//! A checkpoint is written into a hidden `.part` folder; each file is flushed to the disk, `state.json` with sizes and
//! hashes of all others comes last, then the folder gets its name. Whoever resumes takes the newest folder whose files
//! are what was recorded, and is told why newer ones were passed over. What the files hold is up to the caller.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Read},
    path::{Path, PathBuf},
    process,
};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::{Error, Result};

/// The record's name inside a checkpoint.
const STATE: &str = "state.json";

/// Version of the record; a newer one is refused.
const VERSION: u32 = 1;

/// The checkpoints of one run.
#[derive(Debug, Clone)]
pub struct Checkpoints {
    folder: PathBuf,
    keep: usize,
}

/// What a checkpoint says about itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Version of this record.
    pub version: u32,
    /// Steps that were done.
    pub step: u64,
    /// What a run must have in common with the one that wrote this (seed, data, base, options), by name.
    pub identity: BTreeMap<String, String>,
    /// Whatever else the writer wants back.
    pub extra: serde_json::Value,
    /// Every other file.
    files: Vec<Recorded>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Recorded {
    name: String,
    bytes: u64,
    sha256: String,
}

/// A sound checkpoint.
#[derive(Debug, Clone, PartialEq)]
pub struct Found {
    /// Its folder.
    pub folder: PathBuf,
    /// Its record.
    pub state: State,
    /// Newer folders that were passed over, each with the reason.
    pub skipped: Vec<(PathBuf, String)>,
}

impl State {
    /// The record of a checkpoint that is yet to be written.
    pub fn new(step: u64, identity: BTreeMap<String, String>, extra: serde_json::Value) -> Self {
        Self { version: VERSION, step, identity, extra, files: Vec::new() }
    }
}

impl Checkpoints {
    /// The checkpoints in `folder`, of which the `keep` newest stay (at least one).
    pub fn new(folder: impl Into<PathBuf>, keep: usize) -> Self {
        Self { folder: folder.into(), keep: keep.max(1) }
    }

    /// Writes a checkpoint: `write` puts its files into the folder that it is given. Older ones are removed afterwards.
    ///
    /// # Errors
    /// Those of `write`, or if the disk is full or a file reads back differently; older checkpoints then still stand.
    pub fn save(&self, mut state: State, write: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
        let target = self.folder.join(name_of(state.step));
        let stage = self.folder.join(format!(".{}.{}.part", name_of(state.step), process::id()));
        let result = (|| {
            remove_folder(&stage)?;
            fs::create_dir_all(&stage).map_err(writing(&stage))?;
            write(&stage)?;
            state.files = record(&stage)?;
            let text = serde_json::to_vec_pretty(&state).map_err(|error| writing(&stage)(error.into()))?;
            lora_core::format::write_atomically(&stage.join(STATE), |file| file.write_all(&text))?;
            flush(&stage)?;
            verify(&stage).map_err(|reason| Error::Checkpoint { path: stage.clone(), reason })?;
            self.publish(&stage, &target)
        })();
        if result.is_err() {
            // The reason counts; that the remains could not be removed either does not.
            let _ = fs::remove_dir_all(&stage);
        }
        result?;
        self.prune()?;
        Ok(target)
    }

    /// The newest sound checkpoint, or `None` if there is none at all.
    ///
    /// # Errors
    /// If there are checkpoints, but none of them is sound.
    pub fn newest(&self) -> Result<Option<Found>> {
        let mut skipped = Vec::new();
        for folder in self.folders()?.into_iter().rev() {
            match verify(&folder) {
                Ok(state) => return Ok(Some(Found { folder, state, skipped })),
                Err(reason) => skipped.push((folder, reason)),
            }
        }
        match skipped.into_iter().next() {
            Some((path, reason)) => Err(Error::Checkpoint { path, reason: format!("{reason}; no older one is sound") }),
            None => Ok(None),
        }
    }

    /// Removes what processes that are gone left half-written; returns how many folders that were.
    pub fn sweep(&self) -> Result<usize> {
        let mut swept = 0;
        for path in self.entries()? {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let Some(stem) = name.strip_prefix('.').and_then(|name| name.strip_suffix(".part")) else { continue };
            let owner = stem.rsplit('.').next().and_then(|pid| pid.parse::<u32>().ok());
            let alive = owner.is_some_and(|pid| pid != process::id() && Path::new(&format!("/proc/{pid}")).exists());
            if !alive {
                remove_folder(&path)?;
                swept += 1;
            }
        }
        Ok(swept)
    }

    /// The folder that holds the checkpoints.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    fn publish(&self, stage: &Path, target: &Path) -> Result<()> {
        let old = self.folder.join(format!(".old-{}.{}.part", name_of(0), process::id()));
        remove_folder(&old)?;
        match fs::rename(target, &old) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(writing(target)(error)),
        }
        fs::rename(stage, target).map_err(writing(target))?;
        flush(&self.folder)?;
        remove_folder(&old)
    }

    fn prune(&self) -> Result<()> {
        let folders = self.folders()?;
        for folder in folders.iter().rev().skip(self.keep) {
            remove_folder(folder)?;
        }
        Ok(())
    }

    /// All folders that have a checkpoint's name, oldest first.
    fn folders(&self) -> Result<Vec<PathBuf>> {
        let mut folders: Vec<(u64, PathBuf)> = self
            .entries()?
            .into_iter()
            .filter_map(|path| {
                let name = path.file_name()?.to_str()?;
                Some((name.strip_prefix("step-")?.parse().ok()?, path))
            })
            .collect();
        folders.sort();
        Ok(folders.into_iter().map(|(_, path)| path).collect())
    }

    fn entries(&self) -> Result<Vec<PathBuf>> {
        let reading = |source| Error::Read { path: self.folder.clone(), source };
        match fs::read_dir(&self.folder) {
            Ok(entries) => entries.map(|entry| Ok(entry.map_err(reading)?.path())).collect(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => Err(reading(error)),
        }
    }
}

fn name_of(step: u64) -> String {
    format!("step-{step:06}")
}

/// Flushes every file of a folder to the disk and lists them with sizes and hashes.
fn record(folder: &Path) -> Result<Vec<Recorded>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).map_err(writing(folder))? {
        let path = entry.map_err(writing(folder))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        flush(&path)?;
        let (bytes, sha256) = measure(&path).map_err(writing(&path))?;
        files.push(Recorded { name, bytes, sha256 });
    }
    files.sort_by(|left, right| left.name.cmp(&right.name));
    Ok(files)
}

/// Reads a checkpoint's record and checks that every file is what it says.
fn verify(folder: &Path) -> Result<State, String> {
    let text = fs::read(folder.join(STATE)).map_err(|error| format!("{STATE}: {error}"))?;
    let state: State = serde_json::from_slice(&text).map_err(|error| format!("{STATE}: {error}"))?;
    if state.version != VERSION {
        return Err(format!("{STATE} has version {}, this program reads {VERSION}", state.version));
    }
    for Recorded { name, bytes, sha256 } in &state.files {
        // A name is data: it must not lead out of the folder.
        if Path::new(name).file_name() != Some(name.as_ref()) {
            return Err(format!("{STATE} names the file {name:?}"));
        }
        let (found_bytes, found_sha256) = measure(&folder.join(name)).map_err(|error| format!("{name}: {error}"))?;
        if found_bytes != *bytes {
            return Err(format!("{name} has {found_bytes} bytes, {bytes} were written"));
        }
        if found_sha256 != *sha256 {
            return Err(format!("{name} was changed: its hash is not the recorded one"));
        }
    }
    Ok(state)
}

/// Size and hash of a file.
fn measure(path: &Path) -> io::Result<(u64, String)> {
    let mut file = File::open(path)?;
    let (mut hash, mut buffer, mut bytes) = (Sha256::new(), vec![0; 1 << 20], 0);
    loop {
        let count = file.read(&mut buffer)?;
        if count == 0 {
            break;
        }
        hash.update(&buffer[..count]);
        bytes += count as u64;
    }
    Ok((bytes, hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()))
}

/// Waits until a file's or folder's content is on the disk.
fn flush(path: &Path) -> Result<()> {
    File::open(path).and_then(|file| file.sync_all()).map_err(writing(path))
}

fn remove_folder(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(writing(path)(error)),
        _ => Ok(()),
    }
}

fn writing(path: &Path) -> impl Fn(io::Error) -> Error + '_ {
    move |source| Error::Write { path: path.to_path_buf(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn save(checkpoints: &Checkpoints, step: u64, content: &str) -> PathBuf {
        let state = State::new(step, BTreeMap::from([("seed".into(), "1".into())]), serde_json::json!({"epoch": 2}));
        let write = |folder: &Path| {
            fs::write(folder.join("adapter"), content).unwrap();
            Ok(())
        };
        checkpoints.save(state, write).unwrap()
    }

    #[test]
    fn the_newest_sound_checkpoint_is_found_and_newer_ones_are_named_with_their_fault() {
        let folder = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::new(folder.path().join("checkpoints"), 9);
        assert_eq!(checkpoints.newest().unwrap(), None);
        for step in [1, 2, 10, 11, 12, 13] {
            save(&checkpoints, step, "numbers");
        }
        let at = |step| checkpoints.folder().join(name_of(step));
        fs::write(at(13).join("adapter"), "numbert").unwrap(); // one byte differs
        fs::write(at(12).join("adapter"), "number").unwrap(); // cut short
        fs::remove_file(at(11).join(STATE)).unwrap();
        let found = checkpoints.newest().unwrap().unwrap();
        assert_eq!((found.state.step, &found.state.extra["epoch"]), (10, &serde_json::json!(2)));
        let reasons: Vec<&str> = found.skipped.iter().map(|(_, reason)| reason.as_str()).collect();
        assert!(reasons[0].contains("hash") && reasons[1].contains("6 bytes, 7") && reasons[2].contains(STATE));
        for step in [1, 2, 10] {
            fs::remove_file(at(step).join("adapter")).unwrap();
        }
        assert!(checkpoints.newest().unwrap_err().to_string().contains("no older one is sound"));
    }

    #[test]
    fn a_failed_save_leaves_the_older_checkpoint_and_no_remains() {
        let folder = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::new(folder.path(), 2);
        save(&checkpoints, 1, "old");
        let failing = |stage: &Path| {
            fs::write(stage.join("adapter"), "half").unwrap();
            Err(Error::Config { option: "test", reason: "full disk".into() })
        };
        assert!(checkpoints.save(State::new(2, BTreeMap::new(), serde_json::Value::Null), failing).is_err());
        assert_eq!(checkpoints.newest().unwrap().unwrap().state.step, 1);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn only_the_newest_are_kept_and_saving_a_step_again_replaces_it() {
        let folder = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::new(folder.path(), 2);
        for (step, content) in [(1, "a"), (2, "b"), (3, "c"), (3, "again")] {
            save(&checkpoints, step, content);
        }
        let names: Vec<_> = checkpoints.folders().unwrap();
        assert_eq!(names, [folder.path().join("step-000002"), folder.path().join("step-000003")]);
        assert_eq!(fs::read_to_string(names[1].join("adapter")).unwrap(), "again");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
    }

    #[test]
    fn remains_of_dead_processes_are_swept_and_those_of_living_ones_stay() {
        let folder = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::new(folder.path(), 2);
        let living = std::os::unix::process::parent_id();
        for name in [".step-000001.4294967.part".to_owned(), format!(".step-000001.{living}.part")] {
            fs::create_dir(folder.path().join(name)).unwrap();
        }
        assert_eq!(checkpoints.sweep().unwrap(), 1);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_record_cannot_point_out_of_its_folder() {
        let folder = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::new(folder.path(), 2);
        let saved = save(&checkpoints, 1, "x");
        let text = fs::read_to_string(saved.join(STATE)).unwrap();
        fs::write(saved.join(STATE), text.replace("\"adapter\"", "\"../adapter\"")).unwrap();
        assert!(checkpoints.newest().unwrap_err().to_string().contains("names the file"));
    }
}
