//! One message of a conversation, and what `transformers` does to it before a template sees it.

use serde_json::{Map, Value as Json};

/// A message: an object with `role`, mostly `content`, and whatever else templates know (`tool_calls`, `name`, …).
pub type Message = Map<String, Json>;

/// A plain message.
pub fn message(role: &str, content: &str) -> Message {
    let field = |key: &str, text: &str| (key.to_owned(), Json::from(text));
    [field("role", role), field("content", content)].into_iter().collect()
}

/// Names of a message's reasoning, the standard one first.
const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// The message without empty fields, and with its reasoning under the names that templates look for
/// (`apply_chat_template` and `_alias_reasoning_fields`).
pub(super) fn prepared(message: &Message) -> Message {
    let present = |key: &str| message.get(key).filter(|value| !value.is_null());
    let reasoning = REASONING.into_iter().find_map(present).cloned();
    let mut out = Message::new();
    if let Some(reasoning) = &reasoning {
        out.insert("thinking".to_owned(), reasoning.clone());
    }
    let fields = message.iter().filter(|(_, value)| !value.is_null());
    out.extend(fields.map(|(key, value)| (key.clone(), value.clone())));
    if let Some(reasoning) = reasoning {
        out.insert("reasoning_content".to_owned(), reasoning);
    }
    out
}
