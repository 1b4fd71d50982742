//! The real program in a folder, as if nothing else were on the machine; shared by the tests beside this one.
#![allow(dead_code, reason = "no test program needs all of it")]
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::{
    path::{Path, PathBuf},
    process::Command,
};

/// What the peers wrote, and what is wrong with files.
pub(crate) fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../lora-core/tests/fixtures")
}

/// The adapter files among them.
pub(crate) fn formats() -> PathBuf {
    fixtures().join("formats")
}

/// The program, about to start in `folder`.
pub(crate) fn command(folder: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lora"));
    command.current_dir(folder).env_clear().env("HOME", folder);
    command
}

/// Exit code, stdout and stderr of the program with the words of a line.
pub(crate) fn lora(folder: &Path, line: &str) -> (i32, String, String) {
    lora_of(folder, &line.split_whitespace().collect::<Vec<_>>())
}

/// [`lora`], with words that may hold blanks.
pub(crate) fn lora_of(folder: &Path, words: &[&str]) -> (i32, String, String) {
    let output = command(folder).args(words).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

/// What a command that must succeed shows.
#[track_caller]
pub(crate) fn done(folder: &Path, line: &str) -> String {
    done_of(folder, &line.split_whitespace().collect::<Vec<_>>())
}

/// [`done`], with words that may hold blanks.
#[track_caller]
pub(crate) fn done_of(folder: &Path, words: &[&str]) -> String {
    let (code, shown, talk) = lora_of(folder, words);
    assert_eq!(code, 0, "{words:?}: {shown}{talk}");
    shown
}
