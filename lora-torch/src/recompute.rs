//! Gradients in pieces: what would be kept for the backward pass is thrown away and computed again.
//!
//! Chen et al. 2016, "Training deep nets with sublinear memory cost" (arXiv 1604.06174), with one segment a stage. libtorch
//! offers no way to say this from here, so it is done by hand: a stage is run once without a graph, and later, when the
//! gradient of its output is known, once more with one, whose backward pass ends in the stage's input and in the adapters
//! on it. The result is a scalar like any other: [`carrying`] gives it the value and the gradients that were found, so that
//! whoever asked for a loss need not know. Nothing here waits for a device.

use tch::{Kind, Tensor};

use crate::{Projection, Result};

/// A part of a model that can be run again.
pub trait Stage {
    /// `x` → what the next stage reads. A function of `x` and of the adapters on [`projections`](Self::projections).
    fn forward(&self, x: &Tensor) -> Result<Tensor>;

    /// The layers in it that may carry adapters.
    fn projections(&self) -> Vec<&Projection>;
}

/// The loss of `x` after all stages, a scalar with gradients in the adapters and, if it asks for one, in `x`, for the memory
/// of one stage at a time.
///
/// `loss` makes a 32-bit scalar of the last stage's output; the layers in it are `last`.
///
/// # Errors
/// Those of stages and loss.
pub fn recomputed<S: Stage>(
    x: &Tensor,
    stages: &[S],
    loss: impl FnOnce(&Tensor) -> Result<Tensor>,
    last: &[&Projection],
) -> Result<Tensor> {
    let mut inputs = Vec::with_capacity(stages.len());
    let mut output = x.f_detach()?;
    {
        let _no_grad = tch::no_grad_guard();
        for stage in stages {
            let next = stage.forward(&output)?;
            inputs.push(std::mem::replace(&mut output, next));
        }
    }
    let output = output.f_detach()?.f_set_requires_grad(true)?;
    let loss = loss(&output)?;
    let mut found = Vec::new();
    let mut slope = gradients(&loss, Some(&output), last, &mut found)?;
    drop(output);
    for (index, stage) in stages.iter().enumerate().rev() {
        let is_asked = index > 0 || x.requires_grad();
        let input = inputs.pop().map(|input| input.f_detach()?.f_set_requires_grad(is_asked)).transpose()?;
        let (Some(input), Some(known)) = (input, slope.take()) else { break };
        // The gradient of ⟨output, slope⟩ is what the slope becomes on its way back.
        let product = stage.forward(&input)?.f_mul(&known)?.f_sum(None)?;
        drop(known);
        slope = gradients(&product, Some(&input).filter(|_| is_asked), &stage.projections(), &mut found)?;
    }
    if let Some(slope) = slope.filter(|_| x.requires_grad()) {
        found.push((x.shallow_clone(), slope));
    }
    carrying(&loss, &found)
}

/// The value of `value`, a scalar, with the given gradient for each tensor, whatever made them.
///
/// # Errors
/// If a gradient is shaped otherwise than its tensor.
pub fn carrying(value: &Tensor, gradients: &[(Tensor, Tensor)]) -> Result<Tensor> {
    let value = value.f_detach()?;
    if gradients.is_empty() {
        return Ok(value);
    }
    let flat = |parts: Vec<&Tensor>| -> Result<Tensor> {
        let parts = parts.into_iter().map(|part| Ok(part.f_reshape([-1])?)).collect::<Result<Vec<_>>>()?;
        // In 16 bits a long sum could overflow, and infinity less infinity is not 0.
        Ok(Tensor::f_cat(&parts, 0)?.f_to_kind(Kind::Float)?)
    };
    let tensors = flat(gradients.iter().map(|(tensor, _)| tensor).collect())?;
    let slopes = flat(gradients.iter().map(|(_, slope)| slope).collect())?.f_detach()?;
    let product = tensors.f_dot(&slopes)?;
    Ok(value.f_add(&product.f_sub(&product.f_detach()?)?)?)
}

/// Runs a backward pass that ends in `input`, whose gradient it returns, and in the adapters of `projections`, whose
/// gradients it adds to `found`.
fn gradients(
    scalar: &Tensor,
    input: Option<&Tensor>,
    projections: &[&Projection],
    found: &mut Vec<(Tensor, Tensor)>,
) -> Result<Option<Tensor>> {
    let mut leaves: Vec<Tensor> = Vec::new();
    for projection in projections {
        leaves.extend(projection.leaves()?);
    }
    let mut asked: Vec<&Tensor> = leaves.iter().collect();
    asked.extend(input);
    if asked.is_empty() || !scalar.requires_grad() {
        return Ok(None);
    }
    let mut slopes = Tensor::f_run_backward(&[scalar], &asked, false, false)?;
    let of_input = if input.is_some() { slopes.pop() } else { None };
    found.extend(leaves.into_iter().zip(slopes));
    Ok(of_input)
}

#[cfg(test)]
mod tests {
    use lora_core::{AnyAdapter, Draw, Geometry, Purpose, adapter::Lora};

    use super::*;
    use crate::random;

    struct Curved(Projection);

    impl Stage for Curved {
        fn forward(&self, x: &Tensor) -> Result<Tensor> {
            Ok(self.0.forward(x)?.f_tanh()?)
        }

        fn projections(&self) -> Vec<&Projection> {
            vec![&self.0]
        }
    }

    fn drawn(sample: u32, shape: &[usize]) -> Tensor {
        random::normal(&mut Draw::new(3, Purpose::Init, 1, sample), shape).unwrap()
    }

    #[test]
    fn gradients_in_pieces_equal_those_of_one_pass() {
        let leaves: Vec<Tensor> = (0..4).map(|i| drawn(i, &[9]).f_set_requires_grad(true).unwrap()).collect();
        let stages: Vec<Curved> = (0..2)
            .map(|stage| {
                let mut layer = Projection::new("p", drawn(10 + stage, &[3, 3]), None, Geometry::Linear).unwrap();
                let part = |at: u32| leaves[(2 * stage + at) as usize].f_view([3, 3]).unwrap();
                layer.set_trained(Some(AnyAdapter::Lora(Lora::new(part(0), part(1), 0.7))));
                Curved(layer)
            })
            .collect();
        let first = drawn(20, &[15]).f_set_requires_grad(true).unwrap();
        let x = first.view([5, 3]);
        let leaves: Vec<Tensor> = leaves.into_iter().chain([first]).collect();
        let loss = |y: &Tensor| Ok(y.f_square()?.f_mean(Kind::Float)?);
        let plain = stages.iter().fold(x.shallow_clone(), |x, stage| stage.forward(&x).unwrap());
        let plain = loss(&plain).unwrap();
        let pieces = recomputed(&x, &stages, loss, &[]).unwrap();
        assert_eq!(pieces.double_value(&[]), plain.double_value(&[]));
        let expected = Tensor::f_run_backward(&[plain], &leaves, false, false).unwrap();
        let actual = Tensor::f_run_backward(&[pieces], &leaves, false, false).unwrap();
        for (actual, expected) in actual.iter().zip(&expected) {
            assert!(expected.abs().max().double_value(&[]) > 1e-3);
            assert!((actual - expected).abs().max().double_value(&[]) < 1e-6);
        }
    }
}
