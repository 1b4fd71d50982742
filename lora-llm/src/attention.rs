//! Self-attention with grouped heads and rotary positions (Vaswani et al. 2017, arXiv 1706.03762, §3.2;
//! Ainslie et al. 2023, arXiv 2305.13245, for the groups).
//!
//! ```text
//! x ─► q_proj ─► [norm] ─► turn ─┐
//!   ├► k_proj ─► [norm] ─► turn ─┼► softmax(q·kᵀ/√e + mask)·v ─► o_proj
//!   └► v_proj ───────────────────┘
//! ```
//!
//! Axes: `b` rows of a batch, `s` new positions, `t` positions that are seen, `h` heads, `g` key and value heads, `e` width of
//! a head. Texts are rows of one matrix, `[b·s, d]`; on the CPU padding is left out of it, `[n, d]`.

use std::collections::BTreeMap;

use lora_torch::{Projection, Scope};
use tch::{Device, Kind, Tensor};

use crate::{
    LlmConfig, Result,
    cache::LayerCache,
    norm::RmsNorm,
    rope::{Rope, Rotation},
};

/// Padding is left out where at most this share of the rows is kept: to spread heads for attention costs a little, too.
const WORTH: f64 = 0.97;

/// What every layer shares in one pass over a batch: rotations, and which position sees which.
#[derive(Debug)]
pub(crate) struct Pass {
    batch: i64,
    rotation: Rotation,
    /// The rows that are computed, if not all are.
    kept: Option<Kept>,
    /// By width of the window.
    seen: BTreeMap<Option<usize>, Seen>,
}

/// The rows of a batch that are no padding: products and norms leave the others out, attention has zeros in their place.
#[derive(Debug)]
pub(crate) struct Kept {
    /// Their numbers among all rows, `[n]`.
    numbers: Tensor,
    /// How many rows there are with the padding, `b·s`.
    all: i64,
    /// Where each text begins among the kept rows, `[b, 1]`.
    starts: Tensor,
}

impl Kept {
    /// Of texts with `lengths` ids, `[b, 1]`, in rows of `length`; `None` if leaving the padding out is not worth it.
    ///
    /// How many rows are kept differs from batch to batch, which a captured graph cannot follow, so that it is for the CPU.
    pub(crate) fn of(lengths: &Tensor, length: i64) -> Result<Option<Self>> {
        let all = lengths.size()[0] * length;
        if lengths.device() != Device::Cpu
            || lengths.f_sum(Kind::Int64)?.f_int64_value(&[])? as f64 > WORTH * all as f64
        {
            return Ok(None);
        }
        let positions = Tensor::f_arange(length, (Kind::Int64, Device::Cpu))?; // [s]
        let numbers = positions.f_lt_tensor(lengths)?.f_flatten(0, 1)?.f_nonzero()?.f_view([-1])?;
        Ok(Some(Self { numbers, all, starts: lengths.f_cumsum(0, Kind::Int64)?.f_sub(lengths)? }))
    }

    /// The kept ones of `b·s` rows.
    pub(crate) fn of_rows(&self, rows: &Tensor) -> Result<Tensor> {
        Ok(rows.f_index_select(0, &self.numbers)?)
    }

    /// Where each text begins among them, `[b, 1]`.
    pub(crate) fn starts(&self) -> &Tensor {
        &self.starts
    }
}

/// The positions that a position sees.
#[derive(Debug)]
enum Seen {
    /// Its own and all before; there are as many queries as keys.
    Past,
    /// All: it is the last one.
    All,
    /// 0 where it sees, -∞ where it does not, broadcast to `[b, h, s, t]`.
    Mask(Tensor),
}

/// Several examples in one row: `[b, s]` each, whole numbers.
#[derive(Debug, Clone, Copy)]
pub struct Packing<'a> {
    /// Which example a position belongs to; positions of different examples do not see each other.
    pub segments: &'a Tensor,
    /// Its number within the example, from 0.
    pub positions: &'a Tensor,
}

impl Pass {
    /// A pass over `[batch, length]` ids that start anew in every row.
    pub(crate) fn fresh(
        rope: &Rope,
        config: &LlmConfig,
        [batch, length]: [i64; 2],
        packing: Option<Packing<'_>>,
        kept: Option<Kept>,
        on: (Kind, Device),
    ) -> Result<Self> {
        let order = Tensor::f_arange(length, (Kind::Int64, on.1))?; // [s]
        let positions = packing.map_or(&order, |packing| packing.positions); // [s] or [b, s]
        let rotation = match &kept {
            Some(kept) => rope.at(&kept.of_rows(&positions.f_expand([batch, length], false)?.f_flatten(0, 1)?)?)?,
            None => rope.at(positions)?,
        };
        let seen = |window: Option<usize>| {
            let window = window.filter(|window| (*window as i64) < length);
            if window.is_none() && packing.is_none() {
                return Ok(Seen::Past);
            }
            let mut hidden = beyond(&order, &order, window)?; // [s, s]
            if let Some(Packing { segments, .. }) = packing {
                let other = segments.f_unsqueeze(2)?.f_ne_tensor(&segments.f_unsqueeze(1)?)?; // [b, s, s]
                hidden = other.f_logical_or(&hidden)?.f_unsqueeze(1)?; // [b, 1, s, s]
            }
            mask(&hidden, on)
        };
        Ok(Self { batch, rotation, kept, seen: by_window(config, seen)? })
    }

