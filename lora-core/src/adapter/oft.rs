//! OFT and BOFT: `W' = R · W` with orthogonal block-diagonal or butterfly `R`.
//!
//! Qiu et al. 2023 (arXiv 2306.07280, §3) and Liu et al. 2023 (arXiv 2311.06243, §4). `R` comes from skew matrices `Q`
//! through the Cayley transform. sd-scripts and LyCORIS turn groups of rows, peft turns groups of input columns. The
//! strength moves every block along the straight line from the identity to `R`, as LyCORIS does. ΔW depends on `W`: the
//! order of adapters matters.

use super::{Adapter, Axis, Part, shape};
use crate::{AdapterConfig, Array, Backend, Draw, Error, Result};

/// Block-diagonal orthogonal finetuning.
#[derive(Debug, Clone)]
pub struct Oft<T> {
    /// Rows: `[blocks, b, b]`, `Q = S − Sᵀ`. Columns: `[blocks, b(b−1)/2]`, the upper triangle of `Q`, row by row.
    pub blocks: T,
    /// What every row is multiplied by at the end, whatever the strength; `[out]` with any unit axes.
    pub rescale: Option<T>,
    /// What is turned, and how `R` is made.
    pub side: OftSide,
}

/// Which axis of the weight an [`Oft`] turns.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum OftSide {
    /// Groups of rows, `W'_k = R_kᵀ · W_k` (sd-scripts, LyCORIS).
    Rows {
        /// Largest Frobenius norm of `Q` over all blocks (`alpha · out` of the files). 0 means no turn at all, which is
        /// how sd-scripts reads it; LyCORIS reads 0 as `None`.
        bound: Option<f64>,
    },
    /// Groups of input columns, `W' = W · blockdiag(R)ᵀ` (peft); one block may serve all groups.
    Columns(Cayley),
}

/// How peft makes `R` from `Q`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cayley {
    /// `R = (I − Q)(I + Q)⁻¹`.
    Exact,
    /// `R = I + 2Q + 2Q² + … + Qᵗ⁻¹` with that many terms. It turns in the opposite direction of the exact form.
    Neumann(usize),
}

/// Butterfly orthogonal finetuning: several block-diagonal stages over shuffled rows.
#[derive(Debug, Clone)]
pub struct Boft<T> {
    /// `[stages, blocks, b, b]`, `Q = S − Sᵀ`.
    pub blocks: T,
    /// What every row is multiplied by at the end, whatever the strength; `[out]` with any unit axes.
    pub rescale: Option<T>,
    /// Largest Frobenius norm of `Q` over all stages and blocks.
    pub bound: Option<f64>,
}

impl<T> Oft<T> {
    pub(super) fn map<U>(&self, change: &mut dyn FnMut(Part, &T) -> Result<U>) -> Result<Oft<U>> {
        Ok(Oft {
            blocks: change(Part::OftBlocks, &self.blocks)?,
            rescale: self.rescale.as_ref().map(|rescale| change(Part::Rescale, rescale)).transpose()?,
            side: self.side,
        })
    }
}

impl<T> Boft<T> {
    pub(super) fn map<U>(&self, change: &mut dyn FnMut(Part, &T) -> Result<U>) -> Result<Boft<U>> {
        Ok(Boft {
            blocks: change(Part::OftBlocks, &self.blocks)?,
            rescale: self.rescale.as_ref().map(|rescale| change(Part::Rescale, rescale)).transpose()?,
            bound: self.bound,
        })
    }
}

impl<B: Backend> Adapter<B> for Oft<B::Tensor> {
    /// Not trained here.
    fn init(_on: &B, _base: &B::Tensor, _config: &AdapterConfig, _draw: &mut Draw) -> Result<Self> {
        Err(super::init::not_trained("OFT"))
    }

    fn scale(&self) -> f64 {
        1.0
    }

    fn delta(&self, on: &B, base: &B::Tensor) -> Result<B::Tensor> {
        self.change(on, base, 1.0)
    }

    fn change(&self, on: &B, base: &B::Tensor, strength: f64) -> Result<B::Tensor> {
        let turned = match self.side {
            OftSide::Rows { bound } => {
                let [blocks, size] = square_blocks(on, &self.blocks)?;
                let turn = on.permute(&turn_of_rows(on, &self.blocks, bound)?, &[0, 2, 1])?; // (R − I)ᵀ
                let rows =
                    on.reshape(&shape::flat(on, base)?, &[blocks, size, elements(on, base) / (blocks * size)])?;
                on.matmul(&turn, &rows)?
            }
            OftSide::Columns(cayley) => turn_columns(on, &self.blocks, cayley, base)?,
        };
        let change = on.scale(&on.reshape(&turned, &on.shape(base))?, strength)?;
        rescaled(on, base, change, self.rescale.as_ref())
    }

