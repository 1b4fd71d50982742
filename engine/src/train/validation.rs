//! What a run has measured of examples that it does not train on, and what a person should know of it at the end.

use std::path::Path;

use lora_cli::run::{RunError, Validation, read_metrics};

/// So much above its lowest point, relative to it, the loss has risen and not merely wavered.
const RISEN: f64 = 0.01;

/// The measurements of all sessions so far.
#[derive(Debug, Default)]
pub(super) struct Measured {
    last: Option<Validation>,
    lowest: Option<Validation>,
}

impl Measured {
    /// Those that a run has logged.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub(super) fn of(metrics: &Path) -> Result<Self, RunError> {
        let mut measured = Self::default();
        read_metrics(metrics)?.validation.into_iter().for_each(|next| measured.add(next));
        Ok(measured)
    }

    /// Takes the newest into account.
    pub(super) fn add(&mut self, measured: Validation) {
        self.last = Some(measured);
        let is_lower = |lowest: &Validation| measured.validation_loss < lowest.validation_loss;
        if measured.validation_loss.is_finite() && self.lowest.as_ref().is_none_or(is_lower) {
            self.lowest = Some(measured);
        }
    }

    /// The newest.
    pub(super) fn last(&self) -> Option<&Validation> {
        self.last.as_ref()
    }

    /// A sentence for whoever has trained for too long.
    pub(super) fn advice(&self) -> Option<String> {
        let (last, lowest) = (self.last?, self.lowest?);
        let has_risen = last.validation_loss > lowest.validation_loss * (1.0 + RISEN);
        has_risen.then(|| {
            format!(
                "lowest validation loss {:.4} at step {}: since then it has learnt by heart, fewer steps may do better",
                lowest.validation_loss, lowest.step
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(losses: &[f64]) -> Measured {
        let mut measured = Measured::default();
        for (step, validation_loss) in losses.iter().enumerate() {
            measured.add(Validation { step: step as u64 * 10, validation_loss: *validation_loss, seconds: 0.0 });
        }
        measured
    }

    #[test]
    fn a_loss_that_has_risen_is_spoken_of() {
        let advice = measured(&[2.0, 1.0, 1.3]).advice().unwrap();
        assert!(advice.contains("1.0000 at step 10"), "{advice}");
        for fine in [&[2.0, 1.0, 1.005][..], &[2.0, 1.0], &[f64::NAN, 1.0], &[]] {
            assert_eq!(measured(fine).advice(), None, "{fine:?}");
        }
    }
}
