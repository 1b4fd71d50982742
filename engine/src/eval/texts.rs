//! Loss, perplexity, and the share of questions that are answered word for word.

use std::process::ExitCode;

use lora_cli::{
    Failure,
    options::{DataConfig, values::LoraFile},
    progress::Stage,
    text,
    ui::Ui,
};
use lora_llm::{
    Decoder,
    data::Parts,
    generate::{GenerateOptions, Sampling, Session},
    objective::evaluate,
    question::Question,
};
use lora_torch::Projections as _;
use serde_json::json;

use super::Measures;
use crate::{failures::Explain as _, machine::Machine, texts::TextBase};

/// Tokens that an answer may have beyond those of the right one: a longer one is wrong already.
const SPARE: usize = 4;

/// Measures; if questions are to be answered, the model takes the likeliest token each time.
///
/// # Errors
/// Whatever stops it, as it is to be shown.
pub(super) fn run(config: &DataConfig, lora: &[LoraFile], measures: Measures, ui: &Ui) -> Result<ExitCode, Failure> {
    let machine = Machine::choose(config.device, config.dtype)?;
    let base = TextBase::find(config.base()?, config.chat_template.as_deref(), config.quantize)?;
    let dataset = base.read(&Parts::held_out(&config.data).explain()?, config.text, 0.0, config.seed, None)?;
    let (mut decoder, mut adapters) = base.load(lora, &machine, ui)?;
    let _no_grad = tch::no_grad_guard();
    let mut questions = Vec::new();
    if measures.answers {
        for example in &dataset.train {
            questions.extend(Question::of(example, &base.tokenizer).explain()?);
        }
    }
    let variants = if measures.compare { adapters.variants().into_iter().map(Some).collect() } else { vec![None] };
    let mut results = Vec::new();
    for variant in &variants {
        if let Some(variant) = variant {
            adapters.set(decoder.projections(), &variant.strengths)?;
        }
        let measured = evaluate(&decoder, &dataset.train, config.batch.get()).explain()?;
        let right = right_answers(&questions, &decoder, &base, ui)?;
        let exact = (!questions.is_empty()).then(|| right as f64 / questions.len() as f64);
        let perplexity = measured.loss.exp();
        let document = json!({
            "loss": measured.loss,
            "perplexity": perplexity,
            "tokens": measured.targets,
            "examples": dataset.train.len(),
            "exact_match": exact,
            "questions": questions.len(),
        });
        let mut lines = vec![format!(
            "loss {:.6}, perplexity {perplexity:.4} over {} of {}",
            measured.loss,
            text::plural(measured.targets as u64, "token"),
            text::plural(dataset.train.len() as u64, "example")
        )];
        lines.extend(exact.map(|share| {
            format!("exact match {share:.4}, {right} of {}", text::plural(questions.len() as u64, "question"))
        }));
        results.push((variant.as_ref().map(|variant| variant.label.as_str()), document, lines));
    }
    super::write(&results, ui)?;
    Ok(ExitCode::SUCCESS)
}

/// How many questions are answered word for word.
fn right_answers(questions: &[Question], decoder: &Decoder, base: &TextBase, ui: &Ui) -> Result<usize, Failure> {
    let mut stage = Stage::new(*ui, "answering", questions.len() as u64);
    let mut right = 0;
    let mut session = Session::new(decoder).explain()?;
    for question in questions {
        let options =
            GenerateOptions { sampling: Sampling::GREEDY, max_tokens: question.tokens + SPARE, stop: base.ends() };
        let mut ids = Vec::new();
        session
            .generate(&question.prompt, &options, &mut |id| {
                ids.push(id);
                std::ops::ControlFlow::Continue(())
            })
            .explain()?;
        let answer = base.tokenizer.decode(&ids, false).explain()?;
        right += usize::from(question.is_answered_by(&answer));
        stage.advance(1);
    }
    Ok(right)
}
