//! What `lora-core` refuses, in front of a person: every fault of a file with a word for programs, and what to do about that
//! very fault.

use std::path::Path;

use lora_core::{
    Error,
    format::{Dialect, Dtype, Fault, FileKind, Quoted, TensorFile, guess_family},
};

use super::{Failure, places, shell_word};

/// What to do about numbers that no decomposition takes.
pub(crate) const DIVERGED: &str = "such numbers come from a training that diverged, or from a damaged file: take an \
     earlier save of it, or fetch a fresh copy";

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let failure = Self::from_error("bad_file", &error);
        match error {
            Error::Read { path, source } => Self { code: "unreadable", ..failure }
                .hint(places::unread(&path, &source))
                .with("path", path.display().to_string()),
            Error::Write { path, source } => Self { code: "cannot_write", ..failure }
                .hint(format!("what was there before is untouched; {}", places::unwritten(&path, &source)))
                .with("path", path.display().to_string()),
            Error::Config { option, .. } => {
                Self { code: "bad_option", ..failure }.hint(format!("what it may be: `lora config explain {option}`"))
            }
            Error::File { path, fault } => faulty(&path, &fault, failure).with("path", path.display().to_string()),
            Error::NoTarget { .. } | Error::Pattern { .. } => Self { code: "bad_targets", ..failure }.hint(
                "--targets takes attention, attention+ff, cross-attention, linear, all (each also with +te), or a regular \
                 expression over module paths such as 'mid_block.*attn2'",
            ),
            Error::Numeric { .. } => Self { code: "not_finite", ..failure }.hint(DIVERGED),
            _ => failure,
        }
    }
}

