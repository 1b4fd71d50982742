//! One row, whatever its format was: a conversation, an instruction, a prompt with its completion, or a text.

use serde_json::{Map, Value as Json};

use super::records::kind;
use crate::chat::{Message, message};

/// Roles that templates know.
const ROLES: [&str; 6] = ["system", "developer", "user", "assistant", "tool", "function"];

/// What one row says.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Row {
    Chat {
        messages: Vec<Message>,
        tools: Option<Vec<Json>>,
        /// Messages before this one are there to be read, not to be learned.
        first: usize,
    },
    Instruction {
        system: Option<String>,
        instruction: String,
        input: Option<String>,
        output: String,
    },
    Completion {
        prompt: String,
        completion: String,
    },
    Text(String),
}

impl Row {
    /// A conversation from its messages; those before `first` are not learned.
    pub(super) fn chat(messages: &Json, name: &str, tools: Option<&Json>, first: usize) -> Result<Self, String> {
        let Json::Array(list) = messages else {
            return Err(format!("`{name}` is {}, expected a list", kind(messages)));
        };
        let messages = (1..)
            .zip(list)
            .map(|(number, message)| checked(message).map_err(|reason| format!("message {number}: {reason}")))
            .collect::<Result<Vec<_>, _>>()?;
        if messages.is_empty() {
            return Err(format!("`{name}` is empty"));
        }
        if !messages[first.min(messages.len())..].iter().any(is_assistant) {
            return Err("no message of the assistant: nothing to learn".to_owned());
        }
        Ok(Self::Chat { messages, tools: tool_list(tools)?, first })
    }

    /// A conversation from ShareGPT's turns.
    pub(super) fn share_gpt(turns: &Json, system: Option<String>, tools: Option<&Json>) -> Result<Self, String> {
        let mut messages: Vec<Json> = system.map(|text| Json::Object(message("system", &text))).into_iter().collect();
        for (number, turn) in (1..).zip(turns.as_array().into_iter().flatten()) {
            let field = |key: &str| match turn.get(key) {
                Some(Json::String(text)) => Ok(&**text),
                Some(other) => Err(format!("turn {number}: `{key}` is {}, expected a text", kind(other))),
                None => Err(format!("turn {number}: `{key}` is missing")),
            };
            let role = match field("from")? {
                "human" | "user" => "user",
                "gpt" | "assistant" | "chatgpt" | "bing" | "bard" | "model" | "function_call" => "assistant",
                "system" => "system",
                "tool" | "observation" | "function_response" => "tool",
                other => {
                    return Err(format!("turn {number}: `from` is `{other}`, expected human, gpt, system or tool"));
                }
            };
            messages.push(Json::Object(message(role, field("value")?)));
        }
        Self::chat(&Json::Array(messages), "conversations", tools, 0)
    }

    /// A prompt and its completion.
    pub(super) fn completion(prompt: String, completion: String) -> Result<Self, String> {
        if completion.is_empty() {
            return Err("`completion` is empty".to_owned());
        }
        Ok(Self::Completion { prompt, completion })
    }
}

pub(super) fn is_assistant(message: &Message) -> bool {
    role(message) == Some("assistant")
}

pub(super) fn role(message: &Message) -> Option<&str> {
    message.get("role").and_then(Json::as_str)
}

/// A message with a known role and a content that is text.
fn checked(value: &Json) -> Result<Message, String> {
    let Json::Object(fields) = value else { return Err(format!("{}, expected an object", kind(value))) };
    let mut message = fields.clone();
    let role = match fields.get("role") {
        Some(Json::String(role)) => role.as_str(),
        Some(other) => return Err(format!("`role` is {}, expected a text", kind(other))),
        None => return Err("`role` is missing".to_owned()),
    };
    if !ROLES.contains(&role) {
        return Err(format!("`role` is `{role}`, expected one of {}", ROLES.join(", ")));
    }
    let calls = tool_calls(&mut message)?;
    match fields.get("content") {
        Some(Json::String(text)) if role == "assistant" && text.trim().is_empty() && !calls => {
            return Err("the assistant says nothing".to_owned());
        }
        Some(Json::String(_)) => {}
        Some(Json::Array(parts)) => {
            message.insert("content".to_owned(), Json::String(joined(parts)?));
        }
        None | Some(Json::Null) if role == "assistant" && calls => {}
        None | Some(Json::Null) => return Err("`content` is missing".to_owned()),
        Some(other) => return Err(format!("`content` is {}, expected a text", kind(other))),
    }
    Ok(message)
}

/// Parts of a content as one text; there is nothing here that could see a picture.
fn joined(parts: &[Json]) -> Result<String, String> {
    let mut out = String::new();
    for part in parts {
        match (part.get("type").and_then(Json::as_str), part.get("text").and_then(Json::as_str)) {
            (Some("text") | None, Some(text)) => out.push_str(text),
            (Some(other), _) if other != "text" => {
                return Err(format!("a part of type `{other}`: only texts are learned"));
            }
            _ => return Err("a part of `content` without `text`".to_owned()),
        }
    }
    Ok(out)
}

/// Whether there are calls. OpenAI writes their arguments as JSON within a text; templates want the object itself.
fn tool_calls(message: &mut Message) -> Result<bool, String> {
    let calls = match message.get_mut("tool_calls") {
        None | Some(Json::Null) => return Ok(false),
        Some(Json::Array(calls)) => calls,
        Some(other) => return Err(format!("`tool_calls` is {}, expected a list", kind(other))),
    };
    for call in calls.iter_mut() {
        let arguments = call.get_mut("function").and_then(|function| function.get_mut("arguments"));
        if let Some(arguments @ Json::String(_)) = arguments
            && let Some(Ok(object)) = arguments.as_str().map(serde_json::from_str::<Map<String, Json>>)
        {
            *arguments = Json::Object(object);
        }
    }
    Ok(!calls.is_empty())
}

/// Tools as a list, or a list within a text, as data sets in columns have them.
fn tool_list(tools: Option<&Json>) -> Result<Option<Vec<Json>>, String> {
    match tools {
        None | Some(Json::Null) => Ok(None),
        Some(Json::Array(tools)) => Ok(Some(tools.clone()).filter(|tools| !tools.is_empty())),
        Some(Json::String(text)) if text.trim().is_empty() => Ok(None),
        Some(Json::String(text)) => serde_json::from_str(text).map(Some).map_err(|_| "`tools` is no list".to_owned()),
        Some(other) => Err(format!("`tools` is {}, expected a list", kind(other))),
    }
}
