//! `lora-engine`: whatever needs libtorch, behind the same command line as `lora`, which starts it.
//!
//! Thin glue from options to the library crates: each command is one file.

mod adapters;
mod base;
mod chat;
mod data;
mod eval;
mod failures;
mod generate;
mod machine;
mod pictures;
mod signals;
mod texts;
mod train;

use std::{ffi::OsString, process::ExitCode};

use lora_cli::{Failure, app, args::Task, ui::Ui};

fn main() -> ExitCode {
    let words: Vec<OsString> = std::env::args_os().collect();
    let invocation = match app::parse(&words) {
        Ok(invocation) => invocation,
        Err(exit) => return exit,
    };
    let ui = Ui::new(&invocation.cli.global);
    match invocation.task().and_then(|task| run(task, &ui)) {
        Ok(exit) => exit,
        Err(failure) => failure.report(&ui),
    }
}

fn run(task: Option<Task>, ui: &Ui) -> Result<ExitCode, Failure> {
    match task {
        Some(Task::Train { config, resume, dry_run }) => train::run(*config, resume, dry_run, ui),
        Some(Task::Generate { config, compare }) => generate::run(&config, compare, ui),
        Some(Task::Chat(config)) => chat::run(&config, ui),
        Some(Task::Eval { config, lora, draws, answers, compare }) => {
            let measures = eval::Measures { draws, answers, compare };
            eval::run(&config, &lora, measures, ui)
        }
        Some(Task::DataCheck(config)) => data::check(&config, ui),
        Some(Task::DataPreview { config, limit, out }) => data::preview(&config, limit, &out, ui),
        None => Err(Failure::usage("not_the_engine", "this command belongs to `lora`, which needs no engine for it")
            .hint("call `lora` instead of `lora-engine`")),
    }
}