/// The failure of a file, `failure` so far, with its word and its hint.
fn faulty(path: &Path, fault: &Fault, failure: Failure) -> Failure {
    let file = shell_word(&places::as_argument(path));
    let coded = |code| Failure { code, ..failure.clone() };
    match fault {
        Fault::Kind { kind } => {
            let message = format!("{} is {kind}, not a safetensors file", path.display());
            let hint = match kind {
                FileKind::Zip | FileKind::Pickle => format!(
                    "pickles can run code when they are opened and are refused; `lora convert {file} {}` runs nothing",
                    shell_word(&places::beside(path, "safetensors"))
                ),
                other => other.advice().to_owned(),
            };
            Failure::new("not_safetensors", message).hint(hint)
        }
        Fault::NothingMatches { modules, base, guess, is_foreign, keys } => {
            let guessed = guess.as_ref().map(|guess| format!("; the file looks like one for {guess}"));
            let message = format!(
                "{}: 0 of {modules} modules match this base ({base}){}",
                path.display(),
                guessed.unwrap_or_default()
            );
            let keys: Vec<String> = keys.iter().map(|key| Quoted(key).to_string()).collect();
            let failure =
                Failure::new("base_mismatch", message).detail(format!("its first keys:\n{}", keys.join("\n")));
            failure.hint(match guess.as_ref().filter(|_| *is_foreign) {
                Some(guess) => not_applied(guess, &file),
                None => format!("what it is for: `lora inspect {file}`; then name such a base"),
            })
        }
        Fault::Misfit { .. } => {
            let mut failure = Failure::new("base_mismatch", format!("{} does not fit this base", path.display()));
            failure.details.push(fault.to_string());
            // The widths of a file tell its model, where the names alone do not.
            let family = TensorFile::open(path).ok().and_then(|file| guess_family(&file));
            failure.details.extend(family.map(|family| format!("the file looks like one for {family}")));
            failure.hint(format!("what it is for: `lora inspect {file}`"))
        }
        Fault::NoModel { guess: Some(guess), is_foreign: true, .. } => {
            coded("base_mismatch").hint(not_applied(guess, &file))
        }
        Fault::NoModel { .. } | Fault::NeedsBase { .. } => {
            coded("needs_base").hint("name the model with `--base BASE`: a folder or a .safetensors checkpoint")
        }
        Fault::NotAdaptable { .. } => {
            coded("base_mismatch").hint(format!("what it is for: `lora inspect {file}`; then name such a base"))
        }
        Fault::NotAnAdapter { .. } => {
            coded("no_adapter").hint(format!("what it is: `lora inspect {file}`; a model goes to `--base`"))
        }
        Fault::NoTensors => coded("no_adapter").hint("what was saved was empty, or no weights: look for another file"),
        Fault::NoAdapterFile => {
            coded("no_adapter").hint("name the file itself if it is called otherwise; a base goes to `--base`")
        }
        Fault::Packed { .. } => coded("quantised_base")
            .hint("name the model in full precision as the base: the one that this was quantised from"),
        Fault::Quantised { .. } => coded("not_a_base")
            .hint("take the model in full precision; `--quantize nf4` keeps it in 4 bits while it is used"),
        Fault::ShardName { .. } | Fault::NotInShards { .. } => coded("not_a_base")
            .hint("the index and its shards come from different saves: fetch the whole folder again"),
        Fault::NotABase { .. } | Fault::NoWeights { .. } => coded("not_a_base")
            .hint("a base is a diffusers or transformers folder, or a single .safetensors checkpoint"),
        Fault::NoPeftConfig { .. } => {
            failure.hint("fetch adapter_config.json from where the file came from, and put it beside it")
        }
        Fault::PeftField { field, .. } if field == "peft_type" => coded("unsupported").hint(
            "LORA, LOHA, LOKR, IA3 and OFT are known here; peft itself merges some of the others into their base \
             (`merge_and_unload`), which can be used here",
        ),
        Fault::PeftField { .. } => coded("unsupported").hint(format!(
            "compare {file} with a fresh copy; what peft alone can follow, it can merge into the base (`merge_and_unload`)"
        )),
        Fault::Unsupported { .. } => {
            coded("unsupported").hint("the program that wrote it can apply it; ask for a version as plain LoRA")
        }
        Fault::TiedHead { .. } => coded("tied_head").hint(
            "keep the adapter beside the model (`--lora FILE`), or train `--targets embed_tokens` instead",
        ),
        Fault::Pickle { .. } => {
            coded("pickle_refused").hint("nothing of it was run; look for a .safetensors version of the file")
        }
        Fault::Unwritable { other, .. } => coded("unwritable").hint(match other {
            Some(Dialect::Peft) => "nothing was written; adapters of language models have words in `--to peft`".to_owned(),
            Some(other) => format!("nothing was written; another spelling may have words for it, as `--to {other}`"),
            None => "nothing was written; keep the file as it is: `lora merge` puts what it holds into a base".to_owned(),
        }),
        Fault::Overflow { dtype: Dtype::F16, .. } => coded("overflow")
            .hint("nothing was written; a smaller strength, or `--dtype bf16` or `--dtype fp32`, may do"),
        Fault::Overflow { .. } => coded("overflow")
            .hint("nothing was written; is the adapter meant for this base? a smaller strength may do"),
        Fault::FactorOverflow { .. } => {
            coded("overflow").hint("nothing was written; `--dtype bf16` and `--dtype fp32` have room for it")
        }
        Fault::NotFinite { .. } | Fault::Indecomposable { .. } => coded("not_finite").hint(DIVERGED),
        Fault::DataLength { expected, actual } if actual > expected => {
            failure.hint("something was written behind its end: fetch the file again")
        }
        Fault::DataLength { .. } | Fault::Short { .. } | Fault::NoHeader | Fault::HeaderLength { .. } => {
            failure.hint("the download may have stopped half-way: fetch the file again")
        }
        Fault::UnknownDtype { .. } => failure.hint("a newer version of this program may know it"),
        Fault::MissingPart { .. } | Fault::Alone { .. } => {
            failure.hint("a part of the adapter was left out: fetch the file again, or ask who made it")
        }
        Fault::TwoFamilies { .. } | Fault::TwoSpellings { .. } => {
            failure.hint("two adapters seem to have been put into one file: ask who made it for each of them")
        }
        Fault::ReadBack { .. } => failure.hint("the disk may be failing: name a place on another one"),
        Fault::Text { .. } => failure.hint(format!("correct {file}, or fetch a fresh copy of it")),
        _ => failure.hint("the program that wrote the file made a mistake, or the file is damaged: fetch a fresh copy"),
    }
}

/// What can be done with a file for a family of models that is not read here.
fn not_applied(family: &str, file: &str) -> String {
    format!(
        "adapters of {family} can be looked at (`lora inspect {file}`) and not applied: this program knows Stable \
         Diffusion 1.x, 2.x and XL, Llama, Mistral and Qwen"
    )
}
