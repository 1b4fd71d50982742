//! Compares chat templates with `transformers`, over a folder of templates outside the repository.
//!
//! ```text
//! python lora-llm/tests/fixtures/templates/make.py FOLDER expected.json
//! cargo run -p lora-llm --example templates -- FOLDER expected.json
//! ```
//!
//! Equal means: the same text, or a refusal on both sides; and the same parts where `{% generation %}` marks them. Over 142
//! templates of Llama, Qwen, Mistral, Gemma, Phi, Granite, GLM, Command, Nemotron, Kimi, gpt-oss and others, as TRL,
//! huggingface.js, mistral.rs, minja and chat_templates carry them, all 142 were equal to transformers 5.23.0.

use std::{
    collections::BTreeMap,
    env, fs,
    path::Path,
    process::ExitCode,
    time::{Duration, SystemTime},
};

use lora_llm::chat::{ChatTemplate, Conversation, Message, Rendered};
use serde_json::{Map, Value};

#[expect(clippy::print_stdout, reason = "an example talks")]
fn main() -> Result<ExitCode, Box<dyn std::error::Error>> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let [folder, expected] = arguments.as_slice() else { return Err("usage: templates FOLDER EXPECTED.json".into()) };
    let cases = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/templates/conversations.json");
    let cases: BTreeMap<String, Value> = serde_json::from_str(&fs::read_to_string(cases)?)?;
    let expected: BTreeMap<String, BTreeMap<String, Value>> = serde_json::from_str(&fs::read_to_string(expected)?)?;
    let (mut equal, mut laxer) = (0, 0);
    for (name, results) in &expected {
        let source = fs::read_to_string(Path::new(folder).join(name))?.replace("\r\n", "\n");
        let source = match name.ends_with(".json") {
            true => serde_json::from_str::<Value>(&source)?["chat_template"].as_str().unwrap_or_default().to_owned(),
            false => source,
        };
        let (mut differences, mut accepted) = (Vec::new(), Vec::new());
        for (case, wanted) in results {
            let got = render(name, &source, &cases[case]);
            match (wanted.get("text").and_then(Value::as_str), got) {
                (Some(text), Ok(got)) if got.text == text => match (wanted.get("spans"), letters(&got)) {
                    (Some(spans), got) if got != *spans => differences.push(format!("{case}: {got}, expected {spans}")),
                    _ => {}
                },
                (Some(text), Ok(got)) => differences.push(format!("{case}: {}", first_difference(text, &got.text))),
                (Some(_), Err(error)) => differences.push(format!("{case}: {error}")),
                (None, Ok(_)) => accepted.push(format!("{case}: transformers refuses, {}", wanted["error"])),
                (None, Err(_)) => {}
            }
        }
        equal += usize::from(differences.is_empty());
        laxer += usize::from(differences.is_empty() && !accepted.is_empty());
        differences.iter().chain(&accepted).for_each(|difference| println!("{name}: {difference}"));
    }
    println!("{equal} of {} templates equal over {} conversations,", expected.len(), cases.len());
    println!("{laxer} of them also render a conversation that transformers refuses");
    Ok(if equal == expected.len() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn render(name: &str, source: &str, case: &Value) -> Result<Rendered, lora_llm::chat::Error> {
    let special = ["bos_token <s>", "eos_token </s>", "unk_token <unk>", "pad_token <pad>"];
    let special = special.iter().filter_map(|pair| pair.split_once(' ')).map(|(a, b)| (a.to_owned(), b.to_owned()));
    let template = ChatTemplate::with_special(name, source.to_owned(), special.collect(), Vec::new())?;
    let messages: Vec<Message> =
        case["messages"].as_array().into_iter().flatten().filter_map(|message| message.as_object().cloned()).collect();
    let variables: Option<&Map<String, Value>> = case.get("variables").and_then(Value::as_object);
    let conversation = Conversation {
        tools: case.get("tools").and_then(Value::as_array).map(Vec::as_slice),
        generation_prompt: case.get("add_generation_prompt").and_then(Value::as_bool).unwrap_or(false),
        variables,
        now: Some(SystemTime::UNIX_EPOCH + Duration::from_secs(1_753_434_000)),
        ..Conversation::new(&messages)
    };
    template.render(&conversation)
}

/// The generated parts, counted in letters as Python counts them.
fn letters(rendered: &Rendered) -> Value {
    let count = |at: usize| rendered.text[..at].chars().count();
    rendered.generated.iter().flatten().map(|span| Value::from(vec![count(span.start), count(span.end)])).collect()
}

fn first_difference(wanted: &str, got: &str) -> String {
    let at = wanted.bytes().zip(got.bytes()).take_while(|(a, b)| a == b).count();
    let part = |text: &str| {
        String::from_utf8_lossy(&text.as_bytes()[at.saturating_sub(20).min(text.len())..(at + 40).min(text.len())])
            .into_owned()
    };
    format!("at byte {at}: {:?}, expected {:?}", part(got), part(wanted))
}
