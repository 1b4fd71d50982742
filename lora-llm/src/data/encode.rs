//! Rows as token ids, and which of them count in the loss.
//!
//! A text is tokenised once and whole: parts on their own would be cut differently at their borders. Which tokens are
//! trained follows from the bytes that each stands for; one that lies across the border has to be written by the model,
//! and so is trained. The same is true of the mark that ends a completion or a turn.

use std::{ops::Range, time::SystemTime};

use serde_json::{Map, Value as Json};

use super::{
    Error, Result,
    row::{Row, is_assistant, role},
};
use crate::{
    chat::{ChatTemplate, Conversation, Message, message},
    example::Example,
    tokenizer::{Encoded, Tokenizer},
};

/// What counts in the loss.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TrainOn {
    /// What the assistant says, and completions; all of a plain text.
    #[default]
    Completions,
    /// Everything.
    All,
}

/// What happens to an example with more tokens than are allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnLong {
    /// Its end is cut off.
    #[default]
    Truncate,
    /// It is left out.
    Drop,
    /// It becomes several: conversations between turns, each with the system message; texts anywhere.
    Split,
}

/// How rows are encoded.
#[derive(Debug, Clone, Copy)]
pub(super) struct Encoder<'a> {
    pub(super) tokenizer: &'a Tokenizer,
    pub(super) template: Option<&'a ChatTemplate>,
    pub(super) train_on: TrainOn,
    pub(super) variables: &'a Map<String, Json>,
    pub(super) now: SystemTime,
}

/// What one row became.
#[derive(Debug, Clone, Default)]
pub(super) struct Outcome {
    pub(super) examples: Vec<Example>,
    /// Tokens of the row as it was, when that was too long.
    pub(super) too_long: Option<usize>,
    /// Why it gave no example.
    pub(super) reason: Option<String>,
}

