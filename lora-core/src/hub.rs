//! Models by name, `org/name` or `org/name@revision`, out of the local cache of Hugging Face.
//!
//! ```text
//! $HF_HUB_CACHE | $HF_HOME/hub | ~/.cache/huggingface/hub
//!   models--org--name/refs/main            the hash of the revision `main`
//!   models--org--name/snapshots/<hash>/    its files, links into the store
//! ```
//!
//! Only `refs` and `snapshots` are read: the store behind them has changed its layout before (`huggingface_hub` 2). Nothing
//! is downloaded here: that is the crate `lora-hub`, which `lora pull` calls.

use std::{
    env,
    ffi::OsString,
    fmt, fs,
    path::{Path, PathBuf},
};

/// What a name says: an organisation, a model, and a revision if one is wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelName {
    /// `org/name`.
    pub repository: String,
    /// A branch, a tag or a hash.
    pub revision: Option<String>,
}

/// Why a name leads nowhere.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The model is not in the cache.
    #[error("{repository}: not in the cache {}", cache.display())]
    NotCached {
        /// `org/name`.
        repository: String,
        /// The cache.
        cache: PathBuf,
    },
    /// The model is there, but not in this revision.
    #[error("{repository}: no revision `{revision}` in the cache, only {known}")]
    NoRevision {
        /// `org/name`.
        repository: String,
        /// The wanted revision.
        revision: String,
        /// The revisions that there are.
        known: String,
    },
    /// There is no place for a cache.
    #[error("no cache of models: neither HF_HOME nor HOME is set")]
    NoCache,
}

impl Error {
    /// What to do about it, where there is something.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Self::NotCached { repository, .. } => {
                format!("`lora pull {repository}` fetches it; a folder of the same name is given as ./{repository}")
            }
            Self::NoRevision { repository, revision, .. } => format!("`lora pull {repository}@{revision}` fetches it"),
            Self::NoCache => "give the model's folder".to_owned(),
        })
    }
}

impl ModelName {
    /// Reads `org/name`, `org/name@revision` and `hf://org/name`; `None` for anything else, such as a path.
    pub fn parse(text: &str) -> Option<Self> {
        let text = text.strip_prefix("hf://").unwrap_or(text);
        let (repository, revision) = match text.split_once('@') {
            Some((repository, revision)) => (repository, Some(revision)),
            None => (text, None),
        };
        let (organisation, name) = repository.split_once('/')?;
        let plain = |part: &str| {
            !part.is_empty()
                && !part.starts_with(['.', '-'])
                && !part.ends_with(['.', '-'])
                && !part.contains("--")
                && !part.contains("..")
                && part.chars().all(|letter| letter.is_ascii_alphanumeric() || "-_.".contains(letter))
        };
        let revision = revision.map(str::to_owned);
        let sound = |revision: &String| {
            !revision.is_empty() && !revision.contains("..") && !revision.starts_with('/') && !revision.contains('\\')
        };
        (plain(organisation) && plain(name) && revision.as_ref().is_none_or(sound))
            .then(|| Self { repository: repository.to_owned(), revision })
    }

    /// The name of the folder in a cache that holds every revision: `models--org--name`.
    pub fn folder(&self) -> String {
        format!("models--{}", self.repository.replace('/', "--"))
    }

    /// The folder of the model in a cache.
    ///
    /// # Errors
    /// When the cache does not have it.
    pub fn find(&self, cache: &Path) -> Result<PathBuf, Error> {
        let root = cache.join(self.folder());
        let snapshots = root.join("snapshots");
        let known = names(&snapshots);
        if known.is_empty() {
            return Err(Error::NotCached { repository: self.repository.clone(), cache: cache.to_owned() });
        }
        let revision = self.revision.as_deref().unwrap_or("main");
        let hash = fs::read_to_string(root.join("refs").join(revision)).map(|hash| hash.trim().to_owned()).ok();
        let long = |name: &&String| revision.len() >= 7 && name.starts_with(revision);
        let found = known.iter().find(|name| hash.as_deref() == Some(name)).or(known.iter().find(long));
        // A model that was fetched by hash has no `main`; if there is but one, it is meant.
        let only = known.first().filter(|_| self.revision.is_none() && known.len() == 1);
        match found.or(only) {
            Some(name) => Ok(snapshots.join(name)),
            None => Err(Error::NoRevision {
                repository: self.repository.clone(),
                revision: revision.to_owned(),
                known: known.join(", "),
            }),
        }
    }
}

/// As it is typed: `org/name` or `org/name@revision`.
impl fmt::Display for ModelName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.repository)?;
        self.revision.iter().try_for_each(|revision| write!(f, "@{revision}"))
    }
}

