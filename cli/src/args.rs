//! The command line of `lora` and `lora-engine`: one definition, parsed by both.
//!
//! `lora` parses first, so that a wrong command line never starts the engine; the engine parses the same words again
//! and gets the same [`Task`].

use std::{ffi::OsString, num::NonZeroUsize, path::PathBuf};

use clap::{
    ArgAction, ArgMatches, Args, CommandFactory as _, FromArgMatches as _, Parser, Subcommand, error::ErrorKind,
};

use crate::{
    Failure,
    options::{
        self, GenerateConfig, GenerateOptions, Layers, Options, PictureConfig, PictureOptions, Surroundings,
        TrainConfig, TrainOptions, keys, values::LoraFile, variable,
    },
};

/// Train, inspect and use low-rank adapters for Stable Diffusion
#[derive(Debug, Clone, Parser)]
#[command(
    name = "lora",
    version,
    disable_help_flag = true,
    disable_help_subcommand = true,
    max_term_width = 80,
    subcommand_value_name = "COMMAND",
    after_help = "First run: lora train ./pictures --base BASE      Trouble: lora doctor"
)]
pub struct Cli {
    /// What all commands know.
    #[command(flatten)]
    pub global: Global,
    /// The command.
    #[command(subcommand)]
    pub command: Command,
}

/// What all commands know.
#[derive(Debug, Clone, Default, Args)]
pub struct Global {
    /// Configuration file
    #[arg(
        long,
        value_name = "FILE",
        global = true,
        env = "LORA_CONFIG",
        hide_env = true,
        help_heading = "Global",
        display_order = 900
    )]
    pub config: Option<PathBuf>,
    /// Answer in JSON
    #[arg(long, global = true, help_heading = "Global", display_order = 901)]
    pub json: bool,
    /// Say nothing but results and errors
    #[arg(short, long, global = true, hide_short_help = true, help_heading = "Global", display_order = 902)]
    pub quiet: bool,
    /// Say more; repeat for more still
    #[arg(short, long, action = ArgAction::Count, global = true, hide_short_help = true, help_heading = "Global", display_order = 903)]
    pub verbose: u8,
    /// Do not touch the network
    #[arg(
        long,
        global = true,
        env = "LORA_OFFLINE",
        hide_env = true,
        hide_short_help = true,
        help_heading = "Global",
        display_order = 904
    )]
    pub offline: bool,
    /// Answer yes to every question
    #[arg(
        long,
        global = true,
        env = "LORA_YES",
        hide_env = true,
        hide_short_help = true,
        help_heading = "Global",
        display_order = 905
    )]
    pub yes: bool,
    /// Draw no bars
    #[arg(
        long,
        global = true,
        env = "LORA_NO_PROGRESS",
        hide_env = true,
        hide_short_help = true,
        help_heading = "Global",
        display_order = 906
    )]
    pub no_progress: bool,
    #[arg(short, long, action = ArgAction::HelpShort, global = true, help = "Show the usual options", help_heading = "Global", display_order = 907)]
    help: Option<bool>,
    #[arg(long, action = ArgAction::HelpLong, global = true, help = "Show all options", help_heading = "Global", display_order = 908)]
    help_all: Option<bool>,
}

/// A command.
#[derive(Debug, Clone, Subcommand)]
pub enum Command {
    /// Train an adapter on a folder of pictures, or go on with a run
    Train(Box<TrainArgs>),
    /// Draw pictures from a prompt
    Generate(GenerateArgs),
    /// Measure the loss on a folder of pictures with fixed noise
    Eval(EvalArgs),
    /// Look at what would be trained on
    #[command(subcommand)]
    Data(DataCommand),
    /// Say what an adapter file is
    Inspect(InspectArgs),
    /// Check an adapter file against a base, key by key
    Check(CheckArgs),
    /// List, show and compare runs
    #[command(subcommand)]
    Runs(RunsCommand),
    /// Write the report of a run anew
    Report(ReportArgs),
    /// Explain the installation, and what is wrong with it
    Doctor,
    /// Show, explain and start configurations
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Print the completions of a shell
    Completions(CompletionsArgs),
    /// Print the manual page
    Man,
}

