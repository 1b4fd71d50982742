//! One loss however it is computed: packed or padded, in micro-steps or at once, with activations kept or computed again.

#![expect(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use std::{num::NonZeroUsize, path::Path};

use lora_core::{AdapterConfig, AnyAdapter, Draw, Method, Purpose};
use lora_llm::{
    Base, Decoder, Example,
    example::{Padding, pack},
    objective::{EmbeddingNoise, LanguageObjective, LanguageOptions, Source, TrainingSet, evaluate},
};
use lora_torch::{
    Model as _, Objective as _, Report, Target, Torch, TrainOptions, Trainer, optimizer::OptimizerConfig,
    schedule::Schedule,
};

/// 32-bit sums in another order, over some steps of training.
const TOLERANCE: f64 = 2e-5;

const PADDED: Padding = Padding { multiple: 1, packed: false };

fn decoder(name: &str) -> Decoder {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/architectures").join(name);
    Base::open(&folder, &Torch::CPU).unwrap().decoder
}

/// Examples of very different lengths, of which very different shares count.
fn examples() -> Vec<Example> {
    let lengths = [(4, 3), (19, 1), (7, 6), (12, 0), (3, 1), (9, 8), (16, 5), (2, 1)];
    let example = |(number, (length, from)): (usize, (usize, usize))| {
        let mut draw = Draw::new(1, Purpose::Token, number as u64, 0);
        Example {
            ids: (0..length).map(|_| 3 + draw.below(45)).collect(),
            trained: (0..length).map(|at| at >= from).collect(),
        }
    };
    lengths.into_iter().enumerate().map(example).collect()
}

/// The same examples in every step, in given rows, dealt out to micro-steps.
#[derive(Debug)]
struct Fixed {
    examples: Vec<Example>,
    micro_steps: Vec<Vec<Vec<usize>>>,
}

impl Source for Fixed {
    fn rows(&self, _: u64, micro: u64) -> Vec<Vec<&Example>> {
        let rows = &self.micro_steps[micro as usize];
        rows.iter().map(|row| row.iter().map(|index| &self.examples[*index]).collect()).collect()
    }
}

/// Some steps of training: what is reported, and every number of the adapter afterwards.
fn train(name: &str, micro_steps: Vec<Vec<Vec<usize>>>, recompute: bool, padding: Padding) -> (Vec<Report>, Vec<f32>) {
    train_on(examples(), name, micro_steps, recompute, padding)
}

fn train_on(
    examples: Vec<Example>,
    name: &str,
    micro_steps: Vec<Vec<Vec<usize>>>,
    recompute: bool,
    padding: Padding,
) -> (Vec<Report>, Vec<f32>) {
    let accumulation = micro_steps.len() as u64;
    let source = Fixed { examples, micro_steps };
    let options = LanguageOptions { accumulation, recompute, padding };
    trained(LanguageObjective::new(decoder(name), source, options), accumulation)
}

fn trained(objective: LanguageObjective<Fixed>, accumulation: u64) -> (Vec<Report>, Vec<f32>) {
    let options = TrainOptions {
        seed: 3,
        steps: 4,
        accumulation,
        adapter: AdapterConfig::new(Method::Lora, NonZeroUsize::new(2).unwrap(), 4.0).unwrap(),
        // Plain descent: the rule passes differences on as they are, where Adam would blow up those of tiny gradients.
        optimizer: OptimizerConfig::SGD,
        rate: 0.05,
        up_rate: 1.0,
        schedule: Schedule::default(),
        clip: None,
        ema: None,
        graphs: false,
    };
    let mut trainer = Trainer::new(&Torch::CPU, objective, &mut |_| Some(Target::default()), options).unwrap();
    let reports = (0..4).flat_map(|_| trainer.step().unwrap()).collect();
    let mut values = Vec::new();
    for module in trainer.adapters(false).unwrap() {
        let AnyAdapter::Lora(lora) = module.adapter else { panic!("not a LoRA") };
        for factor in [lora.down, lora.up] {
            values.extend(Vec::<f32>::try_from(factor.reshape([-1])).unwrap());
        }
    }
    (reports, values)
}

