//! The command line of `lora`, and what its two programs share.
//!
//! | module | holds |
//! |---|---|
//! | [`args`] | commands and their arguments, parsed by both programs |
//! | [`options`] | settings with their layers: flag, variable, files, preset, default |
//! | [`run`] | a run's folder: configuration, metrics, TensorBoard events, samples |
//! | [`plan`], [`progress`] | what is said before and during a run |
//! | [`inspection`] | what a file is |
//! | [`report`] | the page that is left of a run |
//! | [`launch`] | finding the engine and libtorch |
//! | [`usage`] | how a finished adapter is used elsewhere |
//! | [`failure`], [`ui`], [`text`] | how errors, data and numbers are shown |
//! | `signals` | Ctrl-C: what is being written is removed |
//!
//! Nothing here knows libtorch or a model; `lora` starts in milliseconds, and starts `lora-engine` for the rest.

pub mod app;
pub mod args;
mod commands;
pub mod disk;
pub mod failure;
pub mod inspection;
pub mod launch;
pub mod options;
pub mod plan;
pub mod progress;
pub mod report;
pub mod run;
mod signals;
pub mod text;
pub mod ui;
pub mod usage;

pub use failure::{Exit, Failure};