/// Arguments of `lora train`.
#[derive(Debug, Clone, Args)]
pub struct TrainArgs {
    /// Everything that can also stand in a configuration file.
    #[command(flatten)]
    pub options: TrainOptions,
    /// Go on with the run in this folder; needs nothing else
    #[arg(long, value_name = "RUN")]
    pub resume: Option<PathBuf>,
    /// Say what would be done, and stop
    #[arg(long)]
    pub dry_run: bool,
}

/// Arguments of `lora generate`.
#[derive(Debug, Clone, Args)]
pub struct GenerateArgs {
    /// What the picture should show
    #[arg(value_name = "PROMPT")]
    pub prompt: String,
    /// Everything that can also stand in a configuration file.
    #[command(flatten)]
    pub options: GenerateOptions,
}

/// Arguments of `lora eval`.
#[derive(Debug, Clone, Args)]
pub struct EvalArgs {
    /// Everything that can also stand in a configuration file.
    #[command(flatten)]
    pub options: PictureOptions,
    /// Adapter with its strength; repeat for several
    #[arg(long, value_name = "FILE[:STRENGTH]")]
    pub lora: Vec<LoraFile>,
    /// Noises and timesteps that each picture is measured with
    #[arg(long, value_name = "N", default_value = "8")]
    pub draws: NonZeroUsize,
}

/// `lora data ...`.
#[derive(Debug, Clone, Subcommand)]
pub enum DataCommand {
    /// List what would be trained on, and what would be skipped and why
    Check(DataArgs),
    /// Draw pictures and captions as training sees them
    Preview(PreviewArgs),
}

/// Arguments of `lora data check`.
#[derive(Debug, Clone, Args)]
pub struct DataArgs {
    /// Everything that can also stand in a configuration file.
    #[command(flatten)]
    pub options: PictureOptions,
}

/// Arguments of `lora data preview`.
#[derive(Debug, Clone, Args)]
pub struct PreviewArgs {
    /// Everything that can also stand in a configuration file.
    #[command(flatten)]
    pub options: PictureOptions,
    /// Pictures on the sheet
    #[arg(long, value_name = "N", default_value = "16")]
    pub limit: NonZeroUsize,
    /// The sheet
    #[arg(long, short, value_name = "FILE", default_value = "preview.png")]
    pub out: PathBuf,
}

/// Arguments of `lora inspect`.
#[derive(Debug, Clone, Args)]
pub struct InspectArgs {
    /// A .safetensors file
    pub file: PathBuf,
    /// Base model to match the keys with [default: guessed from the file]
    #[arg(long, value_name = "BASE")]
    pub base: Option<String>,
    /// Also list every module
    #[arg(long)]
    pub modules: bool,
}

/// Arguments of `lora check`.
#[derive(Debug, Clone, Args)]
pub struct CheckArgs {
    /// A .safetensors file
    pub file: PathBuf,
    /// Base model: folder or .safetensors file
    #[arg(long, value_name = "BASE")]
    pub base: String,
}

/// `lora runs ...`.
#[derive(Debug, Clone, Subcommand)]
pub enum RunsCommand {
    /// List the runs in a folder
    List {
        /// Folder that holds runs, itself or in `runs/`
        #[arg(value_name = "FOLDER", default_value = ".")]
        folder: PathBuf,
    },
    /// Show a run: options, loss, samples, file
    Show {
        /// Folder of the run
        #[arg(value_name = "RUN")]
        run: PathBuf,
    },
    /// Put runs side by side: what differs, and what came of it
    Compare {
        /// Folders of the runs
        #[arg(value_name = "RUN", required = true, num_args = 2..)]
        runs: Vec<PathBuf>,
    },
}

/// Arguments of `lora report`.
#[derive(Debug, Clone, Args)]
pub struct ReportArgs {
    /// Folder of the run
    #[arg(value_name = "RUN")]
    pub run: PathBuf,
}

/// `lora config ...`.
#[derive(Debug, Clone, Subcommand)]
pub enum ConfigCommand {
    /// Show every value that a training would run with, and where it comes from
    Show {
        /// The same arguments as `lora train` takes.
        #[command(flatten)]
        options: Box<TrainOptions>,
    },
    /// Write a configuration file with every option and its default
    Init {
        /// The file
        #[arg(value_name = "FILE", default_value = "lora.toml")]
        file: PathBuf,
    },
    /// Explain an option: what it does, what it may be, what it is now
    Explain {
        /// The option, as `min-snr` or `generate.steps`
        #[arg(value_name = "KEY")]
        key: String,
    },
    /// Translate a configuration of kohya's trainers
    Import {
        /// A kohya .toml file
        #[arg(value_name = "FILE")]
        file: PathBuf,
    },
}

