//! One further id on the CPU, without libtorch: the decoder's arithmetic on one vector.
//!
//! What an id costs is reading every weight once. libtorch adds to that some three hundred calls and as many meetings of its
//! threads, and weights in 32 bits; here threads meet five times a layer and weights are read as they are stored. The
//! [`Decoder`](crate::Decoder) decides when this pass stands for its own, and a test holds one against the other.
//!
//! ```text
//! x ─► norm ─► q, k, v │ turn, remember, attend │ o, + │ norm ─► silu(gate)·up │ down, + │ … │ norm ─► head
//! ```
//!
//! A bar is the end of a stage, for which threads take rows of the matrices, or heads.

use std::{
    ops::Range,
    sync::{Mutex, PoisonError},
};

use lora_torch::{
    Projection,
    matvec::{add_combination, product},
    memory::Numbers,
};

use crate::{
    attention::Attention,
    mlp::Mlp,
    norm::RmsNorm,
    team::{Shared, together},
};

/// Rows are dealt out in groups that the product forms together.
const GROUP: usize = 4;

/// A frozen matrix with its bias and the low-rank adapters on it, as numbers.
#[derive(Debug)]
pub(crate) struct Matrix<'a> {
    weight: Numbers<'a>,
    bias: Option<&'a [f32]>,
    adapters: Vec<LowRank<'a>>,
    /// Numbers that go in, and rows.
    inner: usize,
    out: usize,
}

/// `factor · up · down`.
#[derive(Debug)]
struct LowRank<'a> {
    down: &'a [f32],
    up: &'a [f32],
    factor: f32,
    rank: usize,
}

impl<'a> Matrix<'a> {
    /// `None` if the layer is not on the CPU in a kind that can be read, or carries other adapters than plain LoRA.
    pub(crate) fn of(projection: &'a Projection) -> Option<Self> {
        let floats = |tensor| Numbers::of(tensor)?.floats();
        let weight = projection.stored()?;
        let &[out, inner] = weight.size().as_slice() else { return None };
        let mut adapters = Vec::new();
        for (down, up, factor) in projection.low_rank()? {
            let rank = usize::try_from(*down.size().first()?).ok()?;
            let (down, up) = (floats(down)?, floats(up)?);
            adapters.push(LowRank { down, up, factor: factor as f32, rank });
        }
        Some(Self {
            weight: Numbers::of(weight)?,
            bias: match projection.bias() {
                Some(bias) => Some(floats(bias)?),
                None => None,
            },
            adapters,
            inner: usize::try_from(inner).ok()?,
            out: usize::try_from(out).ok()?,
        })
    }

    /// Some of the outputs for `x`.
    fn rows(&self, x: &[f32], rows: Range<usize>) -> Vec<f32> {
        let mut y = vec![0.0; rows.len()];
        product(self.weight.range(rows.start * self.inner..rows.end * self.inner), x, &mut y);
        if let Some(bias) = self.bias {
            y.iter_mut().zip(&bias[rows.clone()]).for_each(|(y, bias)| *y += bias);
        }
        for LowRank { down, up, factor, rank } in &self.adapters {
            // The narrow product is formed anew for each piece of the rows: one stage fewer, for a few rows more.
            let mut narrow = vec![0.0; *rank];
            product(Numbers::F32(down), x, &mut narrow);
            let mut change = vec![0.0; rows.len()];
            product(Numbers::F32(&up[rows.start * rank..rows.end * rank]), &narrow, &mut change);
            y.iter_mut().zip(&change).for_each(|(y, change)| *y += factor * change);
        }
        y
    }
}

/// The weight of a root-mean-square norm.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Norm<'a> {
    weight: &'a [f32],
    eps: f32,
}

impl<'a> Norm<'a> {
    /// `None` if its weight is not on the CPU in 32 bits.
    pub(crate) fn of(norm: &'a RmsNorm) -> Option<Self> {
        Some(Self { weight: Numbers::of(&norm.weight)?.floats()?, eps: norm.eps as f32 })
    }

