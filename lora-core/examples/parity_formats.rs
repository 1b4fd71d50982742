//! Runs a folder laid out like `tests/fixtures/formats` and prints one line a case; exit code 1 if any fails.
//!
//! `cargo run -p lora-core --example parity_formats -- FOLDER [CASE..]`

#[path = "../tests/parity/mod.rs"]
mod parity;

use std::{path::Path, process::ExitCode};

#[expect(clippy::print_stdout, clippy::print_stderr, reason = "the lines are what it is for")]
fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let Some((folder, cases)) = arguments.split_first() else {
        eprintln!("usage: parity_formats FOLDER [CASE..]");
        return ExitCode::from(2);
    };
    let outcomes = parity::run(Path::new(folder), cases);
    let failed = outcomes.iter().filter(|outcome| !outcome.problems.is_empty()).count();
    outcomes.iter().for_each(|outcome| println!("{outcome}"));
    println!("{} cases, {failed} failed", outcomes.len());
    if failed == 0 && !outcomes.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