/// Arguments of `lora completions`.
#[derive(Debug, Clone, Args)]
pub struct CompletionsArgs {
    /// The shell
    #[arg(value_enum)]
    pub shell: clap_complete::Shell,
}

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
    /// Draw pictures.
    Generate(Box<GenerateConfig>),
    /// Measure the loss.
    Eval {
        /// How pictures are read; has a base.
        config: Box<PictureConfig>,
        /// The adapters.
        lora: Vec<LoraFile>,
        /// Noises and timesteps for each picture.
        draws: usize,
    },
    /// List the data.
    DataCheck(Box<PictureConfig>),
    /// Draw the data.
    DataPreview {
        /// How pictures are read.
        config: Box<PictureConfig>,
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
    let pictures = |command| with(command, keys::<PictureOptions>(), PictureOptions::TABLE);
    Cli::command()
        .mut_subcommand("train", train)
        .mut_subcommand("generate", |command| with(command, keys::<GenerateOptions>(), GenerateOptions::TABLE))
        .mut_subcommand("eval", pictures)
        .mut_subcommand("data", |data| data.mut_subcommand("check", pictures).mut_subcommand("preview", pictures))
        .mut_subcommand("config", |config| config.mut_subcommand("show", train))
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
                Task::Generate(Box::new(options.resolve(args.prompt.clone())?))
            }
            Command::Eval(args) => {
                let config = Box::new(self.layers(args.options.clone())?.options.resolve()?);
                config.base()?;
                Task::Eval { config, lora: args.lora.clone(), draws: args.draws.get() }
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

/// Clap's error in our form: its first line, what it lists, and a hint that can be pasted.
fn usage(error: &clap::Error, words: &[OsString]) -> Failure {
    use clap::error::{ContextKind, ContextValue};
    let rendered = error.render().to_string();
    let mut lines = rendered.lines().map(str::trim_end).filter(|line| !line.is_empty());
    let first = lines.next().unwrap_or("wrong command line");
    let mut failure = Failure::usage("usage", plain_words(first.trim_start_matches("error: ")));
    let mut tip = None;
    for line in lines {
        if line.starts_with("Usage:") || line.starts_with("For more information") {
            break;
        }
        match line.trim_start().strip_prefix("tip: ") {
            Some(text) => tip = Some(text.replace('\'', "`")),
            None => failure = failure.detail(line.trim()),
        }
    }
    let context = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text.clone()),
        _ => None,
    };
    if let (Some(arg), Some(value)) = (context(ContextKind::InvalidArg), context(ContextKind::InvalidValue)) {
        let flag = arg.trim_start_matches("--").split([' ', '=']).next().unwrap_or_default();
        let named = [variable(None, flag), variable(GenerateOptions::TABLE, flag)];
        let from = named.into_iter().find(|name| std::env::var(name).is_ok_and(|set| set == value));
        if let Some(name) = from.filter(|_| !words.iter().any(|word| word.to_string_lossy().contains(&value))) {
            failure = failure.detail(format!("the value comes from the variable {name}"));
        }
    }
    let named = words.iter().skip(1).map(|word| word.to_string_lossy());
    let mut path = String::from("lora");
    let mut at = command();
    for word in named {
        match at.find_subcommand(word.as_ref()).cloned() {
            Some(inner) => {
                path = format!("{path} {word}");
                at = inner;
            }
            None if word.starts_with('-') => continue,
            None => break,
        }
    }
    let more = format!("`{path} --help` shows what it takes");
    match tip {
        Some(tip) => failure.hint(format!("{tip}; {more}")),
        None => failure.hint(more),
    }
}

/// Clap's words with names in backticks, and the standard library's remarks on numbers in plain ones.
fn plain_words(line: &str) -> String {
    let mut line = line.replace('\'', "`");
    for (theirs, ours) in [
        ("invalid digit found in string", "a whole number is expected"),
        ("cannot parse integer from empty string", "a whole number is expected"),
        ("number would be zero for non-zero type", "it must be at least 1"),
        ("number too large to fit in target type", "the number is too large"),
        ("invalid float literal", "a number is expected"),
        ("cannot parse float from empty string", "a number is expected"),
    ] {
        line = line.replace(theirs, ours);
    }
    line
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