    /// Of a vector as long as the weight.
    fn of_vector(self, mut x: Vec<f32>) -> Vec<f32> {
        let mut squares = [0.0f32];
        product(Numbers::F32(&x), &x, &mut squares);
        let factor = (squares[0] / x.len() as f32 + self.eps).sqrt().recip();
        x.iter_mut().zip(self.weight).for_each(|(x, weight)| *x *= weight * factor);
        x
    }
}

/// One layer, as numbers.
#[derive(Debug)]
pub(crate) struct Layer<'a> {
    attention_norm: Norm<'a>,
    query: Matrix<'a>,
    key: Matrix<'a>,
    value: Matrix<'a>,
    /// Of the heads of queries and keys, where the family has them.
    head_norms: Option<[Norm<'a>; 2]>,
    out: Matrix<'a>,
    mlp_norm: Norm<'a>,
    gate: Matrix<'a>,
    up: Matrix<'a>,
    down: Matrix<'a>,
    /// The most positions that are seen, its own among them.
    window: usize,
}

impl<'a> Layer<'a> {
    /// `None` if one of its parts cannot be read; see [`Matrix::of`] and [`Norm::of`].
    pub(crate) fn of(
        [attention_norm, mlp_norm]: [&'a RmsNorm; 2],
        attention: &'a Attention,
        mlp: &'a Mlp,
    ) -> Option<Self> {
        Some(Self {
            attention_norm: Norm::of(attention_norm)?,
            query: Matrix::of(&attention.query)?,
            key: Matrix::of(&attention.key)?,
            value: Matrix::of(&attention.value)?,
            head_norms: match &attention.norms {
                Some([queries, keys]) => Some([Norm::of(queries)?, Norm::of(keys)?]),
                None => None,
            },
            out: Matrix::of(&attention.out)?,
            mlp_norm: Norm::of(mlp_norm)?,
            gate: Matrix::of(&mlp.gate)?,
            up: Matrix::of(&mlp.up)?,
            down: Matrix::of(&mlp.down)?,
            window: attention.window.unwrap_or(usize::MAX),
        })
    }
}

/// What a layer remembers: keys and values of one head after the other, `[g, room, e]`.
#[derive(Debug)]
pub(crate) struct Memory<'a> {
    pub(crate) keys: &'a mut [f32],
    pub(crate) values: &'a mut [f32],
}

impl<'a> Memory<'a> {
    /// What each of `groups` heads remembers, for whichever thread comes to it.
    fn heads(self, groups: usize) -> Vec<Mutex<Self>> {
        let length = self.keys.len() / groups;
        let parts = self.keys.chunks_exact_mut(length).zip(self.values.chunks_exact_mut(length));
        parts.map(|(keys, values)| Mutex::new(Memory { keys, values })).collect()
    }
}

/// A pass over one id.
#[derive(Debug)]
pub(crate) struct Step<'a> {
    pub(crate) layers: Vec<Layer<'a>>,
    pub(crate) norm: Norm<'a>,
    pub(crate) head: Matrix<'a>,
    /// Cosines and signed sines of the id's position, one a number of a head.
    pub(crate) rotation: [&'a [f32]; 2],
    /// Heads of keys and values.
    pub(crate) groups: usize,
    /// Ids before this one.
    pub(crate) past: usize,
}

/// What a thread reads at least: with less, to wake it and to wait for it takes what it brings.
const BYTES_A_THREAD: usize = 8 << 20;

/// Stages of one layer.
const STAGES: usize = 5;

