//! What adapters of a language model are trained on: the next id (Radford et al. 2018, "Improving language understanding by
//! generative pre-training", eq. 1), where it counts.
//!
//! ```text
//! host    rows of examples ─► ids, who predicts what, what it counts ─┐ one copy a step
//! device                               decoder ─► rows that predict ─► norm ─► head ─► cross-entropy, chunk by chunk
//! ```
//!
//! A step's loss is the mean over all ids that count in it, however they lie in rows and micro-steps: each counts the same,
//! and the weights that come with a batch make the mean over micro-steps and rows that mean. The head, and of the last layer
//! what follows keys and values, are computed only for positions that predict something that counts.

mod cross_entropy;
mod training_set;

use lora_core::{Draw, Purpose};
use lora_torch::{
    Batch, Model, Objective, Projection, Projections as _,
    recompute::{Stage, recomputed},
};
use tch::Tensor;

pub use training_set::TrainingSet;

use crate::{
    Decoder, Error, Example, Result,
    attention::{Packing, Pass},
    decoder::{Layer, Selection},
    example::{Padding, batch},
};

/// Where examples come from.
pub trait Source {
    /// The rows of a micro-step, each with the examples in it: a pure function of `step` and `micro`.
    fn rows(&self, step: u64, micro: u64) -> Vec<Vec<&Example>>;
}

/// How a language model is trained, besides what the trainer decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LanguageOptions {
    /// Micro-steps of a step, as the trainer has them.
    pub accumulation: u64,
    /// Whether layers are computed again in the backward pass, for the memory of one layer instead of all.
    pub recompute: bool,
    /// How rows are brought to one length.
    pub padding: Padding,
}

/// The objective of a language model.
#[derive(Debug)]
pub struct LanguageObjective<S> {
    model: Predictor,
    /// Further copies of it, until the trainer takes them.
    replicas: Vec<Predictor>,
    source: S,
    options: LanguageOptions,
    noise: Option<EmbeddingNoise>,
}

/// Uniform noise on the embeddings of what is trained on (Jain et al. 2023, "NEFTune", arXiv 2310.05914, algorithm 1).
///
/// An example's noise depends on its own ids and its place in the step alone: it is the same in a row of its own, packed
/// among others, and on every device. transformers and TRL measure the padded row instead, so that the neighbours of an
/// example decide how much noise it gets; the paper's own training code counts what is not padding, as here.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct EmbeddingNoise {
    /// How much: numbers lie within ± `amount / √(n·d)`, for an example of `n` ids of width `d`. The paper tries 5 to 15.
    pub amount: f64,
    /// Seed of the draws.
    pub seed: u64,
}

impl<S: Source> LanguageObjective<S> {
    /// An objective for a decoder.
    pub fn new(decoder: Decoder, source: S, options: LanguageOptions) -> Self {
        let model = Predictor { decoder, recompute: options.recompute };
        Self { model, replicas: Vec::new(), source, options, noise: None }
    }

    /// Further copies of the decoder, over the same tensors; see [`Objective::replicas`].
    pub fn with_replicas(mut self, decoders: impl IntoIterator<Item = Decoder>) -> Self {
        let recompute = self.options.recompute;
        self.replicas = decoders.into_iter().map(|decoder| Predictor { decoder, recompute }).collect();
        self
    }

    /// The same with noise on the embeddings, in training alone.
    pub fn with_noise(self, noise: EmbeddingNoise) -> Self {
        Self { noise: Some(noise), ..self }
    }

    /// The model, for samples during training.
    pub fn decoder(&self) -> &Decoder {
        &self.model.decoder
    }

    /// Where examples come from.
    pub fn source(&self) -> &S {
        &self.source
    }
}

