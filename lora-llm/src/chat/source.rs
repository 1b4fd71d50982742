//! Where a model folder keeps its chat templates.
//!
//! In the order of `transformers`: `chat_template.jinja` with `additional_chat_templates/NAME.jinja`; `chat_template.json`,
//! which processors had; `chat_template` in `tokenizer_config.json`, one text or a list of named ones.

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
};

use serde_json::Value as Json;

use super::{Error, Result};

/// The templates of a folder, by name, each with where it was found. The one without a name is called `default`.
pub(super) fn templates(folder: &Path) -> Result<BTreeMap<String, (String, String)>> {
    let mut found = BTreeMap::new();
    let path = folder.join("chat_template.jinja");
    if let Some(text) = read(&path)? {
        found.insert("default".to_owned(), (label(&path), text));
        for path in additional(&folder.join("additional_chat_templates"))? {
            let name = path.file_stem().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            if let Some(text) = read(&path)? {
                found.insert(name, (label(&path), text));
            }
        }
        return Ok(found);
    }
    for file in ["chat_template.json", "tokenizer_config.json"] {
        let path = folder.join(file);
        let Some(text) = read(&path)? else { continue };
        let json: Json = serde_json::from_str(&text)
            .map_err(|error| Error::Broken { path: path.clone(), reason: format!("not JSON: {error}") })?;
        match json.get("chat_template") {
            None | Some(Json::Null) => continue,
            Some(Json::String(text)) => {
                found.insert("default".to_owned(), (label(&path), text.clone()));
            }
            Some(Json::Array(named)) => {
                for entry in named {
                    let field = |key: &str| entry.get(key).and_then(Json::as_str);
                    let (Some(name), Some(text)) = (field("name"), field("template")) else {
                        let reason = "`chat_template` is a list, but not of `name` and `template`".to_owned();
                        return Err(Error::Broken { path, reason });
                    };
                    found.insert(name.to_owned(), (format!("{} ({name})", label(&path)), text.to_owned()));
                }
            }
            Some(_) => {
                let reason = "`chat_template` is neither a text nor a list".to_owned();
                return Err(Error::Broken { path, reason });
            }
        }
        return Ok(found);
    }
    Ok(found)
}

/// A file as text; `None` if there is none.
pub(super) fn read(path: &Path) -> Result<Option<String>> {
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(Error::Read { path: path.to_owned(), source }),
    };
    let broken = |_| Error::Broken { path: path.to_owned(), reason: "not UTF-8".to_owned() };
    String::from_utf8(bytes).map(|text| Some(universal(text))).map_err(broken)
}

/// Python opens a text file with all line ends turned into `\n`.
fn universal(text: String) -> String {
    if text.contains('\r') { text.replace("\r\n", "\n").replace('\r', "\n") } else { text }
}

fn additional(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => return Err(Error::Read { path: folder.to_owned(), source }),
    };
    let mut paths: Vec<PathBuf> = entries
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .filter(|path| path.extension().is_some_and(|extension| extension == "jinja"))
        .collect();
    paths.sort();
    Ok(paths)
}

fn label(path: &Path) -> String {
    path.file_name().map_or_else(|| path.display().to_string(), |name| name.to_string_lossy().into_owned())
}
