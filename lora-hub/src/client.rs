//! One request to the hub: redirects by hand, and what a failure means.
//!
//! Redirects are followed here and not by the HTTP library, since the token may go to the hub itself and to nobody else,
//! however the hub redirects: files lie at other hosts, whose addresses carry a signature of their own.

use std::{io::Read, time::Duration};

use ureq::{
    Agent, Body,
    http::{Method, Request, Response, Uri},
    tls::{PemItem, RootCerts, TlsConfig, parse_pem},
};

use crate::{Error, Result, Settings, Token};

/// Redirects that are followed for one request.
const MOST_REDIRECTS: usize = 10;
/// The longest wait that a server may ask for.
const LONGEST_WAIT: Duration = Duration::from_secs(60);
/// Time for a connection to be made, TLS included.
const CONNECT: Duration = Duration::from_secs(20);

/// Asks the hub.
pub(crate) struct Client {
    agent: Agent,
    origin: Uri,
    token: Option<Token>,
}

/// An answer, of whatever status.
pub(crate) struct Answer {
    /// Who answered in the end.
    pub(crate) host: String,
    pub(crate) status: u16,
    response: Response<Body>,
}

/// Why there is no answer.
#[derive(Debug)]
pub(crate) struct NoAnswer {
    pub(crate) host: String,
    pub(crate) reason: String,
    /// Whether a second try may end otherwise.
    pub(crate) may_pass: bool,
}

impl Client {
    pub(crate) fn new(settings: &Settings) -> Result<Self> {
        let origin = settings.origin()?;
        let mut config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .accept_encoding("identity") // sizes, ranges and hashes are those of the plain bytes
            .user_agent(concat!("lora/", env!("CARGO_PKG_VERSION")))
            .timeout_resolve(Some(CONNECT))
            .timeout_connect(Some(CONNECT))
            .timeout_per_read(Some(settings.silence))
            .timeout_recv_response(Some(settings.silence))
            .tls_config(TlsConfig::builder().root_certs(certificates(settings)?).build());
        if origin.host().is_some_and(is_this_machine) {
            config = config.proxy(None);
        }
        Ok(Self { agent: config.build().new_agent(), origin, token: settings.token.clone() })
    }

    /// The hub's name, for messages.
    pub(crate) fn host(&self) -> String {
        host(&self.origin)
    }

    /// The login that is sent.
    pub(crate) fn token(&self) -> Option<&Token> {
        self.token.as_ref()
    }

    /// The address of a path on the hub: the segments are escaped, slashes inside them too.
    pub(crate) fn address<'a>(&self, segments: impl IntoIterator<Item = &'a str>) -> String {
        let base = self.origin.to_string();
        let path: String = segments.into_iter().map(|segment| format!("/{}", escaped(segment))).collect();
        format!("{}{path}", base.trim_end_matches('/'))
    }

    /// Asks for `address`, from the byte `from` on; redirects are followed.
    pub(crate) fn get(&self, address: &str, from: u64) -> Result<Answer, NoAnswer> {
        self.ask(&Method::GET, address, from, true)
    }

    /// Asks the hub alone for the headers of `address`.
    pub(crate) fn head(&self, address: &str) -> Result<Answer, NoAnswer> {
        self.ask(&Method::HEAD, address, 0, false)
    }

    fn ask(&self, method: &Method, address: &str, from: u64, follow: bool) -> Result<Answer, NoAnswer> {
        let lasting = |at: &Uri, reason: &str| NoAnswer { host: host(at), reason: reason.to_owned(), may_pass: false };
        let mut at: Uri = address.parse().map_err(|_| lasting(&self.origin, "the address cannot be read"))?;
        for _ in 0..=MOST_REDIRECTS {
            let mut request = Request::builder().method(method.clone()).uri(at.clone());
            if from > 0 {
                request = request.header("range", format!("bytes={from}-"));
            }
            if let Some(token) = self.token.as_ref().filter(|_| is_same_origin(&at, &self.origin)) {
                request = request.header("authorization", token.header());
            }
            let request = request.body(()).map_err(|_| lasting(&at, "the request cannot be formed"))?;
            let response = self.agent.run(request).map_err(|error| no_answer(&at, error))?;
            let location = response.headers().get("location").and_then(|to| to.to_str().ok());
            let next = match location.filter(|_| response.status().is_redirection()) {
                // For an old name of a model the hub names a path of its own.
                Some(to) if follow || to.starts_with('/') => to.to_owned(),
                _ => return Ok(Answer { host: host(&at), status: response.status().as_u16(), response }),
            };
            let to = resolve(&at, &next).ok_or_else(|| lasting(&at, "it redirects to something that is no address"))?;
            if at.scheme_str() == Some("https") && to.scheme_str() != Some("https") {
                return Err(lasting(&at, &format!("it redirects to {} without encryption", host(&to))));
            }
            at = to;
        }
        Err(lasting(&at, "it redirects in circles"))
    }
}

