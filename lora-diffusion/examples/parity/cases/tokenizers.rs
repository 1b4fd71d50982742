//! Prompts to ids.

use std::path::Path;

use lora_diffusion::tokenizer::{Padding, Tokenizer};
use lora_parity::{Failure, Report};
use serde_json::Value;

use super::fixture::Case;

pub(crate) fn run(case: &Case, base: &Path, report: &mut Report) -> Result<(), Failure> {
    let tokenizer = match case.config["vocabulary"].is_null() {
        true => Tokenizer::open(&base.join("tokenizer"))?,
        false => Tokenizer::openai(Padding::End)?,
    };
    let rows: Value = serde_json::from_slice(&std::fs::read(case.folder.join("prompts.json"))?)?;
    let rows = rows.as_array().ok_or("prompts.json is no list")?;
    let prompt = |row: &Value| row["prompt"].as_str().unwrap_or_default().to_owned();
    for row in rows {
        let expected: Vec<u64> = row["ids"].as_array().into_iter().flatten().filter_map(Value::as_u64).collect();
        let got: Vec<u64> = tokenizer.encode(&prompt(row)).into_iter().map(u64::from).collect();
        report.equal(&format!("ids of {:?}", prompt(row)), &got, &expected);
    }
    if case.has("ids") {
        let expected = Vec::<i64>::try_from(case.tensor("ids")?.f_flatten(0, -1)?)?;
        let got: Vec<i64> = rows.iter().flat_map(|row| tokenizer.ids(&prompt(row))).collect();
        report.equal("ids cut and padded", &got, &expected);
    }
    Ok(())
}
