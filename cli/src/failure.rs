//! The one thing that goes wrong in front of a person: what and where, what was seen and expected, and what to type next.
//!
//! Everything that ends a command passes through [`Failure`], which prints itself for a person or as JSON. It never
//! shows libtorch's stack: a c10 error is thirty lines of which the first one matters.

mod files;
mod places;

use std::{fmt, io::Write as _, process::ExitCode};

use lora_core::format::is_hidden;
use serde_json::{Map, Value, json};

pub(crate) use files::DIVERGED;
pub(crate) use places::{as_argument, beside};

use crate::{options::ConfigError, run::RunError, ui::Ui};

/// What the shell is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// Input or environment refused, or training stopped.
    Failed = 1,
    /// Wrong command line or configuration.
    Usage = 2,
    /// A login is missing.
    Authentication = 4,
    /// A bug of ours.
    Bug = 101,
    /// Stopped by Ctrl-C, after saving.
    Interrupted = 130,
    /// Stopped by SIGTERM, after saving.
    Terminated = 143,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// A failure as it is shown.
#[derive(Debug, Clone)]
pub struct Failure {
    /// A stable word for programs, such as `run_exists`.
    pub code: &'static str,
    /// What the shell is told.
    pub exit: Exit,
    /// What failed and where: one line, no final stop.
    pub message: String,
    /// What was seen and what was expected, a line each.
    pub details: Vec<String>,
    /// What to do next, with a command that works when pasted.
    pub hint: Option<String>,
    /// The same facts for programs.
    pub context: Box<Map<String, Value>>,
}

impl Failure {
    /// A failure of input or environment.
    pub fn new(code: &'static str, message: impl Into<String>) -> Self {
        let (details, hint, context) = Default::default();
        Self { code, exit: Exit::Failed, message: message.into(), details, hint, context }
    }

    /// A wrong command line or configuration.
    pub fn usage(code: &'static str, message: impl Into<String>) -> Self {
        Self { exit: Exit::Usage, ..Self::new(code, message) }
    }

    /// Adds a line on what was seen or expected.
    pub fn detail(mut self, line: impl Into<String>) -> Self {
        self.details.push(line.into());
        self
    }

    /// Says what to do next.
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Adds a fact for programs.
    pub fn with(mut self, key: &str, value: impl Into<Value>) -> Self {
        self.context.insert(key.into(), value.into());
        self
    }

    /// A failure from any error: its causes become the details.
    pub fn from_error(code: &'static str, error: &(dyn std::error::Error + 'static)) -> Self {
        let mut failure = Self::new(code, first_line(&error.to_string()));
        let mut cause = error.source();
        while let Some(error) = cause {
            failure.details.push(first_line(&error.to_string()));
            cause = error.source();
        }
        failure
    }

    /// The `--json` contract: `{"error": {code, message, hint, context}}`.
    pub fn to_json(&self) -> Value {
        let mut context = self.context.clone();
        if !self.details.is_empty() {
            context.insert("details".into(), json!(self.details));
        }
        json!({"error": {"code": self.code, "message": self.message, "hint": self.hint, "context": context}})
    }

    /// Prints the failure on stderr and gives the exit code.
    pub fn report(&self, ui: &Ui) -> ExitCode {
        let text = if ui.json { self.to_json().to_string() } else { self.render(ui) };
        // Nothing can be done if stderr is gone; the exit code still tells.
        let _ = writeln!(std::io::stderr(), "{text}");
        self.exit.into()
    }

    fn render(&self, ui: &Ui) -> String {
        let paint = ui.stderr();
        let mut text = format!("{} {}", paint.red("error:"), printable(&self.message));
        for detail in &self.details {
            for line in detail.lines() {
                text += &format!("\n  {}", printable(line));
            }
        }
        if let Some(hint) = &self.hint {
            text += &format!("\n\n{} {}", paint.cyan("hint:"), printable(hint));
        }
        text
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

impl From<anyhow::Error> for Failure {
    /// A failure that was passed up as `anyhow` comes out as it was; anything else shows its causes.
    fn from(error: anyhow::Error) -> Self {
        match error.downcast::<Self>() {
            Ok(failure) => failure,
            Err(error) => Self::from_error("failed", error.as_ref()),
        }
    }
}

impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Self {
        let failure = Self { exit: Exit::Usage, ..Self::from_error("config", &error) };
        let at = |failure: Self, place: &crate::options::Place| {
            let file = place.path.display().to_string();
            failure.with("file", file).with("line", place.line).with("column", place.column)
        };
        match error {
            ConfigError::Read { path, .. } => {
                let start = shell_word(&path.display().to_string());
                Self { code: "config_unreadable", ..failure }
                    .hint(format!("name another file, or start this one with `lora config init {start}`"))
                    .with("file", path.display().to_string())
            }
            ConfigError::Syntax { place, .. } => {
                let failure =
                    failure.hint("a configuration file is TOML: `lora config init` writes one with every option");
                at(Self { code: "config_syntax", ..failure }, &place)
            }
            ConfigError::UnknownKey { place, key, suggestion } => {
                let hint = match &suggestion {
                    Some(known) => format!("did you mean `{known}`? see `lora config explain {known}`"),
                    None => "all keys: `lora config show`".into(),
                };
                at(Self { code: "config_unknown_key", ..failure }, &place)
                    .with("key", key)
                    .with("suggestion", suggestion)
                    .hint(hint)
            }
            ConfigError::Value { place, key, message } => at(Self { code: "config_value", ..failure }, &place)
                .detail(message)
                .hint(format!("what it may be: `lora config explain {key}`"))
                .with("key", key),
            ConfigError::Invalid { option, reason, value } => {
                let key = option.trim_start_matches('-');
                Self { code: "option_invalid", ..failure }
                    .detail(reason)
                    .hint(format!("what it may be: `lora config explain {key}`"))
                    .with("option", option)
                    .with("value", value)
            }
            ConfigError::Missing { option, example } => Self { code: "option_missing", ..failure }
                .hint(format!("for example `{example}`"))
                .with("option", option),
            ConfigError::NoSuchKey { key, suggestion } => {
                let hint = match &suggestion {
                    Some(known) => format!("did you mean `{known}`? `lora config explain {known}`"),
                    None => "all keys: `lora config show`".into(),
                };
                Self { code: "config_unknown_key", ..failure }
                    .hint(hint)
                    .with("key", key)
                    .with("suggestion", suggestion)
            }
            ConfigError::ResumeDiffers { run, changes } => {
                let lines =
                    changes.iter().map(|(key, was, asked)| format!("{key}: the run has {was}, asked for {asked}"));
                let failure = lines.fold(failure, Self::detail);
                Self { code: "resume_differs", ..failure }
                    .hint(format!(
                        "go on as it was with `lora train --resume {}`, or start a new run with `--out`",
                        shell_word(&run.display().to_string())
                    ))
                    .with("run", run.display().to_string())
                    .with("keys", changes.into_iter().map(|(key, ..)| key).collect::<Vec<_>>())
            }
        }
    }
}

