//! `parity FOLDER [--base BASE] [CASE]...`: the cases of a folder, a line each.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a program that reports on its standard output")]

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use crate::{Failure, Report};

/// A kind of folder, and the code that runs what lies in it.
#[derive(Debug, Clone, Copy)]
pub struct Cases {
    /// The base that cases were made with, from the folder on, unless another is given.
    pub base: &'static str,
    /// The cases of a folder.
    pub names: fn(&Path) -> Result<Vec<String>, Failure>,
    /// Runs the named case of a folder against a base.
    pub run: fn(&Path, &str, &Path) -> Result<Report, Failure>,
}

/// The whole program, on the arguments of this process: ends with 1 if a case fails, and with 2 if none can be run.
pub fn run(cases: Cases) -> ExitCode {
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
    let base = base.unwrap_or_else(|| folder.join(cases.base));
    let names = match (cases.names)(&folder) {
        Ok(names) => names,
        Err(error) => {
            eprintln!("error: {error}");
            return ExitCode::from(2);
        }
    };
    let mut failed = 0;
    for name in names.iter().filter(|name| only.is_empty() || only.contains(name)) {
        let line = match (cases.run)(&folder, name, &base) {
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
