//! Ctrl-C while a model is fetched: what has come is on the disk already, so there is nothing to do but to say so.

use std::{io::Write as _, thread};

use signal_hook::{
    consts::{SIGHUP, SIGINT, SIGTERM},
    iterator::Signals,
};

use crate::{Exit, Failure};

/// From now on a signal ends the program with a line on how to go on: `again`.
///
/// # Errors
/// If the operating system refuses a handler.
pub(super) fn listen(again: String) -> Result<(), Failure> {
    let mut signals =
        Signals::new([SIGINT, SIGTERM, SIGHUP]).map_err(|error| Failure::from_error("signals", &error))?;
    thread::spawn(move || {
        if let Some(signal) = signals.forever().next() {
            let _ = writeln!(std::io::stderr(), "\ninterrupted: what has come is kept, `{again}` goes on from there");
            std::process::exit(if signal == SIGINT { Exit::Interrupted } else { Exit::Terminated } as i32);
        }
    });
    Ok(())
}