impl Answer {
    /// A header.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.response.headers().get(name)?.to_str().ok()
    }

    /// The bytes, read as they come.
    pub(crate) fn into_reader(self) -> impl Read {
        self.response.into_body().into_reader()
    }

    /// The whole of a short answer.
    pub(crate) fn text(mut self, most_bytes: u64) -> Result<String, NoAnswer> {
        let host = self.host.clone();
        self.response.body_mut().with_config().limit(most_bytes).read_to_string().map_err(|error| NoAnswer {
            host,
            reason: in_words(&error),
            may_pass: is_passing(&error),
        })
    }

    /// Whether a second try may end otherwise: the server is busy or broken.
    pub(crate) fn may_pass(&self) -> bool {
        matches!(self.status, 408 | 425 | 429 | 500 | 502 | 503 | 504)
    }

    /// How long the server asks to wait.
    pub(crate) fn wait(&self) -> Option<Duration> {
        let seconds = self.header("retry-after")?.trim().parse().ok()?;
        Some(Duration::from_secs(seconds).min(LONGEST_WAIT))
    }

    /// What the hub says is wrong, one line.
    pub(crate) fn said(&self) -> Option<String> {
        let said = self.header("x-error-message")?.trim();
        (!said.is_empty()).then(|| said.chars().take(300).collect())
    }
}

impl NoAnswer {
    pub(crate) fn into_error(self) -> Error {
        Error::Unreachable { host: self.host, reason: self.reason }
    }
}

/// What a refusal of `what` means; `gated` says whether the listing has told that a licence comes first.
pub(crate) fn refusal(client: &Client, answer: &Answer, repository: &str, gated: bool, what: &str) -> Error {
    let token = client.token().map(|token| token.source().clone());
    let host = answer.host.clone();
    // Only the hub knows about logins: a signed address of a file that is refused has run out.
    let is_hub = host == client.host();
    // Not every hub names its reason; then the listing has.
    let gated = gated || answer.header("x-error-code") == Some("GatedRepo");
    let said = answer.said();
    let owned = repository.to_owned();
    let page = client.address(repository.split('/'));
    match answer.status {
        401 | 403 if is_hub && gated => Error::Gated { repository: owned, page, token, said },
        401 if is_hub => match token {
            // A login that the hub knows gets 404 for what it may not see.
            Some(source_of_token) => Error::TokenRefused { host, page, source_of_token },
            None => Error::Login { host, page, repository: owned, suggestion: None },
        },
        403 if is_hub => Error::Forbidden { host, page, repository: owned, token, said },
        _ => Error::Status { host, what: what.to_owned(), status: answer.status, said },
    }
}

fn certificates(settings: &Settings) -> Result<RootCerts> {
    let Some(path) = &settings.certificates else { return Ok(RootCerts::WebPki) };
    let broken = |reason: String| Error::Certificates { path: path.clone(), reason };
    let text = std::fs::read(path).map_err(|error| broken(error.to_string()))?;
    let found: Vec<_> = parse_pem(&text)
        .filter_map(|item| match item {
            Ok(PemItem::Certificate(certificate)) => Some(certificate),
            _ => None,
        })
        .collect();
    match found.is_empty() {
        true => Err(broken("no certificate in PEM form is in it".to_owned())),
        false => Ok(RootCerts::from(found)),
    }
}

fn no_answer(at: &Uri, error: ureq::Error) -> NoAnswer {
    NoAnswer { host: host(at), reason: in_words(&error), may_pass: is_passing(&error) }
}

