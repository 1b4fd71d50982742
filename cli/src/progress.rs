//! How far a run is: a bar on a terminal, a line every ten seconds elsewhere, JSON lines for a program.

mod download;

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use serde_json::{Value, json};

use crate::{text, ui::Ui};

pub use download::Download;

/// Time between two lines where no bar can be drawn.
const BETWEEN_LINES: Duration = Duration::from_secs(10);

/// What is known after a step.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct StepReport {
    /// Updates done.
    pub step: u64,
    /// The loss of the step.
    pub loss: f64,
    /// The learning rate of the step.
    pub lr: f64,
    /// The norm of all gradients before clipping.
    pub grad_norm: f64,
}

/// Shows how far a run is.
#[derive(Debug)]
pub struct Progress {
    ui: Ui,
    total: u64,
    rate: Rate,
    loss: Smoothed,
    bar: Option<ProgressBar>,
    last_line: Option<Instant>,
}

impl Progress {
    /// The display of a run of `total` steps of which `done` were done in earlier sessions.
    pub fn new(ui: Ui, done: u64, total: u64) -> Self {
        let bar = ui.bars.then(|| {
            let bar = ProgressBar::new(total).with_position(done);
            bar.set_style(style(" step {pos}/{len} ▕{bar:8}▏ {percent} %  {msg}"));
            bar.enable_steady_tick(Duration::from_millis(250));
            bar
        });
        let loss = Smoothed { value: 0.0, weight: 0.0 };
        Self { ui, total, rate: Rate::default(), loss, bar, last_line: None }
    }

    /// Shows a step. Cheap: a bar is drawn a few times a second at most.
    pub fn step(&mut self, report: &StepReport) {
        self.step_at(report, Instant::now());
    }

    fn step_at(&mut self, report: &StepReport, now: Instant) {
        self.rate.add(now, report.step);
        self.loss.add(report.loss);
        let rate = self.rate.per_second();
        let eta = rate.map(|rate| self.total.saturating_sub(report.step) as f64 / rate);
        if self.ui.json {
            let mut line = json!({"event": "step", "total": self.total, "rate": rate, "eta_seconds": eta});
            if let (Value::Object(line), Ok(Value::Object(report))) = (&mut line, serde_json::to_value(report)) {
                line.extend(report);
            }
            self.json_line(&line);
        } else if let Some(bar) = &self.bar {
            bar.set_position(report.step);
            bar.set_message(figures(self.loss.value(), report.lr, rate, eta));
        } else if !self.ui.quiet && self.is_line_due(now, report.step) {
            self.last_line = Some(now);
            let percent = report.step * 100 / self.total.max(1);
            let figures = figures(self.loss.value(), report.lr, rate, eta);
            self.ui.say(&format!("step {}/{} {percent} %  {figures}", report.step, self.total));
        }
    }

    /// Shows the loss of examples that are not trained on, after `step` steps.
    pub fn validation(&self, step: u64, loss: f64) {
        self.event("validation", &json!({"step": step, "loss": loss}));
        self.note(&format!("step {step}/{} validation loss {loss:.4}", self.total));
    }

    /// A line above the bar: `saved step 500 (0.3 s)`.
    pub fn note(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| self.ui.say(line)),
            None => self.ui.say(line),
        }
    }

    /// A warning above the bar.
    pub fn warn(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| self.ui.warn(line)),
            None => self.ui.warn(line),
        }
    }

    /// An event for a program that reads `--json`: `{"event": name, ...}`; nothing otherwise.
    pub fn event(&self, name: &str, facts: &impl Serialize) {
        if !self.ui.json {
            return;
        }
        let mut line = json!({ "event": name });
        match (&mut line, serde_json::to_value(facts)) {
            (Value::Object(line), Ok(Value::Object(facts))) => line.extend(facts),
            (Value::Object(line), Ok(other)) => drop(line.insert("value".into(), other)),
            _ => {}
        }
        self.json_line(&line);
    }

    /// Steps a second over the last steps; `None` before the fifth.
    pub fn rate(&self) -> Option<f64> {
        self.rate.per_second()
    }

    /// The loss, smoothed over about fifty steps; `None` before the first.
    pub fn loss(&self) -> Option<f64> {
        self.loss.value()
    }

    /// Removes the bar.
    pub fn finish(self) {
        if let Some(bar) = self.bar {
            bar.finish_and_clear();
        }
    }

    fn is_line_due(&self, now: Instant, step: u64) -> bool {
        // The first step is news, then a line every ten seconds, and the end.
        step >= self.total || self.last_line.is_none_or(|last| now.duration_since(last) >= BETWEEN_LINES)
    }

    fn json_line(&self, line: &Value) {
        // A reader that has gone away does not stop the training.
        let _ = self.ui.data(&line.to_string());
    }
}

/// A stage before the first step that takes long enough to be counted: reading pictures, encoding them.
#[derive(Debug)]
pub struct Stage {
    ui: Ui,
    label: String,
    total: u64,
    done: u64,
    bar: Option<ProgressBar>,
    last_line: Instant,
}

impl Stage {
    /// A stage of `total` parts; `label` says what is done: `encoding pictures`.
    pub fn new(ui: Ui, label: &str, total: u64) -> Self {
        let bar = ui.bars.then(|| {
            let bar = ProgressBar::new(total).with_message(label.to_owned());
            bar.set_style(style(" {msg} {pos}/{len} ▕{bar:16}▏ {percent} %  {eta}"));
            bar
        });
        Self { ui, label: label.to_owned(), total, done: 0, bar, last_line: Instant::now() }
    }

