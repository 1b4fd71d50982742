//! What the programs that compare with the peers' own numbers share: how a case is judged, and how a folder of them is run.
//!
//! It knows neither models nor files; `lora-diffusion/examples/parity` and `lora-llm/examples/parity` bring the cases.

mod program;
mod report;

use std::error::Error;

pub use program::{Cases, run};
pub use report::Report;

/// What goes wrong before anything can be compared.
pub type Failure = Box<dyn Error>;