impl Step<'_> {
    /// The logits of the id after `x`, the embedding of this one; each layer's memory has room for it.
    pub(crate) fn logits(&self, x: &[f32], memories: Vec<Memory<'_>>) -> Vec<f32> {
        let widest = |size: fn(&Layer<'_>) -> usize| Shared::zeros(self.layers.iter().map(size).max().unwrap_or(0));
        let state = Shared::new(x);
        let asked = widest(|layer| layer.query.out + layer.key.out + layer.value.out);
        let found = widest(|layer| layer.query.out);
        let hidden = widest(|layer| layer.gate.out);
        let logits = Shared::zeros(self.head.out);
        let heads: Vec<Vec<Mutex<Memory<'_>>>> = memories.into_iter().map(|memory| memory.heads(self.groups)).collect();
        let threads = self.bytes() / BYTES_A_THREAD;
        together(threads.max(1), STAGES * self.layers.len() + 1, |member| {
            let normed = |norm: Norm<'_>| norm.of_vector(state.read(0..x.len()));
            let add = |matrix: &Matrix<'_>, input: &[f32], rows: Range<usize>| {
                let mut sum = matrix.rows(input, rows.clone());
                sum.iter_mut().zip(state.read(rows.clone())).for_each(|(sum, x)| *sum += x);
                state.write(rows.start, &sum);
            };
            for (layer, heads) in self.layers.iter().zip(&heads) {
                let Layer { query, key, value, out, gate, up, down, .. } = layer;
                let all = query.out + key.out + value.out;
                member.stage(
                    all,
                    GROUP,
                    || normed(layer.attention_norm),
                    |x, rows| {
                        let mut offset = 0;
                        for matrix in [query, key, value] {
                            let clipped = |row: usize| row.saturating_sub(offset).min(matrix.out);
                            let own = clipped(rows.start)..clipped(rows.end);
                            asked.write(offset + own.start, &matrix.rows(x, own));
                            offset += matrix.out;
                        }
                    },
                );
                member.stage(
                    self.groups,
                    1,
                    || (),
                    |&(), own| {
                        own.for_each(|head| self.attend(layer, head, &heads[head], &asked, &found));
                    },
                );
                member.stage(out.out, GROUP, || found.read(0..query.out), |input, rows| add(out, input, rows));
                member.stage(
                    gate.out,
                    GROUP,
                    || normed(layer.mlp_norm),
                    |x, rows| {
                        let mut gated = gate.rows(x, rows.clone());
                        let up = up.rows(x, rows.clone());
                        gated.iter_mut().zip(&up).for_each(|(gate, up)| *gate *= up / (1.0 + (-*gate).exp()));
                        hidden.write(rows.start, &gated);
                    },
                );
                member.stage(down.out, GROUP, || hidden.read(0..gate.out), |input, rows| add(down, input, rows));
            }
            let head = &self.head;
            member.stage(
                head.out,
                GROUP,
                || normed(self.norm),
                |x, rows| logits.write(rows.start, &head.rows(x, rows)),
            );
        });
        logits.into_vec()
    }

    /// The memory of all matrices, which an id is mostly waiting for.
    fn bytes(&self) -> usize {
        let of_layer = |layer: &Layer<'_>| {
            let Layer { query, key, value, out, gate, up, down, .. } = layer;
            [query, key, value, out, gate, up, down].map(|matrix| matrix.weight.bytes()).iter().sum::<usize>()
        };
        self.layers.iter().map(of_layer).sum::<usize>() + self.head.weight.bytes()
    }

    /// What the queries of one head of keys find among the positions so far, this id's own among them.
    fn attend(&self, layer: &Layer<'_>, head: usize, memory: &Mutex<Memory<'_>>, asked: &Shared, found: &Shared) {
        let mut memory = memory.lock().unwrap_or_else(PoisonError::into_inner);
        let Memory { keys, values } = &mut *memory;
        let (queries, all) = (layer.query.out, layer.key.out);
        let width = all / self.groups;
        let vector = |start: usize| asked.read(start..start + width);
        let [query_norm, key_norm] = layer.head_norms.map_or([None; 2], |norms| norms.map(Some));
        let end = self.past + 1;
        let here = self.past * width..end * width;
        keys[here.clone()].copy_from_slice(&self.turned(vector(queries + head * width), key_norm));
        values[here].copy_from_slice(&vector(queries + all + head * width));
        let start = end.saturating_sub(layer.window);
        let seen = start * width..end * width;
        let asking = queries / all;
        for number in head * asking..(head + 1) * asking {
            let mut query = self.turned(vector(number * width), query_norm);
            let scale = (width as f32).sqrt().recip();
            query.iter_mut().for_each(|query| *query *= scale);
            let mut shares = vec![0.0; end - start];
            product(Numbers::F32(&keys[seen.clone()]), &query, &mut shares);
            softmax(&mut shares);
            let mut y = vec![0.0; width];
            add_combination(&values[seen.clone()], &shares, &mut y);
            found.write(number * width, &y);
        }
    }

    /// A head, normalised where the family does so, and turned by its position.
    fn turned(&self, head: Vec<f32>, norm: Option<Norm<'_>>) -> Vec<f32> {
        let head = norm.map_or(head.clone(), |norm| norm.of_vector(head));
        let [cosine, sine] = self.rotation;
        let half = head.len() / 2;
        let turn = |at: usize| head[at] * cosine[at] + head[(at + half) % head.len()] * sine[at];
        (0..head.len()).map(turn).collect()
    }
}

