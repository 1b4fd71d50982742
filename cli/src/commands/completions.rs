//! `lora completions`: completions of a shell, on stdout.

use crate::{Failure, args, args::CompletionsArgs, commands::output, ui::Ui};

pub(crate) fn run(args: &CompletionsArgs, ui: &Ui) -> Result<(), Failure> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut args::command(), "lora", &mut script);
    ui.data(&String::from_utf8_lossy(&script)).map_err(output)
}