    fn factors(&self) -> Vec<(Part, &B::Tensor)> {
        let blocks = [(Part::OftBlocks, &self.blocks)].into_iter();
        blocks.chain(self.rescale.iter().map(|rescale| (Part::Rescale, rescale))).collect()
    }
}

impl<B: Backend> Adapter<B> for Boft<B::Tensor> {
    /// Not trained here.
    fn init(_on: &B, _base: &B::Tensor, _config: &AdapterConfig, _draw: &mut Draw) -> Result<Self> {
        Err(super::init::not_trained("BOFT"))
    }

    fn scale(&self) -> f64 {
        1.0
    }

    fn delta(&self, on: &B, base: &B::Tensor) -> Result<B::Tensor> {
        self.change(on, base, 1.0)
    }

    /// Stage `i` brings rows that lie `2ⁱ·b/2` apart into one block, turns the blocks and takes the rows back. The
    /// strength acts inside every stage.
    fn change(&self, on: &B, base: &B::Tensor, strength: f64) -> Result<B::Tensor> {
        let shape = on.shape(&self.blocks);
        let &[stages, blocks, size, width] = &shape[..] else {
            return Err(Error::Shapes { operation: "BOFT blocks", shapes: vec![shape] });
        };
        let out = on.shape(base).first().copied().unwrap_or(0);
        if !is_butterfly([stages, blocks, size, width], out) {
            return Err(Error::Shapes { operation: "BOFT blocks", shapes: vec![shape, on.shape(base)] });
        }
        let columns = elements(on, base) / out;
        let all = on.reshape(&self.blocks, &[stages * blocks, size, size])?;
        let turns = on.scale(&turn_of_rows(on, &all, self.bound)?, strength)?;
        let mut rows = on.reshape(base, &[out, columns])?;
        for stage in 0..stages {
            let step = (size / 2) << stage;
            let pairs = out / (2 * step);
            let near = on.permute(&on.reshape(&rows, &[pairs, 2, step, columns])?, &[0, 2, 1, 3])?;
            let near = on.reshape(&near, &[blocks, size, columns])?;
            let turn = on.narrow(&turns, 0, stage * blocks, blocks)?;
            let near = on.add(&near, &on.matmul(&turn, &near)?)?;
            let back = on.permute(&on.reshape(&near, &[pairs, step, 2, columns])?, &[0, 2, 1, 3])?;
            rows = on.reshape(&back, &[out, columns])?;
        }
        let change = on.sub(&on.reshape(&rows, &on.shape(base))?, base)?;
        rescaled(on, base, change, self.rescale.as_ref())
    }

    fn factors(&self) -> Vec<(Part, &B::Tensor)> {
        let blocks = [(Part::OftBlocks, &self.blocks)].into_iter();
        blocks.chain(self.rescale.iter().map(|rescale| (Part::Rescale, rescale))).collect()
    }
}

/// `R − I` of blocks `[n, b, b]`: `Q = S − Sᵀ`, shrunk to `bound`, `R = (I + Q)(I − Q)⁻¹`.
///
/// `R − I = 2Q(I − Q)⁻¹`, which loses no digits to the identity.
fn turn_of_rows<B: Backend>(on: &B, blocks: &B::Tensor, bound: Option<f64>) -> Result<B::Tensor> {
    let [count, size] = square_blocks(on, blocks)?;
    let mut skew = on.sub(blocks, &on.permute(blocks, &[0, 2, 1])?)?;
    if let Some(bound) = bound {
        let norm = on.values(&on.norm(&skew, &[0, 1, 2])?)?.first().copied().map_or(0.0, f64::from);
        if norm > bound {
            skew = on.scale(&skew, bound / norm)?;
        }
    }
    let identity = identities(on, count, size)?;
    on.solve(&on.sub(&identity, &skew)?, &on.scale(&skew, 2.0)?)
}

/// `W · blockdiag(R − I)ᵀ` as `[out, in·kh·kw]`.
fn turn_columns<B: Backend>(on: &B, packed: &B::Tensor, cayley: Cayley, base: &B::Tensor) -> Result<B::Tensor> {
    let (shape, base_shape) = (on.shape(packed), on.shape(base));
    let misfit = || Error::Shapes { operation: "OFT blocks", shapes: vec![shape.clone(), base_shape.clone()] };
    let &[count, triangle] = &shape[..] else {
        return Err(misfit());
    };
    let size = block_size(triangle).ok_or_else(misfit)?;
    let out = base_shape.first().copied().filter(|out| *out > 0).ok_or_else(misfit)?;
    let columns = elements(on, base) / out;
    if count.checked_mul(size) != Some(columns) && !(count == 1 && columns.is_multiple_of(size)) {
        return Err(misfit());
    }
    let skew = unpacked(on, packed, count, size)?;
    let turn = match cayley {
        // R − I = −2Q(I + Q)⁻¹
        Cayley::Exact => on.solve(&on.add(&identities(on, count, size)?, &skew)?, &on.scale(&skew, -2.0)?)?,
        Cayley::Neumann(terms) => neumann(on, &skew, terms)?,
    };
    let turn = on.permute(&turn, &[0, 2, 1])?;
    let groups = columns / size;
    if count == 1 {
        let rows = on.reshape(base, &[1, out * groups, size])?;
        return on.reshape(&on.matmul(&rows, &turn)?, &[out, columns]);
    }
    let rows = on.permute(&on.reshape(base, &[out, groups, size])?, &[1, 0, 2])?; // [groups, out, b]
    let turned = on.permute(&on.matmul(&rows, &turn)?, &[1, 0, 2])?; // [out, groups, b]
    on.reshape(&turned, &[out, columns])
}

