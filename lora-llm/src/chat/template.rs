//! The chat template of a model, and what it makes of a conversation.

use std::{
    collections::BTreeMap,
    ops::Range,
    path::Path,
    time::{SystemTime, UNIX_EPOCH},
};

use minijinja::{Environment, ErrorKind, Value};
use serde_json::{Map, Value as Json};

use super::{
    Error, Message, Result,
    environment::{self, MARKS, NOW, Raised},
    message::prepared,
    rewrite::rewrite,
    source, value,
};
use crate::tokenizer::Tokenizer;

/// The only template of its environment.
const NAME: &str = "chat";

/// The most bytes of a line that an error shows.
const EXCERPT: usize = 100;

/// What is put into a template.
#[derive(Debug, Clone, Copy, Default)]
pub struct Conversation<'a> {
    /// The messages, oldest first.
    pub messages: &'a [Message],
    /// Functions that the assistant may call, as JSON schemas.
    pub tools: Option<&'a [Json]>,
    /// Texts that the assistant may draw on.
    pub documents: Option<&'a [Json]>,
    /// Ends the text where the assistant is to begin.
    pub generation_prompt: bool,
    /// What else the template knows, for example `enable_thinking`.
    pub variables: Option<&'a Map<String, Json>>,
    /// The time that the template is told; without it, the present.
    pub now: Option<SystemTime>,
}

impl<'a> Conversation<'a> {
    /// Messages alone.
    pub fn new(messages: &'a [Message]) -> Self {
        Self { messages, ..Self::default() }
    }

    /// The same, ending where the assistant is to begin.
    pub fn prompt(self) -> Self {
        Self { generation_prompt: true, ..self }
    }
}

/// A conversation as text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rendered {
    /// The text.
    pub text: String,
    /// Bytes of the text between `{% generation %}` and `{% endgeneration %}`; `None` if the template has no such tags.
    pub generated: Option<Vec<Range<usize>>>,
}

/// A chat template, parsed.
#[derive(Debug, Clone)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    source: String,
    label: String,
    tagged: bool,
    special: BTreeMap<String, String>,
    pub(super) ends: Vec<String>,
}

impl ChatTemplate {
    /// The template of a model folder: the one called `name`, or `default`.
    ///
    /// # Errors
    /// When the folder has none, none of that name, or one that does not parse.
    pub fn open(folder: &Path, name: Option<&str>, tokenizer: &Tokenizer) -> Result<Self> {
        let mut found = source::templates(folder)?;
        if found.is_empty() {
            return Err(Error::Missing { folder: folder.to_owned() });
        }
        let wanted = name.unwrap_or("default");
        let known = found.keys().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
        let Some((label, text)) = found.remove(wanted) else {
            return Err(Error::Unnamed { folder: folder.to_owned(), wanted: wanted.to_owned(), known });
        };
        Self::parse(&label, text, tokenizer)
    }

    /// A template from a file of its own.
    ///
    /// # Errors
    /// When it cannot be read or does not parse.
    pub fn read(path: &Path, tokenizer: &Tokenizer) -> Result<Self> {
        let missing = || Error::Read { path: path.to_owned(), source: std::io::ErrorKind::NotFound.into() };
        let text = source::read(path)?.ok_or_else(missing)?;
        Self::parse(&path.display().to_string(), text, tokenizer)
    }

    /// A template from a text; `label` names it in errors.
    ///
    /// # Errors
    /// When it does not parse.
    pub fn parse(label: &str, source: String, tokenizer: &Tokenizer) -> Result<Self> {
        let special = tokenizer.special();
        let ends = special.ends.iter().filter_map(|id| tokenizer.token(*id)).collect();
        Self::with_special(label, source, special.named.clone(), ends)
    }

    /// A template with special tokens given by name, and the texts that end a turn.
    ///
    /// # Errors
    /// When it does not parse.
    pub fn with_special(
        label: &str,
        source: String,
        special: BTreeMap<String, String>,
        ends: Vec<String>,
    ) -> Result<Self> {
        let (jinja, tagged) = rewrite(&source);
        let jinja = jinja.into_owned();
        let parsed = environment::environment().and_then(|mut environment| {
            environment.add_template_owned(NAME, jinja)?;
            Ok(environment)
        });
        let environment = parsed.map_err(|error| located(label, &source, &error))?;
        Ok(Self { environment, source, label: label.to_owned(), tagged, special, ends })
    }

