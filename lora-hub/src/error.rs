//! What can go wrong between a name and its files in the cache.

use std::{io, path::PathBuf};

use crate::{Hash, TokenSource};

/// The result of everything here.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a model is not there.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// There is no place for a cache.
    #[error(transparent)]
    Cache(#[from] lora_core::hub::Error),
    /// `HF_ENDPOINT` is no address.
    #[error("HF_ENDPOINT is no address of a hub: expected https://HOST, without a user and a query")]
    Endpoint,
    /// The certificates to trust cannot be used.
    #[error("{}: {reason}", path.display())]
    Certificates {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The token could not be sent as it is.
    #[error("{source_of_token} holds no token: expected one word of printable letters, such as hf_...")]
    TokenText {
        /// Where it came from.
        source_of_token: TokenSource,
    },
    /// The token was sent and is not known there.
    #[error("{host} does not accept the token of {source_of_token}")]
    TokenRefused {
        /// The hub.
        host: String,
        /// The page of the model.
        page: String,
        /// Where it came from.
        source_of_token: TokenSource,
    },
    /// The model wants a login, or does not exist: the hub does not tell strangers which.
    #[error("{host} asks for a login before it shows {repository}, or there is no such model")]
    Login {
        /// The hub.
        host: String,
        /// The page of the model.
        page: String,
        /// `org/name`.
        repository: String,
        /// A model of a similar name that is there.
        suggestion: Option<String>,
    },
    /// The model's licence must be accepted first.
    #[error("{repository} is gated: its licence must be accepted before its files are given out")]
    Gated {
        /// `org/name`.
        repository: String,
        /// The page where that is done.
        page: String,
        /// The login that was sent, if any.
        token: Option<TokenSource>,
        /// What the hub said.
        said: Option<String>,
    },
    /// The login is known, but may not see this.
    #[error("{host} refuses {repository}")]
    Forbidden {
        /// The hub.
        host: String,
        /// The page of the model.
        page: String,
        /// `org/name`.
        repository: String,
        /// The login that was sent, if any.
        token: Option<TokenSource>,
        /// What the hub said.
        said: Option<String>,
    },
    /// There is no such model.
    #[error("there is no model {repository} on {host}")]
    NoModel {
        /// The hub.
        host: String,
        /// `org/name`.
        repository: String,
        /// A model of a similar name that is there.
        suggestion: Option<String>,
    },
    /// There is the model, but not in this revision.
    #[error("{repository} has no revision `{revision}`")]
    NoRevision {
        /// `org/name`.
        repository: String,
        /// The wanted revision.
        revision: String,
        /// Branches and tags that there are.
        known: Vec<String>,
        /// The one that is nearest.
        suggestion: Option<String>,
    },
    /// The repository has no such file.
    #[error("{repository} has no file `{file}`")]
    NoFile {
        /// `org/name`.
        repository: String,
        /// The wanted file.
        file: String,
        /// The one that is nearest.
        suggestion: Option<String>,
    },
    /// A file of a kind that is not fetched.
    #[error("`{file}` is {kind}; such files are not fetched")]
    Kind {
        /// The file.
        file: String,
        /// What it is.
        kind: &'static str,
    },
    /// Nothing in the repository can be used.
    #[error("{repository} has nothing to fetch: {reason}")]
    Nothing {
        /// `org/name`.
        repository: String,
        /// What is there instead.
        reason: String,
    },
    /// Several files could be meant.
    #[error("{repository} holds {} files of weights and does not say which is meant", files.len())]
    Several {
        /// `org/name`.
        repository: String,
        /// The files.
        files: Vec<String>,
    },
    /// The hub's answer is not what it should be.
    #[error("{host} gave an answer that cannot be used: {reason}")]
    Answer {
        /// The hub.
        host: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The hub has trouble, or does not want to.
    #[error("{host} answered {what} with status {status}")]
    Status {
        /// Who answered.
        host: String,
        /// What was asked for.
        what: String,
        /// The status.
        status: u16,
        /// What it said.
        said: Option<String>,
    },
    /// Nobody answers.
    #[error("cannot reach {host}: {reason}")]
    Unreachable {
        /// Who was asked.
        host: String,
        /// Why not.
        reason: String,
    },
    /// The connection broke and did not come back.
    #[error("the connection was lost at {kept} of {size} bytes of {file}: {reason}")]
    Lost {
        /// The file.
        file: String,
        /// Bytes that are kept.
        kept: u64,
        /// Bytes of the whole file.
        size: u64,
        /// Why.
        reason: String,
    },
    /// More bytes came than the file has.
    #[error("{file}: {host} sent more than its {size} bytes")]
    TooLong {
        /// Who sent it.
        host: String,
        /// The file.
        file: String,
        /// Bytes that the file has.
        size: u64,
    },
    /// The bytes are not those of the file.
    #[error("{file}: the bytes that came are not those of the file")]
    WrongHash {
        /// The file.
        file: String,
        /// The hash that the hub lists.
        expected: Hash,
        /// The hash of what came.
        actual: String,
    },
    /// The cache cannot be read or written.
    #[error("cannot use {}", path.display())]
    Store {
        /// The file or folder.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

impl Error {
    /// Whether the person has to log in, get access, or give another token.
    pub fn is_authentication(&self) -> bool {
        matches!(
            self,
            Self::TokenText { .. }
                | Self::TokenRefused { .. }
                | Self::Login { .. }
                | Self::Gated { .. }
                | Self::Forbidden { .. }
        )
    }

    /// Whether nobody answered, so that what is in the cache is the best there is.
    pub fn is_network(&self) -> bool {
        match self {
            Self::Unreachable { .. } => true,
            Self::Status { status, .. } => *status == 429 || *status >= 500,
            _ => false,
        }
    }
}
