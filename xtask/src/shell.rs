//! Starting other programs: the repository's root, and commands that fail with their own name.

use std::{
    ffi::OsStr,
    path::PathBuf,
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail};

/// The root of this checkout.
///
/// # Errors
/// If the program was not started through cargo, which says where the package lies.
pub(crate) fn root() -> Result<PathBuf> {
    let package = std::env::var_os("CARGO_MANIFEST_DIR").context("start this program as `cargo xtask`")?;
    let package = PathBuf::from(package);
    Ok(package.parent().context("the package has no parent folder")?.to_owned())
}

/// A command that runs in the root of the checkout.
pub(crate) fn command(program: impl AsRef<OsStr>) -> Result<Command> {
    let mut command = Command::new(program);
    command.current_dir(root()?);
    Ok(command)
}

/// `cargo` itself, the one that started this task.
pub(crate) fn cargo() -> Result<Command> {
    command(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}

/// The Python that set-up and peers use: `$PYTHON`, else `python3`.
pub(crate) fn python() -> Result<Command> {
    command(std::env::var_os("PYTHON").unwrap_or_else(|| "python3".into()))
}

/// Runs to the end, output shown; an exit status other than 0 is an error.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("cannot start {}", spelled(command)))?;
    if !status.success() {
        bail!("{} ended with {status}", spelled(command));
    }
    Ok(())
}

/// Runs to the end and gives what it wrote to stdout; stderr is shown.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let output =
        command.stderr(Stdio::inherit()).output().with_context(|| format!("cannot start {}", spelled(command)))?;
    if !output.status.success() {
        bail!("{} ended with {}", spelled(command), output.status);
    }
    String::from_utf8(output.stdout).with_context(|| format!("{} did not write UTF-8", spelled(command)))
}

/// The beginning of the command as a person would type it: enough to recognise it by.
fn spelled(command: &Command) -> String {
    let arguments: Vec<_> = command.get_args().map(|argument| argument.to_string_lossy()).collect();
    let mut words = vec![command.get_program().to_string_lossy()];
    words.extend(arguments.iter().take(6).map(|argument| argument.lines().next().unwrap_or_default().into()));
    let whole = arguments.len() <= 6 && arguments.iter().all(|argument| argument.lines().count() <= 1);
    format!("`{}{}`", words.join(" "), if whole { "" } else { " .." })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failing_program_is_an_error_that_names_it() {
        let error = run(Command::new("sh").args(["-c", "exit 3"])).unwrap_err().to_string();
        assert!(error.contains("`sh -c exit 3`") && error.contains('3'), "{error}");
    }

    #[test]
    fn long_commands_are_named_by_their_beginning() {
        assert_eq!(spelled(Command::new("python3").args(["-c", "import sys\nprint()"])), "`python3 -c import sys ..`");
        assert_eq!(spelled(Command::new("x").args("1 2 3 4 5 6 7".split(' '))), "`x 1 2 3 4 5 6 ..`");
    }
}
