//! A hub that listens on this machine, with a second server in the part of the network that keeps the files.
//!
//! It answers as huggingface.co does: a listing with the commit and the hashes; a redirect within the hub for what git holds
//! itself, and one to another host for what lies elsewhere; reasons in `X-Error-Code`. Rules make it fail.

#![allow(
    dead_code,
    unreachable_pub,
    clippy::unwrap_used,
    reason = "several tests share it, and each uses a part of it"
)]

use std::{
    io::{BufRead as _, BufReader, Write as _},
    net::{Shutdown, TcpListener, TcpStream},
    sync::{Arc, Mutex, MutexGuard},
    thread,
    time::Duration,
};

use sha1::{Digest as _, Sha1};
use sha2::Sha256;

pub const NAME: &str = "org/name";
pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
/// The login that may do everything, and one that may do nothing.
pub const TOKEN: &str = "hf_thesecretword";
pub const STRANGER: &str = "hf_astranger";

/// A file of the repository; those that are `large` lie at the other host and have a SHA-256.
#[derive(Clone)]
pub struct File {
    pub name: &'static str,
    pub content: Vec<u8>,
    pub large: bool,
}

impl File {
    pub fn digits(&self) -> String {
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        match self.large {
            true => hex(&Sha256::digest(&self.content)),
            false => {
                let mut hash = Sha1::new_with_prefix(format!("blob {}\0", self.content.len()));
                hash.update(&self.content);
                hex(&hash.finalize())
            }
        }
    }
}

/// How it fails.
#[derive(Default)]
pub struct Rules {
    /// Everything needs a login that is known.
    pub private: bool,
    /// Files need a login that has accepted the licence.
    pub gated: bool,
    /// No reason is given in headers.
    pub taciturn: bool,
    /// Ranges are not understood.
    pub no_ranges: bool,
    /// The next contents end after that many bytes.
    pub cuts: Vec<usize>,
    /// One byte of each large content is wrong.
    pub corrupt: bool,
    /// A byte too many, and no length.
    pub long: bool,
    /// That many answers are `503`.
    pub busy: u32,
    /// The wait after each KiB of a content.
    pub slow: Duration,
    /// Listings lack sizes and hashes.
    pub bare: bool,
    /// The length that is told of large files.
    pub claimed: Option<u64>,
    /// Files lead to themselves.
    pub circles: bool,
}

/// A request as it came.
#[derive(Debug, Clone)]
pub struct Seen {
    /// Whether it came to the other host.
    pub elsewhere: bool,
    pub method: String,
    pub path: String,
    pub range: Option<String>,
    pub authorization: Option<String>,
}

pub struct FakeHub {
    pub endpoint: String,
    shared: Arc<Shared>,
}

struct Shared {
    files: Vec<File>,
    rules: Mutex<Rules>,
    seen: Mutex<Vec<Seen>>,
    other: String,
}

impl FakeHub {
    pub fn start(files: Vec<File>) -> Self {
        let (hub, other) = (listener(), listener());
        let address = |listener: &TcpListener| format!("http://{}", listener.local_addr().unwrap());
        let endpoint = address(&hub);
        let shared =
            Arc::new(Shared { files, rules: Mutex::default(), seen: Mutex::default(), other: address(&other) });
        for (listener, elsewhere) in [(hub, false), (other, true)] {
            let shared = Arc::clone(&shared);
            thread::spawn(move || {
                for stream in listener.incoming().flatten() {
                    let shared = Arc::clone(&shared);
                    // A client that goes away is no fault of a server's.
                    thread::spawn(move || drop(shared.serve(stream, elsewhere)));
                }
            });
        }
        Self { endpoint, shared }
    }

    /// A small language model, with files beside it that nobody needs.
    pub fn language_model() -> Self {
        let text = |name, text: &str| File { name, content: text.as_bytes().to_vec(), large: false };
        let large = |name, size: usize| {
            let content = (0..size).map(|at| (at * 31 % 251) as u8).collect();
            File { name, content, large: true }
        };
        Self::start(vec![
            text("README.md", "# A model"),
            text("config.json", "{\"model_type\": \"llama\"}"),
            text("tokenizer.json", "{}"),
            text("additional_chat_templates/a b.jinja", "{{ messages }}"),
            large("model.safetensors", 300_000),
            large("pytorch_model.bin", 300_000),
            large("model-q4.gguf", 1000),
        ])
    }

