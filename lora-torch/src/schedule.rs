//! Learning rates over a run, as a table that is known before the first step.
//!
//! Formulas and their rounding follow `diffusers.optimization.get_scheduler` (the same as transformers'): the factor of
//! step `k`, counted from 0, multiplies the base rate, and warm-up starts at 0.

use std::f64::consts::PI;

use serde::{Deserialize, Serialize};

/// How the rate falls after its warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", tag = "name")]
pub enum Decay {
    /// It stays.
    #[default]
    Constant,
    /// Straight down to 0.
    Linear,
    /// Half a cosine wave down to 0 (Loshchilov and Hutter 2017, arXiv 1608.03983, without restarts).
    Cosine,
    /// Several of them, each starting at the top again (the same, eq. 5).
    Restarts {
        /// How many.
        cycles: u32,
    },
    /// A power of the remaining share of steps, down to a last rate.
    Polynomial {
        /// The power.
        power: f64,
        /// The last factor on the base rate.
        end: f64,
    },
}

/// Warm-up and decay.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Schedule {
    /// What follows the warm-up.
    pub decay: Decay,
    /// Steps in which the rate rises in a straight line from 0.
    pub warmup: u64,
}

impl Schedule {
    /// The factor on the base rate in step `step`, counted from 0, of a run of `steps`.
    pub fn factor(&self, step: u64, steps: u64) -> f64 {
        if step < self.warmup {
            return step as f64 / self.warmup.max(1) as f64;
        }
        let after = (step - self.warmup) as f64;
        let length = steps.saturating_sub(self.warmup).max(1) as f64;
        let progress = after / length;
        match self.decay {
            Decay::Constant => 1.0,
            Decay::Linear => (1.0 - progress).max(0.0),
            Decay::Cosine => (0.5 * (1.0 + (PI * progress).cos())).max(0.0),
            Decay::Restarts { .. } if progress >= 1.0 => 0.0,
            Decay::Restarts { cycles } => {
                let within = (f64::from(cycles) * progress) % 1.0;
                (0.5 * (1.0 + (PI * within).cos())).max(0.0)
            }
            Decay::Polynomial { end, .. } if step > steps => end,
            Decay::Polynomial { power, end } => (1.0 - end) * (1.0 - progress).powf(power) + end,
        }
    }

    /// The factor of every step of a run.
    pub fn table(&self, steps: u64) -> Vec<f64> {
        (0..steps).map(|step| self.factor(step, steps)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `tests/fixtures/schedules.py` writes what diffusers 0.42.1 gives.
    const PEERS: &str = include_str!("../tests/fixtures/schedules.json");

    #[test]
    fn every_schedule_equals_the_peers() {
        let cases: Vec<serde_json::Value> = serde_json::from_str(PEERS).unwrap();
        assert!(cases.len() >= 8);
        for case in cases {
            let schedule: Schedule = serde_json::from_value(case["schedule"].clone()).unwrap();
            let steps = case["steps"].as_u64().unwrap();
            let expected: Vec<f64> = serde_json::from_value(case["factors"].clone()).unwrap();
            for (step, (actual, expected)) in schedule.table(steps).iter().zip(&expected).enumerate() {
                assert!((actual - expected).abs() < 1e-12, "{schedule:?} at {step}: {actual} and {expected}");
            }
            assert_eq!(expected.len() as u64, steps);
        }
    }
}
