//! What the environment says about the hub, under the names of `huggingface_hub`.
//!
//! | variable | says |
//! |---|---|
//! | `HF_HUB_CACHE`, `HF_HOME` | where the cache is |
//! | `HF_TOKEN`, `HF_TOKEN_PATH` | the login, else the file `token` in `HF_HOME` |
//! | `HF_ENDPOINT` | another hub than `https://huggingface.co` |
//! | `HF_HUB_OFFLINE`, `TRANSFORMERS_OFFLINE` | no network |
//! | `HF_HUB_DOWNLOAD_TIMEOUT` | seconds without a byte after which a connection counts as lost |
//! | `HF_HUB_DISABLE_SYMLINKS` | copies in the place of links |
//! | `SSL_CERT_FILE`, `REQUESTS_CA_BUNDLE` | certificates (PEM) to trust in the place of the built-in ones |
//! | `HTTPS_PROXY`, `ALL_PROXY`, `NO_PROXY` | the way out |

use std::{
    env,
    ffi::{OsStr, OsString},
    path::PathBuf,
    time::Duration,
};

use lora_core::hub;
use ureq::http::Uri;

use crate::{Error, Result, Token};

/// The hub that is asked unless somebody says otherwise.
const ENDPOINT: &str = "https://huggingface.co";

/// How the hub is reached and where its files go.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Settings {
    /// The cache.
    pub cache: PathBuf,
    /// `https://host`, without a slash at its end.
    pub endpoint: String,
    /// The login, if there is one.
    pub token: Option<Token>,
    /// How often a request is tried again without a mebibyte in between.
    pub retries: u32,
    /// The wait before the first retry; each next one is twice as long, up to half a minute.
    pub first_wait: Duration,
    /// How long a connection may be silent.
    pub silence: Duration,
    /// Copies in the place of links.
    pub copies: bool,
    /// Certificates to trust in the place of the built-in ones, in PEM.
    pub certificates: Option<PathBuf>,
}

impl Settings {
    /// Defaults for a cache and an endpoint, without a login.
    pub fn new(cache: PathBuf, endpoint: &str) -> Self {
        Self {
            cache,
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            token: None,
            retries: 5,
            first_wait: Duration::from_secs(1),
            silence: Duration::from_secs(30),
            copies: false,
            certificates: None,
        }
    }

    /// What the environment says.
    ///
    /// # Errors
    /// If it names no place for a cache, an endpoint that is no address, or a token that cannot be read or sent.
    pub fn from_env() -> Result<Self> {
        Self::from_variables(|name| env::var_os(name))
    }

    fn from_variables(variable: impl Fn(&str) -> Option<OsString>) -> Result<Self> {
        let set = |name| variable(name).filter(|value| !value.is_empty());
        let cache = hub::cache_of(&variable).ok_or(hub::Error::NoCache)?;
        let endpoint = set("HF_ENDPOINT").map_or_else(|| ENDPOINT.into(), |value| value.to_string_lossy().into_owned());
        let seconds = set("HF_HUB_DOWNLOAD_TIMEOUT").and_then(|value| value.to_str()?.trim().parse::<u64>().ok());
        let settings = Self {
            token: Token::find(&variable)?,
            copies: set("HF_HUB_DISABLE_SYMLINKS").is_some_and(|value| is_true(&value)),
            certificates: set("SSL_CERT_FILE").or_else(|| set("REQUESTS_CA_BUNDLE")).map(PathBuf::from),
            ..Self::new(cache, &endpoint)
        };
        settings.origin()?;
        Ok(match seconds.filter(|seconds| *seconds > 0) {
            Some(seconds) => Self { silence: Duration::from_secs(seconds), ..settings },
            None => settings,
        })
    }

    /// The address of the endpoint, checked.
    pub(crate) fn origin(&self) -> Result<Uri> {
        let uri = self.endpoint.parse::<Uri>().ok();
        let is_web = |uri: &Uri| matches!(uri.scheme_str(), Some("http" | "https"));
        // A password in the address would end up in messages.
        let is_plain = |uri: &Uri| uri.authority().is_some_and(|authority| !authority.as_str().contains('@'));
        uri.filter(|uri| is_web(uri) && is_plain(uri) && uri.query().is_none()).ok_or(Error::Endpoint)
    }
}

/// The variable that forbids the network, if one does.
pub fn offline_by() -> Option<&'static str> {
    offline_by_variables(|name| env::var_os(name))
}

fn offline_by_variables(variable: impl Fn(&str) -> Option<OsString>) -> Option<&'static str> {
    // The first decides where it is set, as in `huggingface_hub`.
    let name = ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"]
        .into_iter()
        .find(|name| variable(name).is_some_and(|value| !value.is_empty()))?;
    variable(name).is_some_and(|value| is_true(&value)).then_some(name)
}

/// Whether a variable says yes.
pub(crate) fn is_true(value: &OsStr) -> bool {
    value.to_str().is_some_and(|value| ["1", "on", "yes", "true"].contains(&value.to_ascii_lowercase().as_str()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(set: &[(&str, &str)]) -> Result<Settings> {
        Settings::from_variables(|name| set.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).into()))
    }

    #[test]
    fn the_environment_is_that_of_huggingface_hub() {
        let plain = settings(&[("HOME", "/h")]).unwrap();
        assert_eq!(plain.cache, PathBuf::from("/h/.cache/huggingface/hub"));
        assert_eq!((plain.endpoint.as_str(), plain.copies, plain.token.is_none()), (ENDPOINT, false, true));
        let set = settings(&[
            ("HF_HOME", "/f"),
            ("HF_ENDPOINT", "https://mirror.example/"),
            ("HF_HUB_DOWNLOAD_TIMEOUT", "7"),
            ("HF_HUB_DISABLE_SYMLINKS", "ON"),
            ("HF_TOKEN", "hf_x"),
        ])
        .unwrap();
        assert_eq!((set.endpoint.as_str(), set.silence.as_secs()), ("https://mirror.example", 7));
        assert!(set.copies && set.token.is_some() && set.cache.ends_with("f/hub"));
    }

    #[test]
    fn an_endpoint_is_an_address_without_a_password() {
        for wrong in ["huggingface.co", "ftp://x", "https://user:secret@x", "https://x/?a=b", ""] {
            let found = settings(&[("HOME", "/h"), ("HF_ENDPOINT", wrong)]);
            match wrong {
                "" => assert_eq!(found.unwrap().endpoint, ENDPOINT),
                _ => assert!(!found.unwrap_err().to_string().contains("secret"), "{wrong}"),
            }
        }
    }

    #[test]
    fn the_first_variable_that_is_set_says_whether_there_is_a_network() {
        let offline = |set: &[(&str, &str)]| {
            offline_by_variables(|name| set.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).into()))
        };
        assert_eq!(offline(&[("HF_HUB_OFFLINE", "1")]), Some("HF_HUB_OFFLINE"));
        assert_eq!(offline(&[("TRANSFORMERS_OFFLINE", "yes")]), Some("TRANSFORMERS_OFFLINE"));
        assert_eq!(offline(&[("HF_HUB_OFFLINE", "0"), ("TRANSFORMERS_OFFLINE", "1")]), None);
        assert_eq!(offline(&[("HF_HUB_OFFLINE", ""), ("TRANSFORMERS_OFFLINE", "true")]), Some("TRANSFORMERS_OFFLINE"));
        assert_eq!(offline(&[]), None);
    }
}
