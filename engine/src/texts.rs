//! What the commands on language models share: a base with its tokenizer and template, and files of texts.

use std::{
    io::{self, Write as _},
    ops::ControlFlow,
    path::{Path, PathBuf},
    time::{Instant, SystemTime},
};

use lora_cli::{
    Failure,
    failure::shell_word,
    options::{
        AnswerConfig, TextConfig,
        values::{self, LoraFile},
    },
    text,
    ui::Ui,
};
use lora_llm::{
    BaseFiles, Decoder,
    chat::{ChatTemplate, Conversation, Error as ChatError, Message, message},
    data::{Dataset, LoadOptions, OnBad, OnLong, TrainOn},
    generate::{Finish, GenerateOptions, Sampling, Session},
    stop::StopStrings,
    tokenizer::Tokenizer,
};

use lora_torch::Projections as _;

use crate::{
    adapters::{self, Adapters},
    base,
    failures::Explain as _,
    machine::Machine,
};

/// A language model whose weights have not been read.
pub(crate) struct TextBase {
    pub(crate) files: BaseFiles,
    pub(crate) tokenizer: Tokenizer,
    /// `None` for a model that was never taught to talk.
    pub(crate) template: Option<ChatTemplate>,
    /// As it was asked for.
    named: String,
}

impl TextBase {
    /// Finds a base with what belongs to it; `template` takes the place of its own, `quantize` says how it will be loaded.
    ///
    /// # Errors
    /// If there is none, its tokenizer is missing or another model's, or its template has a mistake.
    pub(crate) fn find(base: &str, template: Option<&Path>, quantize: values::Quantize) -> Result<Self, Failure> {
        let path = base::locate(base)?;
        let mut files = BaseFiles::find(&path).explain()?;
        files.quantise = base::scheme(quantize);
        let tokenizer = Tokenizer::open(&path).explain()?;
        tokenizer.check_rows(files.config.vocab_size).explain()?;
        let template = match template {
            Some(file) => Some(ChatTemplate::read(&from_here(file), &tokenizer).explain()?),
            None => match ChatTemplate::open(&path, None, &tokenizer) {
                Err(ChatError::Missing { .. }) => None,
                template => Some(template.explain()?),
            },
        };
        Ok(Self { files, tokenizer, template, named: base.to_owned() })
    }

    /// Loads the weights, with adapters on them.
    ///
    /// # Errors
    /// If they cannot be loaded, or an adapter does not fit.
    pub(crate) fn load(&self, lora: &[LoraFile], machine: &Machine, ui: &Ui) -> Result<(Decoder, Adapters), Failure> {
        let mut decoder = self.files.load_for_answers(&machine.on).explain()?;
        let adapters = adapters::attach(lora, &self.files.model().explain()?, decoder.projections(), ui)?;
        Ok((decoder, adapters))
    }

    /// Reads a file of texts; `now` is the time that a template is told, the present without it.
    ///
    /// # Errors
    /// If there is nothing in it that can be used, or a row cannot be and must not be skipped.
    pub(crate) fn read(
        &self,
        path: &Path,
        config: TextConfig,
        validation: f64,
        seed: u64,
        now: Option<SystemTime>,
    ) -> Result<Dataset, Failure> {
        let options = LoadOptions {
            train_on: match config.train_on {
                values::TrainOn::Completions => TrainOn::Completions,
                values::TrainOn::All => TrainOn::All,
            },
            on_long: match config.on_long {
                values::OnLong::Truncate => OnLong::Truncate,
                values::OnLong::Drop => OnLong::Drop,
                values::OnLong::Split => OnLong::Split,
            },
            on_bad: match config.on_bad {
                values::OnBad::Stop => OnBad::Stop,
                values::OnBad::Skip => OnBad::Skip,
            },
            validation,
            seed,
            now,
            ..LoadOptions::new(config.max_len.get().min(self.files.config.max_positions))
        };
        // Hints say what to type: the library does not know how base and file were called.
        let [base, file] = [self.named.clone(), text::path(path)].map(|word| shell_word(&word));
        let filled = |hint: String| {
            hint.replace("--base BASE", &format!("--base {base}")).replace("check FILE ", &format!("check {file} "))
        };
        let loaded = Dataset::load(&from_here(path), &self.tokenizer, self.template.as_ref(), &options).explain();
        loaded.map_err(|failure| Failure { hint: failure.hint.map(filled), ..failure })
    }