    /// For some positions of a fresh pass, `places` `[batch, m]`: what the last layer is asked for, if little else counts.
    pub(crate) fn at(
        rope: &Rope,
        config: &LlmConfig,
        places: &Tensor,
        length: i64,
        packing: Option<Packing<'_>>,
        on: (Kind, Device),
    ) -> Result<Self> {
        let keys = Tensor::f_arange(length, (Kind::Int64, on.1))?; // [s]
        let rotation = match packing {
            Some(Packing { positions, .. }) => rope.at(&positions.f_gather(1, places, false)?)?,
            None => rope.at(places)?,
        };
        let seen = |window: Option<usize>| {
            let mut hidden = beyond(places, &keys, window)?; // [b, m, s]
            if let Some(Packing { segments, .. }) = packing {
                let own = segments.f_gather(1, places, false)?.f_unsqueeze(2)?;
                hidden = hidden.f_logical_or(&own.f_ne_tensor(&segments.f_unsqueeze(1)?)?)?;
            }
            mask(&hidden.f_unsqueeze(1)?, on)
        };
        let last = config.windows.last().copied().flatten();
        Ok(Self { batch: places.size()[0], rotation, kept: None, seen: BTreeMap::from([(last, seen(last)?)]) })
    }

    /// A pass over `length` ids of one text that follow `past` others, whose keys and values are cached.
    pub(crate) fn following(
        rope: &Rope,
        config: &LlmConfig,
        [past, length]: [i64; 2],
        on: (Kind, Device),
    ) -> Result<Self> {
        let all = past + length;
        let queries = Tensor::f_arange_start(past, all, (Kind::Int64, on.1))?;
        let seen = |window: Option<usize>| {
            let window = window.filter(|window| (*window as i64) < all);
            match (window, past, length) {
                (None, _, 1) => Ok(Seen::All),
                (None, 0, _) => Ok(Seen::Past),
                _ => mask(&beyond(&queries, &Tensor::f_arange(all, (Kind::Int64, on.1))?, window)?, on),
            }
        };
        Ok(Self { batch: 1, rotation: rope.at(&queries)?, kept: None, seen: by_window(config, seen)? })
    }

    pub(crate) fn kept(&self) -> Option<&Kept> {
        self.kept.as_ref()
    }

    /// Rows as heads of width `e`: `[b·s, h·e]` → `[b, s, h, e]`, or `[n, h·e]` → `[n, h, e]` if some are left out.
    fn heads(&self, rows: &Tensor, e: i64) -> Result<Tensor> {
        let h = rows.size()[1] / e;
        Ok(match self.kept {
            Some(_) => rows.f_view([-1, h, e])?,
            None => rows.f_view([self.batch, -1, h, e])?,
        })
    }

    /// Such heads beside each other, zeros where rows were left out: `[b, h, s, e]`.
    fn spread(&self, heads: &Tensor) -> Result<Tensor> {
        let spread = match (&self.kept, heads.size().as_slice()) {
            (Some(kept), &[_, h, e]) => {
                let zeros = heads.f_new_zeros([kept.all, h, e], (heads.f_kind()?, heads.device()))?;
                zeros.f_index_copy(0, &kept.numbers, heads)?.f_view([self.batch, -1, h, e])?
            }
            _ => heads.shallow_clone(),
        };
        Ok(spread.f_transpose(1, 2)?)
    }

    /// The way back, `[b, h, s, e]` → `[b·s, h·e]`, or `[n, h·e]`.
    fn gather(&self, heads: &Tensor) -> Result<Tensor> {
        let size = heads.size();
        let rows = heads.f_transpose(1, 2)?.f_reshape([-1, size[1] * size[3]])?;
        self.kept.as_ref().map_or(Ok(rows.shallow_clone()), |kept| kept.of_rows(&rows))
    }
}

fn by_window(
    config: &LlmConfig,
    seen: impl Fn(Option<usize>) -> Result<Seen>,
) -> Result<BTreeMap<Option<usize>, Seen>> {
    let mut all = BTreeMap::new();
    for window in &config.windows {
        if !all.contains_key(window) {
            all.insert(*window, seen(*window)?);
        }
    }
    Ok(all)
}

