//! Conversations as the text that a model was tuned on: chat templates, byte for byte as `transformers` renders them.
//!
//! ```text
//! model folder ─ source ─ rewrite ─ environment ─┐
//! messages ─ message ─ value ────────────────────┴─ ChatTemplate ─ text ─ spans (what the assistant wrote)
//! ```
//!
//! | module | holds |
//! |---|---|
//! | [`template`] | the template of a model, rendering |
//! | `spans` | which parts of the text the assistant wrote |
//! | `source`, `rewrite`, `percent` | where templates lie; what the engine does not have, spelled in what it has |
//! | `environment`, `methods`, `python`, `value`, `time` | Python's ways with values, strings and dates |
//!
//! This module knows nothing of tokens; which of them belong to a span is the business of [`data`](crate::data).

mod environment;
mod error;
mod message;
mod methods;
mod percent;
mod python;
mod rewrite;
mod source;
mod spans;
pub mod template;
mod time;
mod value;

pub use error::{Error, Result};
pub use message::{Message, message};
pub use spans::Marked;
pub use template::{ChatTemplate, Conversation, Rendered};
