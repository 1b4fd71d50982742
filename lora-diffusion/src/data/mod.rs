//! Folders of pictures: what is found in them, what of it can be trained on, and at what size.
//!
//! ```text
//! folder ─ walk ─ table, caption ─┐
//!          bytes ─ sniff ─ decode ┴─ Dataset ─ bucket ─ pixels ─ cache ─ order ─ batches
//! ```
//!
//! | module | holds |
//! |---|---|
//! | [`bucket`] | which size a picture is trained at |
//! | [`sniff`], [`decode`] | what a file is; its pixels, upright and opaque |
//! | [`caption`] | text of any encoding, trigger words, shuffling, dropout |
//! | [`dataset`] | the folder as training sees it: used, skipped and why, notes |
//! | [`pixels`] | resized, cut, mirrored; as tensors |
//! | [`order`] | which pictures make up the batch of a step |
//! | [`latents`], [`embeddings`] | what the frozen models make of pictures and captions |
//! | [`cache`] | both on disk, by the hash of what they are made from |
//! | [`report`], [`preview`] | the same for a person, in numbers and as a sheet of pictures |
//!
//! Every file is used or listed with the reason why not; nothing is dropped in silence. This module knows nothing of
//! UNets and noise: that is [`objective`](crate::objective).

pub mod bucket;
pub mod cache;
pub mod caption;
pub mod dataset;
pub mod decode;
pub mod embeddings;
mod error;
mod gather;
pub mod latents;
pub mod order;
pub mod pixels;
pub mod preview;
pub mod report;
mod scan;
pub mod sniff;
mod table;
mod walk;

pub use bucket::{BucketRule, Fit, NoBucket};
pub use cache::Cache;
pub use caption::CaptionVariation;
pub use dataset::{CaptionSource, Dataset, Masks, Note, NoteKind, Picture, ScanOptions, Skipped};
pub use decode::{Alpha, Unusable};
pub use embeddings::{Embedding, Embeddings};
pub use error::{Error, Result};
pub use latents::{Latent, LatentOptions, Latents};
pub use order::Order;
pub use preview::SheetOptions;
pub use report::{Report, ReportOptions};
