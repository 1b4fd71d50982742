//! Errors of the hub as they are shown: with a stable code, and what to type next.

use lora_hub::{Error, TokenSource};

use crate::{
    Failure,
    failure::{Exit, shell_word},
    text,
};

/// How a login is made known.
const LOG_IN: &str = "make a token at https://huggingface.co/settings/tokens and set it: `export HF_TOKEN=hf_...`";

/// The failure of an error.
pub(super) fn of(error: Error) -> Failure {
    let exit = if error.is_authentication() { Exit::Authentication } else { Exit::Failed };
    let failure = Failure { exit, ..Failure::from_error("hub", &error) };
    match error {
        Error::Cache(error) => {
            let hint = error.hint().unwrap_or_default();
            Failure { code: "no_cache", ..failure }.hint(hint)
        }
        Error::Endpoint => Failure { code: "bad_endpoint", exit: Exit::Usage, ..failure }
            .hint("`unset HF_ENDPOINT` asks https://huggingface.co"),
        Error::Certificates { .. } => Failure { code: "bad_certificates", ..failure }
            .hint("SSL_CERT_FILE or REQUESTS_CA_BUNDLE names this file; without them the built-in certificates are used"),
        Error::TokenText { source_of_token } => {
            Failure { code: "bad_token", ..failure }.hint(format!("{}; {LOG_IN}", without(&source_of_token)))
        }
        Error::TokenRefused { source_of_token, page, .. } => Failure { code: "token_refused", ..failure }
            .detail("it may have run out or been revoked")
            .hint(format!("{}; {LOG_IN}; the model: {page}", without(&source_of_token)))
            .with("page", page),
        Error::Login { suggestion, page, .. } => {
            let failure = Failure { code: "login_needed", ..failure };
            match suggestion {
                Some(near) => failure
                    .hint(format!("did you mean `lora pull {near}`? for a private model {LOG_IN}"))
                    .with("suggestion", near),
                None => failure.hint(format!("see whether {page} is there; for a private model {LOG_IN}")),
            }
            .with("page", page)
        }
        Error::Gated { page, token, said, .. } => {
            let failure = said.into_iter().fold(Failure { code: "gated", ..failure }, Failure::detail);
            match token {
                None => failure.hint(format!("accept the licence at {page}, then {LOG_IN}")),
                Some(source) => failure
                    .detail(format!("the token of {source} was sent, whose owner has no access yet"))
                    .hint(format!(
                        "accept the licence at {page} and wait for the approval; another login: `export HF_TOKEN=hf_...`"
                    )),
            }
            .with("page", page)
        }
        Error::Forbidden { page, token, said, .. } => {
            let failure = said.into_iter().fold(Failure { code: "forbidden", ..failure }, Failure::detail);
            match token {
                None => failure.hint(format!("see {page}; for a login {LOG_IN}")),
                Some(source) => failure
                    .detail(format!("the token of {source} was sent, and does not allow it"))
                    .hint(format!("see {page}; a token needs the right to read this model: `export HF_TOKEN=hf_...`")),
            }
            .with("page", page)
        }
        Error::NoModel { suggestion, .. } => {
            let failure = Failure { code: "no_model", ..failure };
            match suggestion {
                Some(near) => failure.hint(format!("did you mean `lora pull {near}`?")).with("suggestion", near),
                None => failure.hint("a name is copied from the top of the model's page; private models need HF_TOKEN"),
            }
        }
        Error::NoRevision { repository, known, suggestion, .. } => {
            let failure = Failure { code: "no_revision", ..failure };
            let failure = match known.is_empty() {
                true => failure,
                false => failure.detail(format!("branches and tags: {}", listed(&known))),
            };
            let near = suggestion.map(|near| format!("@{near}")).unwrap_or_default();
            failure.hint(format!("`lora pull {repository}{near}`")).with("known", known)
        }
        Error::NoFile { repository, suggestion, .. } => {
            let failure = Failure { code: "no_file", ..failure };
            match suggestion {
                Some(near) => failure
                    .hint(format!("did you mean `lora pull {repository} {}`?", shell_word(&near)))
                    .with("suggestion", near),
                None => failure.hint(format!("what a model needs of it: `lora pull {repository} --dry-run`")),
            }
        }
        Error::Kind { .. } => Failure { code: "kind_refused", ..failure }
            .hint("`lora convert IN.ckpt OUT.safetensors` reads pickles that you have fetched yourself, and runs nothing of them"),
        Error::Nothing { .. } => Failure { code: "nothing_to_fetch", ..failure }
            .hint("look for a repository of the model in diffusers, transformers or safetensors form"),
        Error::Several { repository, files } => {
            let first = files.first().map(|file| shell_word(file)).unwrap_or_default();
            Failure { code: "several_files", ..failure }
                .detail(listed(&files))
                .hint(format!("name it: `lora pull {repository} {first}`"))
                .with("files", files)
        }
        Error::Answer { .. } => Failure { code: "bad_answer", ..failure }
            .hint("is HF_ENDPOINT a hub, and no page of a network that wants a login first?"),
        Error::Status { status, said, .. } => {
            let failure = said.into_iter().fold(Failure { code: "hub_status", ..failure }, Failure::detail);
            failure.hint("the same command goes on from what has come; https://status.huggingface.co says how the hub is").with("status", status)
        }
        error @ Error::Unreachable { .. } => unreachable(&error),
        Error::Lost { file, kept, size, reason } => {
            let message = format!("the connection was lost: {file} is at {} of {}", text::bytes(kept), text::bytes(size));
            Failure::new("connection_lost", message)
                .detail(reason)
                .hint("what has come is kept: the same command goes on from there")
                .with("file", file)
                .with("kept", kept)
                .with("size", size)
        }
        Error::TooLong { .. } => {
            Failure { code: "wrong_bytes", ..failure }.hint("nothing of the file was kept; the same command tries again")
        }
        Error::WrongHash { expected, actual, .. } => Failure { code: "wrong_hash", ..failure }
            .detail(format!("expected: {expected}"))
            .detail(format!("seen:     {actual}"))
            .hint("nothing of the file was kept; the same command tries again, and a proxy on the way may be to blame")
            .with("expected", expected.to_string())
            .with("seen", actual),
        Error::Store { .. } => Failure { code: "cache_unusable", ..failure }
            .hint("see `lora doctor` for the disk; what has come is kept, `HF_HUB_CACHE=FOLDER` names another place"),
        _ => failure,
    }
}

/// Nobody answers, and the cache has no copy.
pub(super) fn unreachable(error: &Error) -> Failure {
    let is_distrust = matches!(error, Error::Unreachable { reason, .. } if reason.contains("certificate"));
    let failure = Failure::from_error("unreachable", error).detail("the cache has no copy of the model");
    if is_distrust {
        return failure.hint("a proxy or mirror with a certificate of its own: `export SSL_CERT_FILE=FILE.pem`");
    }
    failure.hint("behind a proxy set HTTPS_PROXY; a mirror is named by HF_ENDPOINT; `lora doctor` shows what is set")
}

/// How a token is taken away.
fn without(source: &TokenSource) -> String {
    match source {
        TokenSource::Variable(name) => format!("public models need none: `unset {name}`"),
        TokenSource::File(path) => format!("public models need none: `rm {}`", shell_word(&path.display().to_string())),
        _ => "public models need none".to_owned(),
    }
}

/// The first few of many names.
fn listed(names: &[String]) -> String {
    const SHOWN: usize = 8;
    let shown = names.iter().take(SHOWN).map(String::as_str).collect::<Vec<_>>().join(", ");
    if names.len() > SHOWN { format!("{shown} and {} more", names.len() - SHOWN) } else { shown }
}
