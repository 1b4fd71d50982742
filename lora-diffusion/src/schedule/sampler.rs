//! Samplers: from noise to a latent in few calls of the network.
//!
//! A [`Sampler`] says which timesteps the network is called with and turns each output into the next latent. It knows
//! neither the network nor guidance. Coefficients are f64 on the host, latents f32 on the device. One file a family; all of
//! them agree with the scheduler of the same name in diffusers 0.42.1.

mod ddim;
mod dpm;
mod euler;
mod ladder;
mod lcm;
mod pndm;
mod unipc;

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use tch::Tensor;

use super::{Prediction, ScheduleConfig};
use crate::{Error, Result};

/// The samplers by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SamplerKind {
    /// Song et al. 2020 (arXiv 2010.02502), without noise.
    #[default]
    Ddim,
    /// Karras et al. 2022 (arXiv 2206.00364), algorithm 2 without churn and correction.
    Euler,
    /// Euler with fresh noise after every step.
    EulerAncestral,
    /// DPM-Solver++(2M), Lu et al. 2022 (arXiv 2211.01095), algorithm 2.
    #[serde(rename = "dpmpp-2m")]
    DpmPp2m,
    /// The same over the sigmas of Karras et al. 2022, eq. 5.
    #[serde(rename = "dpmpp-2m-karras")]
    DpmPp2mKarras,
    /// Pseudo linear multistep, Liu et al. 2022 (arXiv 2202.09778), without the Runge-Kutta start.
    Pndm,
    /// Latent consistency models, Luo et al. 2023 (arXiv 2310.04378); needs a base or adapter distilled for it.
    Lcm,
    /// UniPC of order 2, Zhao et al. 2023 (arXiv 2302.04867).
    Unipc,
}

impl SamplerKind {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Ddim,
        Self::Euler,
        Self::EulerAncestral,
        Self::DpmPp2m,
        Self::DpmPp2mKarras,
        Self::Pndm,
        Self::Lcm,
        Self::Unipc,
    ];

    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ddim => "ddim",
            Self::Euler => "euler",
            Self::EulerAncestral => "euler-ancestral",
            Self::DpmPp2m => "dpmpp-2m",
            Self::DpmPp2mKarras => "dpmpp-2m-karras",
            Self::Pndm => "pndm",
            Self::Lcm => "lcm",
            Self::Unipc => "unipc",
        }
    }
}

impl fmt::Display for SamplerKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for SamplerKind {
    type Err = Error;

    /// Reads a name; underscores count as hyphens.
    fn from_str(name: &str) -> Result<Self> {
        let plain = name.replace('_', "-");
        Self::ALL.into_iter().find(|kind| kind.name() == plain).ok_or_else(|| Error::Request {
            option: "--sampler",
            reason: format!("`{name}` is none of {}", Self::ALL.map(Self::name).join(", ")),
        })
    }
}

/// One run from noise to latent.
///
/// ```
/// use lora_diffusion::schedule::{Prediction, ScheduleConfig, sampler::{Sampler, SamplerKind}};
///
/// let config = ScheduleConfig::stable_diffusion(Prediction::Epsilon);
/// let sampler = Sampler::new(SamplerKind::Ddim, &config, 4)?;
/// assert_eq!(sampler.timesteps(), [751.0, 501.0, 251.0, 1.0]);
/// # Ok::<(), lora_diffusion::Error>(())
/// ```
#[derive(Debug)]
pub struct Sampler {
    plan: Plan,
    solver: Box<dyn Solver>,
}

impl Sampler {
    /// Plans a run of `steps` steps.
    ///
    /// # Errors
    /// If there are no steps or more than the schedule can give, or if the network predicts noise where the schedule leaves
    /// nothing else (zero terminal SNR needs velocity prediction).
    pub fn new(kind: SamplerKind, config: &ScheduleConfig, steps: usize) -> Result<Self> {
        if steps == 0 || steps > config.num_train_timesteps {
            let most = config.num_train_timesteps;
            return Err(Error::Sampler {
                sampler: kind.name(),
                reason: format!("{steps} steps asked for, expected 1 to {most}"),
            });
        }
        let (plan, solver) = match kind {
            SamplerKind::Ddim => ddim::plan(config, steps)?,
            SamplerKind::Euler => euler::plan(config, steps, false)?,
            SamplerKind::EulerAncestral => euler::plan(config, steps, true)?,
            SamplerKind::DpmPp2m => dpm::plan(config, steps, config.use_karras_sigmas)?,
            SamplerKind::DpmPp2mKarras => dpm::plan(config, steps, true)?,
            SamplerKind::Pndm => pndm::plan(config, steps)?,
            SamplerKind::Lcm => lcm::plan(config, steps)?,
            SamplerKind::Unipc => unipc::plan(config, steps)?,
        };
        Ok(Self { plan, solver })
    }

    /// What the network is called with, in order; PNDM calls once more than it has steps.
    pub fn timesteps(&self) -> &[f64] {
        &self.plan.timesteps
    }

    /// Noise-to-signal ratios, one a call and a last 0, of samplers that think in them.
    pub fn sigmas(&self) -> Option<&[f64]> {
        self.plan.sigmas.as_deref()
    }

    /// What the start noise is multiplied by.
    pub fn init_sigma(&self) -> f64 {
        self.plan.init_sigma
    }

