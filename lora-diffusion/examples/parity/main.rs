//! `parity FOLDER [--base BASE] [CASE]...`: every case of a folder laid out like `tests/fixtures/sd`, a line each.
//!
//! Cases are listed in `FOLDER/index.json`; the base that some of them need is `FOLDER/../../models/tiny-sd` unless given.
//! A line shows, of all comparisons of a case, the one that used up most of its tolerance. Ends with 1 if a case fails.

mod cases;

use std::process::ExitCode;

use lora_parity::Cases;

fn main() -> ExitCode {
    lora_parity::run(Cases { base: "../../models/tiny-sd", names: cases::names, run: cases::run })
}