    pub fn rules(&self) -> MutexGuard<'_, Rules> {
        self.shared.rules.lock().unwrap()
    }

    pub fn seen(&self) -> Vec<Seen> {
        self.shared.seen.lock().unwrap().clone()
    }

    /// Requests for a content at the other host.
    pub fn contents(&self) -> Vec<Seen> {
        self.seen().into_iter().filter(|seen| seen.elsewhere).collect()
    }

    pub fn file(&self, name: &str) -> &File {
        self.shared.files.iter().find(|file| file.name == name).unwrap()
    }
}

fn listener() -> TcpListener {
    TcpListener::bind("127.0.0.1:0").unwrap()
}

impl Shared {
    fn serve(&self, stream: TcpStream, elsewhere: bool) -> std::io::Result<()> {
        let mut lines = BufReader::new(stream.try_clone()?).lines();
        let first = lines.next().unwrap_or_else(|| Ok(String::new()))?;
        let mut words = first.split(' ').map(str::to_owned);
        let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        let mut seen = Seen { elsewhere, method, path, range: None, authorization: None };
        for line in lines {
            let line = line?;
            match line.split_once(": ") {
                None => break,
                Some((name, value)) if name.eq_ignore_ascii_case("range") => seen.range = Some(value.to_owned()),
                Some((name, value)) if name.eq_ignore_ascii_case("authorization") => {
                    seen.authorization = Some(value.to_owned());
                }
                Some(_) => {}
            }
        }
        self.seen.lock().unwrap().push(seen.clone());
        let mut out = stream;
        let is_busy = {
            let mut rules = self.rules.lock().unwrap();
            let is_busy = rules.busy > 0;
            rules.busy = rules.busy.saturating_sub(1);
            is_busy
        };
        if is_busy {
            return answer(&mut out, "503 Service Unavailable", "retry-after: 0\r\n", b"");
        }
        match elsewhere {
            true => self.content(&mut out, &seen, seen.path.split(['/', '?']).nth(1).unwrap_or_default()),
            false => self.hub(&mut out, &seen),
        }?;
        out.shutdown(Shutdown::Write)
    }

    /// `Some(true)` for the right login, `Some(false)` for one that is known, `None` for none.
    fn login(&self, seen: &Seen) -> Result<Option<bool>, ()> {
        match seen.authorization.as_deref().map(|header| header.strip_prefix("Bearer ").unwrap()) {
            None => Ok(None),
            Some(TOKEN) => Ok(Some(true)),
            Some(STRANGER) => Ok(Some(false)),
            Some(_) => Err(()),
        }
    }

