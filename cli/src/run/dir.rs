//! Creating, opening and locking a run's folder, and the paths inside it.

use std::{
    fs::{self, File, TryLockError},
    io::{Read as _, Seek as _, Write as _},
    path::{Path, PathBuf},
};

use super::RunError;

/// The folder of one run.
///
/// A run that is written to holds a lock until it is dropped; the operating system lifts it if the process dies.
#[derive(Debug)]
pub struct RunDir {
    root: PathBuf,
    lock: Option<File>,
}

impl RunDir {
    /// A new run in `root`, which must not hold one yet; locked.
    ///
    /// `config` is the text of `config.toml`. It is written last, so that a folder is a run only when it is one.
    ///
    /// # Errors
    /// [`RunError::Exists`] if there is a run already, or anything else that a run would overwrite.
    pub fn create(root: &Path, config: &str) -> Result<Self, RunError> {
        let run = Self { root: root.to_owned(), lock: None };
        if run.is_taken() {
            return Err(RunError::Exists { path: root.to_owned() });
        }
        for folder in [root.to_owned(), run.samples(), run.checkpoints()] {
            fs::create_dir_all(&folder).map_err(RunError::write(&folder))?;
        }
        let run = run.locked()?;
        // The other of two processes that came this far has written it meanwhile.
        let path = run.config();
        let temporary = root.join(".config.toml.part");
        fs::write(&temporary, config).map_err(RunError::write(&temporary))?;
        match fs::hard_link(&temporary, &path) {
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
                let _ = fs::remove_file(&temporary);
                return Err(RunError::Exists { path: root.to_owned() });
            }
            // A file system without hard links: the lock alone keeps others out.
            Err(_) => fs::rename(&temporary, &path).map_err(RunError::write(&path))?,
            Ok(()) => fs::remove_file(&temporary).map_err(RunError::write(&temporary))?,
        }
        Ok(run)
    }

    /// The first free folder `runs/NAME-1`, `runs/NAME-2`, ... below `folder`; nothing is created.
    pub fn next_free(folder: &Path, name: &str) -> PathBuf {
        let runs = folder.join("runs");
        (1u64..)
            .map(|number| runs.join(format!("{name}-{number}")))
            .find(|path| !path.exists())
            .expect("2^64 folders do not exist")
    }

    /// An existing run, for reading.
    ///
    /// # Errors
    /// [`RunError::NotARun`] if `root` holds no `config.toml`.
    pub fn open(root: &Path) -> Result<Self, RunError> {
        let run = Self { root: root.to_owned(), lock: None };
        match run.config().is_file() {
            true => Ok(run),
            false => Err(RunError::NotARun { path: root.to_owned(), missing: "config.toml" }),
        }
    }

    /// An existing run, to go on with; locked.
    ///
    /// # Errors
    /// As [`open`](Self::open), and [`RunError::Locked`] if another process writes to it.
    pub fn resume(root: &Path) -> Result<Self, RunError> {
        Self::open(root)?.locked()
    }

    /// Lifts the lock: this process writes no more steps.
    pub fn release(&mut self) {
        self.lock = None;
    }

    /// The folder itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// `config.toml`: every option of the run.
    pub fn config(&self) -> PathBuf {
        self.root.join("config.toml")
    }

    /// `plan.json`: what was said before the first step, as [`Plan`](crate::plan::Plan).
    pub fn plan(&self) -> PathBuf {
        self.root.join("plan.json")
    }

    /// `metrics.jsonl`.
    pub fn metrics(&self) -> PathBuf {
        self.root.join("metrics.jsonl")
    }

    /// `report.html`.
    pub fn report(&self) -> PathBuf {
        self.root.join("report.html")
    }

    /// The folder of all samples.
    pub fn samples(&self) -> PathBuf {
        self.root.join("samples")
    }

    /// The folder of the samples after `step` steps; 0 is the base alone.
    pub fn samples_at(&self, step: u64) -> PathBuf {
        self.samples().join(step_name(step))
    }

    /// The folder of all checkpoints.
    pub fn checkpoints(&self) -> PathBuf {
        self.root.join("checkpoints")
    }

    /// The folder of the checkpoint after `step` steps.
    pub fn checkpoint_at(&self, step: u64) -> PathBuf {
        self.checkpoints().join(step_name(step))
    }

    /// The adapter file of a run called `name`.
    pub fn adapter(&self, name: &str) -> PathBuf {
        self.root.join(format!("{name}.safetensors"))
    }

    /// The steps that have a checkpoint folder, oldest first; whether each is complete is the trainer's to say.
    ///
    /// # Errors
    /// If the folder cannot be listed.
    pub fn checkpoint_steps(&self) -> Result<Vec<u64>, RunError> {
        steps_in(&self.checkpoints())
    }

    /// Whether some process is writing to the run.
    pub fn is_running(&self) -> bool {
        let lock = File::open(self.root.join(".lock"));
        lock.is_ok_and(|file| matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock)))
    }

    fn is_taken(&self) -> bool {
        let holds_adapter = || {
            fs::read_dir(&self.root).is_ok_and(|entries| {
                entries.flatten().any(|entry| entry.path().extension().is_some_and(|ending| ending == "safetensors"))
            })
        };
        self.config().exists() || self.metrics().exists() || holds_adapter()
    }

    fn locked(self) -> Result<Self, RunError> {
        let path = self.root.join(".lock");
        let mut file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(RunError::write(&path))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut pid = String::new();
                let _ = file.read_to_string(&mut pid);
                return Err(RunError::Locked { path: self.root, pid: pid.trim().parse().ok() });
            }
            Err(TryLockError::Error(source)) => return Err(RunError::Write { path, source }),
        }
        let mut write = || {
            file.set_len(0)?;
            file.rewind()?;
            writeln!(file, "{}", std::process::id())
        };
        write().map_err(RunError::write(&path))?;
        Ok(Self { root: self.root, lock: Some(file) })
    }
}

