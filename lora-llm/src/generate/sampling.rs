//! The choice of an id, on the host. Order and meaning of the options are those of transformers' `generate`.

use lora_core::{Draw, Purpose};

use crate::{Error, Result};

/// How an id is chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// What logits are divided by; 0 always takes the most likely id.
    pub temperature: f64,
    /// Only so many of the most likely ids.
    pub top_k: Option<usize>,
    /// Only the most likely ids that together have this probability (Holtzman et al. 2020, arXiv 1904.09751, §3.1).
    pub top_p: Option<f64>,
    /// Only ids with this share of the probability of the most likely one (Nguyen et al. 2024, arXiv 2407.01082).
    pub min_p: Option<f64>,
    /// What logits of ids that are in the text are divided by, or multiplied by if negative
    /// (Keskar et al. 2019, arXiv 1909.05858, §4.1); 1 changes nothing.
    pub repetition_penalty: f64,
    /// Seed of the draws.
    pub seed: u64,
}

impl Sampling {
    /// Always the most likely id.
    pub const GREEDY: Self =
        Self { temperature: 0.0, top_k: None, top_p: None, min_p: None, repetition_penalty: 1.0, seed: 0 };

    pub(super) fn check(&self) -> Result<()> {
        let refuse = |option, reason: &str| Err(Error::Request { option, reason: reason.to_owned() });
        if !self.temperature.is_finite() || self.temperature < 0.0 {
            return refuse("--temperature", "must be a finite number and not negative");
        }
        if self.top_k == Some(0) {
            return refuse("--top-k", "must be at least 1");
        }
        if self.top_p.is_some_and(|share| !(share > 0.0 && share <= 1.0)) {
            return refuse("--top-p", "must be greater than 0 and at most 1");
        }
        if self.min_p.is_some_and(|share| !(0.0..=1.0).contains(&share)) {
            return refuse("--min-p", "must be between 0 and 1");
        }
        if !self.repetition_penalty.is_finite() || self.repetition_penalty <= 0.0 {
            return refuse("--repetition-penalty", "must be a finite number greater than 0");
        }
        Ok(())
    }

    /// Whether the most likely id is taken, whatever else was said.
    pub(super) fn is_greedy(&self) -> bool {
        self.temperature == 0.0 && self.repetition_penalty == 1.0
    }

    /// The id that follows `text`; it is the `number`th that is chosen.
    pub(super) fn choose(&self, mut logits: Vec<f32>, text: &[u32], number: u64) -> u32 {
        self.penalise(&mut logits, text);
        if self.temperature == 0.0 {
            return most_likely(&logits);
        }
        let probable = self.candidates(&logits);
        let sum: f64 = probable.iter().map(|(_, weight)| weight).sum();
        let mut rest = f64::from(Draw::new(self.seed, Purpose::Token, number, 0).unit()) * sum;
        for (id, weight) in &probable {
            rest -= weight;
            if rest < 0.0 {
                return *id;
            }
        }
        probable.last().map_or(0, |(id, _)| *id)
    }

    fn penalise(&self, logits: &mut [f32], text: &[u32]) {
        if self.repetition_penalty == 1.0 {
            return;
        }
        let mut ids = text.to_vec();
        ids.sort_unstable();
        ids.dedup();
        let penalty = self.repetition_penalty as f32;
        for id in ids {
            if let Some(logit) = logits.get_mut(id as usize) {
                *logit = if *logit < 0.0 { *logit * penalty } else { *logit / penalty };
            }
        }
    }

