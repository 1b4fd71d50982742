//! What a repository holds at a revision, as `GET /api/models/ORG/NAME/revision/REVISION?blobs=true` tells it.
//!
//! The answer comes from outside: names become paths and hashes become file names, so both are checked here, once.

use std::fmt;

use serde::Deserialize;

/// The files of a repository at a revision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listing {
    /// The commit that the revision stands for.
    pub commit: String,
    /// Whether a licence must be accepted before files are given out.
    pub gated: bool,
    /// The files, sorted by name; those whose names cannot be paths are left out.
    pub files: Vec<RemoteFile>,
}

/// A file of a repository.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RemoteFile {
    /// Its path in the repository: plain segments between slashes.
    pub name: String,
    /// Its length; `None` where the hub does not say, until it is asked for the file itself.
    pub size: Option<u64>,
    /// What its bytes are checked with, and its name among the blobs; `None` as for the size.
    pub hash: Option<Hash>,
}

/// What the bytes of a file must come to.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Hash {
    /// SHA-256 of the bytes, for files that git does not hold itself (LFS, Xet); 64 hexadecimal digits.
    Sha256(String),
    /// The identity of a git blob: SHA-1 of `blob LENGTH\0` and the bytes; 40 hexadecimal digits.
    Git(String),
}

impl Hash {
    /// An `ETag` or an identity from a listing, by its length: 64 digits or 40.
    pub fn parse(text: &str) -> Option<Self> {
        let text = text.trim().trim_start_matches("W/").trim_matches('"');
        let text = text.strip_prefix("sha256:").unwrap_or(text).to_ascii_lowercase();
        let is_hex = text.bytes().all(|byte| byte.is_ascii_hexdigit());
        match text.len() {
            64 if is_hex => Some(Self::Sha256(text)),
            40 if is_hex => Some(Self::Git(text)),
            _ => None,
        }
    }

    /// The digits, which are also the name of the blob in the cache.
    pub fn digits(&self) -> &str {
        match self {
            Self::Sha256(digits) | Self::Git(digits) => digits,
        }
    }
}

impl fmt::Display for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sha256(digits) => write!(f, "sha256 {digits}"),
            Self::Git(digits) => write!(f, "git blob {digits}"),
        }
    }
}

#[derive(Deserialize)]
struct Model {
    sha: Option<String>,
    #[serde(default)]
    gated: serde_json::Value,
    #[serde(default)]
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
    blob_id: Option<String>,
    lfs: Option<Lfs>,
}

#[derive(Deserialize)]
struct Lfs {
    #[serde(alias = "oid")]
    sha256: Option<String>,
    size: Option<u64>,
}

impl Listing {
    /// Reads the hub's answer.
    ///
    /// # Errors
    /// What is wrong with it, in words.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let model: Model = serde_json::from_str(text).map_err(|error| format!("it is no listing: {error}"))?;
        let commit = model.sha.filter(|sha| is_commit(sha)).ok_or("it names no commit")?;
        let mut files: Vec<_> = model.siblings.into_iter().filter_map(Sibling::into_file).collect();
        files.sort_unstable_by(|one, other| one.name.cmp(&other.name));
        files.dedup_by(|one, other| one.name == other.name);
        // `false`, `"auto"` or `"manual"`.
        let gated = !matches!(model.gated, serde_json::Value::Null | serde_json::Value::Bool(false));
        Ok(Self { commit, gated, files })
    }

    /// A file by name.
    pub fn file(&self, name: &str) -> Option<&RemoteFile> {
        self.files.binary_search_by(|file| file.name.as_str().cmp(name)).ok().and_then(|at| self.files.get(at))
    }
}

impl Sibling {
    fn into_file(self) -> Option<RemoteFile> {
        if !is_plain_path(&self.rfilename) {
            return None;
        }
        let (hash, size) = match self.lfs {
            Some(lfs) => (lfs.sha256, lfs.size.or(self.size)),
            None => (self.blob_id, self.size),
        };
        Some(RemoteFile { name: self.rfilename, size, hash: hash.as_deref().and_then(Hash::parse) })
    }
}

