//! Cross-entropy of a large vocabulary that never holds all logits.
//!
//! The logits of a chunk of positions become a loss and, in their own memory, the gradient of that loss, `softmax - 1` at the
//! label; what is kept is the gradient of the chunk's input. The idea is Liger's (Hsu et al. 2024, arXiv 2410.10989, §3.2);
//! since the head is frozen, nothing else is needed of it. A head with an adapter gets its gradients chunk by chunk, too.

use lora_torch::{Projection, recompute::carrying};
use tch::{Kind, Tensor};

use crate::Result;

/// So many logits are in memory at once: 256 MiB in 32 bits.
const LOGITS_AT_ONCE: i64 = 1 << 26;

/// `Σ weights · -log softmax(head(x))[labels]`, a 32-bit scalar with gradients in `x` and in the head's adapter.
///
/// `x` `[n, d]`, `labels` `[n]`, whole numbers, `weights` `[n]`, 32-bit.
pub(super) fn mean(head: &Projection, x: &Tensor, labels: &Tensor, weights: &Tensor) -> Result<Tensor> {
    let words = head.shape()[0];
    let rows = match (LOGITS_AT_ONCE / words.max(1)).max(1) {
        rows if rows > 128 => rows / 128 * 128,
        rows => rows,
    };
    in_chunks(head, x, labels, weights, rows)
}

fn in_chunks(head: &Projection, x: &Tensor, labels: &Tensor, weights: &Tensor, rows: i64) -> Result<Tensor> {
    let leaves = head.leaves()?;
    let differentiable = x.requires_grad() || !leaves.is_empty();
    let (input, count) = (x.f_detach()?, x.size()[0]);
    let (mut losses, mut slopes) = (Vec::new(), Vec::new());
    let mut of_leaves: Vec<Tensor> = Vec::new();
    for start in (0..count).step_by(rows.max(1) as usize) {
        let part = |tensor: &Tensor| tensor.f_narrow(0, start, rows.min(count - start));
        let (input, labels, weights) = (part(&input)?, part(labels)?.f_unsqueeze(1)?, part(weights)?.f_unsqueeze(1)?);
        if head.is_bare() || !differentiable {
            let _no_grad = tch::no_grad_guard();
            let (loss, slope) = softmax(&head.forward(&input)?, &labels, differentiable)?;
            losses.push(loss.f_mul(&weights)?);
            if let Some(slope) = slope {
                // The weights meet the narrow matrix, not the wide one.
                let slope = slope.f_to_kind(head.backend().kind)?.f_mm(&head.weight()?)?; // [rows, d]
                slopes.push(slope.f_mul(&weights)?.f_to_kind(x.f_kind()?)?);
            }
            continue;
        }
        let input = input.f_set_requires_grad(true)?;
        let logits = head.forward(&input)?; // [rows, v]
        let (loss, slope) = softmax(&logits.f_detach()?, &labels, true)?;
        losses.push(loss.f_mul(&weights)?);
        let Some(slope) = slope else { continue };
        let product = logits.f_to_kind(Kind::Float)?.f_mul(&slope.f_mul(&weights)?)?.f_sum(None)?;
        let asked: Vec<&Tensor> = std::iter::once(&input).chain(&leaves).collect();
        let mut gradients = Tensor::f_run_backward(&[product], &asked, false, false)?.into_iter();
        slopes.extend(gradients.next());
        of_leaves = match of_leaves.is_empty() {
            true => gradients.collect(),
            false => of_leaves.iter().zip(gradients).map(|(sum, new)| Ok(sum.f_add(&new)?)).collect::<Result<_>>()?,
        };
    }
    let loss = Tensor::f_cat(&losses, 0)?.f_sum(Kind::Float)?;
    let mut found: Vec<(Tensor, Tensor)> = leaves.into_iter().zip(of_leaves).collect();
    if x.requires_grad() {
        found.push((x.shallow_clone(), Tensor::f_cat(&slopes, 0)?));
    }
    Ok(carrying(&loss, &found)?)
}