    /// The ids of a conversation up to where the model is to answer; without a template, of the last message alone.
    ///
    /// # Errors
    /// If the template refuses the messages.
    pub(crate) fn ids(&self, messages: &[Message]) -> Result<Vec<u32>, Failure> {
        let (text, framed) = match &self.template {
            Some(template) => (template.render(&Conversation::new(messages).prompt()).explain()?.text, false),
            None => {
                let last = messages.last().and_then(|message| message.get("content")).and_then(|text| text.as_str());
                (last.unwrap_or_default().to_owned(), true)
            }
        };
        Ok(self.tokenizer.encode(&text, framed).explain()?.ids)
    }

    /// The ids of one question.
    ///
    /// # Errors
    /// As [`ids`](Self::ids).
    pub(crate) fn question(&self, prompt: &str, config: &AnswerConfig) -> Result<Vec<u32>, Failure> {
        if config.raw {
            return Ok(self.tokenizer.encode(prompt, true).explain()?.ids);
        }
        self.ids(&[opening(config), vec![message("user", prompt)]].concat())
    }

    /// How an answer is chosen.
    pub(crate) fn options(&self, config: &AnswerConfig, seed: u64) -> GenerateOptions {
        GenerateOptions {
            sampling: Sampling {
                temperature: config.temperature,
                top_k: config.top_k.map(std::num::NonZeroUsize::get),
                top_p: config.top_p,
                min_p: config.min_p,
                repetition_penalty: config.repetition_penalty,
                seed,
            },
            max_tokens: config.max_tokens.get(),
            stop: self.ends(),
        }
    }

    /// The ids that end an answer.
    pub(crate) fn ends(&self) -> Vec<u32> {
        let mut ends = self.tokenizer.special().ends.clone();
        ends.extend(self.files.config.eos.iter().filter(|id| !self.tokenizer.special().is_end(**id)));
        ends
    }
}

/// The same file as a person would name it: from the working folder, where it lies inside.
fn from_here(path: &Path) -> PathBuf {
    let inside = std::env::current_dir().ok().and_then(|here| path.strip_prefix(here).ok());
    inside.filter(|inside| !inside.as_os_str().is_empty()).unwrap_or(path).to_owned()
}

/// What was said.
pub(crate) struct Answer {
    /// Without special tokens and blanks around it.
    pub(crate) text: String,
    /// `stop` or `length`.
    pub(crate) finish: &'static str,
    pub(crate) tokens: usize,
    pub(crate) seconds: f64,
}

/// Says an answer while it is thought of.
pub(crate) struct Speaker<'a> {
    base: &'a TextBase,
    config: &'a AnswerConfig,
    /// Whether it goes to stdout piece by piece.
    aloud: bool,
}

impl<'a> Speaker<'a> {
    pub(crate) fn new(base: &'a TextBase, config: &'a AnswerConfig, aloud: bool) -> Self {
        Self { base, config, aloud }
    }

    /// Continues `ids`.
    ///
    /// # Errors
    /// If they are too long for the model, or stdout is gone.
    pub(crate) fn say(&mut self, session: &mut Session<'_>, ids: &[u32], seed: u64) -> Result<Answer, Failure> {
        let started = Instant::now();
        let mut stream = self.base.tokenizer.stream(false);
        let mut stops = StopStrings::new(self.config.stop.iter().cloned());
        let (mut text, mut tokens, mut stopped) = (String::new(), 0, false);
        let mut broken: Option<Failure> = None;
        let aloud = self.aloud;
        let mut show = |piece: &str| -> Result<(), Failure> {
            text.push_str(piece);
            if aloud {
                let mut out = io::stdout().lock();
                let written = out.write_all(piece.as_bytes()).and_then(|()| out.flush());
                written.map_err(|error| Failure::from_error("stdout", &error))?;
            }
            Ok(())
        };
        let finish = session
            .generate(ids, &self.base.options(self.config, seed), &mut |id| {
                tokens += 1;
                let piece = match stream.push(id).explain() {
                    Ok(piece) => piece,
                    Err(failure) => {
                        broken = Some(failure);
                        return ControlFlow::Break(());
                    }
                };
                let shown = stops.push(&piece);
                stopped = shown.stopped;
                if let Err(failure) = show(&shown.text) {
                    broken = Some(failure);
                }
                if stopped || broken.is_some() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            })
            .explain()?;
        if let Some(failure) = broken {
            return Err(failure);
        }
        if !stopped {
            let rest = stops.push(&stream.finish().explain()?);
            show(&rest.text)?;
            if !rest.stopped {
                show(&stops.finish())?;
            }
        }
        if aloud {
            show("\n")?;
        }
        let finish = if finish == Finish::Length { "length" } else { "stop" };
        Ok(Answer { text: text.trim().to_owned(), finish, tokens, seconds: started.elapsed().as_secs_f64() })
    }
}

/// What a conversation begins with.
pub(crate) fn opening(config: &AnswerConfig) -> Vec<Message> {
    config.system.iter().map(|system| message("system", system)).collect()
}
