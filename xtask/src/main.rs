//! `cargo xtask TASK`: everything that is done to this repository, one file a task.
//!
//! Nothing here links libtorch, so that the set-up which fetches libtorch can be compiled first. Tasks are written for a
//! bare machine: Rust, a C++ compiler and Python with pip; what a task needs besides, it says.
#![expect(clippy::print_stdout, reason = "tasks talk to the person who typed them")]

mod bench;
mod check;
mod demo;
mod fuzz;
mod licences;
mod parity;
mod setup;
mod shell;
mod test;
mod tidy;

use std::process::ExitCode;

use anyhow::{Result, bail};

const USAGE: &str = "\
Usage: cargo xtask TASK

  setup [--cuda]      find or fetch libtorch and link it as .libtorch; --cuda is assumed where a GPU is seen
  demo [text]         set up, build, and train a style on the bundled tiny Stable Diffusion;
                      with `text`, new facts on the bundled tiny language model
  test [ARGS..]       set up, then `cargo test --workspace ARGS`
  check [NAME..]      tidy, licences, format, clippy, docs: what CI runs before the tests
  bench [NAME [-- FILTER]]    criterion benches
  bench --peers [ARGS..]      our training beside diffusers + peft on this machine
  parity FOLDER [CASE..]      every golden case of a fixtures folder, one line a case
  fuzz [TARGET] [SECONDS]     run the fuzz targets (needs cargo-fuzz and a nightly toolchain)
";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match run(&arguments) {
        Ok(code) => code,
        Err(error) => {
            #[expect(clippy::print_stderr, reason = "the one place where a failed task is reported")]
            {
                eprintln!("error: {error:#}");
            }
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &[String]) -> Result<ExitCode> {
    let Some((task, rest)) = arguments.split_first() else {
        print!("{USAGE}");
        return Ok(ExitCode::from(2));
    };
    match task.as_str() {
        "setup" => setup::run(rest)?,
        "demo" => demo::run(rest)?,
        "test" => return test::run(rest),
        "check" => return check::run(rest),
        "bench" => bench::run(rest)?,
        "parity" => return parity::run(rest),
        "fuzz" => fuzz::run(rest)?,
        "help" | "--help" | "-h" => print!("{USAGE}"),
        unknown => bail!("there is no task `{unknown}`\n\n{USAGE}"),
    }
    Ok(ExitCode::SUCCESS)
}
