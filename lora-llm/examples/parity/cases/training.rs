//! Hundreds of steps of training, recorded by transformers and peft; and what was learnt in them.

use std::{collections::BTreeMap, num::NonZeroUsize, path::Path};

use lora_core::{
    AdapterConfig, AnyAdapter, Backend, Method,
    format::{AdapterFile, Strengths},
};
use lora_llm::{
    Base, BaseFiles, Decoder, Example,
    example::Padding,
    generate::{GenerateOptions, Sampling, generate},
    objective::{LanguageObjective, LanguageOptions, Source, evaluate},
};
use lora_parity::{Failure, Report};
use lora_torch::{
    Projections, Target, Torch, TrainOptions, Trainer,
    optimizer::OptimizerConfig,
    schedule::{Decay, Schedule},
};
use serde_json::Value;

use super::{
    read,
    texts::{Lesson, lessons},
};

/// What differs in rounding grows over hundreds of steps; transformers on another machine is off by 2e-5 to 2e-4.
const LOSS: [f64; 2] = [2e-4, 1e-3];
const GRADIENT_NORM: [f64; 2] = [2e-3, 5e-3];
const LEARNING_RATE: [f64; 2] = [1e-12, 1e-9];
/// Of all factors together, relative to their norm.
const FACTORS: f64 = 2e-3;
/// One answer in fifty may fall the other way.
const MATCHES: f64 = 0.021;
/// Losses after training, rounded to four digits in the record.
const LOSS_AFTER: [f64; 2] = [1e-3, 1e-2];
/// What transformers' linear schedule warms up in these runs.
const WARMUP: u64 = 10;

pub(super) fn run(folder: &Path, task: &str, base: &Path, report: &mut Report) -> Result<(), Failure> {
    let trace = read(&folder.join("trace.json"))?;
    let results = read(&folder.join("results.json"))?["results"][0].take();
    let number = |key: &str| results[key].as_f64().ok_or_else(|| format!("results.json: no {key}"));
    let numbers = |key: &str| -> Result<Vec<f64>, Failure> {
        Ok(serde_json::from_value(trace[key].clone()).map_err(|error| format!("trace.json: {key}: {error}"))?)
    };
    let (losses, norms, rates) = (numbers("loss")?, numbers("grad_norm")?, numbers("lr")?);
    let (steps, batch) = (number("steps")? as u64, number("batch")? as usize);
    let rank = NonZeroUsize::new(number("r")? as usize).ok_or("rank 0")?;

    let files = BaseFiles::find(base)?;
    let model = files.model()?;
    let start = AdapterFile::read(&folder.join("init"), &model)?;
    report.equal("keys that were not applied", &start.unapplied, &[]);
    let mut starts = BTreeMap::new();
    for module in &start.modules {
        let adapter = module.adapter.map(&mut |_, array| Torch::CPU.tensor(&array.values, &array.shape))?;
        starts.insert(module.path.clone(), adapter);
    }
    let examples = lessons(folder, &format!("{task}_train.jsonl"), base)?.iter().map(Lesson::example).collect();
    let order: Vec<usize> = serde_json::from_value(trace["order"].clone())?;
    let source = Recorded { examples, order, batch };
    let padding = Padding { multiple: 1, packed: false };
    let options = LanguageOptions { accumulation: 1, recompute: false, padding };
    let objective = LanguageObjective::new(files.load(&Torch::CPU)?.decoder, source, options);
    let options = TrainOptions {
        seed: 0,
        steps,
        accumulation: 1,
        adapter: AdapterConfig::new(Method::Lora, rank, number("alpha")?)?,
        optimizer: OptimizerConfig::AdamW { betas: [0.9, 0.999], eps: 1e-8, weight_decay: 0.01 },
        rate: number("lr")?,
        up_rate: 1.0,
        schedule: Schedule { decay: Decay::Linear, warmup: WARMUP },
        clip: Some(1.0),
        ema: None,
        graphs: false,
    };
    let mut select = |projection: &lora_torch::Projection| {
        starts.remove(projection.path()).map(|start| Target { rate: 1.0, start: Some(start) })
    };
    let mut trainer = Trainer::new(&Torch::CPU, objective, &mut select, options)?;
    report.equal("modules without a place", &starts.keys().collect::<Vec<_>>(), &[]);
    for step in 0..steps as usize {
        for done in trainer.step()? {
            report.close("loss", done.loss, losses[step], LOSS);
            report.close("grad_norm", done.gradient_norm, norms[step], GRADIENT_NORM);
            report.close("lr", done.rate, rates[step], LEARNING_RATE);
        }
    }
    compare_factors(&AdapterFile::read(&folder.join("adapter"), &model)?, &trainer, report)?;
    trainer.with_adapters(false, |objective| {
        learnt(folder, task, base, objective.decoder(), &results, report).map_err(to_torch)
    })?;
    reloaded(folder, task, base, &results, report)
}