/// `step-000250`: sorts as the steps do, for runs of less than a million steps.
fn step_name(step: u64) -> String {
    format!("step-{step:06}")
}

/// The steps of the folders `step-NNNNNN` in `folder`, in order; none if there is no such folder.
pub(super) fn steps_in(folder: &Path) -> Result<Vec<u64>, RunError> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => return Err(RunError::Read { path: folder.to_owned(), source }),
    };
    let mut steps: Vec<u64> = entries
        .flatten()
        .filter(|entry| entry.path().is_dir())
        .filter_map(|entry| entry.file_name().to_str()?.strip_prefix("step-")?.parse().ok())
        .collect();
    steps.sort_unstable();
    Ok(steps)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_is_never_overwritten() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("a/b");
        let run = RunDir::create(&root, "seed = 1\n").unwrap();
        assert_eq!(fs::read_to_string(run.config()).unwrap(), "seed = 1\n");
        drop(run);
        assert!(matches!(RunDir::create(&root, "seed = 2\n"), Err(RunError::Exists { .. })));
        assert_eq!(fs::read_to_string(root.join("config.toml")).unwrap(), "seed = 1\n");
    }

    #[test]
    fn a_folder_with_somebody_elses_adapter_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("mine.safetensors"), "x").unwrap();
        assert!(matches!(RunDir::create(folder.path(), ""), Err(RunError::Exists { .. })));
        assert!(!folder.path().join("config.toml").exists());
    }

    #[test]
    fn an_empty_folder_may_become_a_run() {
        let folder = tempfile::tempdir().unwrap();
        RunDir::create(folder.path(), "").unwrap();
    }

    #[test]
    fn a_run_has_one_writer() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("run");
        let first = RunDir::create(&root, "").unwrap();
        match RunDir::resume(&root) {
            Err(RunError::Locked { pid, .. }) => assert_eq!(pid, Some(std::process::id())),
            other => panic!("{other:?}"),
        }
        RunDir::open(&root).unwrap(); // reading needs no lock
        drop(first);
        RunDir::resume(&root).unwrap();
    }

    #[test]
    fn names_count_up() {
        let folder = tempfile::tempdir().unwrap();
        let first = RunDir::next_free(folder.path(), "neon");
        assert!(first.ends_with("runs/neon-1"));
        fs::create_dir_all(&first).unwrap();
        assert!(RunDir::next_free(folder.path(), "neon").ends_with("runs/neon-2"));
    }

    #[test]
    fn checkpoints_are_listed_by_step() {
        let folder = tempfile::tempdir().unwrap();
        let run = RunDir::create(&folder.path().join("run"), "").unwrap();
        for name in ["step-000250", "step-1000000", "step-000100", ".step-000300.7.part", "other"] {
            fs::create_dir_all(run.checkpoints().join(name)).unwrap();
        }
        assert_eq!(run.checkpoint_steps().unwrap(), [100, 250, 1_000_000]);
        assert!(run.checkpoint_at(250).is_dir());
    }
}