/// Whether a key comes after a query, or too long before it, `[.., queries, keys]`.
fn beyond(queries: &Tensor, keys: &Tensor, window: Option<usize>) -> Result<Tensor> {
    let distance = queries.f_unsqueeze(-1)?.f_sub(keys)?;
    let after = distance.f_lt(0)?;
    Ok(match window {
        Some(window) => after.f_logical_or(&distance.f_ge(window as i64)?)?,
        None => after,
    })
}

fn mask(hidden: &Tensor, (kind, device): (Kind, Device)) -> Result<Seen> {
    let size = hidden.size();
    Ok(Seen::Mask(Tensor::f_zeros(&size, (kind, device))?.f_masked_fill(hidden, f64::NEG_INFINITY)?))
}

/// Attention with its four projections.
#[derive(Debug)]
pub(crate) struct Attention {
    pub(crate) query: Projection,
    pub(crate) key: Projection,
    pub(crate) value: Projection,
    pub(crate) out: Projection,
    /// Of queries and keys, where the family has them.
    pub(crate) norms: Option<[RmsNorm; 2]>,
    head_dim: i64,
    groups: i64,
    pub(crate) window: Option<usize>,
}

impl Attention {
    pub(crate) fn new(scope: &Scope<'_>, config: &LlmConfig, window: Option<usize>) -> Result<Self> {
        let (width, e) = (config.hidden_size, config.head_dim);
        let (queries, keys) = (config.heads * e, config.key_value_heads * e);
        let [bias, out_bias] = config.attention_bias;
        let norm = |name: &str| RmsNorm::new(&(scope / name), e, config.norm_eps);
        Ok(Self {
            query: Projection::linear(&(scope / "q_proj"), [queries, width], bias)?,
            key: Projection::linear(&(scope / "k_proj"), [keys, width], bias)?,
            value: Projection::linear(&(scope / "v_proj"), [keys, width], bias)?,
            out: Projection::linear(&(scope / "o_proj"), [width, queries], out_bias)?,
            norms: if config.query_key_norm { Some([norm("q_norm")?, norm("k_norm")?]) } else { None },
            head_dim: e as i64,
            groups: (config.heads / config.key_value_heads) as i64,
            window,
        })
    }

    /// What `asking` rows find in `x`, `[b·s, d]` each: mostly the same rows, of the same pass.
    pub(crate) fn forward(
        &self,
        (asking, asked): (&Tensor, &Pass),
        (x, pass): (&Tensor, &Pass),
        cache: Option<&mut LayerCache>,
    ) -> Result<Tensor> {
        let e = self.head_dim;
        let mut q = asked.heads(&self.query.forward(asking)?, e)?; // [b, s, h, e]
        let mut k = pass.heads(&self.key.forward(x)?, e)?; // [b, s, g, e]
        if let Some([of_queries, of_keys]) = &self.norms {
            (q, k) = (of_queries.forward(&q)?, of_keys.forward(&k)?);
        }
        let q = asked.spread(&asked.rotation.turn(&q)?)?; // [b, h, s, e]
        let mut k = pass.spread(&pass.rotation.turn(&k)?)?; // [b, g, s, e]
        let mut v = pass.spread(&pass.heads(&self.value.forward(x)?, e)?)?; // [b, g, s, e]
        if let Some(cache) = cache {
            (k, v) = cache.append(&k, &v)?; // [1, g, t, e]
        }
        let y = self.attend(&q, &k, &v, asked)?; // [b, h, s, e]
        Ok(self.out.forward(&asked.gather(&y)?)?)
    }

    fn attend(&self, q: &Tensor, k: &Tensor, v: &Tensor, pass: &Pass) -> Result<Tensor> {
        let (mask, causal) = match pass.seen.get(&self.window) {
            Some(Seen::Mask(mask)) => (Some(mask), false),
            Some(Seen::All) => (None, false),
            Some(Seen::Past) | None => (None, true),
        };
        // With a mask the only fused kernel of CUDA is one that knows no groups.
        let (k, v) = match mask.is_some() && self.groups > 1 && q.device() != Device::Cpu {
            true => (self.repeated(k)?, self.repeated(v)?),
            false => (k.shallow_clone(), v.shallow_clone()),
        };
        let grouped = k.size()[1] != q.size()[1];
        Ok(Tensor::f_scaled_dot_product_attention(q, &k, &v, mask, 0.0, causal, None, grouped)?)
    }

    /// `[b, g, t, e]` → `[b, h, t, e]`.
    fn repeated(&self, x: &Tensor) -> Result<Tensor> {
        Ok(x.f_repeat_interleave_self_int(self.groups, 1, x.size()[1] * self.groups)?)
    }

    pub(crate) fn projections(&self) -> [&Projection; 4] {
        [&self.query, &self.key, &self.value, &self.out]
    }

    pub(crate) fn projections_mut(&mut self) -> [&mut Projection; 4] {
        [&mut self.query, &mut self.key, &mut self.value, &mut self.out]
    }
}