/// The losses of some logits, `[rows, 1]`, and their gradient, `[rows, v]`, in 32 bits; labels are `[rows, 1]`.
fn softmax(logits: &Tensor, labels: &Tensor, differentiable: bool) -> Result<(Tensor, Option<Tensor>)> {
    let mut log = logits.f_log_softmax(-1, Kind::Float)?; // [rows, v]
    let loss = log.f_gather(1, labels, false)?.f_neg()?; // [rows, 1]
    if !differentiable {
        return Ok((loss, None));
    }
    let one = loss.f_full_like(-1.0)?;
    let _ = log.f_exp_()?.f_scatter_add_(1, labels, &one)?;
    Ok((loss, Some(log)))
}

#[cfg(test)]
mod tests {
    use lora_core::{AnyAdapter, Draw, Geometry, Purpose, adapter::Lora};
    use lora_torch::random;
    use tch::Reduction;

    use super::*;

    fn drawn(sample: u32, shape: &[usize]) -> Tensor {
        random::normal(&mut Draw::new(3, Purpose::Init, 1, sample), shape).unwrap()
    }

    /// Loss and gradients of `x` and of the adapter, by libtorch's own loss over all logits.
    fn check(adapted: bool) {
        let x = drawn(0, &[7, 5]).f_set_requires_grad(true).unwrap();
        let leaves = [drawn(1, &[2, 5]), drawn(2, &[11, 2])].map(|leaf| leaf.f_set_requires_grad(true).unwrap());
        let mut head = Projection::new("lm_head", drawn(3, &[11, 5]), None, Geometry::Linear).unwrap();
        if adapted {
            let lora = Lora::new(leaves[0].shallow_clone(), leaves[1].shallow_clone(), 0.7);
            head.set_trained(Some(AnyAdapter::Lora(lora)));
        }
        let labels = Tensor::from_slice(&[0i64, 3, 10, 3, 4, 9, 1]);
        let weights = Tensor::from_slice(&[0.5f32, 1.0, 0.0, 2.0, 0.25, 1.0, 3.0]);
        let each = head.forward(&x).unwrap();
        let each = each.f_cross_entropy_loss(&labels, None::<&Tensor>, Reduction::None, -100, 0.0).unwrap();
        let plain = (each * &weights).sum(Kind::Float);
        let asked: Vec<&Tensor> = std::iter::once(&x).chain(leaves.iter().filter(|_| adapted)).collect();
        let expected = Tensor::f_run_backward(&[&plain], &asked, false, false).unwrap();
        for rows in [1, 3, 7, 100] {
            let chunked = in_chunks(&head, &x, &labels, &weights, rows).unwrap();
            let error = chunked.double_value(&[]) - plain.double_value(&[]);
            assert!(error.abs() < 1e-5, "{rows}: loss differs by {error}");
            let actual = Tensor::f_run_backward(&[chunked], &asked, false, false).unwrap();
            for (actual, expected) in actual.iter().zip(&expected) {
                let error = (actual - expected).abs().max().double_value(&[]);
                assert!(error < 1e-5, "{rows}: gradient differs by {error}");
            }
        }
    }

    #[test]
    fn chunks_equal_the_whole_with_a_frozen_head() {
        check(false);
    }

    #[test]
    fn chunks_equal_the_whole_with_an_adapter_on_the_head() {
        check(true);
    }

    #[test]
    fn without_gradients_only_the_loss_is_computed() {
        let head = Projection::new("lm_head", drawn(3, &[11, 5]), None, Geometry::Linear).unwrap();
        let (labels, weights) = (Tensor::from_slice(&[1i64, 2]), Tensor::from_slice(&[1.0f32, 1.0]));
        assert!(!mean(&head, &drawn(0, &[2, 5]), &labels, &weights).unwrap().requires_grad());
    }
}
