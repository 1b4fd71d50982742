//! Talking to a person or a program: data on stdout, talk on stderr, colour only where it is wanted.

use std::io::{self, IsTerminal as _, Write as _};

use serde::Serialize;

use crate::args::Global;

/// How a command talks.
#[derive(Debug, Clone, Copy, Default)]
pub struct Ui {
    /// stdout is JSON.
    pub json: bool,
    /// Nothing but results and errors.
    pub quiet: bool,
    /// How often `-v` was given.
    pub verbose: u8,
    /// Bars may be drawn.
    pub bars: bool,
    stdout: Paint,
    stderr: Paint,
}

impl Ui {
    /// What the flags, the terminal and `NO_COLOR` ask for.
    pub fn new(global: &Global) -> Self {
        let coloured = |terminal: bool| {
            let no_color = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
            let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
            Paint { colour: terminal && !no_color && !dumb }
        };
        Self {
            json: global.json,
            quiet: global.quiet,
            verbose: global.verbose,
            bars: io::stderr().is_terminal() && !global.no_progress && !global.quiet && !global.json,
            stdout: coloured(io::stdout().is_terminal()),
            stderr: coloured(io::stderr().is_terminal()),
        }
    }

    /// A line of talk, on stderr; silent with `-q` and `--json`.
    pub fn say(&self, line: &str) {
        if !self.quiet && !self.json {
            // Talk that nobody can hear is no reason to stop.
            let _ = writeln!(io::stderr(), "{line}");
        }
    }

    /// A warning, on stderr; also heard with `-q`.
    pub fn warn(&self, line: &str) {
        if self.json {
            return;
        }
        let _ = writeln!(io::stderr(), "{} {line}", self.stderr.yellow("warning:"));
    }

    /// Data, on stdout, with a final newline.
    ///
    /// # Errors
    /// If stdout cannot be written; a reader that has gone away (`| head`) is no error.
    pub fn data(&self, text: &str) -> io::Result<()> {
        let mut out = io::stdout().lock();
        let written = out.write_all(text.as_bytes()).and_then(|()| match text.ends_with('\n') {
            true => Ok(()),
            false => out.write_all(b"\n"),
        });
        match written.and_then(|()| out.flush()) {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            other => other,
        }
    }

    /// One JSON document on stdout: indented for a terminal, a line otherwise.
    ///
    /// # Errors
    /// As [`data`](Self::data).
    pub fn json_data(&self, value: &impl Serialize) -> io::Result<()> {
        let text = match io::stdout().is_terminal() {
            true => serde_json::to_string_pretty(value),
            false => serde_json::to_string(value),
        };
        self.data(&text.map_err(io::Error::other)?)
    }

    /// Colours for data.
    pub fn stdout(&self) -> Paint {
        self.stdout
    }

    /// Colours for talk.
    pub fn stderr(&self) -> Paint {
        self.stderr
    }
}

/// Colours text where colour is wanted; the words say the same without.
#[derive(Debug, Clone, Copy, Default)]
pub struct Paint {
    colour: bool,
}

impl Paint {
    /// Colours as asked for, whatever the terminal.
    pub fn new(colour: bool) -> Self {
        Self { colour }
    }

    /// Headings.
    pub fn bold(self, text: &str) -> String {
        self.with("1", text)
    }

    /// What matters less.
    pub fn dim(self, text: &str) -> String {
        self.with("2", text)
    }

    /// Errors.
    pub fn red(self, text: &str) -> String {
        self.with("1;31", text)
    }

    /// Warnings.
    pub fn yellow(self, text: &str) -> String {
        self.with("1;33", text)
    }

    /// What is well.
    pub fn green(self, text: &str) -> String {
        self.with("1;32", text)
    }

    /// Hints.
    pub fn cyan(self, text: &str) -> String {
        self.with("1;36", text)
    }

    fn with(self, code: &str, text: &str) -> String {
        if self.colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }
}