    /// Whether the step after this call takes fresh noise.
    pub fn takes_noise(&self, call: usize) -> bool {
        self.solver.takes_noise(call)
    }

    /// What the network is given for the latent `x` at a call.
    pub fn scale_input(&self, call: usize, x: &Tensor) -> Result<Tensor> {
        self.solver.scale_input(call, x)
    }

    /// The next latent, from the latent `x` (not scaled) and what the network said of it.
    ///
    /// All three of one shape; calls come in order. Without `noise` none is added even where the sampler would take some.
    pub fn step(&mut self, call: usize, x: &Tensor, output: &Tensor, noise: Option<&Tensor>) -> Result<Tensor> {
        self.solver.step(call, x, output, noise)
    }
}

/// What is known before the first call.
#[derive(Debug)]
struct Plan {
    timesteps: Vec<f64>,
    sigmas: Option<Vec<f64>>,
    init_sigma: f64,
}

/// The arithmetic of one family.
trait Solver: fmt::Debug + Send {
    fn takes_noise(&self, _call: usize) -> bool {
        false
    }

    fn scale_input(&self, _call: usize, x: &Tensor) -> Result<Tensor> {
        Ok(x.shallow_clone())
    }

    fn step(&mut self, call: usize, x: &Tensor, output: &Tensor, noise: Option<&Tensor>) -> Result<Tensor>;
}

/// The sum of `factor · tensor`.
fn combine<const N: usize>(terms: [(f64, &Tensor); N]) -> Result<Tensor> {
    let mut sum: Option<Tensor> = None;
    for (factor, tensor) in terms {
        let term = tensor.f_mul_scalar(factor)?;
        sum = Some(match sum {
            Some(mut sum) => sum.f_add_(&term)?,
            None => term,
        });
    }
    Ok(sum.expect("a sum of at least one term"))
}

impl Prediction {
    /// The clean latent in `x = alpha · clean + sigma · noise`, from what the network said.
    fn clean(self, x: &Tensor, output: &Tensor, alpha: f64, sigma: f64) -> Result<Tensor> {
        match self {
            Self::Epsilon => combine([(alpha.recip(), x), (-sigma / alpha, output)]),
            Self::V => combine([(alpha, x), (-sigma, output)]),
        }
    }

    /// The noise in `x = alpha · clean + sigma · noise`, from what the network said.
    fn noise(self, x: &Tensor, output: &Tensor, alpha: f64, sigma: f64) -> Result<Tensor> {
        match self {
            Self::Epsilon => Ok(output.shallow_clone()),
            Self::V => combine([(alpha, output), (sigma, x)]),
        }
    }
}

/// Refuses timesteps at which nothing but noise is left, if noise is what the network predicts.
fn refuse_pure_noise(
    sampler: &'static str,
    config: &ScheduleConfig,
    alphas: impl IntoIterator<Item = f64>,
) -> Result<()> {
    let pure = alphas.into_iter().any(|alpha| alpha <= 0.0);
    if pure && config.prediction_type == Prediction::Epsilon {
        return Err(Error::Sampler {
            sampler,
            reason: "a schedule of zero terminal SNR needs a base that predicts velocity".into(),
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back() {
        for kind in SamplerKind::ALL {
            assert_eq!(kind.name().parse::<SamplerKind>().unwrap(), kind);
            assert_eq!(kind.name().replace('-', "_").parse::<SamplerKind>().unwrap(), kind);
            assert_eq!(serde_json::to_string(&kind).unwrap(), format!("\"{kind}\""));
        }
        assert!("heun".parse::<SamplerKind>().unwrap_err().to_string().contains("ddim, euler"));
    }

    #[test]
    fn every_sampler_takes_any_number_of_steps_it_promises() {
        let config = ScheduleConfig::stable_diffusion(Prediction::Epsilon);
        for kind in SamplerKind::ALL {
            for steps in [1, 2, 3, 7, 30, 50] {
                let mut sampler = Sampler::new(kind, &config, steps).unwrap();
                let mut x = Tensor::f_ones([1, 4, 2, 2], (tch::Kind::Float, tch::Device::Cpu)).unwrap();
                for call in 0..sampler.timesteps().len() {
                    let output = sampler.scale_input(call, &x).unwrap().f_mul_scalar(0.1).unwrap();
                    x = sampler.step(call, &x, &output, None).unwrap();
                }
                let total = x.f_abs().unwrap().f_sum(tch::Kind::Float).unwrap().f_double_value(&[]).unwrap();
                assert!(total.is_finite(), "{kind} in {steps} steps");
            }
            assert!(Sampler::new(kind, &config, 0).is_err());
            assert!(Sampler::new(kind, &config, 1001).is_err());
        }
    }

    #[test]
    fn noise_prediction_is_refused_where_only_noise_is_left() {
        let config = ScheduleConfig {
            rescale_betas_zero_snr: true,
            timestep_spacing: Some(super::super::Spacing::Trailing),
            ..ScheduleConfig::stable_diffusion(Prediction::Epsilon)
        };
        assert!(Sampler::new(SamplerKind::Ddim, &config, 8).unwrap_err().to_string().contains("velocity"));
        assert!(
            Sampler::new(SamplerKind::Ddim, &ScheduleConfig { prediction_type: Prediction::V, ..config }, 8).is_ok()
        );
    }
}
