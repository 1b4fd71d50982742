//! Which timesteps a sampler visits, and the sigmas `√((1-a)/a)` there.

use super::super::{ScheduleConfig, Spacing, linspace};

/// The last alpha of a schedule with zero terminal SNR, for samplers that divide by it: the smallest f16.
const LAST_ALPHA: f64 = 1.0 / 16_777_216.0;

/// Timesteps with their sigmas; a last sigma of 0 stands for the finished latent.
pub(super) struct Ladder {
    pub(super) timesteps: Vec<f64>,
    pub(super) sigmas: Vec<f64>,
}

/// `steps` timesteps from high to low, for samplers that step from one timestep to the next.
///
/// Equal steps are rounded to whole timesteps where `whole` says so.
pub(super) fn timesteps(config: &ScheduleConfig, spacing: Spacing, steps: usize, whole: bool) -> Vec<f64> {
    let count = config.num_train_timesteps;
    match spacing {
        Spacing::Leading => {
            let ratio = count / steps;
            (0..steps).rev().map(|at| (at * ratio + config.steps_offset) as f64).collect()
        }
        Spacing::Trailing => trailing(count, steps),
        Spacing::Linspace => linspace(0.0, (count - 1) as f64, steps)
            .into_iter()
            .rev()
            .map(|timestep| if whole { timestep.round_ties_even() } else { timestep })
            .collect(),
    }
}

/// `steps` timesteps from high to low, for multistep samplers: one more is laid out, and the lowest is not visited.
pub(super) fn multistep_timesteps(config: &ScheduleConfig, spacing: Spacing, steps: usize) -> Vec<f64> {
    let count = config.num_train_timesteps;
    match spacing {
        Spacing::Leading => {
            let ratio = count / (steps + 1);
            (1..=steps).rev().map(|at| (at * ratio + config.steps_offset) as f64).collect()
        }
        Spacing::Trailing => trailing(count, steps),
        Spacing::Linspace => {
            linspace(0.0, (count - 1) as f64, steps + 1).into_iter().skip(1).rev().map(f64::round_ties_even).collect()
        }
    }
}

/// The sigma of every training timestep, rising.
pub(super) fn all_sigmas(config: &ScheduleConfig) -> Vec<f64> {
    let mut alphas = config.alphas_cumprod();
    if config.rescale_betas_zero_snr
        && let Some(last) = alphas.last_mut()
    {
        *last = LAST_ALPHA;
    }
    alphas.into_iter().map(|alpha| ((1.0 - alpha) / alpha).sqrt()).collect()
}

/// The ladder of given timesteps, sigmas between two timesteps interpolated.
pub(super) fn plain(all: &[f64], timesteps: Vec<f64>) -> Ladder {
    let mut sigmas: Vec<f64> = timesteps.iter().map(|timestep| at(all, *timestep)).collect();
    sigmas.push(0.0);
    Ladder { timesteps, sigmas }
}

/// `steps` sigmas between `high` and `low` whose seventh roots are equally far apart (Karras et al. 2022, eq. 5).
pub(super) fn karras(high: f64, low: f64, steps: usize) -> Vec<f64> {
    const RHO: f64 = 7.0;
    let (high, low) = (high.powf(RHO.recip()), low.powf(RHO.recip()));
    linspace(0.0, 1.0, steps).into_iter().map(|share| (high + share * (low - high)).powf(RHO)).collect()
}

/// The timestep of a sigma, interpolated in `ln σ`; at the ends the ends.
pub(super) fn timestep_of(all: &[f64], sigma: f64) -> f64 {
    let above = all.partition_point(|other| *other < sigma);
    if above == 0 {
        return 0.0;
    }
    if above == all.len() {
        return (all.len() - 1) as f64;
    }
    let (low, high) = (all[above - 1].ln(), all[above].ln());
    (above - 1) as f64 + (sigma.ln() - low) / (high - low)
}

fn trailing(count: usize, steps: usize) -> Vec<f64> {
    (0..steps).map(|at| (count as f64 - at as f64 * count as f64 / steps as f64).round_ties_even() - 1.0).collect()
}

fn at(all: &[f64], timestep: f64) -> f64 {
    let last = all.len() - 1;
    let low = (timestep.floor().max(0.0) as usize).min(last);
    let high = (low + 1).min(last);
    all[low] + (timestep - low as f64) * (all[high] - all[low])
}

#[cfg(test)]
mod tests {
    use super::super::super::Prediction;
    use super::*;

    #[test]
    fn multistep_leading_divides_by_one_step_more() {
        let config = ScheduleConfig::stable_diffusion(Prediction::Epsilon);
        assert_eq!(timesteps(&config, Spacing::Leading, 8, true)[..2], [876.0, 751.0]);
        assert_eq!(multistep_timesteps(&config, Spacing::Leading, 8)[..2], [889.0, 778.0]);
    }

    #[test]
    fn a_sigma_leads_back_to_its_timestep() {
        let all = all_sigmas(&ScheduleConfig::stable_diffusion(Prediction::Epsilon));
        for timestep in [0.0, 1.0, 500.0, 999.0] {
            assert!((timestep_of(&all, at(&all, timestep)) - timestep).abs() < 1e-9);
        }
    }
}
