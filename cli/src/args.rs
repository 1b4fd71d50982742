//! The command line of `lora` and `lora-engine`: one definition, parsed by both.
//!
//! `lora` parses first, so that a wrong command line never starts the engine; the engine parses the same words again
//! and gets the same [`Task`].

mod files;
mod invocation;
mod pull;
mod ranks;
mod usage;

use std::{num::NonZeroUsize, path::PathBuf};

use clap::{ArgAction, Args, Parser, Subcommand};

use crate::options::{DataOptions, GenerateOptions, TrainOptions, values::LoraFile};

pub use files::{ConvertArgs, Entry, MergeArgs, MetadataArgs, Stored};
pub use invocation::{Invocation, NotParsed, Task, command};
pub use pull::{PullArgs, RemoteName};
pub use ranks::{DiffArgs, ExtractArgs, MixArgs, Mixing, ResizeArgs, Spelling};

/// Train, inspect and use low-rank adapters: Stable Diffusion, language models
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
    /// Train an adapter on pictures or texts, or go on with a run
    Train(Box<TrainArgs>),
    /// Draw pictures from a prompt, or answer it, by the base
    Generate(GenerateArgs),
    /// Talk with a language model
    Chat(ChatArgs),
    /// Measure the loss on pictures or texts
    Eval(EvalArgs),
    /// Look at what would be trained on
    #[command(subcommand)]
    Data(DataCommand),
    /// Fetch a model from the Hugging Face hub
    Pull(PullArgs),
    /// Say what an adapter file is
    Inspect(InspectArgs),
    /// Check an adapter file against a base, key by key
    Check(CheckArgs),
    /// Write an adapter in another spelling, or a pickle as safetensors
    Convert(ConvertArgs),
    /// Merge adapters into a base model
    Merge(MergeArgs),
    /// Show or change what a file says about itself
    Metadata(MetadataArgs),
    /// Mix several adapters into one
    Mix(MixArgs),
    /// Take an adapter out of two models
    Extract(ExtractArgs),
    /// Give an adapter another rank
    Resize(ResizeArgs),
    /// Compare two adapters
    Diff(DiffArgs),
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

impl Command {
    /// Whether a file or a model is what is left of it; training and fetching look after theirs themselves.
    pub(crate) fn writes_files(&self) -> bool {
        matches!(
            self,
            Self::Convert(_) | Self::Metadata(_) | Self::Merge(_) | Self::Mix(_) | Self::Extract(_) | Self::Resize(_)
        )
    }
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
    /// What the picture should show, or what is asked
    #[arg(value_name = "PROMPT")]
    pub prompt: String,
    /// Everything that can also stand in a configuration file.
    #[command(flatten)]
    pub options: GenerateOptions,
    /// Show the base, each adapter alone, and all together
    #[arg(long)]
    pub compare: bool,
}

/// Arguments of `lora chat`.
#[derive(Debug, Clone, Args)]
pub struct ChatArgs {
    /// Everything that can also stand in a configuration file.
    #[command(flatten)]
    pub options: GenerateOptions,
}

/// Arguments of `lora eval`.
#[derive(Debug, Clone, Args)]
pub struct EvalArgs {
    /// Everything that can also stand in a configuration file.
    #[command(flatten)]
    pub options: DataOptions,
    /// Adapter with its strength; repeat for several
    #[arg(long, value_name = "FILE[:STRENGTH]")]
    pub lora: Vec<LoraFile>,
    /// Noises and timesteps that each picture is measured with
    #[arg(long, value_name = "N", default_value = "8")]
    pub draws: NonZeroUsize,
    /// Texts: measure the loss alone, and answer nothing
    #[arg(long)]
    pub loss_only: bool,
    /// Measure the base, each adapter alone, and all together
    #[arg(long)]
    pub compare: bool,
}

/// `lora data ...`.
#[derive(Debug, Clone, Subcommand)]
pub enum DataCommand {
    /// List what would be trained on, and what would be skipped and why
    Check(DataArgs),
    /// Show pictures or texts as training sees them
    Preview(PreviewArgs),
}

/// Arguments of `lora data check`.
#[derive(Debug, Clone, Args)]
pub struct DataArgs {
    /// Everything that can also stand in a configuration file.
    #[command(flatten)]
    pub options: DataOptions,
}

/// Arguments of `lora data preview`.
#[derive(Debug, Clone, Args)]
pub struct PreviewArgs {
    /// Everything that can also stand in a configuration file.
    #[command(flatten)]
    pub options: DataOptions,
    /// Pictures or texts that are shown
    #[arg(long, value_name = "N", default_value = "16")]
    pub limit: NonZeroUsize,
    /// The sheet of pictures
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
    /// Base model: folder, .safetensors file or org/name from the hub
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
