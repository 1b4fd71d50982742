//! Ctrl-C and its like: the program ends at once, with nothing half-written left and a failure that says what stands.

use std::thread;

use lora_core::format::remove_unfinished;
use signal_hook::{
    consts::{SIGHUP, SIGINT, SIGTERM},
    iterator::Signals,
};

use crate::{Exit, Failure, ui::Ui};

/// From now on a signal removes what is being written and ends the program with the failure that `interrupted` makes,
/// which is told whether there was such a thing.
///
/// A hangup that whoever started the program told it to ignore (`nohup`) stays ignored.
///
/// # Errors
/// If the operating system refuses a handler.
pub(crate) fn listen(interrupted: impl FnOnce(bool) -> Failure + Send + 'static, ui: &Ui) -> Result<(), Failure> {
    let heard = [SIGINT, SIGTERM].into_iter().chain((!ignores_hangups()).then_some(SIGHUP));
    let mut signals = Signals::new(heard).map_err(|error| Failure::from_error("signals", &error))?;
    let ui = *ui;
    thread::spawn(move || {
        let Some(signal) = signals.forever().next() else { return };
        let exit = if signal == SIGINT { Exit::Interrupted } else { Exit::Terminated };
        let failure = interrupted(remove_unfinished());
        if ui.bars {
            ui.say("");
        }
        Failure { exit, ..failure }.report(&ui);
        std::process::exit(exit as i32);
    });
    Ok(())
}

/// Whether hangups are ignored, as far as the system tells.
fn ignores_hangups() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    // A bit each, from the lowest for signal 1.
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.is_some_and(|mask| mask >> (SIGHUP - 1) & 1 == 1)
}
