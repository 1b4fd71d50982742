//! Errors of the libraries as they are shown: with a stable code, their causes, and what to type next.

use lora_cli::Failure;

/// Shows an error of a library as a [`Failure`].
pub(crate) trait Explain<T> {
    /// Turns the error into a failure.
    ///
    /// # Errors
    /// The failure.
    fn explain(self) -> Result<T, Failure>;
}

impl<T> Explain<T> for lora_diffusion::Result<T> {
    fn explain(self) -> Result<T, Failure> {
        self.map_err(diffusion)
    }
}

impl<T> Explain<T> for lora_torch::Result<T> {
    fn explain(self) -> Result<T, Failure> {
        self.map_err(torch)
    }
}

impl<T> Explain<T> for lora_core::Result<T> {
    fn explain(self) -> Result<T, Failure> {
        self.map_err(Failure::from)
    }
}

impl<T> Explain<T> for lora_diffusion::data::Result<T> {
    fn explain(self) -> Result<T, Failure> {
        self.map_err(data)
    }
}

impl<T> Explain<T> for lora_llm::Result<T> {
    fn explain(self) -> Result<T, Failure> {
        self.map_err(language)
    }
}

impl<T> Explain<T> for lora_llm::data::Result<T> {
    fn explain(self) -> Result<T, Failure> {
        self.map_err(|error| {
            let hint = || "`lora data check FILE --base BASE` says how a file is read".to_owned();
            hinted("bad_data", &error, error.hint().or_else(|| Some(hint())))
        })
    }
}

impl<T> Explain<T> for lora_llm::tokenizer::Result<T> {
    fn explain(self) -> Result<T, Failure> {
        self.map_err(|error| hinted("bad_tokenizer", &error, error.hint()))
    }
}

impl<T> Explain<T> for lora_llm::chat::Result<T> {
    fn explain(self) -> Result<T, Failure> {
        self.map_err(|error| hinted("bad_template", &error, error.hint()))
    }
}

/// An error of ours, of which further lines say what was seen and expected.
fn hinted(code: &'static str, error: &(dyn std::error::Error + 'static), hint: Option<String>) -> Failure {
    let mut failure = Failure::from_error(code, error);
    failure.details.splice(0..0, error.to_string().lines().skip(1).map(|line| line.trim().to_owned()));
    match hint {
        Some(hint) => failure.hint(hint),
        None => failure,
    }
}

fn language(error: lora_llm::Error) -> Failure {
    use lora_llm::Error;
    match error {
        Error::Core(error) => Failure::from(error),
        Error::Torch(error) => torch(error),
        Error::Config { option: "quantization_config", .. } => Failure::from_error("not_a_base", &error)
            .hint("take the model in full precision; `--quantize nf4` keeps it in 4 bits while it is used"),
        Error::NotABase { .. } | Error::Unsupported { .. } | Error::Config { .. } => {
            Failure::from_error("not_a_base", &error)
                .hint("a base is a transformers folder of a Llama, Mistral or Qwen model: --base FOLDER")
        }
        Error::TooLong { .. } => Failure::from_error("too_long", &error)
            .hint("shorten it; for training, `--max-len N --on-long truncate|drop|split` says what happens"),
        Error::UnknownToken { .. } => Failure::from_error("bad_tokenizer", &error)
            .hint("compare the folder with a fresh copy of the model; its tokenizer.json may be another model's"),
        Error::Request { option, .. } => Failure::from_error("bad_request", &error)
            .hint(format!("see what {option} takes with `lora generate --help-all`")),
        Error::Read { .. } | Error::Json { .. } => Failure::from_error("unreadable", &error)
            .hint("compare the folder with a fresh copy of the model; a download may have stopped half-way"),
        error => Failure::from_error("model", &error),
    }
}

fn diffusion(error: lora_diffusion::Error) -> Failure {
    use lora_diffusion::Error;
    match error {
        Error::Core(error) => Failure::from(error),
        Error::Torch(error) => torch(error),
        Error::Data(error) => data(error),
        Error::NotABase { .. } => Failure::from_error("not_a_base", &error).hint(
            "a base is a diffusers folder (with model_index.json), a .safetensors checkpoint, or for texts a transformers folder \
             (with config.json); `lora pull org/name` fetches one",
        ),
        Error::Request { option, .. } => {
            Failure::from_error("bad_request", &error).hint(format!("see what {option} takes with `lora generate --help-all`"))
        }
        Error::Read { .. } | Error::Json { .. } => Failure::from_error("unreadable", &error)
            .hint("compare the folder with a fresh copy of the model; a download may have stopped half-way"),
        Error::Vocabulary { .. } => Failure::from_error("bad_vocabulary", &error)
            .hint("the folder `tokenizer` of a base holds vocab.json and merges.txt; copy it anew"),
        error => Failure::from_error("model", &error),
    }
}

fn data(error: lora_diffusion::data::Error) -> Failure {
    use lora_diffusion::data::Error;
    let hint = error.hint();
    let failure = match error {
        Error::Core(error) => return Failure::from(error),
        Error::Torch(error) => return torch(error),
        error => Failure::from_error("bad_data", &error),
    };
    match hint {
        Some(hint) => failure.hint(hint),
        None => failure,
    }
}

/// An error of the training room; one of a model family that passed through it is shown as that family's.
fn torch(error: lora_torch::Error) -> Failure {
    use lora_torch::Error;
    match error {
        Error::Core(error) => Failure::from(error),
        Error::Model { source } => match source.downcast::<lora_diffusion::Error>() {
            Ok(error) => diffusion(*error),
            Err(source) => match source.downcast::<lora_llm::Error>() {
                Ok(error) => language(*error),
                Err(source) => Failure::from_error("model", source.as_ref()),
            },
        },
        Error::OutOfMemory { .. } => Failure::from_error("out_of_memory", &error)
            .hint("train with `--batch 1 --accum 4`, a smaller `--resolution`, or `--dtype bf16`"),
        Error::NotFinite { .. } => Failure::from_error("not_finite", &error)
            .hint("nothing of these steps was applied; go on from the last checkpoint with a lower `--lr`, or try `--dtype fp32`"),
        Error::Checkpoint { .. } => Failure::from_error("checkpoint", &error)
            .hint("start a new run beside it: the same command with another `--out`"),
        Error::NotAttachable { .. } => Failure::from_error("cannot_attach", &error)
            .detail("adapters of norms and embeddings only work merged into the base")
            .hint("lora merge --base BASE --lora FILE --out MERGED"),
        Error::Cuda { .. } => Failure::from_error("no_cuda", &error).hint("see what is missing with `lora doctor`"),
        Error::Write { .. } => disk(&error),
        Error::MissingTensor { .. }
        | Error::Shape { .. }
        | Error::Kind { .. }
        | Error::Duplicate { .. }
        | Error::Quantised { .. } => {
            Failure::from_error("bad_base", &error)
                .hint("the base's files do not fit together; compare them with a fresh copy of the model")
        }
        error => Failure::from_error("training", &error),
    }
}

/// A file that could not be written: a full disk in most cases.
fn disk(error: &(dyn std::error::Error + 'static)) -> Failure {
    Failure::from_error("cannot_write", error)
        .hint("what was there before is untouched; free some space (`df -h .`), or choose another folder with `--out`")
}
