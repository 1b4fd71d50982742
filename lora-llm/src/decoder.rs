//! The decoder of Llama, Mistral and Qwen (Touvron et al. 2023, arXiv 2302.13971, §2.2).
//!
//! ```text
//! ids ─► embedding ─► [ norm ─► attention ─► + ─► norm ─► MLP ─► + ] × layers ─► norm ─► head ─► logits
//! ```
//!
//! Families differ in what [`LlmConfig`] says and in nothing else. Axes: `b` rows, `s` ids, `d` width, `v` words.

use lora_torch::{Projection, Projections, Scope, Torch, memory::Numbers};
use tch::{Kind, Tensor};

use crate::{
    Error, LlmConfig, Result,
    attention::{Attention, Kept, Pass},
    cache::LayerCache,
    mlp::Mlp,
    norm::RmsNorm,
    rope::Rope,
    single,
};
pub use crate::{attention::Packing, cache::Cache};

/// A language model.
#[derive(Debug)]
pub struct Decoder {
    embedding: Projection,
    layers: Vec<Layer>,
    norm: RmsNorm,
    head: Projection,
    rope: Rope,
    config: LlmConfig,
    on: Torch,
}

impl Decoder {
    /// Reads the weights under transformers' names.
    ///
    /// # Errors
    /// If a tensor is missing or does not fit the configuration.
    pub fn new(scope: &Scope<'_>, config: &LlmConfig) -> Result<Self> {
        let (words, width) = (config.vocab_size, config.hidden_size);
        let body = scope / "model";
        let place = &body / "embed_tokens";
        let embedding = place.in_full().weight(&[words, width])?;
        let layers = &body / "layers";
        let windows = config.windows.iter().enumerate();
        Ok(Self {
            layers: windows.map(|(i, window)| Layer::new(&(&layers / i), config, *window)).collect::<Result<_>>()?,
            norm: RmsNorm::new(&(&body / "norm"), width, config.norm_eps)?,
            head: match config.tied {
                true => Projection::over(&(scope / "lm_head"), embedding.share()),
                // bitsandbytes leaves it in full, too: the logits are what its errors would be seen in most.
                false => Projection::linear(&(scope / "lm_head").in_full(), [words, width], false)?,
            },
            rope: Rope::new(&config.rope, config.head_dim, scope.backend().device)?,
            embedding: Projection::over(&place, embedding),
            config: config.clone(),
            on: scope.backend(),
        })
    }

    /// The logits of the id after each, `[b, s, v]`, for `ids` `[b, s]`, whole numbers.
    ///
    /// # Errors
    /// If an id has no embedding or memory runs out.
    pub fn logits(&self, ids: &Tensor, packing: Option<Packing<'_>>) -> Result<Tensor> {
        let (x, pass) = self.begin(ids, packing, None)?;
        let x = self.layers.iter().try_fold(x, |x, layer| layer.forward(&x, &pass, None))?;
        let logits = self.head.forward(&self.norm.forward(&x)?)?; // [b·s, v]
        let [b, s] = dims2(ids)?;
        Ok(logits.f_view([b, s, -1])?)
    }

    /// The logits of the id after the last of `ids`, `[v]`; the cache holds what came before and then also `ids`.
    ///
    /// # Errors
    /// If there is no id, one has no embedding, there are more than the model has positions, or memory runs out.
    pub fn next(&self, ids: &[u32], cache: &mut Cache) -> Result<Tensor> {
        let _no_grad = tch::no_grad_guard();
        self.check(ids)?;
        let (past, limit) = (cache.length(), self.config.max_positions);
        let length = past + ids.len();
        if ids.is_empty() || length > limit {
            return Err(Error::TooLong { what: "the text", length, limit });
        }
        if let [id] = *ids
            && let Some(logits) = self.next_on_cpu(id, cache)?
        {
            return Ok(logits);
        }
        let new: Vec<i64> = ids.iter().map(|id| i64::from(*id)).collect();
        let ids = Tensor::f_from_slice(&new)?.f_to_device(self.on.device)?;
        let pass =
            Pass::following(&self.rope, &self.config, [past as i64, new.len() as i64], (self.on.kind, self.on.device))?;
        let mut x = self.embedding.lookup(&ids)?; // [s, d]
        for (layer, cache) in self.layers.iter().zip(cache.layers_mut()) {
            x = layer.forward(&x, &pass, Some(cache))?;
        }
        let last = self.norm.forward(&x.f_narrow(0, new.len() as i64 - 1, 1)?)?; // [1, d]
        Ok(self.head.forward(&last)?.f_view([-1])?)
    }

