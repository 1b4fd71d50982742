//! All trained factors as one flat 32-bit tensor, so that a step has one gradient, one norm and one optimizer call.
//!
//! Each factor is a piece of the flat leaf, padded to [`ALIGNMENT`] elements, so that its view starts at a 16-byte
//! boundary in every kind. Pieces of one group (one learning rate) lie together. Once per step the leaf is cast to the
//! compute kind and split in one operation, whose backward pass is one concatenation; a `narrow` per factor would cost
//! a zero-filled leaf each.
//!
//! A tall matrix (`B`, `[out, rank]`) is kept turned over, so that the products of its backward pass have few rows instead
//! of few columns: on a CPU 0.17 ms instead of 0.75 ms for `[1024, 320] → 320` of rank 8. cuBLAS takes either.

use lora_core::Backend;
use tch::{Device, Kind, Tensor};

use crate::{
    Error, Result, Torch,
    backend::{copied, signed},
};

/// Pieces start at multiples of this many elements: 16 bytes of bf16, what tensor cores and vector loads want.
pub const ALIGNMENT: usize = 8;

/// The flat leaf and where each factor lies in it.
#[derive(Debug)]
pub struct Arena {
    leaf: Tensor,
    pieces: Vec<Piece>,
    groups: Vec<Group>,
    /// Lengths along the leaf: for each piece in layout order its elements, then its padding if it has any.
    lengths: Vec<i64>,
}

/// One factor's place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// The factor's shape.
    pub shape: Vec<usize>,
    /// The group whose learning rate it has.
    pub group: usize,
    /// First element.
    pub offset: usize,
    /// Whether it is a matrix, or a 1×1 kernel, that is kept turned over.
    transposed: bool,
    /// Which of the chunks that the leaf is split into.
    chunk: usize,
}

/// The elements of one learning rate: a contiguous range of the leaf.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Group {
    /// First element.
    pub offset: usize,
    /// Elements, padding included.
    pub length: usize,
}

impl Piece {
    /// Number of elements without padding.
    pub fn length(&self) -> usize {
        self.shape.iter().product()
    }

    /// The shape in which its elements lie in the flat tensors.
    pub(crate) fn stored_shape(&self) -> Vec<usize> {
        let mut shape = self.shape.clone();
        if self.transposed {
            shape.swap(0, 1);
        }
        shape
    }
}

impl Arena {
    /// An arena that starts with the values of `factors`, each with its group; group numbers run from 0 without gaps.
    ///
    /// # Errors
    /// If there is no factor, or a group has none.
    pub fn new(device: Device, factors: &[(&Tensor, usize)]) -> Result<Self> {
        let _no_grad = tch::no_grad_guard();
        let count = factors.iter().map(|(_, group)| group + 1).max().unwrap_or(0);
        let mut pieces: Vec<Option<Piece>> = vec![None; factors.len()];
        let (mut groups, mut lengths, mut values, mut offset) = (Vec::new(), Vec::new(), Vec::new(), 0);
        for group in 0..count {
            let start = offset;
            for (index, (factor, _)) in factors.iter().enumerate().filter(|(_, (_, of))| *of == group) {
                let shape = Torch::CPU.shape(factor);
                let transposed = matches!(shape[..], [rows, columns] | [rows, columns, 1, 1] if rows > columns);
                let piece = Piece { shape, group, offset, transposed, chunk: lengths.len() };
                let (length, padded) = (piece.length(), piece.length().next_multiple_of(ALIGNMENT));
                pieces[index] = Some(piece);
                let on_device = factor.f_detach()?.f_to_device(device)?.f_to_kind(Kind::Float)?;
                let stored = if transposed { on_device.f_transpose(0, 1)? } else { on_device };
                values.push(stored.f_reshape([-1])?);
                lengths.push(length as i64);
                if padded > length {
                    values.push(Tensor::f_zeros([(padded - length) as i64], (Kind::Float, device))?);
                    lengths.push((padded - length) as i64);
                }
                offset += padded;
            }
            groups.push(Group { offset: start, length: offset - start });
        }
        if offset == 0 || groups.iter().any(|group| group.length == 0) {
            return Err(Error::Config { option: "targets", reason: "nothing to train".to_owned() });
        }
        // A concatenation of one tensor may be that tensor; the leaf must not share memory with what it was made of.
        let leaf = copied(&Tensor::f_cat(&values, 0)?)?.f_set_requires_grad(true)?;
        Ok(Self { leaf, pieces: pieces.into_iter().flatten().collect(), groups, lengths })
    }

    /// Another handle of the same leaf, for another thread: what is written through one is seen through both.
    pub fn share(&self) -> Self {
        Self {
            leaf: self.leaf.shallow_clone(),
            pieces: self.pieces.clone(),
            groups: self.groups.clone(),
            lengths: self.lengths.clone(),
        }
    }

