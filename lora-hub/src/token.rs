//! The login: a token out of the environment or a file, which no message ever shows.

use std::{ffi::OsString, fmt, fs, path::PathBuf};

use lora_core::hub;

use crate::{Error, Result};

/// A secret that is sent to the endpoint and nowhere else; printing it shows where it came from.
#[derive(Clone)]
pub struct Token {
    secret: String,
    source: TokenSource,
}

/// Where a token came from.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum TokenSource {
    /// The variable of that name.
    Variable(&'static str),
    /// A file.
    File(PathBuf),
}

impl Token {
    /// A token that is known already; white space around it does not count.
    ///
    /// # Errors
    /// If it could not be sent: it is empty or holds anything else than printable ASCII.
    pub fn new(secret: &str, source: TokenSource) -> Result<Self> {
        let secret = secret.trim();
        let sound = !secret.is_empty() && secret.bytes().all(|byte| byte.is_ascii_graphic());
        match sound {
            true => Ok(Self { secret: secret.to_owned(), source }),
            false => Err(Error::TokenText { source_of_token: source }),
        }
    }

    /// Where it came from.
    pub fn source(&self) -> &TokenSource {
        &self.source
    }

    /// The value of the header `Authorization`.
    pub(crate) fn header(&self) -> String {
        format!("Bearer {}", self.secret)
    }

    /// The token that the environment names: `HF_TOKEN`, its older name, or the file of `hf auth login`.
    ///
    /// # Errors
    /// If there is one that cannot be read or sent. None at all is no error: most models need none.
    pub(crate) fn find(variable: impl Fn(&str) -> Option<OsString>) -> Result<Option<Self>> {
        if variable("HF_HUB_DISABLE_IMPLICIT_TOKEN").is_some_and(|value| crate::settings::is_true(&value)) {
            return Ok(None);
        }
        for name in ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"] {
            if let Some(value) = variable(name).filter(|value| !value.is_empty()) {
                return Self::new(&value.to_string_lossy(), TokenSource::Variable(name)).map(Some);
            }
        }
        let named = variable("HF_TOKEN_PATH").filter(|value| !value.is_empty()).map(PathBuf::from);
        let Some(path) = named.or_else(|| hub::home_of(&variable).map(|home| home.join("token"))) else {
            return Ok(None);
        };
        match fs::read_to_string(&path) {
            Ok(text) if text.trim().is_empty() => Ok(None), // what `hf auth logout` of some versions leaves
            Ok(text) => Self::new(&text, TokenSource::File(path)).map(Some),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(Error::Store { path, source }),
        }
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Token").field("source", &self.source).finish_non_exhaustive()
    }
}

impl fmt::Display for TokenSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Variable(name) => write!(f, "the variable {name}"),
            Self::File(path) => write!(f, "the file {}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(set: &[(&str, &str)]) -> Result<Option<Token>> {
        Token::find(|name| set.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).into()))
    }

    #[test]
    fn variables_come_before_the_file_and_the_file_where_it_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let home = folder.path().to_str().unwrap();
        fs::write(folder.path().join("token"), "hf_file\n").unwrap();
        let other = folder.path().join("other");
        fs::write(&other, "hf_other").unwrap();
        let header = |set: &[(&str, &str)]| find(set).unwrap().map(|token| token.header());
        let is = |secret: &str| Some(format!("Bearer {secret}"));
        assert_eq!(header(&[("HF_HOME", home)]), is("hf_file"));
        assert_eq!(header(&[("HF_HOME", home), ("HF_TOKEN_PATH", other.to_str().unwrap())]), is("hf_other"));
        assert_eq!(header(&[("HF_HOME", home), ("HF_TOKEN", " hf_word ")]), is("hf_word"));
        assert_eq!(header(&[("HF_HOME", home), ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")]), None);
        assert_eq!(header(&[("HF_HOME", "nowhere")]), None);
    }

    #[test]
    fn a_token_is_never_shown_not_even_one_that_cannot_be_sent() {
        let token = find(&[("HF_TOKEN", "hf_secret")]).unwrap().unwrap();
        assert!(!format!("{token:?}").contains("hf_secret"));
        let error = find(&[("HF_TOKEN", "hf_secret\nX-Other: 1")]).unwrap_err();
        assert!(!format!("{error} {error:?}").contains("hf_secret"), "{error:?}");
        assert!(error.to_string().contains("HF_TOKEN"), "{error}");
    }
}