    /// The same for one id, without libtorch; `None` where that cannot be done.
    pub(crate) fn next_on_cpu(&self, id: u32, cache: &mut Cache) -> Result<Option<Tensor>> {
        let past = cache.length();
        let layers = self
            .layers
            .iter()
            .map(|layer| single::Layer::of([&layer.attention_norm, &layer.mlp_norm], &layer.attention, &layer.mlp));
        let (Some(layers), Some(norm), Some(head)) =
            (layers.collect(), single::Norm::of(&self.norm), single::Matrix::of(&self.head))
        else {
            return Ok(None);
        };
        let rotation = self.rope.at(&Tensor::f_from_slice(&[past as i64])?)?;
        let row =
            self.embedding.lookup(&Tensor::f_from_slice(&[i64::from(id)])?)?.f_flatten(0, 1)?.f_to_kind(Kind::Float)?;
        let floats = |tensor| Numbers::of(tensor)?.floats();
        let (Some(cosine), Some(sine), Some(x)) = (floats(&rotation.cosine), floats(&rotation.sine), floats(&row))
        else {
            return Ok(None);
        };
        let mut memories = Vec::new();
        for layer in cache.layers_mut() {
            let Some(memory) = layer.numbers()? else { return Ok(None) };
            memories.push(memory);
        }
        let groups = self.config.key_value_heads;
        let step = single::Step { layers, norm, head, rotation: [cosine, sine], groups, past };
        let logits = step.logits(x, memories);
        cache.layers_mut().for_each(LayerCache::advance);
        Ok(Some(Tensor::f_from_slice(&logits)?))
    }

    /// An empty memory for [`next`](Self::next).
    ///
    /// # Errors
    /// If there is no room for it.
    pub fn cache(&self) -> Result<Cache> {
        Cache::new(&self.config, (self.on.kind, self.on.device))
    }

    /// Checks that every id has an embedding.
    ///
    /// # Errors
    /// For the first that has none.
    pub fn check(&self, ids: &[u32]) -> Result<()> {
        let words = self.config.vocab_size;
        match ids.iter().find(|id| **id as usize >= words) {
            Some(id) => Err(Error::UnknownToken { id: *id, words }),
            None => Ok(()),
        }
    }

    /// What it was built from.
    pub fn config(&self) -> &LlmConfig {
        &self.config
    }

    /// Where it is, and in which kind.
    pub fn backend(&self) -> Torch {
        self.on
    }

    /// The rows that enter the first layer, `[b·s, d]`, and what all layers share.
    ///
    /// If `lengths` `[b, 1]` says how many ids of each text are no padding, the others may be left out, `[n, d]`.
    pub(crate) fn begin(
        &self,
        ids: &Tensor,
        packing: Option<Packing<'_>>,
        lengths: Option<&Tensor>,
    ) -> Result<(Tensor, Pass)> {
        let [b, s] = dims2(ids)?;
        let kept = lengths.map_or(Ok(None), |lengths| Kept::of(lengths, s))?;
        let pass = Pass::fresh(&self.rope, &self.config, [b, s], packing, kept, (self.on.kind, self.on.device))?;
        let ids = ids.f_flatten(0, 1)?;
        let ids = pass.kept().map_or(Ok(ids.shallow_clone()), |kept| kept.of_rows(&ids))?;
        Ok((self.embedding.lookup(&ids)?, pass))
    }

