//! `cargo xtask test [ARGS..]`: the whole test suite, and one closing line that counts it.
//!
//! Features are all on in a workspace; what is said without them is tested in a build of its own.

use std::{
    io::{BufRead, BufReader},
    process::{ExitCode, Stdio},
};

use anyhow::{Context, Result};

use crate::{setup, shell};

/// `lora` without the network.
const WITHOUT_HUB: [&str; 5] = ["-p", "lora-cli", "--no-default-features", "--test", "no_pull"];

/// The task. All tests run, also after one has failed.
pub(crate) fn run(arguments: &[String]) -> Result<ExitCode> {
    setup::run(&[])?;
    let mut counts = Counts::default();
    let whole: Vec<&str> = ["--workspace"].into_iter().chain(arguments.iter().map(String::as_str)).collect();
    let mut succeeded = cargo_test(&whole, &mut counts)?;
    if arguments.is_empty() {
        succeeded &= cargo_test(&WITHOUT_HUB, &mut counts)?;
    }
    println!("\n{} passed, {} failed, {} skipped", counts.passed, counts.failed, counts.ignored);
    Ok(if succeeded && counts.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// One call of `cargo test`; says whether it succeeded.
fn cargo_test(arguments: &[&str], counts: &mut Counts) -> Result<bool> {
    let mut command = shell::cargo()?;
    command.args(["test", "--no-fail-fast"]).args(arguments).stdout(Stdio::piped());
    if std::env::var_os("OMP_NUM_THREADS").is_none() {
        // Tests run side by side on tiny models; threads inside each of them would only wait for one another.
        command.env("OMP_NUM_THREADS", "1");
    }
    let mut tests = command.spawn().context("cannot start cargo")?;
    if let Some(stdout) = tests.stdout.take() {
        for line in BufReader::new(stdout).lines() {
            let line = line.context("the tests wrote something that is no text")?;
            println!("{line}");
            counts.add(&line);
        }
    }
    let status = tests.wait().context("cannot wait for cargo")?;
    Ok(status.success())
}

/// The sum over all test binaries.
#[derive(Debug, Default, PartialEq, Eq)]
struct Counts {
    passed: u64,
    failed: u64,
    ignored: u64,
}

impl Counts {
    /// Adds a line such as `test result: ok. 5 passed; 0 failed; 1 ignored; 0 measured; ..`; other lines count nothing.
    fn add(&mut self, line: &str) {
        let Some((_, counts)) = line.strip_prefix("test result: ").and_then(|rest| rest.split_once(". ")) else {
            return;
        };
        for part in counts.split("; ") {
            if let Some((number, what)) = part.split_once(' ')
                && let Ok(number) = number.parse::<u64>()
            {
                match what {
                    "passed" => self.passed += number,
                    "failed" => self.failed += number,
                    "ignored" => self.ignored += number,
                    _ => {}
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_of_all_binaries_are_summed() {
        let mut counts = Counts::default();
        counts.add("running 6 tests");
        counts.add("test result: ok. 5 passed; 0 failed; 1 ignored; 0 measured; 2 filtered out; finished in 0.01s");
        counts.add("test result: FAILED. 3 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.2s");
        assert_eq!(counts, Counts { passed: 8, failed: 2, ignored: 1 });
    }
}
