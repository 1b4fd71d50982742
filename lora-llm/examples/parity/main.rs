//! `parity FOLDER [--base BASE] [CASE]...`: every case of a folder laid out like `tests/fixtures/llm`, a line each.
//!
//! Cases are the parts of `FOLDER/parity.json` and each folder in it that holds a training trace; the base that they were
//! made with is `FOLDER/../../models/tiny-llm` unless given, the texts of the traces are in `FOLDER/../../data/llm` or with
//! the assets of this repository. A line shows, of all comparisons of a case, the one that used up most of its tolerance.
//! Ends with 1 if a case fails.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a program that reports on its standard output")]

mod cases;

use std::{path::PathBuf, process::ExitCode};

fn main() -> ExitCode {
    let mut folder = None;
    let mut base = None;
    let mut only = Vec::new();
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match (argument.as_str(), &folder) {
            ("--base", _) => base = arguments.next().map(PathBuf::from),
            (_, None) => folder = Some(PathBuf::from(argument)),
            _ => only.push(argument),
        }
    }
    let Some(folder) = folder else {
        eprintln!("usage: parity FOLDER [--base BASE] [CASE]...");
        return ExitCode::from(2);
    };
    let base = base.unwrap_or_else(|| folder.join("../../models/tiny-llm"));
    let names = match cases::names(&folder) {
        Ok(names) => names,
        Err(error) => {
            eprintln!("error: {error}");
            return ExitCode::from(2);
        }
    };
    let mut failed = 0;
    for name in names.iter().filter(|name| only.is_empty() || only.contains(name)) {
        let line = match cases::run(&folder, name, &base) {
            Ok(report) => {
                failed += usize::from(!report.passed());
                report.to_string()
            }
            Err(error) => {
                failed += 1;
                format!("FAIL  {name}: {error}")
            }
        };
        println!("{line}");
    }
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
