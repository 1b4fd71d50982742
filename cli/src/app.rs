//! From the command line to the command, and from its result to the exit code.

use std::{ffi::OsString, io::Write as _, process::ExitCode};

use crate::{
    Failure,
    args::{Command, Global, Invocation, NotParsed},
    commands, launch,
    options::{closest, describe},
    signals,
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
    if invocation.cli.command.writes_files() {
        // If nothing was under way, it has not begun or is done.
        let interrupted = |removed: bool| match removed {
            true => "interrupted: nothing is written, and what was there is untouched",
            false => "interrupted",
        };
        signals::listen(move |removed| Failure::new("interrupted", interrupted(removed)), ui)?;
    }
    match &invocation.cli.command {
        Command::Inspect(args) => commands::inspect::run(args, ui)?,
        Command::Check(args) => return commands::check::run(args, ui),
        Command::Convert(args) => commands::convert::run(args, ui)?,
        Command::Metadata(args) => commands::metadata::run(args, ui)?,
        Command::Merge(args) => commands::merge::run(args, ui)?,
        Command::Mix(args) => commands::mix::run(args, ui)?,
        Command::Extract(args) => commands::extract::run(args, ui)?,
        Command::Resize(args) => commands::resize::run(args, ui)?,
        Command::Diff(args) => return commands::diff::run(args, ui),
        Command::Pull(args) => commands::pull::run(args, &invocation.cli.global, ui)?,
        Command::Runs(command) => commands::runs::run(command, ui)?,
        Command::Report(args) => commands::report::run(args, ui)?,
        Command::Doctor => return commands::doctor::run(ui),
        Command::Config(command) => commands::config::run(command, invocation, ui)?,
        Command::Completions(args) => commands::completions::run(args, ui)?,
        Command::Man => commands::man::run(ui)?,
        Command::Train(_) | Command::Generate(_) | Command::Chat(_) | Command::Eval(_) | Command::Data(_) => {
            for warning in misspelt_variables() {
                ui.warn(&warning);
            }
            // Whatever is wrong with the options is said here: the engine takes half a second to load.
            invocation.task()?;
            return launch::launch(words, invocation.cli.global.offline);
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Variables that look like ours and are none: a slip there would otherwise pass in silence.
fn misspelt_variables() -> Vec<String> {
    let known: Vec<_> = describe().into_iter().map(|key| key.variable).collect();
    let globals = ["LORA_CONFIG", "LORA_OFFLINE", "LORA_YES", "LORA_NO_PROGRESS"];
    let names = std::env::vars_os().filter_map(|(name, _)| name.into_string().ok());
    let unknown =
        names.filter(|name| name.starts_with("LORA_") && !globals.contains(&name.as_str()) && !known.contains(name));
    let words: Vec<_> =
        known.iter().map(|name| name.trim_start_matches("LORA_").to_lowercase().replace('_', "-")).collect();
    unknown
        .filter_map(|name| {
            let word = name.trim_start_matches("LORA_").to_lowercase();
            let near = closest(&word, words.iter().map(String::as_str))?;
            let meant = near.to_uppercase().replace('-', "_");
            Some(format!("the variable {name} means nothing here; did you mean LORA_{meant}?"))
        })
        .collect()
}