impl<S: Source> Objective for LanguageObjective<S> {
    fn batch(&self, step: u64, micro: u64) -> lora_torch::Result<Batch> {
        let targets =
            |rows: &[Vec<&Example>]| -> usize { rows.iter().flatten().map(|example| example.targets()).sum() };
        let accumulation = self.options.accumulation.max(1);
        let others = (0..accumulation).filter(|other| *other != micro);
        let rows = self.source.rows(step, micro);
        let all = targets(&rows) + others.map(|other| targets(&self.source.rows(step, other))).sum::<usize>();
        // The loss is a mean over rows, and the trainer takes the mean over micro-steps.
        let weight = rows.len() as f64 * accumulation as f64 / all.max(1) as f64;
        let mut batch = batch(&rows, weight, self.options.padding)?;
        if let (Some(noise), Some(ids)) = (&self.noise, batch.inputs.first()) {
            let shape = [rows.len(), ids.size()[1] as usize, self.model.decoder.config().hidden_size];
            batch.inputs.push(noise.draw(&rows, shape, step * accumulation + micro)?);
        }
        Ok(batch)
    }

    fn replicas(&mut self) -> Vec<Box<dyn Model + Send>> {
        let boxed = |model| Box::new(model) as Box<dyn Model + Send>;
        std::mem::take(&mut self.replicas).into_iter().map(boxed).collect()
    }
}

impl<S: Source> Model for LanguageObjective<S> {
    fn loss(&self, inputs: &[Tensor]) -> lora_torch::Result<Tensor> {
        self.model.loss(inputs)
    }

    fn projections(&mut self) -> Vec<&mut Projection> {
        self.model.projections()
    }
}

impl EmbeddingNoise {
    /// Noise for the embeddings of `rows`, 32-bit, `[b, s, d]`; none on padding.
    fn draw(&self, rows: &[Vec<&Example>], [count, length, width]: [usize; 3], number: u64) -> Result<Tensor> {
        let mut values = Vec::with_capacity(count * length * width);
        let mut place = 0;
        for (at, row) in rows.iter().enumerate() {
            for example in row {
                let numbers = example.ids.len() * width;
                let bound = self.amount / (numbers.max(1) as f64).sqrt();
                values.extend(Draw::new(self.seed, Purpose::Noise, number, place).uniform(numbers, bound));
                place += 1;
            }
            values.resize((at + 1) * length * width, 0.0);
        }
        Ok(Tensor::f_from_slice(&values)?.f_view([count as i64, length as i64, width as i64])?)
    }
}

/// A decoder with the loss that its adapters are trained on.
#[derive(Debug)]
struct Predictor {
    decoder: Decoder,
    recompute: bool,
}

impl Model for Predictor {
    fn loss(&self, inputs: &[Tensor]) -> lora_torch::Result<Tensor> {
        Ok(loss(&self.decoder, inputs, self.recompute)?)
    }

    fn projections(&mut self) -> Vec<&mut Projection> {
        self.decoder.projections()
    }
}

/// What came of an evaluation.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Evaluation {
    /// Mean loss of the ids that count.
    pub loss: f64,
    /// How many they are.
    pub targets: usize,
}

/// The mean loss over all that counts in some examples, without gradients; `at_once` of them are computed together.
///
/// # Errors
/// If an id is unknown to the model, or memory runs out.
pub fn evaluate(decoder: &Decoder, examples: &[Example], at_once: usize) -> Result<Evaluation> {
    let _no_grad = tch::no_grad_guard();
    let (mut sum, mut targets) = (0.0, 0);
    // Examples of like lengths together: little is wasted on padding.
    let mut order: Vec<&Example> = examples.iter().filter(|example| example.targets() > 0).collect();
    order.sort_by_key(|example| example.ids.len());
    for some in order.chunks(at_once.max(1)) {
        let mut rows = Vec::with_capacity(some.len());
        for example in some {
            decoder.check(&example.ids)?;
            rows.push(vec![*example]);
            targets += example.targets();
        }
        let inputs = batch(&rows, rows.len() as f64, Padding { multiple: 1, packed: false })?.inputs;
        let device = decoder.backend().device;
        let inputs = inputs.iter().map(|input| Ok(input.f_to_device(device)?)).collect::<Result<Vec<_>>>()?;
        sum += loss(decoder, &inputs, false)?.f_double_value(&[])?;
    }
    Ok(Evaluation { loss: sum / targets.max(1) as f64, targets })
}

