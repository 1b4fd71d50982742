//! The engine's real binary in a fresh folder, with a few pictures of the neon style.

#![allow(dead_code, reason = "each test program uses a part of it")]

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use serde_json::Value;

/// A fresh folder with `pictures/`, removed at the end.
pub(crate) struct Place {
    folder: tempfile::TempDir,
}

impl Place {
    /// A place with `count` captioned pictures.
    pub(crate) fn new(count: usize) -> Self {
        let place = Self { folder: tempfile::tempdir().unwrap() };
        fs::create_dir(place.path("pictures")).unwrap();
        for number in 0..count {
            for ending in ["png", "txt"] {
                let name = format!("{number:02}.{ending}");
                fs::copy(assets().join("styles/neon").join(&name), place.path("pictures").join(&name)).unwrap();
            }
        }
        place
    }

    /// A path inside.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The engine with these words, separated by spaces; see [`bundled`].
    pub(crate) fn engine(&self, words: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lora-engine"));
        self.prepare(&mut command);
        command.args(words.split(' ').map(bundled));
        command
    }

    /// The same with everything on one shell line before it, such as `ulimit -f 100;`.
    pub(crate) fn engine_after(&self, shell: &str, words: &str) -> Command {
        let mut command = Command::new("bash");
        self.prepare(&mut command);
        command.arg("-c").arg(format!("{shell} exec \"$0\" \"$@\"")).arg(env!("CARGO_BIN_EXE_lora-engine"));
        command.args(words.split(' ').map(bundled));
        command
    }

    /// Writes a file of texts, one row a line.
    pub(crate) fn texts(&self, name: &str, rows: &[&str]) {
        fs::write(self.path(name), rows.join("\n") + "\n").unwrap();
    }

    fn prepare(&self, command: &mut Command) {
        command.current_dir(self.folder.path()).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        for (name, _) in std::env::vars_os() {
            if ["LORA_", "HF_"].iter().any(|start| name.to_string_lossy().starts_with(start)) {
                command.env_remove(name);
            }
        }
        command.env("XDG_CACHE_HOME", self.path("cache")).env("XDG_CONFIG_HOME", self.path("config"));
        // Two tests at a time on two cores: more threads only wait for each other.
        command.env("OMP_NUM_THREADS", "1");
    }
}

/// What a command said, for messages of failing tests.
pub(crate) fn said(output: &Output) -> String {
    format!("{}\n{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// What a command that must succeed writes to stdout.
#[track_caller]
pub(crate) fn run(mut command: Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The same, read as JSON.
#[track_caller]
pub(crate) fn json(command: Command) -> Value {
    serde_json::from_str(&run(command)).unwrap()
}

/// `BASE` stands for the bundled Stable Diffusion, `MODEL` for the bundled language model.
fn bundled(word: &str) -> String {
    let path = |name: &str| assets().join(name).display().to_string();
    word.replace("BASE", &path("tiny-sd")).replace("MODEL", &path("tiny-llm"))
}

pub(crate) fn assets() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets").canonicalize().unwrap()
}
