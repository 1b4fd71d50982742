//! Methods of Python's strings, lists and dictionaries that templates call, where `minijinja_contrib::pycompat` lacks them
//! or differs: blanks, line ends and keyword arguments are Python's here. Whatever is not listed goes on to it.

use minijinja::{
    Error, ErrorKind, State, Value,
    value::{Kwargs, Tuple, ValueKind, from_args},
};
use minijinja_contrib::pycompat;

use super::{python::is_space, value::Dict};

/// Longer padding than any template needs.
const MAX_WIDTH: usize = 10_000;

pub(super) fn call(state: &mut State, value: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    let (positional, keywords): (&[Value], Kwargs) = from_args(args)?;
    let arguments = Arguments { positional, keywords };
    let known = match value.kind() {
        ValueKind::String => string(value.as_str().unwrap_or_default(), method, &arguments)?,
        ValueKind::Seq | ValueKind::Iterable => list(value, method, &arguments)?,
        ValueKind::Map => map(value, method)?,
        _ => None,
    };
    match known {
        Some(result) => Ok(result),
        None => pycompat::unknown_method_callback(state, value, method, args),
    }
}

struct Arguments<'a> {
    positional: &'a [Value],
    keywords: Kwargs,
}

impl Arguments<'_> {
    /// The argument of this place or name; `None` counts as not given, as it does in all of these methods.
    fn get(&self, at: usize, name: &str) -> Result<Option<Value>, Error> {
        let given = match self.positional.get(at) {
            Some(value) => Some(value.clone()),
            None if self.keywords.has(name) => Some(self.keywords.get::<Value>(name)?),
            None => None,
        };
        Ok(given.filter(|value| !value.is_none()))
    }

    fn text(&self, at: usize, name: &str) -> Result<Option<String>, Error> {
        match self.get(at, name)? {
            None => Ok(None),
            Some(value) => value.as_str().map(|text| Some(text.to_owned())).ok_or_else(|| wrong(name, "is no string")),
        }
    }

    fn needed(&self, at: usize, name: &str) -> Result<String, Error> {
        self.text(at, name)?.ok_or_else(|| wrong(name, "is missing"))
    }

    fn number(&self, at: usize, name: &str) -> Result<Option<i64>, Error> {
        match self.get(at, name)? {
            None => Ok(None),
            Some(value) => value.as_i64().map(Some).ok_or_else(|| wrong(name, "is no number")),
        }
    }
}

fn wrong(name: &str, what: &str) -> Error {
    Error::new(ErrorKind::InvalidOperation, format!("argument `{name}` {what}"))
}

fn string(text: &str, method: &str, arguments: &Arguments<'_>) -> Result<Option<Value>, Error> {
    let strings = |parts: Vec<&str>| Value::from(parts.into_iter().map(Value::from).collect::<Vec<_>>());
    let triple = |a: &str, b: &str, c: &str| Value::from(Tuple::from([a, b, c].map(Value::from).to_vec()));
    Ok(Some(match method {
        "strip" | "lstrip" | "rstrip" => {
            let chars = arguments.text(0, "chars")?;
            let blank = |letter: char| chars.as_ref().map_or_else(|| is_space(letter), |chars| chars.contains(letter));
            let mut rest = text;
            if method != "rstrip" {
                rest = rest.trim_start_matches(blank);
            }
            if method != "lstrip" {
                rest = rest.trim_end_matches(blank);
            }
            Value::from(rest)
        }
        "split" | "rsplit" => {
            let most = arguments.number(1, "maxsplit")?.and_then(|most| usize::try_from(most).ok());
            let from_right = method == "rsplit";
            match arguments.text(0, "sep")? {
                Some(separator) if separator.is_empty() => return Err(wrong("sep", "is empty")),
                Some(separator) => strings(split(text, &separator, most, from_right)),
                None => strings(split_blanks(text, most, from_right)),
            }
        }
        "splitlines" => {
            let keep = arguments.get(0, "keepends")?.is_some_and(|keep| keep.is_true());
            strings(lines(text, keep))
        }
        "title" => Value::from(title(text)),
        "removeprefix" => {
            let prefix = arguments.needed(0, "prefix")?;
            Value::from(text.strip_prefix(&*prefix).unwrap_or(text))
        }
        "removesuffix" => {
            let suffix = arguments.needed(0, "suffix")?;
            Value::from(text.strip_suffix(&*suffix).unwrap_or(text))
        }
        "partition" => match text.split_once(&*arguments.needed(0, "sep")?) {
            Some((head, tail)) => triple(head, &arguments.needed(0, "sep")?, tail),
            None => triple(text, "", ""),
        },
        "rpartition" => match text.rsplit_once(&*arguments.needed(0, "sep")?) {
            Some((head, tail)) => triple(head, &arguments.needed(0, "sep")?, tail),
            None => triple("", "", text),
        },
        "index" | "rindex" => {
            let wanted = arguments.needed(0, "sub")?;
            let found = if method == "index" { text.find(&*wanted) } else { text.rfind(&*wanted) };
            let at = found.ok_or_else(|| Error::new(ErrorKind::InvalidOperation, "substring not found"))?;
            Value::from(text[..at].chars().count())
        }
        "swapcase" => Value::from(
            text.chars()
                .flat_map(|letter| match letter.is_uppercase() {
                    true => letter.to_lowercase().collect::<Vec<_>>(),
                    false => letter.to_uppercase().collect(),
                })
                .collect::<String>(),
        ),
        "casefold" => Value::from(text.to_lowercase().replace('ß', "ss")),
        "zfill" | "ljust" | "rjust" | "center" => Value::from(pad(text, method, arguments)?),
        _ => return Ok(None),
    }))
}

