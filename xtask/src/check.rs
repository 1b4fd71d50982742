//! `cargo xtask check [NAME..]`: what a change must pass besides its tests. Every check runs, also after one has failed.

use std::{process::ExitCode, time::Instant};

use anyhow::Result;

use crate::{licences, setup, shell, tidy};

/// One check: fine, or an error that lists what is not.
type Check = fn() -> Result<()>;

/// By name; cheap ones first.
const CHECKS: [(&str, Check); 5] =
    [("tidy", tidy::check), ("licences", licences::check), ("format", format), ("clippy", clippy), ("docs", docs)];

/// The task: the named checks, or all of them.
pub(crate) fn run(arguments: &[String]) -> Result<ExitCode> {
    for argument in arguments {
        let names = CHECKS.map(|(name, _)| name);
        anyhow::ensure!(names.contains(&argument.as_str()), "no check `{argument}`; there are {}", names.join(", "));
    }
    setup::run(&[])?;
    let mut failed = Vec::new();
    for (name, check) in CHECKS.iter().filter(|(name, _)| arguments.is_empty() || arguments.iter().any(|a| a == name)) {
        println!("== {name}");
        let started = Instant::now();
        match check() {
            Ok(()) => println!("   {name}: fine ({:.1} s)", started.elapsed().as_secs_f64()),
            Err(error) => {
                println!("   {name}: {error:#}");
                failed.push(*name);
            }
        }
    }
    if failed.is_empty() {
        println!("all checks passed");
        return Ok(ExitCode::SUCCESS);
    }
    println!("failed: {}", failed.join(", "));
    Ok(ExitCode::FAILURE)
}

fn format() -> Result<()> {
    shell::run(shell::cargo()?.args(["fmt", "--all", "--check"]))
}

fn clippy() -> Result<()> {
    let clippy = |packages: &[&str]| {
        let rest = ["--all-targets", "--quiet", "--", "-D", "warnings"];
        shell::run(shell::cargo()?.arg("clippy").args(packages).args(rest))
    };
    clippy(&["--workspace"])?;
    clippy(&["-p", "lora-cli", "--no-default-features"])
}

fn docs() -> Result<()> {
    shell::run(shell::cargo()?.args(["doc", "--workspace", "--no-deps", "--quiet"]).env("RUSTDOCFLAGS", "-D warnings"))
}
