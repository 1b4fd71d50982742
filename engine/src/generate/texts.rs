//! From a prompt to an answer.

use std::{io, process::ExitCode};

use lora_cli::{Failure, options::GenerateConfig, ui::Ui};
use lora_core::format::write_atomically;
use lora_llm::generate::Session;
use serde_json::json;

use crate::{
    failures::Explain as _,
    machine::Machine,
    texts::{Answer, Speaker, TextBase},
};

/// Answers; on stdout, as it is thought of, or into the file that was named.
///
/// # Errors
/// Whatever stops it, as it is to be shown.
pub(super) fn run(config: &GenerateConfig, ui: &Ui) -> Result<ExitCode, Failure> {
    let machine = Machine::choose(config.device, config.dtype)?;
    let base = TextBase::find(&config.base, config.answer.chat_template.as_deref(), config.quantize)?;
    let ids = base.question(&config.prompt, &config.answer)?;
    let decoder = base.load(&config.lora, &machine, ui)?;
    let streamed = !ui.json && config.out.is_none();
    let mut session = Session::new(&decoder).explain()?;
    let mut answers = Vec::new();
    for at in 0..config.count.get() as u64 {
        let seed = config.seed.wrapping_add(at);
        let mut speaker = Speaker::new(&base, &config.answer, streamed);
        let Answer { text, finish, tokens, seconds } = speaker.say(&mut session, &ids, seed)?;
        ui.say(&format!("{tokens} tokens in {seconds:.2} s"));
        answers.push(json!({"text": text, "seed": seed, "tokens": tokens, "finish": finish}));
    }
    let failed = |error: io::Error| Failure::from_error("stdout", &error);
    if ui.json {
        ui.json_data(&json!({"prompt": config.prompt, "answers": answers})).map_err(failed)?;
    } else if let Some(out) = &config.out {
        let texts: Vec<&str> = answers.iter().filter_map(|answer| answer["text"].as_str()).collect();
        let text = texts.join("\n\n") + "\n";
        write_atomically(out, |file| file.write_all(text.as_bytes())).explain()?;
        ui.data(&out.display().to_string()).map_err(failed)?;
    }
    Ok(ExitCode::SUCCESS)
}