/// Where the files of a base are: the path itself, or if there is none and it reads as a name, its folder in the cache.
///
/// # Errors
/// When a name leads nowhere.
pub fn locate(base: &str) -> Result<PathBuf, Error> {
    let path = Path::new(base);
    match ModelName::parse(base) {
        Some(name) if !path.exists() => name.find(&cache()?),
        _ => Ok(path.to_owned()),
    }
}

/// The cache that the environment names.
///
/// # Errors
/// When it names none and there is no home.
pub fn cache() -> Result<PathBuf, Error> {
    cache_of(|name| env::var_os(name)).ok_or(Error::NoCache)
}

/// The cache by variables, as `huggingface_hub` finds it; an empty variable is none.
pub fn cache_of(variable: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    let set = |name| path_of(&variable, name);
    set("HF_HUB_CACHE")
        .or_else(|| set("HUGGINGFACE_HUB_CACHE"))
        .or_else(|| home_of(&variable).map(|home| home.join("hub")))
}

/// The folder that holds the cache and the token, by variables: `$HF_HOME`, else `huggingface` in the user's cache.
pub fn home_of(variable: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    let set = |name| path_of(&variable, name);
    let user = || set("XDG_CACHE_HOME").or_else(|| set("HOME").map(|home| home.join(".cache")));
    set("HF_HOME").or_else(|| user().map(|cache| cache.join("huggingface")))
}

fn path_of(variable: &impl Fn(&str) -> Option<OsString>, name: &str) -> Option<PathBuf> {
    variable(name).filter(|value| !value.is_empty()).map(PathBuf::from)
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_told_from_paths() {
        let name = |repository: &str, revision: Option<&str>| {
            Some(ModelName { repository: repository.to_owned(), revision: revision.map(str::to_owned) })
        };
        assert_eq!(ModelName::parse("Qwen/Qwen3-0.6B"), name("Qwen/Qwen3-0.6B", None));
        assert_eq!(ModelName::parse("hf://a/b@v1.0"), name("a/b", Some("v1.0")));
        assert_eq!(ModelName::parse("a/b@refs/pr/3"), name("a/b", Some("refs/pr/3")));
        assert_eq!(ModelName::parse("hf://a/b@v1.0").unwrap().to_string(), "a/b@v1.0");
        for path in ["./a/b", "/a/b", "a", "a/b/c", "../a", "a/..", "a/b@../c", "a/b@", "a b/c", "a/b@/etc"] {
            assert_eq!(ModelName::parse(path), None, "{path}");
        }
    }

    #[test]
    fn a_model_is_found_by_branch_by_hash_and_alone() {
        let cache = tempfile::tempdir().unwrap();
        let root = cache.path().join("models--a--b");
        let hash = "0123456789abcdef";
        fs::create_dir_all(root.join("snapshots").join(hash)).unwrap();
        let find = |text: &str| ModelName::parse(text).unwrap().find(cache.path());
        assert!(find("a/b").unwrap().ends_with(hash), "the only one is meant");
        fs::create_dir_all(root.join("snapshots/fedcba9876543210")).unwrap();
        assert!(matches!(find("a/b"), Err(Error::NoRevision { .. })));
        fs::create_dir_all(root.join("refs")).unwrap();
        fs::write(root.join("refs/main"), hash).unwrap();
        assert!(find("a/b").unwrap().ends_with(hash));
        assert!(find("a/b@fedcba9").unwrap().ends_with("fedcba9876543210"));
        let error = find("a/b@v2").unwrap_err();
        assert!(error.to_string().ends_with("only 0123456789abcdef, fedcba9876543210") && error.hint().is_some());
        assert!(matches!(find("a/c"), Err(Error::NotCached { .. })));
    }

    #[test]
    fn variables_are_those_of_huggingface_hub() {
        let cache = |set: &[(&str, &str)]| {
            cache_of(|name| set.iter().find(|(known, _)| *known == name).map(|(_, path)| path.into()))
        };
        let home = ("HOME", "/h");
        assert_eq!(cache(&[home]), Some("/h/.cache/huggingface/hub".into()));
        assert_eq!(cache(&[home, ("XDG_CACHE_HOME", "/x")]), Some("/x/huggingface/hub".into()));
        assert_eq!(cache(&[home, ("HF_HOME", "/f")]), Some("/f/hub".into()));
        assert_eq!(cache(&[home, ("HF_HOME", "/f"), ("HF_HUB_CACHE", "/c")]), Some("/c".into()));
        assert_eq!(cache(&[home, ("HF_HUB_CACHE", "")]), Some("/h/.cache/huggingface/hub".into()));
        assert_eq!(cache(&[]), None);
    }
}
