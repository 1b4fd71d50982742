//! How far a download is, in bytes.

use std::time::{Duration, Instant};

use indicatif::ProgressBar;

use super::{BETWEEN_LINES, style};
use crate::{failure::printable, text, ui::Ui};

/// Shows how far several files are that are fetched one after the other.
#[derive(Debug)]
pub struct Download {
    ui: Ui,
    total: u64,
    done: u64,
    /// Bytes that came just now, and since when: what is resumed has no speed.
    fetched: u64,
    started: Instant,
    file: String,
    bar: Option<ProgressBar>,
    last_line: Instant,
}

impl Download {
    /// The display of `total` bytes.
    pub fn new(ui: Ui, total: u64) -> Self {
        let bar = (ui.bars && total > 0).then(|| {
            let bar = ProgressBar::new(total);
            bar.set_style(style(" {msg} ▕{bar:12}▏ {percent} %"));
            bar.enable_steady_tick(Duration::from_millis(250));
            bar
        });
        let now = Instant::now();
        Self { ui, total, done: 0, fetched: 0, started: now, file: String::new(), bar, last_line: now }
    }

    /// A file begins, of which `have` bytes are there.
    pub fn file(&mut self, name: &str, have: u64) {
        self.file = text::ellipsis(&printable(name), 30);
        self.done += have;
        self.show();
    }

    /// Counts bytes that came.
    pub fn advance(&mut self, bytes: u64) {
        self.done += bytes;
        self.fetched += bytes;
        self.show();
    }

    /// Takes bytes back that have to come again.
    pub fn back(&mut self, bytes: u64) {
        self.done = self.done.saturating_sub(bytes);
        self.show();
    }

    /// A line above the bar.
    pub fn note(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| self.ui.say(line)),
            None => self.ui.say(line),
        }
    }

    fn show(&mut self) {
        match &self.bar {
            Some(bar) => {
                bar.set_position(self.done);
                bar.set_message(self.figures());
            }
            None if self.last_line.elapsed() >= BETWEEN_LINES => {
                self.last_line = Instant::now();
                self.ui.say(&self.figures());
            }
            None => {}
        }
    }

    /// `model.safetensors  1.2 GiB of 4.9 GiB  45.0 MiB/s  ETA 1:24`.
    fn figures(&self) -> String {
        let mut parts = vec![self.file.clone(), format!("{} of {}", text::bytes(self.done), text::bytes(self.total))];
        let seconds = self.started.elapsed().as_secs_f64();
        if seconds > 1.0 && self.fetched > 0 {
            let speed = self.fetched as f64 / seconds;
            parts.push(format!("{}/s", text::bytes(speed as u64)));
            parts.push(format!("ETA {}", text::duration(self.total.saturating_sub(self.done) as f64 / speed)));
        }
        parts.join("  ")
    }
}

impl Drop for Download {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