    /// Counts `parts` more.
    pub fn advance(&mut self, parts: u64) {
        self.set(self.done + parts);
    }

    /// `done` parts are done.
    pub fn set(&mut self, done: u64) {
        self.done = done;
        match &self.bar {
            Some(bar) => bar.set_position(self.done),
            None if self.last_line.elapsed() >= BETWEEN_LINES => {
                self.last_line = Instant::now();
                self.ui.say(&format!("{} {}/{}", self.label, self.done, self.total));
            }
            None => {}
        }
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("█▉▊▋▌▍▎▏ ")
}

fn figures(loss: Option<f64>, lr: f64, rate: Option<f64>, eta: Option<f64>) -> String {
    let mut parts = Vec::new();
    parts.extend(loss.map(|loss| format!("loss {loss:.4}")));
    parts.push(format!("lr {}", text::real(lr)));
    parts.extend(
        rate.map(|rate| if rate >= 1.0 { format!("{rate:.2} it/s") } else { format!("{:.2} s/it", 1.0 / rate) }),
    );
    parts.extend(eta.map(|eta| format!("ETA {}", text::duration(eta))));
    parts.join("  ")
}

/// Steps a second over a sliding window.
#[derive(Debug, Default)]
struct Rate(VecDeque<(Instant, u64)>);

impl Rate {
    /// Steps whose duration is known before a rate is named, and steps that it is taken from.
    const FIRST: usize = 4;
    const WINDOW: usize = 64;

    fn add(&mut self, now: Instant, step: u64) {
        self.0.push_back((now, step));
        if self.0.len() > Self::WINDOW {
            self.0.pop_front();
        }
    }

    /// By the median step, so that a pause for samples or a checkpoint counts for nothing.
    fn per_second(&self) -> Option<f64> {
        let pairs = self.0.iter().zip(self.0.iter().skip(1));
        let mut seconds: Vec<f64> = pairs
            .filter(|((_, before), (_, after))| after > before)
            .map(|((start, before), (end, after))| end.duration_since(*start).as_secs_f64() / (after - before) as f64)
            .collect();
        if seconds.len() < Self::FIRST {
            return None;
        }
        let middle = seconds.len() / 2;
        let (_, median, _) = seconds.select_nth_unstable_by(middle, f64::total_cmp);
        (*median > 0.0).then(|| 1.0 / *median)
    }
}

/// An exponential mean that starts at the first value instead of zero.
#[derive(Debug)]
struct Smoothed {
    value: f64,
    weight: f64,
}

impl Smoothed {
    const KEEP: f64 = 0.98;

    fn add(&mut self, value: f64) {
        if value.is_finite() {
            self.value = Self::KEEP * self.value + (1.0 - Self::KEEP) * value;
            self.weight = Self::KEEP * self.weight + (1.0 - Self::KEEP);
        }
    }

    fn value(&self) -> Option<f64> {
        (self.weight > 0.0).then(|| self.value / self.weight)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_waits_for_five_steps_and_passes_over_pauses() {
        let start = Instant::now();
        let at = |milliseconds| start + Duration::from_millis(milliseconds);
        let mut rate = Rate::default();
        for step in 1..5 {
            rate.add(at(step * 100), step);
        }
        assert_eq!(rate.per_second(), None);
        rate.add(at(500), 5);
        assert!((rate.per_second().unwrap() - 10.0).abs() < 1e-9);
        // A minute of samples, then steps at the old pace.
        for step in 6..=9 {
            rate.add(at(60_000 + step * 100), step);
        }
        assert!((rate.per_second().unwrap() - 10.0).abs() < 1e-9);
    }

    #[test]
    fn the_first_loss_is_not_drawn_to_zero() {
        let mut loss = Smoothed { value: 0.0, weight: 0.0 };
        assert_eq!(loss.value(), None);
        loss.add(0.5);
        assert!((loss.value().unwrap() - 0.5).abs() < 1e-12);
        loss.add(f64::NAN);
        assert!((loss.value().unwrap() - 0.5).abs() < 1e-12);
    }

    #[test]
    fn figures_fit_beside_the_bar() {
        let text = figures(Some(0.0871), 8.1e-5, Some(1.52), Some(566.0));
        assert_eq!(text, "loss 0.0871  lr 8.1e-5  1.52 it/s  ETA 9:26");
        let bar = " step 1000/1500 ▕████████▏ 100 %  ";
        assert!(text::width(bar) + text::width(&text) <= 80);
        assert_eq!(figures(None, 1e-4, Some(0.25), None), "lr 1e-4  4.00 s/it");
    }

    #[test]
    fn lines_come_at_the_first_step_every_ten_seconds_and_at_the_end() {
        let start = Instant::now();
        let mut progress = Progress::new(Ui::default(), 0, 100);
        assert!(progress.is_line_due(start, 1));
        progress.last_line = Some(start);
        assert!(!progress.is_line_due(start + Duration::from_secs(9), 50));
        assert!(progress.is_line_due(start + Duration::from_secs(10), 51));
        assert!(progress.is_line_due(start + Duration::from_secs(1), 100));
    }
}
