//! Ctrl-C and its relatives: the first asks a run to save and stop, the second ends the process at once.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use lora_cli::Exit;
use signal_hook::{
    consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1},
    flag,
};

/// What was asked of the process so far.
#[derive(Debug, Clone)]
pub(crate) struct Signals {
    interrupted: Arc<AtomicBool>,
    terminated: Arc<AtomicBool>,
    save: Arc<AtomicBool>,
}

impl Signals {
    /// From now on the first SIGINT, SIGTERM or SIGHUP only raises a flag, and SIGUSR1 asks for a checkpoint.
    ///
    /// # Errors
    /// If the operating system refuses a handler.
    pub(crate) fn listen() -> io::Result<Self> {
        let signals = Self { interrupted: Arc::default(), terminated: Arc::default(), save: Arc::default() };
        let stops = [
            (SIGINT, Exit::Interrupted, &signals.interrupted),
            (SIGTERM, Exit::Terminated, &signals.terminated),
            (SIGHUP, Exit::Terminated, &signals.terminated),
        ];
        for (signal, exit, raised) in stops {
            // Looked at first: whoever asks twice, by whichever signal, does not wait for the save.
            for earlier in [&signals.interrupted, &signals.terminated] {
                flag::register_conditional_shutdown(signal, exit as i32, Arc::clone(earlier))?;
            }
            flag::register(signal, Arc::clone(raised))?;
        }
        flag::register(SIGUSR1, Arc::clone(&signals.save))?;
        Ok(signals)
    }

    /// The exit code that the shell shall see, if the run was asked to stop.
    pub(crate) fn stop(&self) -> Option<Exit> {
        match (self.interrupted.load(Ordering::Relaxed), self.terminated.load(Ordering::Relaxed)) {
            (true, _) => Some(Exit::Interrupted),
            (_, true) => Some(Exit::Terminated),
            _ => None,
        }
    }

    /// Whether a checkpoint was asked for since the last call.
    pub(crate) fn take_save(&self) -> bool {
        self.save.swap(false, Ordering::Relaxed)
    }
}
