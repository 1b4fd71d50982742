//! Runs a folder laid out like `tests/fixtures/formats` and prints one line a case; exit code 1 if any fails.
//!
//! `cargo run -p lora-core --example parity_formats -- FOLDER`

#[path = "../tests/parity/mod.rs"]
mod parity;

use std::{path::Path, process::ExitCode};

#[expect(clippy::print_stdout, clippy::print_stderr, reason = "the lines are what it is for")]
fn main() -> ExitCode {
    let Some(folder) = std::env::args_os().nth(1) else {
        eprintln!("usage: parity_formats FOLDER");
        return ExitCode::from(2);
    };
    let outcomes = parity::run(Path::new(&folder));
    let failed = outcomes.iter().filter(|outcome| !outcome.problems.is_empty()).count();
    outcomes.iter().for_each(|outcome| println!("{outcome}"));
    println!("{} cases, {failed} failed", outcomes.len());
    if failed == 0 && !outcomes.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
