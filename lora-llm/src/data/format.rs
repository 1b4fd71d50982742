//! What a row means: five formats, told apart by their fields.
//!
//! | format | fields | also read by |
//! |---|---|---|
//! | messages | `messages` of `role`, `content`; `tools` | OpenAI, TRL, axolotl |
//! | prompt and completion | `prompt`, `completion`: texts, or lists of messages | TRL, mlx-lm |
//! | Alpaca | `instruction`, `input`, `output`; Dolly's `context`, `response` | Stanford Alpaca |
//! | ShareGPT | `conversations` of `from`, `value`; `system` | FastChat, LLaMA-Factory |
//! | text | `text` | all |

use std::fmt;

use serde::Serialize;
use serde_json::{Map, Value as Json};

use super::{records::kind, row::Row};

/// A format of rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// Conversations as OpenAI has them.
    Messages,
    /// A text to begin with and the one to end it with.
    PromptCompletion,
    /// An instruction, perhaps with an input, and the answer.
    Alpaca,
    /// Conversations as FastChat has them.
    ShareGpt,
    /// Plain text.
    Text,
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Messages => "messages",
            Self::PromptCompletion => "prompt and completion",
            Self::Alpaca => "Alpaca: instruction, input, output",
            Self::ShareGpt => "ShareGPT conversations",
            Self::Text => "text",
        })
    }
}

impl Format {
    /// The format of a row, if it has one.
    pub(super) fn of(fields: &Map<String, Json>) -> Option<Self> {
        let has = |key: &str| fields.get(key).is_some_and(|value| !value.is_null());
        if has("messages") {
            return Some(Self::Messages);
        }
        if let Some(turns) = turns(fields) {
            let spoken =
                turns.as_array().and_then(|turns| turns.first()).is_some_and(|turn| turn.get("role").is_some());
            return Some(if spoken { Self::Messages } else { Self::ShareGpt });
        }
        if has("prompt") && has("completion") {
            return Some(Self::PromptCompletion);
        }
        if has("instruction") && (has("output") || has("response")) {
            return Some(Self::Alpaca);
        }
        has("text").then_some(Self::Text)
    }

    /// A row of this format.
    ///
    /// # Errors
    /// The field and what is wrong with it.
    pub(super) fn row(self, fields: &Map<String, Json>) -> Result<Row, String> {
        let text = |key: &str| match fields.get(key) {
            Some(Json::String(text)) => Ok(text.clone()),
            Some(other) => Err(format!("`{key}` is {}, expected a text", kind(other))),
            None => Err(format!("`{key}` is missing")),
        };
        let optional = |keys: &[&str]| match keys.iter().find_map(|key| fields.get(*key).map(|value| (key, value))) {
            None | Some((_, Json::Null)) => Ok(None),
            Some((_, Json::String(text))) => Ok(Some(text.clone()).filter(|text| !text.trim().is_empty())),
            Some((key, other)) => Err(format!("`{key}` is {}, expected a text", kind(other))),
        };
        match self {
            Self::Messages => {
                let messages = fields.get("messages").or(turns(fields)).ok_or("`messages` is missing")?;
                Row::chat(messages, "messages", fields.get("tools"), 0)
            }
            Self::ShareGpt => {
                let turns = turns(fields).ok_or("`conversations` is missing")?;
                Row::share_gpt(turns, optional(&["system"])?, fields.get("tools"))
            }
            Self::PromptCompletion => match (fields.get("prompt"), fields.get("completion")) {
                (Some(Json::Array(prompt)), Some(Json::Array(completion))) => {
                    let all: Vec<Json> = prompt.iter().chain(completion).cloned().collect();
                    Row::chat(&Json::Array(all), "prompt and completion", fields.get("tools"), prompt.len())
                }
                (Some(Json::Array(_)), _) | (_, Some(Json::Array(_))) => {
                    Err("`prompt` and `completion` must both be texts or both be lists of messages".to_owned())
                }
                _ => Row::completion(text("prompt")?, text("completion")?),
            },
            Self::Alpaca => {
                let answer = optional(&["output", "response"])?.ok_or("`output` is empty")?;
                Ok(Row::Instruction {
                    system: optional(&["system"])?,
                    instruction: text("instruction")?,
                    input: optional(&["input", "context"])?,
                    output: answer,
                })
            }
            Self::Text => match text("text")? {
                text if text.trim().is_empty() => Err("`text` is empty".to_owned()),
                text => Ok(Row::Text(text)),
            },
        }
    }
}

fn turns(fields: &Map<String, Json>) -> Option<&Json> {
    ["conversations", "conversation"].into_iter().find_map(|key| fields.get(key)).filter(|turns| turns.is_array())
}

/// The fields of a row in words, for messages.
pub(super) fn fields_of(fields: &Map<String, Json>) -> String {
    match fields.keys().map(|key| format!("`{key}`")).collect::<Vec<_>>() {
        none if none.is_empty() => "no fields".to_owned(),
        some => some.join(", "),
    }
}
