//! `lora chat`: a conversation on the terminal, or line by line from a pipe; adapters can be switched in the middle of it.

use std::{
    io::{self, BufRead as _, IsTerminal as _, Write as _},
    process::ExitCode,
};

use lora_cli::{
    Failure,
    options::{GenerateConfig, is_language_model, values::Strength},
    ui::Ui,
};
use lora_llm::{
    chat::{Message, message},
    generate::Session,
};
use lora_torch::Projections as _;
use serde_json::json;

use crate::{
    adapters::Adapters,
    failures::Explain as _,
    machine::Machine,
    texts::{Speaker, TextBase, opening},
};

/// What can be said to the program instead of the model.
const COMMANDS: &str = "/new begins anew, /again answers the last question anew, /help says this, /exit or Ctrl-D ends";

/// The same about adapters.
const SWITCHING: &str =
    "/lora lists the adapters, /lora NAME[:STRENGTH] ... takes these alone, /lora none takes the base";

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
    let (mut decoder, mut adapters) = base.load(&config.lora, &machine, ui)?;
    if base.template.is_none() {
        ui.warn("the model has no chat template: it goes on with each line as it stands");
    }
    let person = io::stdin().is_terminal();
    let mut talk = Talk { base: &base, config, ui, person, messages: opening(&config.answer), turn: 0 };
    if person {
        talk.help(&adapters);
    }
    loop {
        // What was remembered of the conversation was read with the adapters of that time.
        let session = Session::new(&decoder).explain()?;
        match talk.until_switched(session, &adapters)? {
            Some(strengths) => adapters.set(decoder.projections(), &strengths)?,
            None => return Ok(ExitCode::SUCCESS),
        }
        talk.show(&adapters)?;
    }
}

/// Whether a line is meant for the program: a stroke and one word of letters, unlike a path.
fn is_command(line: &str) -> bool {
    line.strip_prefix('/')
        .is_some_and(|word| !word.is_empty() && word.chars().all(|letter| letter.is_ascii_alphabetic()))
}

/// A conversation, whoever answers.
struct Talk<'a> {
    base: &'a TextBase,
    config: &'a GenerateConfig,
    ui: &'a Ui,
    /// Whether somebody sits in front of it.
    person: bool,
    messages: Vec<Message>,
    /// Answers so far.
    turn: u64,
}

impl Talk<'_> {
    /// Answers line by line until others are to answer, with which strengths, or until the end.
    fn until_switched(
        &mut self,
        mut session: Session<'_>,
        adapters: &Adapters,
    ) -> Result<Option<Vec<Strength>>, Failure> {
        let mut line = String::new();
        loop {
            if self.person {
                let _ = write!(io::stderr(), "{} ", self.ui.stderr().bold(">"));
            }
            line.clear();
            if io::stdin().lock().read_line(&mut line).map_err(|error| Failure::from_error("stdin", &error))? == 0 {
                return Ok(None);
            }
            match line.trim() {
                "" => continue,
                "/exit" | "/quit" => return Ok(None),
                "/new" => {
                    self.messages = opening(&self.config.answer);
                    continue;
                }
                "/again" => {
                    if self.is_answered() {
                        self.messages.pop();
                    } else {
                        self.ui.warn("there is no question yet that could be answered anew");
                        continue;
                    }
                }
                "/lora" => {
                    self.show(adapters)?;
                    continue;
                }
                "/help" => {
                    self.help(adapters);
                    continue;
                }
                said if is_command(said) => {
                    self.ui.warn(&format!("there is no command {said}"));
                    self.help(adapters);
                    continue;
                }
                said => match said.strip_prefix("/lora ") {
                    Some(words) => match adapters.wanted(words) {
                        Ok(strengths) => return Ok(Some(strengths)),
                        Err(failure) if self.person => {
                            self.ui.warn(&failure.to_string());
                            self.show(adapters)?;
                            continue;
                        }
                        Err(failure) => return Err(failure),
                    },
                    None => self.messages.push(message("user", said)),
                },
            }
            self.answer(&mut session)?;
        }
    }

    /// Says what can be said to the program.
    fn help(&self, adapters: &Adapters) {
        self.ui.say(COMMANDS);
        if !adapters.is_empty() {
            self.ui.say(SWITCHING);
        }
    }

    /// Answers the last message.
    fn answer(&mut self, session: &mut Session<'_>) -> Result<(), Failure> {
        let ids = self.base.ids(&self.messages)?;
        let mut speaker = Speaker::new(self.base, &self.config.answer, !self.ui.json);
        match speaker.say(session, &ids, self.config.seed.wrapping_add(self.turn)) {
            Ok(answer) => {
                if self.ui.json {
                    self.write(&json!({"role": "assistant", "content": answer.text}))?;
                }
                self.messages.push(message("assistant", &answer.text));
            }
            // A conversation that has grown too long is no reason to lose the window.
            Err(failure) if self.person => {
                self.messages.pop();
                self.ui.warn(&format!("{failure}; {COMMANDS}"));
            }
            Err(failure) => return Err(failure),
        }
        self.turn += 1;
        Ok(())
    }

    /// Whether the last message is an answer.
    fn is_answered(&self) -> bool {
        self.messages.last().and_then(|last| last.get("role")).is_some_and(|role| role.as_str() == Some("assistant"))
    }

    /// Says which adapters act.
    fn show(&self, adapters: &Adapters) -> Result<(), Failure> {
        match (self.ui.json, adapters.is_empty()) {
            (true, _) => self.write(&json!({"adapters": adapters.to_json()})),
            (false, true) => {
                self.ui.say("no adapters: start with `--lora FILE`, once for each that is to be at hand");
                Ok(())
            }
            (false, false) => {
                self.ui.say(&adapters.describe());
                Ok(())
            }
        }
    }

    fn write(&self, document: &serde_json::Value) -> Result<(), Failure> {
        self.ui.json_data(document).map_err(|error| Failure::from_error("stdout", &error))
    }
}
