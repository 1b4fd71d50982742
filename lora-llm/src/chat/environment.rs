//! The Jinja of `transformers`: a sandbox with `trim_blocks` and `lstrip_blocks`, four functions and one filter more.
//!
//! Follows `transformers/utils/chat_template_utils.py` (5.23). A template comes from a stranger: it has no files, no
//! network and no clock but the one it is given, its work is counted, and so is the depth of its calls.

use std::{collections::VecDeque, fmt, fmt::Write as _, time::SystemTime};

use minijinja::{
    AutoEscape, Environment, Error, ErrorKind, State, UndefinedBehavior, Value,
    syntax::SyntaxConfig,
    value::{Kwargs, Rest, ValueKind, from_args},
};

use super::{
    methods,
    python::{self, JsonStyle},
    rewrite,
    time::strftime,
    value::Dict,
};

/// What a template may do: some 20 million steps or a gigabyte of text, well under a second.
const FUEL: u64 = 20_000_000;

/// Calls within calls; each takes some kilobytes of the stack.
const RECURSION: usize = 200;

/// The variable that holds the two letters around what the model wrote. No template can name it.
pub(super) const MARKS: &str = "generation marks";

/// The variable that holds the time, in seconds. No template can name it.
pub(super) const NOW: &str = "time now";

/// What `raise_exception` raises, to be told from the template's own mistakes.
#[derive(Debug)]
pub(super) struct Raised(pub(super) String);

impl fmt::Display for Raised {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Raised {}

/// An environment without templates.
pub(super) fn environment() -> Result<Environment<'static>, Error> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?;
    environment.set_syntax(syntax);
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_undefined_behavior(UndefinedBehavior::Lenient);
    environment.set_debug(false);
    environment.set_fuel(Some(FUEL));
    environment.set_recursion_limit(RECURSION);
    environment.set_unknown_method_callback(methods::call);
    environment.set_formatter(|out, _, value| out.write_str(&python::str(value)?).map_err(Error::from));
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", strftime_now);
    environment.add_function("dict", dict);
    environment.add_filter("tojson", tojson);
    environment.add_filter("string", |value: &Value| python::str(value));
    for name in ["default", "d"] {
        environment.add_filter(name, default);
    }
    for name in ["escape", "e"] {
        environment.add_filter(name, escape);
    }
    environment.add_filter(rewrite::FILTER, generation);
    environment.add_test("sequence", is_sequence);
    environment.add_test("callable", |value: &Value| value.kind() == ValueKind::Plain);
    Ok(environment)
}

fn raise_exception(message: &Value) -> Result<Value, Error> {
    let message = python::str(message)?;
    Err(Error::new(ErrorKind::InvalidOperation, message.clone()).with_source(Raised(message)))
}

fn strftime_now(state: &State, format: &str) -> String {
    let seconds = state.lookup(NOW).and_then(|now| u64::try_from(now).ok());
    let now = seconds.map_or_else(SystemTime::now, |seconds| SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(seconds));
    strftime(now, format)
}

/// `dict(mapping, **fields)`.
fn dict(given: Option<Value>, keywords: Kwargs) -> Result<Value, Error> {
    let mut fields: Vec<(Value, Value)> = Vec::new();
    let mut set = |key: Value, value: Value| match fields.iter_mut().find(|(name, _)| *name == key) {
        Some((_, old)) => *old = value,
        None => fields.push((key, value)),
    };
    if let Some(given) = given {
        let pairs = given.kind() != ValueKind::Map;
        for item in given.try_iter()?.checked() {
            let item = item?;
            match pairs {
                true => set(item.get_item_by_index(0)?, item.get_item_by_index(1)?),
                false => {
                    let value = given.get_item(&item)?;
                    set(item, value);
                }
            }
        }
    }
    for name in keywords.args() {
        set(Value::from(name), keywords.get(name)?);
    }
    Ok(Value::from_object(Dict(fields)))
}

/// `json.dumps(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False)`.
fn tojson(state: &State, value: &Value, args: Rest<Value>) -> Result<Value, Error> {
    let (positional, keywords): (&[Value], Kwargs) = from_args(&args)?;
    let mut positional: VecDeque<&Value> = positional.iter().collect();
    let mut argument = |name: &str| -> Result<Option<Value>, Error> {
        let given = match positional.pop_front() {
            Some(value) => Some(value.clone()),
            None if keywords.has(name) => Some(keywords.get::<Value>(name)?),
            None => None,
        };
        Ok(given.filter(|value| !value.is_none()))
    };
    let ascii = argument("ensure_ascii")?.is_some_and(|value| value.is_true());
    let indent = match argument("indent")? {
        None => None,
        Some(value) => Some(match value.as_str() {
            Some(text) => text.to_owned(),
            None => " ".repeat(value.as_usize().unwrap_or(0).min(64)),
        }),
    };
    let (item, key) = match argument("separators")? {
        None if indent.is_some() => (",".to_owned(), ": ".to_owned()),
        None => (", ".to_owned(), ": ".to_owned()),
        Some(pair) => (python::str(&pair.get_item_by_index(0)?)?, python::str(&pair.get_item_by_index(1)?)?),
    };
    let sorted = argument("sort_keys")?.is_some_and(|value| value.is_true());
    keywords.assert_all_used()?;
    let text = python::json(value, &JsonStyle { ascii, indent, item, key, sorted })?;
    state.consume_fuel(text.len() as u64 / 4)?;
    Ok(Value::from(text))
}

/// `default(value, default_value='', boolean=False)`.
fn default(value: &Value, other: Option<Value>, boolean: Option<bool>, keywords: Kwargs) -> Result<Value, Error> {
    let named = keywords.get::<Option<Value>>("default_value")?;
    let boolean = boolean.or(keywords.get::<Option<bool>>("boolean")?).unwrap_or(false);
    keywords.assert_all_used()?;
    let other = || other.or(named).unwrap_or_else(|| Value::from(""));
    Ok(if value.is_undefined() || (boolean && !value.is_true()) { other() } else { value.clone() })
}

/// The five letters of HTML, spelled as `markupsafe` spells them.
fn escape(value: &Value) -> Result<String, Error> {
    let text = python::str(value)?;
    let mut out = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '\'' => out.push_str("&#39;"),
            '"' => out.push_str("&#34;"),
            other => out.push(other),
        }
    }
    Ok(out)
}

/// What stands between `{% generation %}` and `{% endgeneration %}`, between marks.
fn generation(state: &State, text: &str) -> String {
    let marks = state.lookup(MARKS);
    match marks.as_ref().and_then(Value::as_str).map(|marks| marks.chars().collect::<Vec<_>>()).as_deref() {
        Some(&[open, close]) => {
            let mut out = String::with_capacity(text.len() + 8);
            // Writing to a string cannot fail.
            let _ = write!(out, "{open}{text}{close}");
            out
        }
        _ => text.to_owned(),
    }
}

/// Strings and dictionaries have a length and can be indexed, which is all that Jinja asks.
fn is_sequence(value: &Value) -> bool {
    matches!(
        value.kind(),
        ValueKind::Seq | ValueKind::Iterable | ValueKind::String | ValueKind::Map | ValueKind::Undefined
    )
}
