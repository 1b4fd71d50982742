//! `parity FOLDER [--base BASE] [CASE]...`: every case of a folder laid out like `tests/fixtures/llm`, a line each.
//!
//! Cases are the parts of `FOLDER/parity.json` and each folder in it that holds a training trace; the base that they were
//! made with is `FOLDER/../../models/tiny-llm` unless given, the texts of the traces are in `FOLDER/../../data/llm` or with
//! the assets of this repository. A line shows, of all comparisons of a case, the one that used up most of its tolerance.
//! Ends with 1 if a case fails.

mod cases;

use std::process::ExitCode;

use lora_parity::Cases;

fn main() -> ExitCode {
    lora_parity::run(Cases { base: "../../models/tiny-llm", names: cases::names, run: cases::run })
}