/// The loss of a [`batch`], a mean over its rows; behind its tensors there may be noise for the embeddings, `[b, s, d]`.
fn loss(decoder: &Decoder, inputs: &[Tensor], recompute: bool) -> Result<Tensor> {
    let [ids, places, labels, weights, lengths, rest @ ..] = inputs else { return Err(not_a_batch(inputs)) };
    let (packing, noise) = match rest {
        [] => (None, None),
        [noise] => (None, Some(noise)),
        [segments, positions] => (Some(Packing { segments, positions }), None),
        [segments, positions, noise] => (Some(Packing { segments, positions }), Some(noise)),
        _ => return Err(not_a_batch(inputs)),
    };
    let &[b, s] = ids.size().as_slice() else {
        return Err(Error::Shape { what: "ids", actual: ids.size(), expected: "[rows, ids]" });
    };
    let (labels, weights) = (labels.f_flatten(0, 1)?, weights.f_flatten(0, 1)?.f_div_scalar(b)?);
    let (mut x, pass) = decoder.begin(ids, packing, Some(lengths))?; // [b·s, d], or [n, d]
    if let Some(noise) = noise {
        let noise = noise.f_flatten(0, 1)?.f_to_kind(x.f_kind()?)?;
        x = x.f_add(&pass.kept().map_or(Ok(noise.shallow_clone()), |kept| kept.of_rows(&noise))?)?;
    }
    let chosen = decoder.select(places, s, packing, &pass)?; // [b·m] rows
    // The mask that this takes costs less than the rows that it saves.
    let few = 2 * places.size()[1] <= s;
    let (layers, head) = (decoder.layers(), decoder.head());
    let stage = |(index, layer)| LayerStage {
        layer,
        pass: &pass,
        only: Some(&chosen).filter(|_| few && index + 1 == layers.len()),
    };
    let stages: Vec<LayerStage<'_>> = layers.iter().enumerate().map(stage).collect();
    let loss = |x: &Tensor| {
        let predicting = if few { x.shallow_clone() } else { x.f_index_select(0, chosen.rows())? }; // [b·m, d]
        cross_entropy::mean(head, &decoder.final_norm(&predicting)?, &labels, &weights)
    };
    if recompute && grad_is_asked(decoder)? {
        return Ok(recomputed(&x, &stages, |x| Ok(loss(x)?), &[head])?);
    }
    loss(&stages.iter().try_fold(x, |x, stage| stage.run(&x))?)
}

fn not_a_batch(inputs: &[Tensor]) -> Error {
    Error::Shape { what: "inputs of the loss", actual: vec![inputs.len() as i64], expected: "those of `batch`" }
}

/// Whether any adapter in training waits for a gradient.
fn grad_is_asked(decoder: &Decoder) -> Result<bool> {
    for projection in decoder.layers().iter().flat_map(Layer::projections).chain([decoder.head(), decoder.embedding()])
    {
        if !projection.leaves()?.is_empty() {
            return Ok(true);
        }
    }
    Ok(false)
}

/// A layer within a pass.
struct LayerStage<'a> {
    layer: &'a Layer,
    pass: &'a Pass,
    /// The rows whose output is wanted, if not all are.
    only: Option<&'a Selection>,
}

impl LayerStage<'_> {
    fn run(&self, x: &Tensor) -> Result<Tensor> {
        match self.only {
            Some(some) => self.layer.forward_at(x, self.pass, some),
            None => self.layer.forward(x, self.pass, None),
        }
    }
}

impl Stage for LayerStage<'_> {
    fn forward(&self, x: &Tensor) -> lora_torch::Result<Tensor> {
        Ok(self.run(x)?)
    }

    fn projections(&self) -> Vec<&Projection> {
        self.layer.projections().collect()
    }
}
