//! The hub as a whole: what a repository holds, what of it will be fetched, fetching it.
//!
//! Files become blobs one after the other; the snapshot is made when all of them are there, and the ref last. So a model is
//! found in the cache when it is whole, and not before.

use std::{fmt, path::PathBuf, thread, time::Duration};

use lora_core::hub::ModelName;

use crate::{
    Error, Hash, Listing, RemoteFile, Result, Settings, Wanted,
    client::{Answer, Client, NoAnswer, refusal},
    listing::is_commit,
    select::{nearest, select},
    store::Store,
    transfer::{Patience, Transfer},
};

/// The longest listing that is read.
const MOST_LISTING: u64 = 64 << 20;
/// The longest answer to a question on the side.
const MOST_ASIDE: u64 = 4 << 20;
/// The branch that is meant where none is named.
const MAIN: &str = "main";

/// A hub, and the cache that its files go to.
pub struct Hub {
    client: Client,
    settings: Settings,
}

/// What will be fetched.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The model.
    pub name: ModelName,
    /// The commit that its revision stands for now.
    pub commit: String,
    /// The files, in the order in which they are fetched.
    pub files: Vec<Planned>,
    gated: bool,
    store: Store,
}

/// A file of a plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Planned {
    /// Its path in the repository.
    pub name: String,
    /// Its length.
    pub size: u64,
    /// What its bytes must come to.
    pub hash: Hash,
    /// Whether the cache has it.
    pub is_there: bool,
    /// Bytes that an earlier try has left.
    pub half: u64,
}

/// What was fetched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fetched {
    /// The folder of the model.
    pub path: PathBuf,
    /// Bytes that came over the network.
    pub bytes: u64,
}

/// What happens along the way.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// A file begins, with what an earlier try has left.
    File {
        /// The file.
        file: &'a Planned,
        /// Bytes that are there.
        have: u64,
    },
    /// Bytes of the file came.
    Bytes {
        /// How many.
        count: u64,
    },
    /// The file begins anew; these bytes do not count any more.
    Back {
        /// How many.
        bytes: u64,
    },
    /// Another program fetches the same file; this one waits for it.
    Waiting {
        /// The file.
        file: &'a Planned,
    },
    /// Something went wrong, and there will be another try.
    Retry {
        /// What was asked for.
        what: &'a str,
        /// What went wrong.
        reason: &'a str,
        /// The wait before the next try.
        wait: Duration,
    },
}

impl Plan {
    /// Bytes of all files.
    pub fn size(&self) -> u64 {
        self.files.iter().map(|file| file.size).fold(0, u64::saturating_add)
    }

    /// Bytes that are not in the cache yet.
    pub fn missing(&self) -> u64 {
        let missing = self.files.iter().filter(|file| !file.is_there);
        missing.map(|file| file.size.saturating_sub(file.half)).fold(0, u64::saturating_add)
    }

    /// The folder where the model will be.
    pub fn path(&self) -> PathBuf {
        self.store.snapshot(&self.commit)
    }
}

impl Hub {
    /// A hub by settings; nothing is asked yet.
    ///
    /// # Errors
    /// If the endpoint is no address or the certificates cannot be read.
    pub fn new(settings: Settings) -> Result<Self> {
        Ok(Self { client: Client::new(&settings)?, settings })
    }

