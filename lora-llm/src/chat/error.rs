//! Why a chat template cannot be used or a conversation not be put into it, with what to do about it.

use std::{io, path::PathBuf};

/// The result of every fallible function of this module.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong. Templates are named by their file, and by their name where a file holds several.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The model has no template.
    #[error("{}: no chat template", folder.display())]
    Missing {
        /// The model's folder.
        folder: PathBuf,
    },
    /// There are several templates, and none of the wanted name.
    #[error("{}: no chat template `{wanted}`, only {known}", folder.display())]
    Unnamed {
        /// The model's folder.
        folder: PathBuf,
        /// The name that was wanted.
        wanted: String,
        /// The names that there are.
        known: String,
    },
    /// A file could not be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file that should hold a template does not.
    #[error("{}: {reason}", path.display())]
    Broken {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The template does not parse, or does something that cannot be done.
    #[error("{template}:{line}: {reason}{}", quoted(excerpt))]
    Template {
        /// The template's file or name.
        template: String,
        /// The line, from 1.
        line: usize,
        /// What is wrong there.
        reason: String,
        /// The line itself.
        excerpt: String,
    },
    /// The template goes on for ever, or as good as.
    #[error("{template}:{line}: the template does too much work and was stopped{}", quoted(excerpt))]
    Endless {
        /// The template's file or name.
        template: String,
        /// Where it was stopped.
        line: usize,
        /// The line itself.
        excerpt: String,
    },
    /// The template refuses the conversation (`raise_exception`).
    #[error("the chat template refuses the conversation: {reason}")]
    Refused {
        /// The template's file or name.
        template: String,
        /// The line, from 1.
        line: usize,
        /// What it says.
        reason: String,
    },
    /// Which part of a conversation the model would have written cannot be told.
    #[error("turn {turn}: what the assistant wrote cannot be found again in the text that the chat template makes of it")]
    NoSpans {
        /// The template's file or name.
        template: String,
        /// The assistant's message, from 1, counting all messages.
        turn: usize,
    },
    /// A conversation without messages.
    #[error("the conversation has no messages")]
    Empty,
}

impl Error {
    /// What to do about it, where there is something.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Missing { .. } => "a base model without instruction tuning has none: train on `text` or \
                 `prompt`/`completion`, or give a template: --chat-template FILE.jinja"
                .to_owned(),
            Self::Template { .. } | Self::Endless { .. } => {
                "a newer revision of the model may have a corrected template; another one can be given: \
                 --chat-template FILE.jinja"
                    .to_owned()
            }
            Self::Refused { template, line, .. } => {
                format!("the rule is in line {line} of {template}; roles that take turns, user first, suit every template")
            }
            Self::NoSpans { .. } => "train on whole conversations (--train-on all), or mark the assistant's text in the \
                 template with {% generation %} … {% endgeneration %}"
                .to_owned(),
            _ => return None,
        })
    }
}

fn quoted(excerpt: &str) -> String {
    if excerpt.is_empty() { String::new() } else { format!("\n  {excerpt}") }
}