/// Evaluation loss and exact answers, where the record has them.
fn learnt(
    folder: &Path,
    task: &str,
    base: &Path,
    decoder: &Decoder,
    results: &Value,
    report: &mut Report,
) -> Result<(), Failure> {
    let questions = lessons(folder, &format!("{task}_eval.jsonl"), base)?;
    let examples: Vec<Example> = questions.iter().map(Lesson::example).collect();
    if let Some(expected) = results["eval_loss_after"].as_f64() {
        let loss = evaluate(decoder, &examples, 20)?.loss;
        report.close("eval_loss_after", loss, expected, LOSS_AFTER);
    }
    if let Some(expected) = results["exact_match_after"].as_f64() {
        let mut right = 0;
        for Lesson { prompt, answer } in &questions {
            let options = GenerateOptions { sampling: Sampling::GREEDY, max_tokens: answer.len(), stop: Vec::new() };
            right += usize::from(generate(decoder, prompt, &options)? == *answer);
        }
        report.push("exact_match_after", (right as f64 / questions.len() as f64 - expected).abs(), MATCHES);
    }
    Ok(())
}

/// The recorded adapter beside the base answers as it did when it was saved.
fn reloaded(folder: &Path, task: &str, base: &Path, results: &Value, report: &mut Report) -> Result<(), Failure> {
    let mut model = Base::open(base, &Torch::CPU)?;
    let file = AdapterFile::read(&folder.join("adapter"), &model.files.model()?)?;
    lora_torch::attach(model.decoder.projections(), &[(&file, &Strengths::all(1.0))])?;
    learnt(folder, task, base, &model.decoder, results, report)
}

fn compare_factors(
    expected: &AdapterFile,
    trainer: &Trainer<LanguageObjective<Recorded>>,
    report: &mut Report,
) -> Result<(), Failure> {
    let factors = |adapter: &AnyAdapter<tch::Tensor>| -> Result<[Vec<f32>; 2], Failure> {
        let AnyAdapter::Lora(lora) = adapter else { return Err("not a LoRA".into()) };
        Ok([Torch::CPU.values(&lora.down)?, Torch::CPU.values(&lora.up)?])
    };
    let mut got = BTreeMap::new();
    for module in trainer.adapters(false)? {
        got.insert(module.path.clone(), factors(&module.adapter)?);
    }
    let (mut difference, mut norm) = (0.0, 0.0);
    for module in &expected.modules {
        let adapter = module.adapter.map(&mut |_, array| Torch::CPU.tensor(&array.values, &array.shape))?;
        let got = got.remove(&module.path).ok_or_else(|| format!("`{}` was not trained", module.path))?;
        for (got, expected) in got.iter().zip(&factors(&adapter)?) {
            report.equal("size of a factor", &[got.len()], &[expected.len()]);
            difference += got.iter().zip(expected).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>();
            norm += expected.iter().map(|b| f64::from(*b).powi(2)).sum::<f64>();
        }
    }
    report.equal("modules that were not recorded", &got.keys().collect::<Vec<_>>(), &[]);
    report.push("final factors", (difference / norm).sqrt(), FACTORS);
    Ok(())
}

fn to_torch(failure: Failure) -> lora_torch::Error {
    lora_torch::Error::Torch { message: failure.to_string() }
}

/// Examples in the order in which they were recorded.
#[derive(Debug)]
struct Recorded {
    examples: Vec<Example>,
    order: Vec<usize>,
    batch: usize,
}

impl Source for Recorded {
    fn rows(&self, step: u64, _: u64) -> Vec<Vec<&Example>> {
        let first = step as usize * self.batch;
        self.order[first..first + self.batch].iter().map(|index| vec![&self.examples[*index]]).collect()
    }
}