impl Encoder<'_> {
    /// The examples of a row, none longer than `longest`.
    pub(super) fn examples(&self, row: &Row, longest: usize, on_long: OnLong) -> Result<Outcome> {
        let whole = match self.whole(row) {
            Ok(example) => example,
            Err(error) => return self.refusal(error),
        };
        let mut outcome = Outcome::default();
        let length = whole.ids.len();
        if length <= longest {
            outcome.examples.push(whole);
        } else {
            outcome.too_long = Some(length);
            outcome.examples = match (on_long, row) {
                (OnLong::Drop, _) => Vec::new(),
                (OnLong::Truncate, _) => vec![cut(whole, longest)],
                (OnLong::Split, Row::Text(_)) => pieces(&whole, longest),
                (OnLong::Split, Row::Chat { messages, tools, first: 0 }) => {
                    self.parts(messages, tools.as_deref(), longest)?
                }
                (OnLong::Split, _) => vec![cut(whole, longest)],
            };
        }
        let before = outcome.examples.len();
        outcome.examples.retain(|example| example.trained.contains(&true));
        if before > 0 && outcome.examples.is_empty() {
            outcome.reason = Some(match outcome.too_long {
                Some(length) => format!("{length} tokens, and the first {longest} hold nothing to learn"),
                None => "nothing to learn: no token is trained".to_owned(),
            });
        }
        Ok(outcome)
    }

    /// A conversation that the template refuses is a bad row; a template with a mistake spoils all of them.
    fn refusal(&self, error: Error) -> Result<Outcome> {
        use crate::chat::Error::{NoSpans, Refused};
        match error {
            Error::Chat(refused @ (Refused { .. } | NoSpans { .. })) => {
                Ok(Outcome { reason: Some(refused.to_string()), ..Outcome::default() })
            }
            other => Err(other),
        }
    }

    /// All of a row, however long.
    fn whole(&self, row: &Row) -> Result<Example> {
        match row {
            Row::Text(text) => self.framed(text, 0),
            Row::Completion { prompt, completion } => self.framed(&format!("{prompt}{completion}"), prompt.len()),
            Row::Chat { messages, tools, first } => self.chat(messages, tools.as_deref(), *first),
            Row::Instruction { system, instruction, input, output } => match self.template {
                Some(_) => {
                    let asked = match input {
                        Some(input) => format!("{instruction}\n{input}"),
                        None => instruction.clone(),
                    };
                    let system = system.iter().map(|text| message("system", text));
                    let turns = [message("user", &asked), message("assistant", output)];
                    self.chat(&system.chain(turns).collect::<Vec<_>>(), None, 0)
                }
                None => {
                    let prompt = alpaca(system.as_deref(), instruction, input.as_deref());
                    self.framed(&format!("{prompt}{output}"), prompt.len())
                }
            },
        }
    }

    /// A text between the tokenizer's marks, trained from a byte on; its end mark is trained too.
    fn framed(&self, text: &str, from: usize) -> Result<Example> {
        let encoded = self.tokenizer.encode(text, true)?;
        let spans = [if self.train_on == TrainOn::All { 0..text.len() } else { from..text.len() }];
        let mut example = self.labelled(encoded, &spans);
        if let Some(end) = self.tokenizer.end() {
            if example.ids.last() == Some(&end) {
                if let Some(last) = example.trained.last_mut() {
                    *last = true;
                }
            } else {
                example.ids.push(end);
                example.trained.push(true);
            }
        }
        Ok(example)
    }

    fn chat(&self, messages: &[Message], tools: Option<&[Json]>, first: usize) -> Result<Example> {
        let Some(template) = self.template else {
            return Err(crate::chat::Error::Missing { folder: self.tokenizer.path().to_owned() }.into());
        };
        let (variables, now) = (Some(self.variables), Some(self.now));
        let conversation = Conversation { tools, variables, now, ..Conversation::new(messages) };
        if self.train_on == TrainOn::All {
            let text = template.render(&conversation)?.text;
            let encoded = self.tokenizer.encode(&text, false)?;
            let whole = 0..text.len();
            return Ok(self.labelled(encoded, &[whole]));
        }
        let marked = template.render_marked(&conversation)?;
        let encoded = self.tokenizer.encode(&marked.text, false)?;
        let learned = messages[first.min(messages.len())..].iter().filter(|message| is_assistant(message)).count();
        let skipped = marked.spans.len().saturating_sub(learned);
        Ok(self.labelled(encoded, &marked.spans[if first == 0 { 0 } else { skipped }..]))
    }

    /// Ids that stand for a byte of a span are trained, the mark at the beginning never: nothing comes before it.
    fn labelled(&self, encoded: Encoded, spans: &[Range<usize>]) -> Example {
        let begin = self.tokenizer.special().begin;
        let first_is_mark = encoded.ids.first().copied() == begin && begin.is_some();
        let mut spans = spans.iter().peekable();
        let mut trained = Vec::with_capacity(encoded.ids.len());
        for (at, bytes) in encoded.spans.iter().enumerate() {
            while spans.next_if(|span| span.end <= bytes.start && !bytes.is_empty()).is_some() {}
            let within = spans.peek().is_some_and(|span| bytes.start < span.end && span.start < bytes.end);
            trained.push(within && !(at == 0 && first_is_mark));
        }
        Example { ids: encoded.ids, trained }
    }

    /// A conversation as several: as many exchanges in each as there is room for, the system message before every one.
    fn parts(&self, messages: &[Message], tools: Option<&[Json]>, longest: usize) -> Result<Vec<Example>> {
        let system =
            messages.iter().take_while(|message| matches!(role(message), Some("system" | "developer"))).count();
        let starts: Vec<usize> =
            (system..messages.len()).filter(|at| *at == system || role(&messages[*at]) == Some("user")).collect();
        let part = |from: usize, to: usize| {
            let taken: Vec<Message> = messages[..system].iter().chain(&messages[from..to]).cloned().collect();
            match taken.iter().any(is_assistant) {
                true => self.chat(&taken, tools, 0),
                false => Ok(Example::default()),
            }
        };
        let mut out = Vec::new();
        let mut at = 0;
        while at < starts.len() {
            let end = |exchange: usize| starts.get(exchange).copied().unwrap_or(messages.len());
            let (mut best, mut next) = (part(starts[at], end(at + 1))?, at + 1);
            while next < starts.len() {
                let longer = part(starts[at], end(next + 1))?;
                if longer.ids.len() > longest {
                    break;
                }
                (best, next) = (longer, next + 1);
            }
            out.push(cut(best, longest));
            at = next;
        }
        Ok(out)
    }
}

fn cut(mut example: Example, longest: usize) -> Example {
    example.ids.truncate(longest);
    example.trained.truncate(longest);
    example
}

fn pieces(example: &Example, longest: usize) -> Vec<Example> {
    let ids = example.ids.chunks(longest.max(1));
    let trained = example.trained.chunks(longest.max(1));
    ids.zip(trained).map(|(ids, trained)| Example { ids: ids.to_vec(), trained: trained.to_vec() }).collect()
}

/// The prompt of Stanford Alpaca, for models that have no chat template.
fn alpaca(system: Option<&str>, instruction: &str, input: Option<&str>) -> String {
    let with = if input.is_some() { ", paired with an input that provides further context" } else { "" };
    let default = format!(
        "Below is an instruction that describes a task{with}. Write a response that appropriately completes the request."
    );
    let input = input.map(|input| format!("### Input:\n{input}\n\n")).unwrap_or_default();
    format!("{}\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n", system.unwrap_or(&default))
}