    /// The rows at `places` `[b, m]` of each of the texts of a pass, which have `length` ids with their padding.
    pub(crate) fn select(
        &self,
        places: &Tensor,
        length: i64,
        packing: Option<Packing<'_>>,
        pass: &Pass,
    ) -> Result<Selection> {
        let [b, _] = dims2(places)?;
        let on = (self.on.kind, self.on.device);
        let starts = match pass.kept() {
            Some(kept) => kept.starts().shallow_clone(),
            None => Tensor::f_arange_start_step(0, b * length, length, (Kind::Int64, on.1))?.f_view([-1, 1])?,
        }; // [b, 1]
        Ok(Selection {
            rows: places.f_add(&starts)?.f_flatten(0, 1)?,
            pass: Pass::at(&self.rope, &self.config, places, length, packing, on)?,
        })
    }

    pub(crate) fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// The norm before the head, `[.., d]` → the same.
    pub(crate) fn final_norm(&self, x: &Tensor) -> Result<Tensor> {
        self.norm.forward(x)
    }

    pub(crate) fn head(&self) -> &Projection {
        &self.head
    }

    pub(crate) fn embedding(&self) -> &Projection {
        &self.embedding
    }
}

impl Projections for Decoder {
    fn projections(&mut self) -> Vec<&mut Projection> {
        let layers = self.layers.iter_mut().flat_map(|Layer { attention, mlp, .. }| {
            attention.projections_mut().into_iter().chain(mlp.projections_mut())
        });
        // The embedding stands at the end, so that what is drawn for the layers does not depend on whether it is trained.
        layers.chain([&mut self.head, &mut self.embedding]).collect()
    }
}

/// Some rows of a pass, of which alone the last layer's output is wanted.
#[derive(Debug)]
pub(crate) struct Selection {
    /// Their numbers among all rows, `[b·m]`.
    rows: Tensor,
    /// What they see.
    pass: Pass,
}

impl Selection {
    /// The numbers of the rows, `[b·m]`.
    pub(crate) fn rows(&self) -> &Tensor {
        &self.rows
    }
}

/// One layer: attention and MLP, each on its normalised input and added to it.
#[derive(Debug)]
pub(crate) struct Layer {
    attention_norm: RmsNorm,
    attention: Attention,
    mlp_norm: RmsNorm,
    mlp: Mlp,
}

impl Layer {
    fn new(scope: &Scope<'_>, config: &LlmConfig, window: Option<usize>) -> Result<Self> {
        let norm = |name: &str| RmsNorm::new(&(scope / name), config.hidden_size, config.norm_eps);
        Ok(Self {
            attention_norm: norm("input_layernorm")?,
            attention: Attention::new(&(scope / "self_attn"), config, window)?,
            mlp_norm: norm("post_attention_layernorm")?,
            mlp: Mlp::new(&(scope / "mlp"), config)?,
        })
    }

    /// `[b·s, d]` → the same.
    pub(crate) fn forward(&self, x: &Tensor, pass: &Pass, cache: Option<&mut LayerCache>) -> Result<Tensor> {
        // A product's memory is nobody else's: the additions go into it.
        let normed = self.attention_norm.forward(x)?;
        let x = self.attention.forward((&normed, pass), (&normed, pass), cache)?.f_add_(x)?;
        Ok(self.mlp.forward(&self.mlp_norm.forward(&x)?)?.f_add_(&x)?)
    }

    /// The same for some of the rows, `[b·s, d]` → `[b·m, d]`.
    pub(crate) fn forward_at(&self, x: &Tensor, pass: &Pass, some: &Selection) -> Result<Tensor> {
        let normed = self.attention_norm.forward(x)?;
        let asking = normed.f_index_select(0, &some.rows)?;
        let found = self.attention.forward((&asking, &some.pass), (&normed, pass), None)?;
        let x = x.f_index_select(0, &some.rows)?.f_add(&found)?;
        Ok(self.mlp.forward(&self.mlp_norm.forward(&x)?)?.f_add_(&x)?)
    }

    pub(crate) fn projections(&self) -> impl Iterator<Item = &Projection> {
        self.attention.projections().into_iter().chain(self.mlp.projections())
    }
}

fn dims2(ids: &Tensor) -> Result<[i64; 2]> {
    ids.size().try_into().map_err(|actual| Error::Shape { what: "ids", actual, expected: "[rows, ids]" })
}