/// Whether a text is a full commit hash.
pub(crate) fn is_commit(text: &str) -> bool {
    matches!(text.len(), 40 | 64) && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// Whether a name from outside can be a path below a folder and nowhere else, on any system.
fn is_plain_path(name: &str) -> bool {
    let plain = |part: &str| {
        !part.is_empty()
            && part != "."
            && part != ".."
            && part.len() <= 255
            && !part.contains(|letter: char| letter.is_control() || "\\:*?\"<>|".contains(letter))
    };
    name.len() <= 1024 && name.split('/').all(plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHA: &str = "0123456789012345678901234567890123456789";

    #[test]
    fn sizes_and_hashes_are_those_of_the_content_not_of_the_pointer() {
        let sha256 = "ab".repeat(32);
        let text = format!(
            r#"{{"sha": "{SHA}", "gated": "manual", "other": 1, "siblings": [
                {{"rfilename": "model.safetensors", "size": 134, "blobId": "{SHA}", "lfs": {{"sha256": "{sha256}", "size": 9000000000, "pointerSize": 134}}}},
                {{"rfilename": "config.json", "size": 12, "blobId": "{SHA}"}},
                {{"rfilename": "plain.txt"}}]}}"#
        );
        let listing = Listing::parse(&text).unwrap();
        assert!(listing.gated && listing.commit == SHA);
        let file = |name| listing.file(name).unwrap();
        assert_eq!(file("model.safetensors").size, Some(9_000_000_000));
        assert_eq!(file("model.safetensors").hash, Some(Hash::Sha256(sha256)));
        assert_eq!(file("config.json").hash, Some(Hash::Git(SHA.to_owned())));
        assert_eq!((file("plain.txt").size, &file("plain.txt").hash), (None, &None));
        assert_eq!(listing.file("gone"), None);
    }

    #[test]
    fn names_that_lead_out_of_the_folder_are_left_out() {
        for name in ["../x", "/x", "a/../x", "a//b", "", "a\\\\b", "c:x", "a\\u0000", "a/", "./a"] {
            let text = format!(r#"{{"sha": "{SHA}", "siblings": [{{"rfilename": "{name}"}}]}}"#);
            assert_eq!(Listing::parse(&text).unwrap().files, [], "{name}");
        }
    }

    #[test]
    fn hashes_that_are_no_names_of_files_are_none() {
        for text in ["../../x", "", "zz", &"g".repeat(64), &"a".repeat(63)] {
            assert_eq!(Hash::parse(text), None, "{text}");
        }
        assert_eq!(Hash::parse(&format!("W/\"{SHA}\"")), Some(Hash::Git(SHA.to_owned())));
    }

    /// Every cut and every changed byte of a listing: what is still read has paths and hashes that stay in their folders.
    #[test]
    fn mangled_listings_are_refused_or_harmless() {
        let text = format!(
            r#"{{"sha":"{SHA}","gated":false,"siblings":[{{"rfilename":"a/b.json","size":12,"blobId":"{SHA}","lfs":{{"sha256":"{}","size":1}}}}]}}"#,
            "0".repeat(64)
        );
        let mut read = 0;
        let mut check = |text: &str| {
            if let Ok(listing) = Listing::parse(text) {
                read += 1;
                assert!(is_commit(&listing.commit), "{text}");
                for file in listing.files {
                    assert!(!file.name.split('/').any(|part| matches!(part, "" | "." | "..")), "{text}");
                    assert!(file.hash.is_none_or(|hash| matches!(hash.digits().len(), 40 | 64)), "{text}");
                }
            }
        };
        for at in 0..text.len() {
            check(&text[..at]);
            for byte in ["/", ".", "..", "\\", "\\u0000", "-1", "9e99", "\"", "null", "[", "é"] {
                check(&format!("{}{byte}{}", &text[..at], &text[at + 1..]));
                check(&format!("{}{byte}{}", &text[..at], &text[at..]));
            }
        }
        assert!(read > 100, "the test has tested something: {read}");
    }

    #[test]
    fn an_answer_without_a_commit_is_refused() {
        for text in ["", "[]", "<html>", r#"{"siblings": []}"#, r#"{"sha": "../../x"}"#, r#"{"sha": 3}"#] {
            Listing::parse(text).unwrap_err();
        }
    }
}