    /// What may be chosen, with weights in proportion to probabilities, the most likely first.
    fn candidates(&self, logits: &[f32]) -> Vec<(u32, f64)> {
        let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let weight = |logit: f32| (f64::from(logit - most) / self.temperature).exp();
        let mut all: Vec<(u32, f32)> = logits.iter().enumerate().map(|(id, logit)| (id as u32, *logit)).collect();
        let falling = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
        if let Some(count) = self.top_k.filter(|count| *count < all.len()) {
            all.select_nth_unstable_by(count, falling);
            all.truncate(count);
        }
        all.sort_unstable_by(falling);
        let mut kept: Vec<(u32, f64)> = all.into_iter().map(|(id, logit)| (id, weight(logit))).collect();
        if let Some(share) = self.top_p.filter(|share| *share < 1.0) {
            let enough = share * kept.iter().map(|(_, weight)| weight).sum::<f64>();
            let mut before = 0.0;
            // The id that crosses the border is kept.
            let count = kept.iter().take_while(|(_, weight)| {
                let kept = before < enough;
                before += weight;
                kept
            });
            let count = count.count();
            kept.truncate(count.max(1));
        }
        if let Some(share) = self.min_p {
            kept.retain(|(_, weight)| *weight >= share); // the most likely one weighs 1
        }
        kept
    }
}

fn most_likely(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (id, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = id;
        }
    }
    best as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: [f32; 5] = [1.0, 3.0, 2.0, -1.0, 2.5];

    fn ids(sampling: Sampling) -> Vec<u32> {
        sampling.candidates(&LOGITS).into_iter().map(|(id, _)| id).collect()
    }

    #[test]
    fn each_border_keeps_the_most_likely() {
        let warm = Sampling { temperature: 1.0, ..Sampling::GREEDY };
        assert_eq!(ids(warm), [1, 4, 2, 0, 3]);
        assert_eq!(ids(Sampling { top_k: Some(2), ..warm }), [1, 4]);
        // Probabilities: 0.466, 0.283, 0.171, 0.063, 0.009.
        assert_eq!(ids(Sampling { top_p: Some(0.4), ..warm }), [1]);
        assert_eq!(ids(Sampling { top_p: Some(0.5), ..warm }), [1, 4]);
        assert_eq!(ids(Sampling { min_p: Some(0.3), ..warm }), [1, 4, 2]);
        // At half the temperature the ratio of the first two is squared.
        assert_eq!(ids(Sampling { min_p: Some(0.4), temperature: 0.5, ..warm }), [1]);
    }

    #[test]
    fn a_penalty_pushes_both_signs_down() {
        let sampling = Sampling { repetition_penalty: 2.0, ..Sampling::GREEDY };
        let mut logits = LOGITS.to_vec();
        sampling.penalise(&mut logits, &[1, 1, 3]);
        assert_eq!(logits, [1.0, 1.5, 2.0, -2.0, 2.5]);
        assert_eq!(sampling.choose(LOGITS.to_vec(), &[1, 1, 3], 0), 4);
    }

    #[test]
    fn draws_follow_the_probabilities_and_the_seed() {
        let sampling = Sampling { temperature: 1.0, seed: 7, ..Sampling::GREEDY };
        let draw = |sampling: Sampling, number| sampling.choose(LOGITS.to_vec(), &[], number);
        let count = (0..4000).filter(|number| draw(sampling, *number) == 1).count();
        assert!((count as f64 / 4000.0 - 0.472).abs() < 0.03, "{count}");
        assert_eq!(draw(sampling, 5), draw(sampling, 5));
        let other = Sampling { seed: 8, ..sampling };
        assert!((0..20).any(|number| draw(sampling, number) != draw(other, number)));
    }

    #[test]
    fn options_that_cannot_be_are_named() {
        let check = |sampling: Sampling| sampling.check().unwrap_err().to_string();
        assert!(check(Sampling { temperature: -1.0, ..Sampling::GREEDY }).starts_with("--temperature"));
        assert!(check(Sampling { top_k: Some(0), ..Sampling::GREEDY }).starts_with("--top-k"));
        assert!(check(Sampling { top_p: Some(1.1), ..Sampling::GREEDY }).starts_with("--top-p"));
        assert!(check(Sampling { min_p: Some(f64::NAN), ..Sampling::GREEDY }).starts_with("--min-p"));
    }
}
