//! A parsed command line, and the task that it asks of the engine.

use std::{ffi::OsString, path::PathBuf};

use clap::{ArgMatches, CommandFactory as _, FromArgMatches as _, error::ErrorKind};

use super::{Cli, Command, DataCommand, usage::usage};
use crate::{
    Failure,
    options::{
        self, DataConfig, DataOptions, GenerateConfig, GenerateOptions, Layers, Options, Surroundings, TrainConfig,
        TrainOptions, keys, values::LoraFile, variable,
    },
};

/// What the engine is to do, with every option resolved.
#[derive(Debug, Clone)]
pub enum Task {
    /// Train.
    Train {
        /// What will run; `out` is the run's folder when it is resumed.
        config: Box<TrainConfig>,
        /// The run is there already.
        resume: bool,
        /// Stop after the plan.
        dry_run: bool,
    },
    /// Draw pictures, or answer.
    Generate {
        /// What, and how.
        config: Box<GenerateConfig>,
        /// Show the base and each adapter beside each other.
        compare: bool,
    },
    /// Talk; the configuration's prompt is empty.
    Chat(Box<GenerateConfig>),
    /// Measure the loss.
    Eval {
        /// How data is read; has a base.
        config: Box<DataConfig>,
        /// The adapters.
        lora: Vec<LoraFile>,
        /// Noises and timesteps for each picture.
        draws: usize,
        /// Whether questions are answered, too.
        answers: bool,
        /// Measure the base and each adapter beside each other.
        compare: bool,
    },
    /// List the data.
    DataCheck(Box<DataConfig>),
    /// Draw the data.
    DataPreview {
        /// How pictures are read.
        config: Box<DataConfig>,
        /// Pictures on the sheet.
        limit: usize,
        /// The sheet.
        out: PathBuf,
    },
}

/// A parsed command line.
#[derive(Debug, Clone)]
pub struct Invocation {
    /// The words.
    pub cli: Cli,
    matches: ArgMatches,
}

/// Why there is no [`Invocation`]: help or a version was asked for, or the words are wrong.
#[derive(Debug)]
pub enum NotParsed {
    /// Text for stdout; the command is done.
    Answered(String),
    /// A wrong command line. JSON is wanted if the flag is true.
    Wrong(Box<Failure>, bool),
}

/// The clap command with the variables of every option.
pub fn command() -> clap::Command {
    let with = |command: clap::Command, names: Vec<String>, table: Option<&'static str>| {
        command.mut_args(|arg| {
            let key = arg.get_id().as_str().replace('_', "-");
            if names.contains(&key) { arg.env(variable(table, &key)).hide_env(true) } else { arg }
        })
    };
    let train = |command| with(command, keys::<TrainOptions>(), TrainOptions::TABLE);
    let generate = |command| with(command, keys::<GenerateOptions>(), GenerateOptions::TABLE);
    let pictures = |command| with(command, keys::<DataOptions>(), DataOptions::TABLE);
    Cli::command()
        .mut_subcommand("train", train)
        .mut_subcommand("generate", generate)
        .mut_subcommand("chat", |command| without_pictures(generate(command)))
        .mut_subcommand("eval", pictures)
        .mut_subcommand("data", |data| data.mut_subcommand("check", pictures).mut_subcommand("preview", pictures))
        .mut_subcommand("config", |config| config.mut_subcommand("show", train))
}

/// Hides what a conversation has no use for; it is understood all the same, since the options are those of `generate`.
fn without_pictures(command: clap::Command) -> clap::Command {
    command.mut_args(|arg| {
        let idle =
            arg.get_help_heading() == Some("Pictures") || matches!(arg.get_id().as_str(), "out" | "count" | "raw");
        arg.hide(idle)
    })
}

impl Invocation {
    /// Parses the words of a command line, the program's name first.
    ///
    /// # Errors
    /// If the words are wrong, or help is wanted instead.
    pub fn parse(words: impl IntoIterator<Item = OsString>) -> Result<Self, NotParsed> {
        let words: Vec<_> = words.into_iter().collect();
        let json = words.iter().any(|word| word == "--json");
        let not_parsed = |error: clap::Error| match error.kind() {
            ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => NotParsed::Answered(error.render().to_string()),
            ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand if words.len() < 2 => {
                NotParsed::Answered(error.render().to_string())
            }
            _ => NotParsed::Wrong(Box::new(usage(&error, &words)), json),
        };
        let matches = command().try_get_matches_from(&words).map_err(not_parsed)?;
        let cli = Cli::from_arg_matches(&matches).map_err(not_parsed)?;
        Ok(Self { cli, matches })
    }

    /// What the engine is to do; `None` for a command that needs no engine.
    ///
    /// # Errors
    /// If a configuration file or an option is wrong.
    pub fn task(&self) -> Result<Option<Task>, Failure> {
        Ok(Some(match &self.cli.command {
            Command::Train(args) => match &args.resume {
                Some(run) => {
                    crate::run::RunDir::open(run)?;
                    let config = options::resume(run, args.options.clone(), self.innermost())?;
                    Task::Train { config: Box::new(config), resume: true, dry_run: args.dry_run }
                }
                None => {
                    let config = Box::new(self.layers(args.options.clone())?.options.resolve()?);
                    Task::Train { config, resume: false, dry_run: args.dry_run }
                }
            },
            Command::Generate(args) => {
                let options = self.layers(args.options.clone())?.options;
                let config = Box::new(options.resolve(args.prompt.clone())?);
                Task::Generate { config, compare: args.compare }
            }
            Command::Chat(args) => {
                let options = self.layers(args.options.clone())?.options;
                Task::Chat(Box::new(options.resolve(String::new())?))
            }
            Command::Eval(args) => {
                let config = Box::new(self.layers(args.options.clone())?.options.resolve()?);
                config.base()?;
                let (lora, draws) = (args.lora.clone(), args.draws.get());
                Task::Eval { config, lora, draws, answers: !args.loss_only, compare: args.compare }
            }
            Command::Data(DataCommand::Check(args)) => {
                Task::DataCheck(Box::new(self.layers(args.options.clone())?.options.resolve()?))
            }
            Command::Data(DataCommand::Preview(args)) => {
                let config = Box::new(self.layers(args.options.clone())?.options.resolve()?);
                Task::DataPreview { config, limit: args.limit.get(), out: args.out.clone() }
            }
            _ => return Ok(None),
        }))
    }

    /// The layers of the options of the given command, these flags and variables on top.
    ///
    /// # Errors
    /// If a configuration file is wrong.
    pub fn layers<O: Options + Clone>(&self, said: O) -> Result<Layers<O>, Failure> {
        let config = self.cli.global.config.as_deref();
        Ok(Layers::gather(said, self.innermost(), config, &Surroundings::here())?)
    }

    /// The matches of the innermost command.
    fn innermost(&self) -> &ArgMatches {
        let mut matches = &self.matches;
        while let Some((_, inner)) = matches.subcommand() {
            matches = inner;
        }
        matches
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_definition_is_sound() {
        command().debug_assert();
    }

    #[test]
    fn engine_commands_become_tasks_and_the_rest_does_not() {
        let parse = |line: &str| Invocation::parse(line.split(' ').map(Into::into)).unwrap();
        assert!(parse("lora doctor").task().unwrap().is_none());
        match parse("lora eval pictures --base b --draws 3 --lora x:0.5").task().unwrap() {
            Some(Task::Eval { lora, draws: 3, .. }) => assert_eq!(lora[0].strength.unet, 0.5),
            other => panic!("{other:?}"),
        }
    }
}