    /// All factors, in the order in which they were given, as differentiable views in `kind`.
    ///
    /// The cast, the split and the views are the whole cost; their backward pass ends in the leaf.
    pub fn views(&self, kind: Kind) -> Result<Vec<Tensor>> {
        self.split(&self.leaf.f_to_kind(kind)?)
    }

    /// The gradient of `loss` with respect to the leaf, flat; the graph is freed.
    pub fn gradient(&self, loss: &Tensor) -> Result<Tensor> {
        let mut gradients = Tensor::f_run_backward(&[loss], &[&self.leaf], false, false)?;
        gradients.pop().ok_or_else(|| Error::Torch { message: "the loss has no gradient".to_owned() })
    }

    /// The parts of `flat`, which is laid out as the leaf, as views shaped like the factors, in the order of those.
    pub fn split(&self, flat: &Tensor) -> Result<Vec<Tensor>> {
        let chunks = flat.f_split_with_sizes(&self.lengths, 0)?;
        let part = |piece: &Piece| {
            let stored = chunks[piece.chunk].f_view(signed(&piece.stored_shape()).as_slice())?;
            Ok(if piece.transposed { stored.f_transpose(0, 1)? } else { stored })
        };
        self.pieces.iter().map(part).collect()
    }

    /// The flat values, cut off from gradients; writing to them writes to the leaf.
    pub fn values(&self) -> Result<Tensor> {
        Ok(self.leaf.f_detach()?)
    }

    /// A flat tensor of zeros with the leaf's layout.
    pub fn zeros(&self) -> Result<Tensor> {
        Ok(self.leaf.f_detach()?.f_zeros_like()?)
    }

    /// The factors' places, in the order in which they were given.
    pub fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    /// The learning-rate groups, in order.
    pub fn groups(&self) -> &[Group] {
        &self.groups
    }

    /// How many numbers are trained, padding not counted.
    pub fn trainable(&self) -> usize {
        self.pieces.iter().map(Piece::length).sum()
    }

    /// Where the leaf lives.
    pub fn device(&self) -> Device {
        self.leaf.device()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn factor(shape: &[i64], first: f64) -> Tensor {
        let count: i64 = shape.iter().product();
        let values = Tensor::f_arange_start(first, first + count as f64, (Kind::Float, Device::Cpu)).unwrap();
        values.f_view(shape).unwrap()
    }

    #[test]
    fn views_hold_the_factors_and_start_at_aligned_places() {
        let factors = [factor(&[5, 3], 0.0), factor(&[2, 4], 100.0), factor(&[7], 200.0), factor(&[4, 2, 1, 1], 300.0)];
        let given = [(&factors[0], 1), (&factors[1], 0), (&factors[2], 1), (&factors[3], 1)];
        let arena = Arena::new(Device::Cpu, &given).unwrap();
        assert!(arena.pieces().iter().all(|piece| piece.offset % ALIGNMENT == 0));
        assert_eq!(arena.groups(), [Group { offset: 0, length: 8 }, Group { offset: 8, length: 32 }]);
        assert_eq!(arena.trainable(), 15 + 8 + 7 + 8);
        for (view, factor) in arena.views(Kind::Float).unwrap().iter().zip(&factors) {
            assert_eq!(view, factor);
        }
        let tall = arena.views(Kind::Float).unwrap()[0].stride();
        assert_eq!(tall, [1, 5]);
    }

    #[test]
    fn one_backward_pass_gives_every_factors_gradient_in_its_place() {
        let factors = [factor(&[3, 3], 1.0), factor(&[2, 4], 2.0)];
        let arena = Arena::new(Device::Cpu, &[(&factors[0], 0), (&factors[1], 0)]).unwrap();
        let views = arena.views(Kind::Float).unwrap();
        let loss = views[0].f_square().unwrap().f_sum(None).unwrap(); // the second factor takes no part
        let gradient = arena.split(&arena.gradient(&loss).unwrap()).unwrap();
        assert_eq!(gradient[0], factors[0].f_mul_scalar(2.0).unwrap());
        assert_eq!(gradient[1], factors[1].f_zeros_like().unwrap());
    }

    #[test]
    fn the_leaf_is_a_copy() {
        let factor = factor(&[8], 0.0);
        let arena = Arena::new(Device::Cpu, &[(&factor, 0)]).unwrap();
        let _no_grad = tch::no_grad_guard();
        let _ = arena.values().unwrap().f_fill_(5.0).unwrap();
        assert_eq!(arena.views(Kind::Float).unwrap()[0].f_sum(None).unwrap().double_value(&[]), 40.0);
        assert_eq!(factor.f_sum(None).unwrap().double_value(&[]), 28.0);
    }
}
