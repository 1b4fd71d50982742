//! `cargo xtask bench`: our own benches, or the same work side by side with the Python peers.

use anyhow::Result;

use crate::{setup, shell};

/// The task. `benches/README.md` says what each bench answers and what the peers need.
pub(crate) fn run(arguments: &[String]) -> Result<()> {
    setup::run(&[])?;
    match arguments {
        [first, rest @ ..] if first == "--peers" => {
            shell::run(shell::cargo()?.args(["build", "--release", "--quiet", "-p", "lora-cli", "-p", "lora-engine"]))?;
            shell::run(shell::python()?.arg("benches/peers/compare.py").args(rest))
        }
        [name, rest @ ..] => {
            shell::run(shell::cargo()?.args(["bench", "-p", "lora-benches", "--bench", name]).args(rest))
        }
        [] => shell::run(shell::cargo()?.args(["bench", "-p", "lora-benches"])),
    }
}