impl From<lora_core::hub::Error> for Failure {
    fn from(error: lora_core::hub::Error) -> Self {
        let failure = Self::from_error("not_a_base", &error);
        match error.hint() {
            Some(hint) => failure.hint(hint),
            None => failure,
        }
    }
}

impl From<RunError> for Failure {
    fn from(error: RunError) -> Self {
        let failure = Self::from_error("run", &error);
        let path = error.path().display().to_string();
        let pasted = shell_word(&path);
        let failure = failure.with("path", path);
        match error {
            RunError::Exists { .. } => Self { code: "run_exists", ..failure }
                .hint(format!("go on with `lora train --resume {pasted}`, or choose another folder with `--out`")),
            RunError::Locked { pid, .. } => Self { code: "run_locked", ..failure }
                .hint("wait for it, or choose another folder with `--out`")
                .with("pid", pid),
            RunError::NotARun { .. } => {
                Self { code: "not_a_run", ..failure }.hint("`lora runs list` shows the runs below the working folder")
            }
            RunError::Read { .. } => Self { code: "run_unreadable", ..failure },
            RunError::Write { .. } => Self { code: "run_unwritable", ..failure }
                .hint("free space or choose another folder with `--out`; `lora doctor` shows the disk"),
            RunError::Record { .. } => Self { code: "run_damaged", ..failure },
        }
    }
}

/// The part of an error's text that says something: libtorch appends its stack to the first line.
fn first_line(text: &str) -> String {
    let line = text.lines().find(|line| !line.trim().is_empty()).unwrap_or("no reason was given");
    line.split(" (most recent call first)").next().unwrap_or(line).trim().to_owned()
}

/// Text from a file or a name, safe for a terminal: control characters are shown instead of obeyed.
pub fn printable(text: &str) -> String {
    text.chars()
        .map(|c| if is_hidden(c) && c != '\t' { c.escape_default().to_string() } else { c.to_string() })
        .collect()
}

/// A word that a shell takes as one argument.
pub fn shell_word(word: &str) -> String {
    let plain = |c: char| c.is_alphanumeric() || "-_./:=,+@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else if word.chars().any(is_hidden) {
        // What a terminal would obey is spelled out, as `$'a\nb'`.
        let spelled = |c: char| match c {
            '\'' | '\\' => format!("\\{c}"),
            '\n' => "\\n".to_owned(),
            c if is_hidden(c) && c.is_ascii() => format!("\\x{:02x}", c as u32),
            c if is_hidden(c) => format!("\\u{:04x}", c as u32),
            c => c.to_string(),
        };
        format!("$'{}'", word.chars().map(spelled).collect::<String>())
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_libtorch_stack_is_cut_to_its_first_line() {
        let torch = "mat1 and mat2 shapes cannot be multiplied (4x5 and 3x2)\nException raised from meta at x.cpp:1 (most recent call first):\nframe #0";
        let error = anyhow::anyhow!("{torch}").context("the first step failed");
        let failure = Failure::from(error);
        assert_eq!(failure.message, "the first step failed");
        assert_eq!(failure.details, ["mat1 and mat2 shapes cannot be multiplied (4x5 and 3x2)"]);
    }

    #[test]
    fn names_from_files_cannot_steer_the_terminal() {
        assert_eq!(printable("a\u{1b}[2Jb\n\u{202E}c"), "a\\u{1b}[2Jb\\n\\u{202e}c");
    }

    #[test]
    fn pasted_paths_survive_the_shell() {
        assert_eq!(shell_word("runs/a-1"), "runs/a-1");
        assert_eq!(shell_word("my run's"), r"'my run'\''s'");
        assert_eq!(shell_word("a\n\u{1b}[2J'\u{202E}"), r"$'a\n\x1b[2J\'\u202e'");
    }
}