fn softmax(scores: &mut [f32]) {
    let largest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    scores.iter_mut().for_each(|score| *score = (*score - largest).exp());
    let total: f32 = scores.iter().sum();
    scores.iter_mut().for_each(|score| *score /= total);
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use lora_core::{AnyAdapter, Draw, Purpose, adapter::Lora};
    use lora_torch::{Projections as _, Torch, random};
    use tch::Tensor;

    use crate::{Base, Decoder};

    /// 32-bit sums in another order, relative to the largest logit.
    const TOLERANCE: f64 = 1e-5;

    fn decoder(name: &str) -> Decoder {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/architectures").join(name);
        Base::open(&folder, &Torch::CPU).unwrap().decoder
    }

    fn drawn(sample: u32, shape: [i64; 2]) -> Tensor {
        let shape = shape.map(|length| length as usize);
        random::normal(&mut Draw::new(1, Purpose::Init, 5, sample), &shape).unwrap() * 0.3
    }

    /// Puts two plain adapters on every layer.
    fn adapt(decoder: &mut Decoder) {
        for (number, projection) in (0..).zip(decoder.projections()) {
            let [out, inner] = projection.shape().try_into().unwrap();
            for rank in [2, 3] {
                let (down, up) = (drawn(4 * number + rank as u32, [rank, inner]), drawn(number, [out, rank]));
                projection.attach(AnyAdapter::Lora(Lora::new(down, up, 0.5)), 0.7);
            }
        }
    }

    #[test]
    fn a_step_with_adapters_says_what_the_decoder_says() {
        for name in ["llama3", "mistral", "qwen2", "qwen3"] {
            let mut decoder = decoder(name);
            adapt(&mut decoder);
            let ids = [5, 6, 7, 8, 9, 10, 11, 5, 6, 20, 21, 22];
            let mut cache = decoder.cache().unwrap();
            for (at, id) in ids.into_iter().enumerate() {
                let logits = decoder.next_on_cpu(id, &mut cache).unwrap().unwrap();
                let text = Tensor::from_slice(&ids[..=at].iter().map(|id| i64::from(*id)).collect::<Vec<_>>());
                let whole = tch::no_grad(|| decoder.logits(&text.unsqueeze(0), None).unwrap());
                let expected = whole.get(0).get(at as i64);
                let error = ((logits - &expected).abs().max() / expected.abs().max()).double_value(&[]);
                assert!(error < TOLERANCE, "{name} at {at}: {error}");
            }
        }
    }

    #[test]
    fn what_is_more_than_plain_lora_is_left_to_the_decoder() {
        let mut decoder = decoder("llama2");
        let mut cache = decoder.cache().unwrap();
        assert!(decoder.next_on_cpu(5, &mut cache).unwrap().is_some());
        let projection = decoder.projections().remove(0);
        let [out, inner] = projection.shape().try_into().unwrap();
        let middle = Lora { mid: Some(drawn(0, [2, 2])), ..Lora::new(drawn(1, [2, inner]), drawn(2, [out, 2]), 1.0) };
        projection.attach(AnyAdapter::Lora(middle), 1.0);
        assert!(decoder.next_on_cpu(6, &mut cache).unwrap().is_none());
        assert_eq!(cache.length(), 1, "nothing was remembered of an id that was not read");
    }
}