    /// What the repository of a model holds.
    ///
    /// # Errors
    /// If the hub cannot be reached, does not know model or revision, or asks for a login.
    pub fn list(&self, name: &ModelName, on: &mut dyn FnMut(Event<'_>)) -> Result<Listing> {
        let revision = name.revision.as_deref().unwrap_or(MAIN);
        let address = self.client.address(self.api(name).chain(["revision", revision])) + "?blobs=true";
        let answer = self.patiently(&name.repository, on, || self.client.get(&address, 0))?;
        if answer.status != 200 {
            return Err(self.not_listed(name, revision, &answer));
        }
        let text = answer.text(MOST_LISTING).map_err(NoAnswer::into_error)?;
        Listing::parse(&text).map_err(|reason| Error::Answer { host: self.client.host(), reason })
    }

    /// What of a model would be fetched.
    ///
    /// # Errors
    /// As [`list`](Self::list), and if what is wanted is not there.
    pub fn plan(&self, name: &ModelName, wanted: &Wanted, on: &mut dyn FnMut(Event<'_>)) -> Result<Plan> {
        let listing = self.list(name, on)?;
        let store = Store::new(&self.settings.cache, name, self.settings.copies);
        let mut files = Vec::new();
        for file in select(&name.repository, &listing, wanted)? {
            let (size, hash) = match (file.size, &file.hash) {
                (Some(size), Some(hash)) => (size, hash.clone()),
                _ => self.ask_for(name, &listing, file, on)?,
            };
            let mut planned = Planned { name: file.name.clone(), size, hash, is_there: false, half: 0 };
            planned.is_there = store.has(&listing.commit, &planned);
            planned.half = store.half(&planned);
            files.push(planned);
        }
        Ok(Plan { name: name.clone(), commit: listing.commit, files, gated: listing.gated, store })
    }

    /// Fetches what a plan says and is not there yet.
    ///
    /// # Errors
    /// If a file does not come, or not as it should; what has come is kept, and the next call goes on from there.
    pub fn fetch(&self, plan: &Plan, on: &mut dyn FnMut(Event<'_>)) -> Result<Fetched> {
        let mut bytes = 0;
        for file in plan.files.iter().filter(|file| !file.is_there) {
            let transfer = Transfer {
                client: &self.client,
                store: &plan.store,
                patience: self.patience(),
                repository: &plan.name.repository,
                gated: plan.gated,
                address: self.address_of(&plan.name, &plan.commit, &file.name),
                file,
            };
            bytes += transfer.run(on)?;
        }
        for file in &plan.files {
            plan.store.link(&plan.commit, file)?;
        }
        plan.store.set_ref(plan.name.revision.as_deref().unwrap_or(MAIN), &plan.commit)?;
        Ok(Fetched { path: plan.path(), bytes })
    }

    fn patience(&self) -> Patience {
        Patience { retries: self.settings.retries, first_wait: self.settings.first_wait }
    }

    fn api<'a>(&self, name: &'a ModelName) -> impl Iterator<Item = &'a str> + use<'a> {
        ["api", "models"].into_iter().chain(name.repository.split('/'))
    }

    fn address_of(&self, name: &ModelName, commit: &str, file: &str) -> String {
        let repository = name.repository.split('/');
        self.client.address(repository.chain(["resolve", commit]).chain(file.split('/')))
    }

    /// Length and hash of a file from its own headers, for hubs whose listings leave them out.
    fn ask_for(
        &self,
        name: &ModelName,
        listing: &Listing,
        file: &RemoteFile,
        on: &mut dyn FnMut(Event<'_>),
    ) -> Result<(u64, Hash)> {
        let address = self.address_of(name, &listing.commit, &file.name);
        let answer = self.patiently(&file.name, on, || self.client.head(&address))?;
        if answer.status >= 400 {
            return Err(refusal(&self.client, &answer, &name.repository, listing.gated, &file.name));
        }
        let size = answer.header("x-linked-size").or_else(|| answer.header("content-length"));
        let hash = answer.header("x-linked-etag").or_else(|| answer.header("etag")).and_then(Hash::parse);
        match (size.and_then(|size| size.trim().parse().ok()), hash) {
            (Some(size), Some(hash)) => Ok((size, hash)),
            _ => Err(Error::Answer {
                host: self.client.host(),
                reason: format!("neither its listing nor its headers have length and hash of {}", file.name),
            }),
        }
    }

    /// Asks until there is an answer that will not change.
    fn patiently(
        &self,
        what: &str,
        on: &mut dyn FnMut(Event<'_>),
        ask: impl Fn() -> Result<Answer, NoAnswer>,
    ) -> Result<Answer> {
        let mut failures = 0;
        loop {
            let (reason, asked, error) = match ask() {
                Ok(answer) if answer.may_pass() => {
                    let reason = format!("status {} from {}", answer.status, answer.host);
                    let wait = answer.wait();
                    (reason, wait, refusal(&self.client, &answer, what, false, what))
                }
                Ok(answer) => return Ok(answer),
                Err(error) if error.may_pass => (error.reason.clone(), None, error.into_error()),
                Err(error) => return Err(error.into_error()),
            };
            failures += 1;
            let Some(wait) = self.patience().wait(failures, asked) else { return Err(error) };
            on(Event::Retry { what, reason: &reason, wait });
            thread::sleep(wait);
        }
    }

    fn not_listed(&self, name: &ModelName, revision: &str, answer: &Answer) -> Error {
        let (host, repository) = (self.client.host(), name.repository.clone());
        let is_revision = answer.header("x-error-code") == Some("RevisionNotFound");
        match answer.status {
            404 if is_revision || (name.revision.is_some() && self.knows(name)) => {
                let known = self.revisions(name);
                let suggestion = nearest(revision, known.iter().map(String::as_str));
                Error::NoRevision { repository, revision: revision.to_owned(), known, suggestion }
            }
            404 => Error::NoModel { host, suggestion: self.similar(name), repository },
            _ => match refusal(&self.client, answer, &name.repository, false, &name.repository) {
                Error::Login { host, page, repository, .. } => {
                    Error::Login { host, page, suggestion: self.similar(name), repository }
                }
                other => other,
            },
        }
    }

    /// An answer on the side, which no failure of makes anything worse.
    fn aside(&self, address: &str) -> Option<serde_json::Value> {
        let answer = self.client.get(address, 0).ok().filter(|answer| answer.status == 200)?;
        serde_json::from_str(&answer.text(MOST_ASIDE).ok()?).ok()
    }

    fn knows(&self, name: &ModelName) -> bool {
        self.aside(&self.client.address(self.api(name))).is_some()
    }

    /// Branches and tags.
    fn revisions(&self, name: &ModelName) -> Vec<String> {
        let Some(refs) = self.aside(&self.client.address(self.api(name).chain(["refs"]))) else { return Vec::new() };
        let lists = ["branches", "tags"].into_iter().filter_map(|list| refs[list].as_array());
        let mut names: Vec<String> =
            lists.flatten().filter_map(|entry| entry["name"].as_str().map(str::to_owned)).collect();
        names.retain(|name| !is_commit(name));
        names
    }

    /// A model of a similar name that the hub finds.
    fn similar(&self, name: &ModelName) -> Option<String> {
        let (_, short) = name.repository.split_once('/')?;
        let plain = short.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte));
        let address = self.client.address(["api", "models"]) + &format!("?search={short}&limit=50");
        let found = plain.then(|| self.aside(&address)).flatten()?;
        let names = found.as_array()?.iter().filter_map(|model| model["id"].as_str());
        nearest(&name.repository, names.filter(|found| ModelName::parse(found).is_some()))
    }
}

/// Without the login.
impl fmt::Debug for Hub {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hub").field("settings", &self.settings).finish_non_exhaustive()
    }
}
