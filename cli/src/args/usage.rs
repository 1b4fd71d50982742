//! Wrong command lines in our form of errors.

use std::ffi::OsString;

use super::command;
use crate::{
    Failure,
    options::{GenerateOptions, Options as _, variable},
};

/// Clap's error in our form: its first line, what it lists, and a hint that can be pasted.
pub(super) fn usage(error: &clap::Error, words: &[OsString]) -> Failure {
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
            None => failure = failure.detail(alternatives(line.trim())),
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

/// One of several arguments, as clap lists it (`<--rank <N>|--energy <SHARE>>`), in plain words.
fn alternatives(line: &str) -> String {
    match line.strip_prefix('<').and_then(|line| line.strip_suffix('>')).filter(|line| line.contains('|')) {
        Some(arguments) => arguments.replace('|', " or "),
        None => line.to_owned(),
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