/// What a missing network looks like from here.
const NO_HOST: &str = "no host of that name is found; is there a network?";

/// An error of the HTTP library without its prefixes.
pub(crate) fn in_words(error: &ureq::Error) -> String {
    match error {
        ureq::Error::Io(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
            "the connection was closed early".to_owned()
        }
        ureq::Error::Io(error) => match error.to_string() {
            reason if reason.starts_with("failed to lookup address") => NO_HOST.to_owned(),
            reason => reason,
        },
        ureq::Error::Timeout(_) => "no answer in time".to_owned(),
        ureq::Error::HostNotFound => NO_HOST.to_owned(),
        ureq::Error::ConnectProxyFailed(reason) => format!("the proxy refuses: {reason}"),
        other => other.to_string(),
    }
}

/// Whether a second try may end otherwise.
fn is_passing(error: &ureq::Error) -> bool {
    use std::io::ErrorKind;
    match error {
        ureq::Error::Io(error) => !matches!(error.kind(), ErrorKind::InvalidData | ErrorKind::PermissionDenied),
        ureq::Error::Timeout(_) | ureq::Error::ConnectionFailed | ureq::Error::Protocol(_) => true,
        _ => false,
    }
}

/// `host` or `host:port`.
fn host(at: &Uri) -> String {
    at.authority().map_or_else(String::new, |authority| authority.as_str().to_owned())
}

fn is_this_machine(host: &str) -> bool {
    matches!(host, "localhost" | "127.0.0.1" | "[::1]")
}

fn is_same_origin(one: &Uri, other: &Uri) -> bool {
    let port = |uri: &Uri| uri.port_u16().or(if uri.scheme_str() == Some("https") { Some(443) } else { Some(80) });
    let host = |uri: &Uri| uri.host().map(str::to_ascii_lowercase);
    one.scheme_str() == other.scheme_str() && host(one) == host(other) && port(one) == port(other)
}

/// Where a `Location` leads (RFC 9110 §10.2.2, without its rarer forms).
fn resolve(at: &Uri, location: &str) -> Option<Uri> {
    let (scheme, authority) = (at.scheme_str()?, at.authority()?);
    let is_absolute = location.starts_with("http://") || location.starts_with("https://");
    let text = match location {
        _ if is_absolute => location.to_owned(),
        rest if rest.starts_with("//") => format!("{scheme}:{rest}"),
        rest if rest.starts_with('/') => format!("{scheme}://{authority}{rest}"),
        _ => return None,
    };
    // What follows `#` is for browsers.
    text.split('#').next()?.parse().ok()
}

/// A segment of a path (RFC 3986 §3.3), with its slashes escaped as well.
fn escaped(segment: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
    segment
        .bytes()
        .map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn uri(text: &str) -> Uri {
        text.parse().unwrap()
    }

    #[test]
    fn locations_are_resolved_against_where_they_came_from() {
        let at = uri("https://hub.example:8443/a/b?c=d");
        let resolved = |location| resolve(&at, location).map(|uri| uri.to_string());
        assert_eq!(resolved("/x/y?z").as_deref(), Some("https://hub.example:8443/x/y?z"));
        assert_eq!(resolved("//cdn.example/x").as_deref(), Some("https://cdn.example/x"));
        assert_eq!(resolved("http://cdn.example/x#part").as_deref(), Some("http://cdn.example/x"));
        assert_eq!(resolved("x/y"), None);
        assert_eq!(resolved("file:///etc/passwd"), None);
    }

    #[test]
    fn a_token_goes_to_the_same_scheme_host_and_port_only() {
        let hub = uri("https://hub.example");
        assert!(is_same_origin(&uri("https://HUB.example:443/x"), &hub));
        for other in
            ["http://hub.example/", "https://hub.example:444/", "https://cdn.hub.example/", "https://hub.exampl/"]
        {
            assert!(!is_same_origin(&uri(other), &hub), "{other}");
        }
    }

    #[test]
    fn segments_are_escaped_with_their_slashes() {
        assert_eq!(escaped("refs/pr/3"), "refs%2Fpr%2F3");
        assert_eq!(escaped("ein Bild ü?#%.txt"), "ein%20Bild%20%C3%BC%3F%23%25.txt");
    }
}
