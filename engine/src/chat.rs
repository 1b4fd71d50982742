//! `lora chat`: a conversation on the terminal, or line by line from a pipe.

use std::{
    io::{self, BufRead as _, IsTerminal as _, Write as _},
    process::ExitCode,
};

use lora_cli::{
    Failure,
    options::{GenerateConfig, is_language_model},
    ui::Ui,
};
use lora_llm::{chat::message, generate::Session};

use crate::{
    failures::Explain as _,
    machine::Machine,
    texts::{Speaker, TextBase, opening},
};

/// What can be said to the program instead of the model.
const COMMANDS: &str = "/new begins anew, /exit or Ctrl-D ends";

/// Runs the command.
///
/// # Errors
/// Whatever stops it, as it is to be shown.
pub(crate) fn run(config: &GenerateConfig, ui: &Ui) -> Result<ExitCode, Failure> {
    if !is_language_model(&config.base) {
        return Err(Failure::new("not_a_base", format!("{}: no language model, nobody to talk with", config.base))
            .hint("a base to talk with is a transformers folder of a Llama, Mistral or Qwen model; draw with `lora generate`"));
    }
    let machine = Machine::choose(config.device, config.dtype)?;
    let base = TextBase::find(&config.base, config.answer.chat_template.as_deref(), config.quantize)?;
    let decoder = base.load(&config.lora, &machine, ui)?;
    if base.template.is_none() {
        ui.warn("the model has no chat template: it goes on with each line as it stands");
    }
    let person = io::stdin().is_terminal();
    if person {
        ui.say(COMMANDS);
    }
    let failed = |error: io::Error| Failure::from_error("stdout", &error);
    let mut session = Session::new(&decoder).explain()?;
    let mut messages = opening(&config.answer);
    let mut turn = 0;
    let mut line = String::new();
    loop {
        if person {
            let _ = write!(io::stderr(), "{} ", ui.stderr().bold(">"));
        }
        line.clear();
        if io::stdin().lock().read_line(&mut line).map_err(|error| Failure::from_error("stdin", &error))? == 0 {
            break;
        }
        match line.trim() {
            "" => continue,
            "/exit" | "/quit" => break,
            "/new" => {
                messages = opening(&config.answer);
                continue;
            }
            said => messages.push(message("user", said)),
        }
        let ids = base.ids(&messages)?;
        let mut speaker = Speaker::new(&base, &config.answer, !ui.json);
        match speaker.say(&mut session, &ids, config.seed.wrapping_add(turn)) {
            Ok(answer) => {
                if ui.json {
                    ui.json_data(&serde_json::json!({"role": "assistant", "content": answer.text})).map_err(failed)?;
                }
                messages.push(message("assistant", &answer.text));
            }
            // A conversation that has grown too long is no reason to lose the window.
            Err(failure) if person => {
                messages.pop();
                ui.warn(&format!("{failure}; {COMMANDS}"));
            }
            Err(failure) => return Err(failure),
        }
        turn += 1;
    }
    Ok(ExitCode::SUCCESS)
}
