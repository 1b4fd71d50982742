//! From the command line to the command, and from its result to the exit code.

use std::{ffi::OsString, io::Write as _, process::ExitCode};

use crate::{
    Failure,
    args::{Command, Global, Invocation, NotParsed},
    commands, launch,
    ui::Ui,
};

/// Runs `lora`.
pub fn main() -> ExitCode {
    let words: Vec<OsString> = std::env::args_os().collect();
    let invocation = match parse(&words) {
        Ok(invocation) => invocation,
        Err(exit) => return exit,
    };
    let ui = Ui::new(&invocation.cli.global);
    match run(&invocation, &words, &ui) {
        Ok(exit) => exit,
        Err(failure) => failure.report(&ui),
    }
}

/// Parses the words; help, versions and wrong command lines are answered here, and give the exit code.
///
/// # Errors
/// The exit code, if there is nothing left to do.
pub fn parse(words: &[OsString]) -> Result<Invocation, ExitCode> {
    Invocation::parse(words.iter().cloned()).map_err(|not_parsed| match not_parsed {
        NotParsed::Answered(text) => {
            let _ = std::io::stdout().write_all(text.as_bytes());
            ExitCode::SUCCESS
        }
        NotParsed::Wrong(failure, json) => {
            let mut ui = Ui::new(&Global::default());
            ui.json = json;
            failure.report(&ui)
        }
    })
}

fn run(invocation: &Invocation, words: &[OsString], ui: &Ui) -> Result<ExitCode, Failure> {
    match &invocation.cli.command {
        Command::Inspect(args) => commands::inspect::run(args, ui)?,
        Command::Check(args) => return commands::check::run(args, ui),
        Command::Runs(command) => commands::runs::run(command, ui)?,
        Command::Report(args) => commands::report::run(args, ui)?,
        Command::Doctor => return commands::doctor::run(ui),
        Command::Config(command) => commands::config::run(command, invocation, ui)?,
        Command::Completions(args) => commands::completions::run(args, ui)?,
        Command::Man => commands::man::run(ui)?,
        Command::Train(_) | Command::Generate(_) | Command::Eval(_) | Command::Data(_) => {
            // Whatever is wrong with the options is said here: the engine takes half a second to load.
            invocation.task()?;
            return launch::launch(words, invocation.cli.global.offline);
        }
    }
    Ok(ExitCode::SUCCESS)
}
