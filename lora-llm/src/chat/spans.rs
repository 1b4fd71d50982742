//! Which part of a rendered conversation the assistant wrote: what a model is trained on.
//!
//! A template with `{% generation %}` says it. For others there are two ways that prove themselves, tried turn by turn:
//!
//! - by prefixes: the text before the turn with a generation prompt, and the text up to the turn, must both be beginnings
//!   of the whole text; what lies between is what the model has to write, end mark included;
//! - by marks: two letters that occur nowhere else are put around what the assistant said, and taking them out again must
//!   give the same text; the end mark that follows is included.
//!
//! The second serves templates that write a turn differently once it is history, such as those that drop its reasoning, and
//! templates without a generation prompt.

use std::ops::Range;

use serde_json::Value as Json;

use super::{
    ChatTemplate, Conversation, Error, Message, Result,
    template::{marks, unmarked},
};

/// A conversation as text, and what of it the assistant wrote.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Marked {
    /// The text.
    pub text: String,
    /// Bytes of the text, in order, without overlaps.
    pub spans: Vec<Range<usize>>,
}

impl ChatTemplate {
    /// The text of a conversation, and which part of it the assistant wrote.
    ///
    /// # Errors
    /// As [`render`](Self::render), and when what the assistant wrote cannot be told for certain.
    pub fn render_marked(&self, conversation: &Conversation<'_>) -> Result<Marked> {
        let whole = self.render(conversation)?;
        if let Some(spans) = whole.generated {
            return Ok(Marked { text: whole.text, spans });
        }
        let messages = conversation.messages;
        let mut spans: Vec<Range<usize>> = Vec::new();
        for turn in (0..messages.len()).filter(|turn| is_assistant(&messages[*turn])) {
            let after = spans.last().map_or(0, |span| span.end);
            let span =
                self.span(conversation, turn, &whole.text).filter(|span| span.start >= after && span.start < span.end);
            let Some(span) = span else {
                return Err(Error::NoSpans { template: self.label().to_owned(), turn: turn + 1 });
            };
            spans.push(span);
        }
        Ok(Marked { text: whole.text, spans })
    }

    /// What a turn is in the whole text, if it can be told.
    fn span(&self, conversation: &Conversation<'_>, turn: usize, whole: &str) -> Option<Range<usize>> {
        let prefix = |messages: &[Message], generation_prompt: bool| {
            // A template may refuse half a conversation; that proves nothing about the whole.
            let part = self.render(&Conversation { messages, generation_prompt, ..*conversation }).ok()?;
            whole.starts_with(&part.text).then_some(part.text.len())
        };
        let messages = conversation.messages;
        let start = prefix(&messages[..turn], true);
        let last = turn + 1 == messages.len() && !conversation.generation_prompt;
        let end = if last { Some(whole.len()) } else { prefix(&messages[..=turn], false) };
        let between = match (start, end) {
            (Some(start), Some(end)) if start < end => Some(start..start + self.trimmed(&whole[start..end])),
            _ => None,
        };
        // Without a generation prompt, the heading of the turn would lie between as well.
        let prompts = self.source().contains("add_generation_prompt");
        if prompts && between.is_some() {
            return between;
        }
        let Some(said) = self.said(conversation, turn, whole) else { return between };
        let start = start.filter(|start| prompts && *start <= said.start).unwrap_or(said.start);
        let rest = &whole[said.end..];
        let blanks = rest.len() - rest.trim_start().len();
        let mark = self.ends.iter().filter(|end| rest[blanks..].starts_with(&***end)).map(String::len).max();
        Some(start..said.end + mark.map_or(0, |mark| blanks + mark))
    }

    /// Length of a turn up to its end mark, without blanks after that.
    fn trimmed(&self, turn: &str) -> usize {
        let bare = turn.trim_end();
        if self.ends.iter().any(|end| bare.ends_with(&**end)) { bare.len() } else { turn.len() }
    }

    /// Where the content of a message went, by marks.
    fn said(&self, conversation: &Conversation<'_>, turn: usize, whole: &str) -> Option<Range<usize>> {
        let mut messages = conversation.messages.to_vec();
        let [open, close] = marks(&messages)?;
        let content = text_of(messages[turn].get_mut("content")?)?;
        // Templates trim; the marks stay inside.
        let inner = content.trim();
        let before = content.len() - content.trim_start().len();
        let after = &content[before + inner.len()..];
        *content = format!("{}{open}{inner}{close}{after}", &content[..before]);
        let marked = self.render(&Conversation { messages: &messages, ..*conversation }).ok()?;
        let found = unmarked(&marked.text, [open, close]);
        match found.generated?.as_slice() {
            [span] if found.text == whole => Some(span.clone()),
            _ => None,
        }
    }
}

fn is_assistant(message: &Message) -> bool {
    message.get("role").and_then(Json::as_str) == Some("assistant")
}

/// The text of a content: itself, or that of its only part.
fn text_of(content: &mut Json) -> Option<&mut String> {
    match content {
        Json::String(text) => Some(text),
        Json::Array(parts) => match parts.as_mut_slice() {
            [part] => match part.get_mut("text") {
                Some(Json::String(text)) => Some(text),
                _ => None,
            },
            _ => None,
        },
        _ => None,
    }
}
