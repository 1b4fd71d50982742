//! `lora man`: the manual page, all commands in one, on stdout.

use crate::{Failure, args, commands::output, ui::Ui};

pub(crate) fn run(ui: &Ui) -> Result<(), Failure> {
    let mut command = args::command();
    command.build();
    let mut page = Vec::new();
    clap_mangen::Man::new(command.clone()).render(&mut page).map_err(output)?;
    for inner in command.get_subcommands() {
        section(inner, &format!("lora {}", inner.get_name()), &mut page).map_err(output)?;
    }
    ui.data(&String::from_utf8_lossy(&page)).map_err(output)
}

/// The options of one command as sections of the page; commands within it follow.
fn section(command: &clap::Command, path: &str, page: &mut Vec<u8>) -> std::io::Result<()> {
    use std::io::Write as _;
    writeln!(page, ".SH {}", path.to_uppercase())?;
    let man = clap_mangen::Man::new(command.clone());
    for part in [clap_mangen::Man::render_description_section, clap_mangen::Man::render_options_section] {
        let mut text = Vec::new();
        part(&man, &mut text)?;
        // The parts come as sections of their own; here they lie one level deeper.
        page.extend(String::from_utf8_lossy(&text).replace(".SH ", ".SS ").into_bytes());
    }
    for inner in command.get_subcommands() {
        section(inner, &format!("{path} {}", inner.get_name()), page)?;
    }
    Ok(())
}