    /// What names the template in errors: its file.
    pub fn label(&self) -> &str {
        &self.label
    }

    /// The template as it was read.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Whether it says itself what the assistant wrote.
    pub fn tagged(&self) -> bool {
        self.tagged
    }

    /// The text of a conversation.
    ///
    /// # Errors
    /// When the template refuses the conversation, makes a mistake, or does not come to an end.
    pub fn render(&self, conversation: &Conversation<'_>) -> Result<Rendered> {
        if conversation.messages.is_empty() {
            return Err(Error::Empty);
        }
        let messages: Vec<Message> = conversation.messages.iter().map(prepared).collect();
        self.render_prepared(conversation, &messages)
    }

    fn render_prepared(&self, conversation: &Conversation<'_>, messages: &[Message]) -> Result<Rendered> {
        let list = |items: Option<&[Json]>| match items {
            Some(items) => Value::from(items.iter().map(value::value).collect::<Vec<_>>()),
            None => Value::from(()),
        };
        let mut context: BTreeMap<&str, Value> =
            self.special.iter().map(|(name, token)| (&**name, Value::from(&**token))).collect();
        for (name, given) in conversation.variables.into_iter().flatten() {
            context.insert(name, value::value(given));
        }
        context.insert("messages", Value::from(messages.iter().map(value::dict).collect::<Vec<_>>()));
        context.insert("tools", list(conversation.tools));
        context.insert("documents", list(conversation.documents));
        context.insert("add_generation_prompt", Value::from(conversation.generation_prompt));
        let now = conversation.now.and_then(|now| now.duration_since(UNIX_EPOCH).ok());
        if let Some(now) = now {
            context.insert(NOW, Value::from(now.as_secs()));
        }
        let marks = self.tagged.then(|| marks(messages)).flatten();
        if let Some([open, close]) = marks {
            context.insert(MARKS, Value::from(String::from_iter([open, close])));
        }
        let located = |error| located(&self.label, &self.source, &error);
        let template = self.environment.get_template(NAME).map_err(located)?;
        let text = template.render(Value::from_pairs(context)).map_err(located)?;
        Ok(match marks {
            Some(marks) => unmarked(&text, marks),
            None => Rendered { text, generated: self.tagged.then(Vec::new) },
        })
    }
}

/// Two letters that stand for nothing in Unicode and do not occur in the messages.
pub(super) fn marks(messages: &[Message]) -> Option<[char; 2]> {
    let mut text = String::new();
    messages.iter().for_each(|message| message.values().for_each(|value| text.push_str(&value.to_string())));
    let mut free = ('\u{fdd0}'..='\u{fdef}').filter(|letter| !text.contains(*letter));
    Some([free.next()?, free.next()?])
}

/// Takes the marks out; spans within spans count as one.
pub(super) fn unmarked(marked: &str, [open, close]: [char; 2]) -> Rendered {
    let mut text = String::with_capacity(marked.len());
    let mut spans = Vec::new();
    let (mut depth, mut start) = (0usize, 0);
    for letter in marked.chars() {
        if letter == open {
            if depth == 0 {
                start = text.len();
            }
            depth += 1;
        } else if letter == close {
            depth = depth.saturating_sub(1);
            if depth == 0 {
                spans.push(start..text.len());
            }
        } else {
            text.push(letter);
        }
    }
    Rendered { text, generated: Some(spans) }
}

/// An error of the engine, with the line that it happened on.
fn located(label: &str, source: &str, error: &minijinja::Error) -> Error {
    let line = error.line().unwrap_or(1);
    let template = label.to_owned();
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(current) = cause {
        if let Some(Raised(reason)) = current.downcast_ref() {
            return Error::Refused { template, line, reason: reason.clone() };
        }
        cause = current.source();
    }
    let text = source.lines().nth(line.saturating_sub(1)).unwrap_or_default().trim();
    let excerpt = match text.char_indices().nth(EXCERPT) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    };
    if error.kind() == ErrorKind::OutOfFuel {
        return Error::Endless { template, line, excerpt };
    }
    let reason = match error.detail() {
        Some(detail) => detail.replace(rewrite_name(), "generation"),
        None => error.kind().to_string(),
    };
    Error::Template { template, line, reason, excerpt }
}

fn rewrite_name() -> &'static str {
    super::rewrite::FILTER
}
