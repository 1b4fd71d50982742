//! The Jinja of `transformers`: a sandbox with `trim_blocks` and `lstrip_blocks`, four functions and one filter more.
//!
//! Follows `transformers/utils/chat_template_utils.py` (5.23). A template comes from a stranger: it has no files, no
//! network and no clock but the one it is given, its work is counted, and so is the depth of its calls.

use std::{
    fmt,
    time::{Duration, SystemTime},
};

use minijinja::{
    AutoEscape, Environment, Error, ErrorKind, State, UndefinedBehavior, Value,
    syntax::SyntaxConfig,
    value::{Kwargs, ValueKind},
};

use super::{
    methods, percent,
    python::{self, JsonStyle},
    rewrite,
    time::strftime,
    value::Dict,
};

/// What a template may do: some 8 million steps, half a second.
const FUEL: u64 = 8_000_000;

/// Calls within calls; each takes some kilobytes of the stack.
const RECURSION: usize = 200;

/// Deeper than what JSON may be nested (128), so that every message can be given a name.
const MAX_DEPTH: usize = 150;

/// Blanks of one step of `tojson(indent=…)`.
const MAX_INDENT: usize = 64;

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
    environment.add_filter(rewrite::GENERATION, generation);
    environment.add_filter(rewrite::STORED, stored);
    environment.add_filter(rewrite::EACH, each);
    environment.add_filter(percent::FILTER, format);
    environment.add_test("sequence", is_sequence);
    environment.add_test("iterable", is_sequence);
    environment.add_test("callable", |value: &Value| value.kind() == ValueKind::Plain);
    Ok(environment)
}

fn raise_exception(message: &Value) -> Result<Value, Error> {
    let message = python::str(message)?;
    Err(Error::new(ErrorKind::InvalidOperation, message.clone()).with_source(Raised(message)))
}

fn strftime_now(state: &State, format: &str) -> String {
    let seconds = state.lookup(NOW).and_then(|now| u64::try_from(now).ok());
    let now = seconds.map_or_else(SystemTime::now, |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds));
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
fn tojson(
    state: &State,
    value: &Value,
    ascii: Option<Value>,
    indent: Option<Value>,
    keywords: Kwargs,
) -> Result<Value, Error> {
    let argument = |given: Option<Value>, name: &str| -> Result<Option<Value>, Error> {
        let named = if keywords.has(name) { Some(keywords.get::<Value>(name)?) } else { None };
        Ok(given.or(named).filter(|value| !value.is_none()))
    };
    let ascii = argument(ascii, "ensure_ascii")?.is_some_and(|value| value.is_true());
    let indent = argument(indent, "indent")?.map(|value| match value.as_str() {
        Some(text) => text.to_owned(),
        None => " ".repeat(value.as_usize().unwrap_or(0).min(MAX_INDENT)),
    });
    let (item, key) = match argument(None, "separators")? {
        None if indent.is_some() => (",".to_owned(), ": ".to_owned()),
        None => (", ".to_owned(), ": ".to_owned()),
        Some(pair) => (python::str(&pair.get_item_by_index(0)?)?, python::str(&pair.get_item_by_index(1)?)?),
    };
    let sorted = argument(None, "sort_keys")?.is_some_and(|value| value.is_true());
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
        Some(&[open, close]) => format!("{open}{text}{close}"),
        _ => text.to_owned(),
    }
}

/// A value that is given a name: as it is, but a list that is yet to be computed is computed now, as Python does. In a
/// `field` of a namespace it must not hold namespaces, one of which could be that one.
fn stored(state: &State, value: &Value, field: Option<bool>) -> Result<Value, Error> {
    measure(state, value, field.unwrap_or(false), 0)?;
    Ok(match value.kind() {
        ValueKind::Iterable => Value::from(value.try_iter()?.checked().collect::<Result<Vec<_>, _>>()?),
        _ => value.clone(),
    })
}

/// `text % operand`: a tuple gives several values, a dictionary named ones.
fn format(state: &mut State, text: &str, operand: &Value) -> Result<Value, Error> {
    let mut arguments = vec![Value::from(text)];
    if operand.is_tuple() {
        for item in operand.try_iter()?.checked() {
            arguments.push(item?);
        }
    } else if operand.kind() == ValueKind::Map {
        let mut named = Vec::new();
        for key in operand.try_iter()?.checked() {
            let key = key?;
            named.push((python::str(&key)?, operand.get_item(&key)?));
        }
        arguments.push(Value::from(named.into_iter().collect::<Kwargs>()));
    } else {
        arguments.push(operand.clone());
    }
    state.apply_filter("format", &arguments)
}

/// What is gone through: not `None` and numbers; a text letter by letter.
fn each(value: &Value) -> Result<Value, Error> {
    match value.kind() {
        ValueKind::None | ValueKind::Bool | ValueKind::Number => {
            Err(Error::new(ErrorKind::InvalidOperation, format!("`{}` cannot be gone through", python::repr(value)?)))
        }
        ValueKind::String => Ok(Value::from(value.try_iter()?.checked().collect::<Result<Vec<_>, _>>()?)),
        _ => Ok(value.clone()),
    }
}

fn measure(state: &State, value: &Value, field: bool, depth: usize) -> Result<(), Error> {
    let refuse = |what: &'static str| Err(Error::new(ErrorKind::InvalidOperation, what));
    if !matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable | ValueKind::Map) {
        return Ok(());
    }
    if depth > MAX_DEPTH {
        return refuse("the value is nested too deep");
    }
    if field && value.as_object().is_some_and(|object| object.type_name().ends_with("::Namespace")) {
        return refuse("a namespace cannot be put into a namespace");
    }
    for item in value.try_iter()?.checked() {
        state.consume_fuel(1)?;
        let item = item?;
        match value.kind() {
            ValueKind::Map => measure(state, &value.get_item(&item)?, field, depth + 1)?,
            _ => measure(state, &item, field, depth + 1)?,
        }
    }
    Ok(())
}

/// Strings and dictionaries have a length and can be indexed, and can be gone through, which is all that Jinja asks.
fn is_sequence(value: &Value) -> bool {
    matches!(
        value.kind(),
        ValueKind::Seq | ValueKind::Iterable | ValueKind::String | ValueKind::Map | ValueKind::Undefined
    )
}