/// `2Q + 2Q² + … + Qᵗ⁻¹`: the Neumann series of the Cayley transform without its identity, cut off as peft does.
///
/// peft adds the last power once; below four terms its loop still ends with a cube.
fn neumann<B: Backend>(on: &B, skew: &B::Tensor, terms: usize) -> Result<B::Tensor> {
    match terms {
        0 | 1 => return on.scale(skew, 0.0),
        2 => return on.scale(skew, 2.0),
        _ => {}
    }
    let mut power = on.share(skew)?;
    let mut sum = on.scale(skew, 2.0)?;
    let last = terms.max(4) - 1;
    for exponent in 2..=last {
        power = on.matmul(&power, skew)?;
        sum = on.add(&sum, &on.scale(&power, if exponent == last { 1.0 } else { 2.0 })?)?;
    }
    Ok(sum)
}

/// Skew matrices `[n, b, b]` from their upper triangles, row by row, `[n, b(b−1)/2]`.
///
/// Cut and joined: a product with a matrix that scatters would hold `b⁴/2` numbers, 137 GB for blocks of 512.
fn unpacked<B: Backend>(on: &B, packed: &B::Tensor, count: usize, size: usize) -> Result<B::Tensor> {
    let mut pieces = Vec::with_capacity(2 * size);
    let mut start = 0;
    for row in 0..size {
        pieces.push(on.tensor(&vec![0.0; count * (row + 1)], &[count, row + 1])?);
        let length = size - row - 1;
        if length > 0 {
            pieces.push(on.narrow(packed, 1, start, length)?);
        }
        start += length;
    }
    let upper = on.reshape(&on.concat(&pieces, 1)?, &[count, size, size])?;
    on.sub(&upper, &on.permute(&upper, &[0, 2, 1])?)
}

/// Whether blocks `[stages, n, b, b]` turn `out` rows: `b` is even, `n·b` is `out`, and the widest stage divides it.
pub(crate) fn is_butterfly([stages, blocks, size, width]: [usize; 4], out: usize) -> bool {
    let tiles =
        size == width && size >= 2 && size.is_multiple_of(2) && blocks.checked_mul(size) == Some(out) && out > 0;
    // Rows of the last stage lie `2^(stages − 1)·b/2` apart.
    let widest = || 1_usize.checked_shl(u32::try_from(stages).ok()?.checked_sub(1)?)?.checked_mul(size);
    tiles && widest().is_some_and(|widest| out.is_multiple_of(widest))
}

/// The `b` whose upper triangle `b(b−1)/2` has this many numbers.
pub(crate) fn block_size(triangle: usize) -> Option<usize> {
    let size = usize::midpoint(1, triangle.checked_mul(8)?.checked_add(1)?.isqrt());
    (size * (size - 1) / 2 == triangle).then_some(size)
}

/// `rescale ⊙ (W + change) − W`.
fn rescaled<B: Backend>(on: &B, base: &B::Tensor, change: B::Tensor, rescale: Option<&B::Tensor>) -> Result<B::Tensor> {
    let Some(rescale) = rescale else {
        return Ok(change);
    };
    let rescale = Axis::Output.over_weight(on, rescale, base)?;
    on.sub(&on.mul(&on.add(base, &change)?, &rescale)?, base)
}

/// `count` identity matrices, `[count, n, n]`.
fn identities<B: Backend>(on: &B, count: usize, n: usize) -> Result<B::Tensor> {
    on.tensor(&Array::identity(n).values.repeat(count), &[count, n, n])
}

fn square_blocks<B: Backend>(on: &B, blocks: &B::Tensor) -> Result<[usize; 2]> {
    let shape = on.shape(blocks);
    match shape[..] {
        [count, size, width] if size == width && count > 0 && size > 0 => Ok([count, size]),
        _ => Err(Error::Shapes { operation: "OFT blocks", shapes: vec![shape] }),
    }
}

fn elements<B: Backend>(on: &B, tensor: &B::Tensor) -> usize {
    on.shape(tensor).iter().product()
}