fn compare(what: &str, (left, left_values): (Vec<Report>, Vec<f32>), (right, right_values): (Vec<Report>, Vec<f32>)) {
    assert!(left[3].loss < left[0].loss, "{what}: nothing was learnt");
    for (left, right) in left.iter().zip(&right) {
        let error = (left.loss - right.loss).abs();
        assert!(error < TOLERANCE * left.loss, "{what}: loss of step {} differs by {error}", left.step);
        let error = (left.gradient_norm - right.gradient_norm).abs();
        assert!(error < TOLERANCE * left.gradient_norm, "{what}: norm of step {} differs by {error}", left.step);
    }
    let error = left_values.iter().zip(&right_values).map(|(a, b)| f64::from((a - b).abs())).fold(0.0, f64::max);
    assert!(error < TOLERANCE && left_values.len() == right_values.len(), "{what}: a factor differs by {error}");
}

fn alone(indices: impl IntoIterator<Item = usize>) -> Vec<Vec<usize>> {
    indices.into_iter().map(|index| vec![index]).collect()
}

#[test]
fn packed_examples_have_the_loss_that_they_have_alone() {
    for name in ["llama3", "mistral", "qwen2_window", "qwen3"] {
        let rows = pack(&examples(), 24);
        assert!(rows.len() < 5);
        let packed = train(name, vec![rows], false, Padding { multiple: 8, packed: true });
        compare(name, train(name, vec![alone(0..8)], false, PADDED), packed);
    }
}

#[test]
fn micro_steps_add_up_to_the_step_of_the_whole_batch() {
    let micro_steps = vec![alone([0, 2]), alone([1, 3]), alone([4, 5]), alone([6, 7])];
    compare(
        "micro-steps",
        train("llama3", vec![alone(0..8)], false, PADDED),
        train("llama3", micro_steps, false, PADDED),
    );
    let uneven = vec![alone([0, 1, 2, 3, 4]), alone([5]), alone([6, 7])];
    compare("uneven", train("llama3", vec![alone(0..8)], false, PADDED), train("llama3", uneven, false, PADDED));
}

#[test]
fn activations_computed_again_give_the_same_gradients() {
    for name in ["llama_bias", "mistral", "qwen3"] {
        let plain = train(name, vec![alone(0..8)], false, PADDED);
        compare(name, plain, train(name, vec![alone(0..8)], true, PADDED));
    }
}

#[test]
fn a_last_layer_for_the_rows_that_count_gives_the_same_gradients() {
    let sparse = |name: &str, recompute, packed| {
        let mut examples = vec![examples()[1].clone(), examples()[6].clone()];
        examples[0].trained = (0..19).map(|at| at == 9 || at == 17).collect();
        examples[1].trained = (0..16).map(|at| at == 15).collect();
        let rows = if packed { vec![vec![0, 1]] } else { alone([0, 1]) };
        train_on(examples, name, vec![rows], recompute, Padding { multiple: 1, packed })
    };
    for name in ["llama3", "mistral", "qwen2_window", "qwen3"] {
        compare(name, sparse(name, false, false), sparse(name, true, false));
        compare(name, sparse(name, false, false), sparse(name, false, true));
        // The mask's own rows against those of libtorch's causal kernel: the same loss as in logits of everything.
        let decoder = decoder(name);
        let ids = &examples()[1].ids;
        let all: Vec<i64> = ids.iter().map(|id| i64::from(*id)).collect();
        let logits = tch::no_grad(|| decoder.logits(&tch::Tensor::from_slice(&all).unsqueeze(0), None).unwrap());
        let expected = -logits.log_softmax(-1, tch::Kind::Float).double_value(&[0, 16, all[17]]);
        let example = Example { ids: ids.clone(), trained: (0..19).map(|at| at == 17).collect() };
        let loss = evaluate(&decoder, &[example], 1).unwrap().loss;
        assert!((loss - expected).abs() < TOLERANCE, "{name}: {loss} and {expected}");
    }
}