fn split<'t>(text: &'t str, separator: &str, most: Option<usize>, from_right: bool) -> Vec<&'t str> {
    match (most, from_right) {
        (None, _) => text.split(separator).collect(),
        (Some(most), false) => text.splitn(most.saturating_add(1), separator).collect(),
        (Some(most), true) => {
            let mut parts: Vec<&str> = text.rsplitn(most.saturating_add(1), separator).collect();
            parts.reverse();
            parts
        }
    }
}

/// Words between blanks; when the splits are used up, the rest with the blanks within it.
fn split_blanks(text: &str, most: Option<usize>, from_right: bool) -> Vec<&str> {
    let most = most.unwrap_or(usize::MAX);
    let mut parts = Vec::new();
    let mut rest = text.trim_matches(is_space);
    while !rest.is_empty() {
        let found = if from_right { rest.rfind(is_space) } else { rest.find(is_space) };
        let Some(at) = found.filter(|_| parts.len() < most) else {
            parts.push(rest);
            break;
        };
        if from_right {
            let blank = rest[at..].chars().next().map_or(1, char::len_utf8);
            parts.push(&rest[at + blank..]);
            rest = rest[..at].trim_end_matches(is_space);
        } else {
            parts.push(&rest[..at]);
            rest = rest[at..].trim_start_matches(is_space);
        }
    }
    if from_right {
        parts.reverse();
    }
    parts
}

fn lines(text: &str, keep: bool) -> Vec<&str> {
    const ENDS: [char; 10] =
        ['\n', '\r', '\u{b}', '\u{c}', '\u{1c}', '\u{1d}', '\u{1e}', '\u{85}', '\u{2028}', '\u{2029}'];
    let mut parts = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let Some(at) = rest.find(ENDS) else {
            parts.push(rest);
            break;
        };
        let length = match &rest[at..] {
            end if end.starts_with("\r\n") => 2,
            end => end.chars().next().map_or(1, char::len_utf8),
        };
        parts.push(&rest[..if keep { at + length } else { at }]);
        rest = &rest[at + length..];
    }
    parts
}

/// A capital after everything that has no case.
fn title(text: &str) -> String {
    let mut inside = false;
    let mut out = String::with_capacity(text.len());
    for letter in text.chars() {
        if inside {
            out.extend(letter.to_lowercase());
        } else {
            out.extend(letter.to_uppercase());
        }
        inside = letter.is_lowercase() || letter.is_uppercase();
    }
    out
}

fn pad(text: &str, method: &str, arguments: &Arguments<'_>) -> Result<String, Error> {
    let width = arguments.number(0, "width")?.ok_or_else(|| wrong("width", "is missing"))?;
    let length = text.chars().count();
    let missing = usize::try_from(width).unwrap_or(0).saturating_sub(length);
    if missing > MAX_WIDTH {
        return Err(wrong("width", "is too large"));
    }
    if method == "zfill" {
        let (sign, digits) = match text.strip_prefix(['+', '-']) {
            Some(digits) => text.split_at(text.len() - digits.len()),
            None => ("", text),
        };
        return Ok(format!("{sign}{}{digits}", "0".repeat(missing)));
    }
    let fill = arguments.text(1, "fillchar")?.unwrap_or_else(|| " ".to_owned());
    let left = match method {
        "ljust" => 0,
        "rjust" => missing,
        // CPython: the odd blank goes left if the width is odd.
        _ => missing / 2 + (missing & (missing + length) & 1),
    };
    Ok(format!("{}{text}{}", fill.repeat(left), fill.repeat(missing - left)))
}

fn list(value: &Value, method: &str, arguments: &Arguments<'_>) -> Result<Option<Value>, Error> {
    Ok(Some(match method {
        "index" => {
            let wanted = arguments.get(0, "value")?.unwrap_or_else(|| Value::from(()));
            let mut at = None;
            for (place, item) in value.try_iter()?.checked().enumerate() {
                if item? == wanted {
                    at = Some(place);
                    break;
                }
            }
            Value::from(at.ok_or_else(|| Error::new(ErrorKind::InvalidOperation, "value is not in list"))?)
        }
        "copy" => value.clone(),
        // The sandbox of `transformers` does not let a template change what it was given.
        "append" | "clear" | "extend" | "insert" | "pop" | "remove" | "reverse" | "sort" => {
            return Err(Error::new(ErrorKind::InvalidOperation, format!("`{method}` would change a list")));
        }
        _ => return Ok(None),
    }))
}

fn map(value: &Value, method: &str) -> Result<Option<Value>, Error> {
    match method {
        "copy" => {
            let mut fields = Vec::new();
            for key in value.try_iter()?.checked() {
                let key = key?;
                let item = value.get_item(&key)?;
                fields.push((key, item));
            }
            Ok(Some(Value::from_object(Dict(fields))))
        }
        "clear" | "pop" | "popitem" | "setdefault" | "update" => {
            Err(Error::new(ErrorKind::InvalidOperation, format!("`{method}` would change a dictionary")))
        }
        _ => Ok(None),
    }
}
