//! Logits, losses and greedy continuations of recorded prompts.

use std::path::Path;

use lora_llm::{
    Base, Decoder, Example,
    generate::{GenerateOptions, Sampling, generate},
    objective::evaluate,
};
use lora_parity::{Failure, Report};
use lora_torch::Torch;
use serde_json::Value;
use tch::{Kind, Tensor};

use super::ids;

/// Logits of 32-bit models reach 20; both sides sum in their own order.
const LOGITS: [f64; 2] = [1e-4, 1e-5];
/// Mean losses.
const LOSS: [f64; 2] = [1e-6, 1e-5];

pub(super) fn prompts(cases: &Value, base: &Path, report: &mut Report) -> Result<(), Failure> {
    let decoder = Base::open(base, &Torch::CPU)?.decoder;
    for case in cases.as_array().into_iter().flatten() {
        let prompt = ids(&case["ids"])?;
        let logits = last_logits(&decoder, &prompt)?;
        for (id, expected) in ids(&case["top_ids"])?.iter().zip(case["top_logits"].as_array().into_iter().flatten()) {
            let expected = expected.as_f64().ok_or("no logit")?;
            report.close("logit", f64::from(logits[*id as usize]), expected, LOGITS);
        }
        let mut order: Vec<usize> = (0..logits.len()).collect();
        order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]));
        report.equal("most likely id", &[order[0] as u32], &ids(&case["top_ids"])?[..1]);
        report.close("loss", loss(&decoder, &prompt)?, case["loss"].as_f64().ok_or("no loss")?, LOSS);
        // The recorded continuations end with the end mark.
        let expected = ids(&case["greedy_ids"])?;
        let options = GenerateOptions { sampling: Sampling::GREEDY, max_tokens: expected.len(), stop: Vec::new() };
        report.equal("greedy ids", &generate(&decoder, &prompt, &options)?, &expected);
    }
    Ok(())
}

pub(super) fn windows(parity: &Value, base: &Path, report: &mut Report) -> Result<(), Failure> {
    let decoder = Base::open(base, &Torch::CPU)?.decoder;
    let losses = parity["window_losses"].as_array().ok_or("no losses")?;
    for (window, expected) in parity["windows"].as_array().into_iter().flatten().zip(losses) {
        report.close("loss", loss(&decoder, &ids(window)?)?, expected.as_f64().ok_or("no loss")?, LOSS);
    }
    Ok(())
}

fn last_logits(decoder: &Decoder, ids: &[u32]) -> Result<Vec<f32>, Failure> {
    let _no_grad = tch::no_grad_guard();
    let ids: Vec<i64> = ids.iter().map(|id| i64::from(*id)).collect();
    let logits = decoder.logits(&Tensor::f_from_slice(&ids)?.f_unsqueeze(0)?, None)?; // [1, s, v]
    Ok(Vec::try_from(logits.f_select(0, 0)?.f_select(0, -1)?.f_to_kind(Kind::Float)?)?)
}

/// The mean loss of every id after the first.
fn loss(decoder: &Decoder, ids: &[u32]) -> Result<f64, Failure> {
    let example = Example { ids: ids.to_vec(), trained: vec![true; ids.len()] };
    Ok(evaluate(decoder, &[example], 1)?.loss)
}
