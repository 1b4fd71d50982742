//! The loss of pictures under fixed noise, so that two measurements differ by the weights alone.

use lora_torch::Model as _;
use tch::Device;

use super::{DiffusionObjective, TrainingSet};
use crate::Result;

/// So many timesteps of `0..total`, each in the middle of its share.
pub fn spread(count: usize, total: usize) -> Vec<usize> {
    (0..count).map(|at| (2 * at + 1) * total / (2 * count)).collect()
}

/// The mean loss of some pictures of the objective's set at each of `timesteps`, without gradients, as
/// [`TrainingSet::fixed`] shows them; `done` is called for each picture and timestep.
///
/// # Errors
/// If there is no such picture, or memory runs out.
pub fn evaluate(
    objective: &DiffusionObjective<TrainingSet>,
    pictures: &[usize],
    timesteps: &[usize],
    device: Device,
    done: &mut dyn FnMut(),
) -> Result<Vec<f64>> {
    let _no_grad = tch::no_grad_guard();
    let mut means = vec![0.0; timesteps.len()];
    for picture in pictures {
        for (mean, timestep) in means.iter_mut().zip(timesteps) {
            let inputs = objective.inputs(&[objective.source().fixed(*picture, *timestep)?])?;
            let inputs = inputs.iter().map(|input| Ok(input.f_to_device(device)?)).collect::<Result<Vec<_>>>()?;
            *mean += objective.loss(&inputs)?.f_double_value(&[])? / pictures.len() as f64;
            done();
        }
    }
    Ok(means)
}

#[cfg(test)]
mod tests {
    use super::spread;

    #[test]
    fn timesteps_lie_in_the_middle_of_their_shares() {
        assert_eq!(spread(4, 1000), [125, 375, 625, 875]);
        assert_eq!(spread(1, 1000), [500]);
    }
}