#[test]
fn noise_on_the_embeddings_is_a_function_of_seed_and_step_and_has_its_bound() {
    let noise = EmbeddingNoise { amount: 5.0, seed: 4 };
    let plain = noisy(None, vec![alone([1, 4])], PADDED);
    let noisy = noisy(Some(noise), vec![alone([1, 4])], PADDED);
    let drawn = |step| noisy.batch(step, 0).unwrap().inputs.pop().unwrap();
    assert_eq!(drawn(0).size(), [2, 19, 16]);
    assert_eq!(drawn(0), drawn(0));
    assert_ne!(drawn(0), drawn(1));
    for (row, ids) in [(0, 19), (1, 3)] {
        let row = drawn(0).get(row);
        let (of_ids, of_padding) = (row.narrow(0, 0, ids), row.narrow(0, ids, 19 - ids));
        let (most, bound) = (of_ids.abs().max().double_value(&[]), 5.0 / ((ids * 16) as f64).sqrt());
        assert!(most <= bound && most > 0.8 * bound, "{most} of {bound}");
        assert_eq!(of_padding.abs().sum(None).double_value(&[]), 0.0);
    }
    let loss = |inputs: &[tch::Tensor]| noisy.loss(inputs).unwrap().double_value(&[]);
    let mut inputs = noisy.batch(0, 0).unwrap().inputs;
    let with = loss(&inputs);
    inputs.pop();
    assert_eq!(loss(&inputs), plain.loss(&plain.batch(0, 0).unwrap().inputs).unwrap().double_value(&[]));
    assert_ne!(loss(&inputs), with);
}

#[test]
fn an_example_gets_the_same_noise_packed_or_alone_and_on_any_thread() {
    // Little enough that four steps learn more than it blurs.
    let noise = || Some(EmbeddingNoise { amount: 0.1, seed: 4 });
    let padded = noisy(noise(), vec![alone([0, 1, 2, 3])], PADDED);
    let packed = Padding { multiple: 8, packed: true };
    let packed = noisy(noise(), vec![vec![vec![0, 1], vec![2, 3]]], packed);
    let lanes = noisy(noise(), vec![alone([0, 1, 2, 3])], PADDED).with_replicas([decoder("qwen3"), decoder("qwen3")]);
    let padded = trained(padded, 1);
    compare("packed", trained(packed, 1), padded.clone());
    compare("threads", trained(lanes, 1), padded.clone());
    let without = trained(noisy(None, vec![alone([0, 1, 2, 3])], PADDED), 1);
    assert!(without.0[0].loss != padded.0[0].loss);
}

/// An objective on `qwen3` with noise.
fn noisy(
    noise: Option<EmbeddingNoise>,
    micro_steps: Vec<Vec<Vec<usize>>>,
    padding: Padding,
) -> LanguageObjective<Fixed> {
    let source = Fixed { examples: examples(), micro_steps };
    let options = LanguageOptions { accumulation: 1, recompute: false, padding };
    let objective = LanguageObjective::new(decoder("qwen3"), source, options);
    noise.into_iter().fold(objective, LanguageObjective::with_noise)
}

#[test]
fn a_step_reports_the_loss_of_an_evaluation() {
    let (reports, _) = train("qwen2", vec![alone(0..8)], false, PADDED);
    let expected = evaluate(&decoder("qwen2"), &examples(), 3).unwrap();
    assert!((reports[0].loss - expected.loss).abs() < TOLERANCE);
    assert_eq!(expected.targets, examples().iter().map(Example::targets).sum::<usize>());
}

#[test]
fn every_epoch_has_every_example_once_in_an_order_of_its_own() {
    let decoder = decoder("llama2");
    let set = TrainingSet::new(examples(), &decoder, 9, 3, 2, None).unwrap();
    assert_eq!(set.rows_an_epoch(), 8);
    let places: Vec<Example> = (0..4)
        .flat_map(|step| (0..2).map(move |micro| (step, micro)))
        .flat_map(|(step, micro)| set.rows(step, micro))
        .map(|row| row[0].clone())
        .collect();
    let sorted = |epoch: &[Example]| {
        let mut ids: Vec<Vec<u32>> = epoch.iter().map(|example| example.ids.clone()).collect();
        ids.sort();
        ids
    };
    assert_eq!(sorted(&places[..8]), sorted(&examples()));
    assert_eq!(sorted(&places[8..16]), sorted(&examples()));
    assert_ne!(places[..8], places[8..16]);
    assert_eq!(set.rows(2, 1), TrainingSet::new(examples(), &decoder, 9, 3, 2, None).unwrap().rows(2, 1));
}

#[test]
fn examples_that_the_model_cannot_read_are_refused() {
    let decoder = decoder("llama2");
    let refusal = |example: Example| TrainingSet::new(vec![example], &decoder, 0, 1, 1, None).unwrap_err().to_string();
    let example = |length: usize, id: u32, trained| Example { ids: vec![id; length], trained: vec![trained; length] };
    assert!(refusal(example(65, 3, true)).contains("65 tokens"), "too long");
    assert!(refusal(example(5, 48, true)).contains("token 48"), "unknown");
    assert!(refusal(example(5, 3, false)).contains("no example"), "nothing counts");
}
