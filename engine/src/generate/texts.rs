//! From a prompt to an answer.

use std::{io, process::ExitCode};

use lora_cli::{Failure, options::GenerateConfig, ui::Ui};
use lora_core::format::write_atomically;
use lora_llm::generate::Session;
use lora_torch::Projections as _;
use serde_json::{Value, json};

use crate::{
    failures::Explain as _,
    machine::Machine,
    texts::{Answer, Speaker, TextBase},
};

/// Answers; on stdout, as it is thought of, or into the file that was named.
///
/// # Errors
/// Whatever stops it, as it is to be shown.
pub(super) fn run(config: &GenerateConfig, compare: bool, ui: &Ui) -> Result<ExitCode, Failure> {
    let machine = Machine::choose(config.device, config.dtype)?;
    let base = TextBase::find(&config.base, config.answer.chat_template.as_deref(), config.quantize)?;
    let ids = base.question(&config.prompt, &config.answer)?;
    let (mut decoder, mut adapters) = base.load(&config.lora, &machine, ui)?;
    let streamed = !ui.json && config.out.is_none();
    let failed = |error: io::Error| Failure::from_error("stdout", &error);
    let mut answers = Vec::new();
    let variants = if compare { adapters.variants().into_iter().map(Some).collect() } else { vec![None] };
    for variant in &variants {
        if let Some(variant) = variant {
            adapters.set(decoder.projections(), &variant.strengths)?;
            if streamed {
                let gap = if answers.is_empty() { "" } else { "\n" };
                ui.data(&format!("{gap}{}", ui.stdout().bold(&variant.label))).map_err(failed)?;
            }
        }
        let mut session = Session::new(&decoder).explain()?;
        for at in 0..config.count.get() as u64 {
            let seed = config.seed.wrapping_add(at);
            let mut speaker = Speaker::new(&base, &config.answer, streamed);
            let Answer { text, finish, tokens, seconds } = speaker.say(&mut session, &ids, seed)?;
            ui.say(&format!("{tokens} tokens in {seconds:.2} s"));
            let mut answer = json!({"text": text, "seed": seed, "tokens": tokens, "finish": finish});
            if let Some(variant) = variant {
                answer["adapter"] = variant.label.as_str().into();
            }
            answers.push(answer);
        }
    }
    if ui.json {
        ui.json_data(&json!({"prompt": config.prompt, "answers": answers})).map_err(failed)?;
    } else if let Some(out) = &config.out {
        let shown = |answer: &Value| {
            let text = answer["text"].as_str().unwrap_or_default();
            answer["adapter"].as_str().map_or_else(|| text.to_owned(), |label| format!("{label}\n{text}"))
        };
        let text = answers.iter().map(shown).collect::<Vec<_>>().join("\n\n") + "\n";
        write_atomically(out, |file| file.write_all(text.as_bytes())).explain()?;
        ui.data(&out.display().to_string()).map_err(failed)?;
    }
    Ok(ExitCode::SUCCESS)
}