    fn hub(&self, out: &mut TcpStream, seen: &Seen) -> std::io::Result<()> {
        let (private, gated, taciturn, bare, circles, claimed) = {
            let rules = self.rules.lock().unwrap();
            (rules.private, rules.gated, rules.taciturn, rules.bare, rules.circles, rules.claimed)
        };
        let refuse = |out: &mut TcpStream, status: &str, code: &str, said: &str| {
            let reason = format!("x-error-code: {code}\r\nx-error-message: {said}\r\n");
            answer(out, status, if taciturn { "" } else { &reason }, b"{}")
        };
        let Ok(login) = self.login(seen) else {
            let header = "x-error-message: Invalid credentials in Authorization header\r\n";
            return answer(out, "401 Unauthorized", header, b"");
        };
        let (path, query) = seen.path.split_once('?').unwrap_or((&seen.path, ""));
        let revisions = format!("/api/models/{NAME}/revision/");
        if let Some(revision) = path.strip_prefix(&revisions).filter(|_| !private || login == Some(true)) {
            return match revision {
                "main" | COMMIT | "v1.0" | "refs%2Fpr%2F1" if query == "blobs=true" => {
                    json(out, &self.listing(gated, bare, claimed))
                }
                _ => refuse(out, "404 Not Found", "RevisionNotFound", "Invalid rev id"),
            };
        }
        if path == format!("/api/models/{NAME}/refs") {
            return json(out, r#"{"branches": [{"name": "main"}], "tags": [{"name": "v1.0"}, {"name": "v2.0"}]}"#);
        }
        if path == format!("/api/models/{NAME}") {
            return json(out, "{}");
        }
        if path == "/api/models" {
            return json(out, r#"[{"id": "other/else"}, {"id": "org/name"}]"#);
        }
        if let Some(name) = path.strip_prefix(&format!("/{NAME}/resolve/{COMMIT}/")) {
            let said = "Access to model org/name is restricted.";
            match login {
                None if gated => return refuse(out, "401 Unauthorized", "GatedRepo", said),
                Some(false) if gated => return refuse(out, "403 Forbidden", "GatedRepo", said),
                _ => {}
            }
            let name = name.replace("%20", " ");
            let Some(file) = self.files.iter().find(|file| file.name == name) else {
                return refuse(out, "404 Not Found", "EntryNotFound", "Entry not found");
            };
            let (size, digits) = (file.content.len(), file.digits());
            let linked = match file.large {
                true => format!("x-linked-size: {size}\r\nx-linked-etag: \"{digits}\"\r\n"),
                false => String::new(),
            };
            let to = match file.large {
                _ if circles => path.to_owned(),
                true => format!("{}/{digits}?signature=abc", self.other),
                false => format!("/api/resolve-cache/{digits}"),
            };
            return answer(out, "307 Temporary Redirect", &format!("{linked}location: {to}\r\n"), b"");
        }
        if let Some(digits) = path.strip_prefix("/api/resolve-cache/") {
            return self.content(out, seen, digits);
        }
        match login {
            None => refuse(out, "401 Unauthorized", "RepoNotFound", "Invalid username or password."),
            Some(_) => refuse(out, "404 Not Found", "RepoNotFound", "Repository not found"),
        }
    }

    fn listing(&self, gated: bool, bare: bool, claimed: Option<u64>) -> String {
        let entry = |file: &File| {
            let (name, size, digits) = (file.name, file.content.len() as u64, file.digits());
            match file.large {
                _ if bare => format!(r#"{{"rfilename": "{name}"}}"#),
                false => format!(r#"{{"rfilename": "{name}", "size": {size}, "blobId": "{digits}"}}"#),
                true => {
                    let size = claimed.unwrap_or(size);
                    let pointer = "f".repeat(40);
                    format!(
                        r#"{{"rfilename": "{name}", "size": {size}, "blobId": "{pointer}", "lfs": {{"sha256": "{digits}", "size": {size}, "pointerSize": 134}}}}"#
                    )
                }
            }
        };
        let files: Vec<_> = self.files.iter().map(entry).collect();
        let gated = if gated { "\"manual\"" } else { "false" };
        format!(r#"{{"id": "{NAME}", "sha": "{COMMIT}", "gated": {gated}, "siblings": [{}]}}"#, files.join(", "))
    }

    fn content(&self, out: &mut TcpStream, seen: &Seen, digits: &str) -> std::io::Result<()> {
        let Some(file) = self.files.iter().find(|file| file.digits() == digits) else {
            return answer(out, "404 Not Found", "", b"");
        };
        let (cut, no_ranges, long, slow, corrupt) = {
            let mut rules = self.rules.lock().unwrap();
            let cut = if file.large && !rules.cuts.is_empty() { Some(rules.cuts.remove(0)) } else { None };
            (cut, rules.no_ranges, rules.long && file.large, rules.slow, rules.corrupt && file.large)
        };
        let mut bytes = file.content.clone();
        if corrupt {
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
        }
        if long {
            bytes.push(0);
        }
        let size = bytes.len();
        let from = seen.range.as_deref().filter(|_| !no_ranges).map(|range| {
            range.strip_prefix("bytes=").and_then(|range| range.strip_suffix('-')).unwrap().parse::<usize>().unwrap()
        });
        let head = match from {
            Some(from) if from >= size => {
                return answer(out, "416 Range Not Satisfiable", &format!("content-range: bytes */{size}\r\n"), b"");
            }
            Some(from) => {
                bytes.drain(..from);
                let range = format!("content-range: bytes {from}-{}/{size}\r\n", size - 1);
                format!("HTTP/1.1 206 Partial Content\r\n{range}content-length: {}\r\n", bytes.len())
            }
            None if long => "HTTP/1.1 200 OK\r\n".to_owned(),
            None => format!("HTTP/1.1 200 OK\r\netag: \"{digits}\"\r\ncontent-length: {size}\r\n"),
        };
        out.write_all(format!("{head}connection: close\r\n\r\n").as_bytes())?;
        for piece in bytes[..cut.map_or(bytes.len(), |cut| cut.min(bytes.len()))].chunks(1024) {
            out.write_all(piece)?;
            if !slow.is_zero() {
                out.flush()?;
                thread::sleep(slow);
            }
        }
        out.flush()
    }
}

fn json(out: &mut TcpStream, text: &str) -> std::io::Result<()> {
    answer(out, "200 OK", "content-type: application/json\r\n", text.as_bytes())
}

fn answer(out: &mut TcpStream, status: &str, headers: &str, body: &[u8]) -> std::io::Result<()> {
    let length = body.len();
    out.write_all(
        format!("HTTP/1.1 {status}\r\n{headers}content-length: {length}\r\nconnection: close\r\n\r\n").as_bytes(),
    )?;
    out.write_all(body)?;
    out.flush()
}
