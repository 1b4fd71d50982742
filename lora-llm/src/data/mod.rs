//! Files of texts: what is found in them, and what of it is trained on.
//!
//! ```text
//! file ─ source ─ records ─ format ─ row ─ encode ─ Dataset ─ examples
//!        bytes    objects   meaning  one   ids, loss   report, preview
//! ```
//!
//! | module | holds |
//! |---|---|
//! | `source` | unpacking, byte order marks, what is no text at all |
//! | `records`, `parquet` | JSON lines and arrays, the place of every fault; columns (feature `parquet`) |
//! | [`mod@format`], `row` | five formats, and what a row of each says |
//! | [`encode`] | token ids, which of them count in the loss, what is too long |
//! | [`folder`] | a folder with files for training, validation and test |
//! | [`dataset`] | the file as training sees it: used, skipped and why |
//! | [`report`], [`preview`] | the same for a person, in numbers and as text |
//!
//! Every row is used or listed with line, column and reason; nothing is dropped in silence. This module knows nothing of
//! models and batches.

pub mod dataset;
pub mod encode;
mod error;
pub mod folder;
pub mod format;
#[cfg(feature = "parquet")]
mod parquet;
pub mod preview;
mod records;
pub mod report;
mod row;
mod source;

pub use dataset::{Dataset, LoadOptions, Long, OnBad};
pub use encode::{OnLong, TrainOn};
pub use error::{Error, Result};
pub use folder::Parts;
pub use format::Format;
pub use preview::{Piece, Preview};
pub use records::BadRow;
pub use report::{Report, Tokens};
