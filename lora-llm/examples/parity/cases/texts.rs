//! Texts and conversations as ids, and lines of training data as examples.

use std::{fs, path::Path};

use lora_llm::{
    Example,
    chat::{ChatTemplate, Conversation, Message},
    tokenizer::Tokenizer,
};
use lora_parity::{Failure, Report};
use serde_json::Value;

use super::ids;

pub(super) fn tokenize(cases: &Value, base: &Path, report: &mut Report) -> Result<(), Failure> {
    let tokenizer = Tokenizer::open(base)?;
    for case in cases.as_array().into_iter().flatten() {
        let text = case["text"].as_str().ok_or("no text")?;
        report.equal(&format!("ids of {text:?}"), &tokenizer.encode(text, true)?.ids, &ids(&case["ids"])?);
        let plain = ids(&case["ids_plain"])?;
        report.equal(&format!("plain ids of {text:?}"), &tokenizer.encode(text, false)?.ids, &plain);
        let decoded = case["decoded"].as_str().ok_or("no decoded text")?;
        report.equal("decoded text", &[tokenizer.decode(&ids(&case["ids"])?, true)?.as_str()], &[decoded]);
    }
    Ok(())
}

pub(super) fn chat(cases: &Value, base: &Path, report: &mut Report) -> Result<(), Failure> {
    let tokenizer = Tokenizer::open(base)?;
    let template = ChatTemplate::open(base, None, &tokenizer)?;
    for case in cases.as_array().into_iter().flatten() {
        let messages: Vec<Message> = serde_json::from_value(case["messages"].clone())?;
        let whole = template.render(&Conversation::new(&messages))?.text;
        report.equal("rendered text", &[whole.as_str()], &[case["rendered"].as_str().unwrap_or_default()]);
        report.equal("ids", &tokenizer.encode(&whole, false)?.ids, &ids(&case["ids"])?);
        // The prompt ends before the last answer.
        let before = messages.split_last().map_or(&[][..], |(_, before)| before);
        let prompt = template.render(&Conversation::new(before).prompt())?.text;
        report.equal("prompt", &[prompt.as_str()], &[case["prompt"].as_str().unwrap_or_default()]);
    }
    Ok(())
}

/// A line of data: what comes first, and what is to be said then.
pub(super) struct Lesson {
    pub(super) prompt: Vec<u32>,
    pub(super) answer: Vec<u32>,
}

impl Lesson {
    /// What is trained is the answer.
    pub(super) fn example(&self) -> Example {
        let ids = [self.prompt.as_slice(), &self.answer].concat();
        let trained = (0..ids.len()).map(|at| at >= self.prompt.len()).collect();
        Example { ids, trained }
    }
}

/// The lines of a file of the materials, which lies beside the case or with the assets of this repository.
pub(super) fn lessons(folder: &Path, name: &str, base: &Path) -> Result<Vec<Lesson>, Failure> {
    let assets = Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/texts");
    let places = [folder.join("../../../data/llm").join(name), assets.join(name)];
    let path = places.iter().find(|path| path.is_file()).ok_or_else(|| format!("{name} is nowhere"))?;
    let tokenizer = Tokenizer::open(base)?;
    let special = tokenizer.special();
    let template = ChatTemplate::open(base, None, &tokenizer)?;
    let lesson = |line: &str| -> Result<Lesson, Failure> {
        let line: Value = serde_json::from_str(line)?;
        if let (Some(prompt), Some(completion)) = (line["prompt"].as_str(), line["completion"].as_str()) {
            let prompt = special.begin.into_iter().chain(tokenizer.encode(prompt, false)?.ids).collect();
            let answer = tokenizer.encode(completion, false)?.ids.into_iter().chain(special.end).collect();
            return Ok(Lesson { prompt, answer });
        }
        let messages: Vec<Message> = serde_json::from_value(line["messages"].clone())?;
        let before = messages.split_last().map_or(&[][..], |(_, before)| before);
        let prompt = tokenizer.encode(&template.render(&Conversation::new(before).prompt())?.text, false)?.ids;
        let whole = tokenizer.encode(&template.render(&Conversation::new(&messages))?.text, false)?.ids;
        let answer = whole.strip_prefix(prompt.as_slice()).ok_or("a prompt that is no prefix of its text")?.to_vec();
        Ok(Lesson { prompt, answer })
    };
    fs::read_to_string(path)?.lines().map(lesson).collect()
}
