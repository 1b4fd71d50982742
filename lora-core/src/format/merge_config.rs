//! The `config.json` of a merged model, where merging makes what it says untrue: type, vocabulary, tied head.
//!
//! transformers and diffusers believe it more than the weights beside it: they load into the type that it names, refuse a
//! table of another size, and lay the embedding table over a head that it calls tied. Values are replaced inside the text,
//! so that everything else stays as it was, byte for byte.

use std::ops::Range;

use serde::{Deserialize, de::IgnoredAny};
use serde_json::{Deserializer, Map, Value};

use super::Dtype;

/// What has become untrue.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct ConfigChanges {
    /// The type that numbers are now stored in, where it was asked for.
    pub dtype: Option<Dtype>,
    /// How many rows embedding table and head now have, where that has changed.
    pub vocabulary: Option<usize>,
    /// Whether the head, once the embedding table, now has a weight of its own.
    pub unties: bool,
}

impl ConfigChanges {
    /// The text of a configuration as it is true now; `None` if it is true as it stands, or is no JSON object.
    ///
    /// A type is replaced where one is named (`dtype`, of older programs `torch_dtype`); without one the weights decide.
    pub(super) fn apply(&self, text: &str) -> Option<String> {
        let mut config: Map<String, Value> = serde_json::from_str(text).ok()?;
        let mut text = text.to_owned();
        let before = config.clone();
        for (key, value) in self.values(&before) {
            let replaced = value_range(&text, key).map(|range| {
                let mut text = text.clone();
                text.replace_range(range, &value.to_string());
                text
            });
            config.insert(key.to_owned(), value);
            let as_meant = |text: &String| serde_json::from_str::<Map<_, _>>(text).is_ok_and(|new| new == config);
            // A key that is missing, or there twice, has no one place in the text.
            text = replaced.filter(as_meant).unwrap_or_else(|| format!("{:#}\n", Value::Object(config.clone())));
        }
        (config != before).then_some(text)
    }

    /// The keys whose values are others now.
    fn values(&self, config: &Map<String, Value>) -> Vec<(&'static str, Value)> {
        let mut values = Vec::new();
        if let Some(name) = self.dtype.and_then(torch_name) {
            let named = ["dtype", "torch_dtype"].into_iter().filter(|key| config.contains_key(*key));
            values.extend(named.map(|key| (key, Value::from(name))));
        }
        values.extend(self.vocabulary.map(|rows| ("vocab_size", Value::from(rows))));
        values.extend(self.unties.then_some(("tie_word_embeddings", Value::from(false))));
        values.retain(|(key, value)| config.get(*key) != Some(value));
        values
    }
}

/// What torch calls a type.
fn torch_name(dtype: Dtype) -> Option<&'static str> {
    match dtype {
        Dtype::F32 => Some("float32"),
        Dtype::F16 => Some("float16"),
        Dtype::Bf16 => Some("bfloat16"),
        _ => None,
    }
}

/// Where in the text of an object the value of one of its own keys lies.
fn value_range(text: &str, wanted: &str) -> Option<Range<usize>> {
    let mut at = past(text, 0, '{')?;
    loop {
        let (key, end): (String, usize) = value_at(text, at)?;
        let start = past(text, end, ':')?;
        let (IgnoredAny, end) = value_at(text, start)?;
        if key == wanted {
            return Some(start..end);
        }
        at = past(text, end, ',')?;
    }
}

/// The place after a sign and the blanks around it.
fn past(text: &str, at: usize, sign: char) -> Option<usize> {
    let rest = text.get(at..)?.trim_start().strip_prefix(sign)?;
    Some(text.len() - rest.trim_start().len())
}

/// The value that begins at a place, and where it ends.
fn value_at<'a, T: Deserialize<'a>>(text: &'a str, at: usize) -> Option<(T, usize)> {
    let mut values = Deserializer::from_str(text.get(at..)?).into_iter();
    let value = values.next()?.ok()?;
    Some((value, at + values.byte_offset()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: ConfigChanges = ConfigChanges { dtype: Some(Dtype::Bf16), vocabulary: Some(45), unties: true };

    #[test]
    fn only_what_is_untrue_changes_and_every_other_byte_stays() {
        let text = "{\r\n\t\"vocab_size\" : 40 ,\"of\": {\"dtype\": null, \"vocab_size\": [40]},\n  \
                    \"torch_dtype\": \"float32\", \"z\": 1e-06, \"é\": \"\\u00e9 \\\"dtype\\\": 1\",\"dtype\":null,\n \
                    \"tie_word_embeddings\":true }\n\n";
        let expected = text
            .replacen(": 40 ", ": 45 ", 1)
            .replace("\"float32\"", "\"bfloat16\"")
            .replace("\"dtype\":null", "\"dtype\":\"bfloat16\"")
            .replace(":true", ":false");
        assert_eq!(ALL.apply(text), Some(expected.clone()));
        assert_eq!(ALL.apply(&expected), None, "it is true already");
        assert_eq!(ConfigChanges::default().apply(text), None);
    }

    #[test]
    fn keys_without_one_place_are_set_all_the_same() {
        let parsed = |text: &str| serde_json::from_str::<Value>(&ALL.apply(text).unwrap()).unwrap();
        assert_eq!(parsed("{}"), serde_json::json!({"vocab_size": 45, "tie_word_embeddings": false}));
        let twice = parsed(r#"{"vocab_size": 1, "tie_word_embeddings": false, "vocab_size": 40}"#);
        assert_eq!(twice, serde_json::json!({"vocab_size": 45, "tie_word_embeddings": false}));
        for no_object in ["", "[1]", "{\"vocab_size\": }", "\u{feff}{}"] {
            assert_eq!(ALL.apply(no_object), None, "{no_object}");
        }
    }
}
