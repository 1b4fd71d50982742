//! Messages as a template sees them: JSON as Python's dictionaries, lists and numbers.
//!
//! In Jinja `tool.items` is the method of the dictionary even if the dictionary has a key `items`, which every schema of
//! an array has; `tool['items']` is the value. `minijinja` asks an object for both in different ways, and so [`Dict`] can
//! tell them apart.

use std::sync::Arc;

use minijinja::{
    Value,
    value::{Enumerator, Object, ObjectRepr},
};
use serde_json::Value as Json;

/// The methods of `dict` that a sandboxed template may name.
const METHODS: [&str; 6] = ["copy", "fromkeys", "get", "items", "keys", "values"];

/// A JSON value for a template.
pub(super) fn value(json: &Json) -> Value {
    match json {
        Json::Null => Value::from(()),
        Json::Bool(value) => Value::from(*value),
        Json::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(number), _) => Value::from(number),
            (None, Some(number)) => Value::from(number),
            (None, None) => Value::from(number.as_f64().unwrap_or(f64::NAN)),
        },
        Json::String(text) => Value::from(text.as_str()),
        Json::Array(items) => Value::from(items.iter().map(value).collect::<Vec<_>>()),
        Json::Object(fields) => dict(fields),
    }
}

/// A JSON object for a template.
pub(super) fn dict(fields: &serde_json::Map<String, Json>) -> Value {
    Value::from_object(Dict(fields.iter().map(|(key, item)| (Value::from(key.as_str()), value(item))).collect()))
}

/// A dictionary in the order of its keys; there are few, so that a search from the front is quickest.
#[derive(Debug)]
pub(super) struct Dict(pub(super) Vec<(Value, Value)>);

impl Object for Dict {
    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        self.0.iter().find(|(name, _)| name == key).map(|(_, value)| value.clone())
    }

    fn get_value_by_str(self: &Arc<Self>, key: &str) -> Option<Value> {
        if METHODS.contains(&key) {
            return Some(Value::from_object(Method(key.to_owned())));
        }
        self.0.iter().find(|(name, _)| name.as_str() == Some(key)).map(|(_, value)| value.clone())
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        Enumerator::Iter(Box::new(self.0.iter().map(|(key, _)| key.clone()).collect::<Vec<_>>().into_iter()))
    }

    fn enumerator_len(self: &Arc<Self>) -> Option<usize> {
        Some(self.0.len())
    }
}

/// A method that is named and not called: true, and equal to nothing.
#[derive(Debug)]
struct Method(String);

impl Object for Method {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn render(self: &Arc<Self>, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "<built-in method {} of dict object>", self.0)
    }
}
