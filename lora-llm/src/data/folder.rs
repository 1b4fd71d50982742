//! A folder of texts in parts, as mlx-lm and the datasets library lay them: `train`, `valid`, `test`.

use std::path::{Path, PathBuf};

use super::{Error, Result};

/// The files of a folder, by what they are for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parts {
    /// What is trained on.
    pub train: PathBuf,
    /// What is validated with.
    pub validation: Option<PathBuf>,
    /// What is kept for the end.
    pub test: Option<PathBuf>,
}

/// What a part may be called.
const TRAIN: [&str; 1] = ["train"];
const VALIDATION: [&str; 3] = ["valid", "validation", "val"];
const TEST: [&str; 1] = ["test"];
/// How files of texts end.
const ENDINGS: [&str; 6] = ["jsonl", "json", "jsonl.gz", "jsonl.zst", "parquet", "txt"];

impl Parts {
    /// The parts of a folder; `None` for anything that is no folder with a `train` file.
    ///
    /// # Errors
    /// If two files could be meant by one part.
    pub fn find(folder: &Path) -> Result<Option<Self>> {
        let Some(train) = part(folder, &TRAIN)? else { return Ok(None) };
        Ok(Some(Self { train, validation: part(folder, &VALIDATION)?, test: part(folder, &TEST)? }))
    }

    /// What a model is measured with: the file itself, or of a folder the part that is furthest from training.
    ///
    /// # Errors
    /// As [`find`](Self::find), and if a folder has nothing but what was trained on.
    pub fn held_out(path: &Path) -> Result<PathBuf> {
        let Some(parts) = Self::find(path)? else { return Ok(path.to_owned()) };
        parts.test.or(parts.validation).ok_or(Error::NothingHeldOut { train: parts.train })
    }
}

fn part(folder: &Path, names: &[&str]) -> Result<Option<PathBuf>> {
    let files = names.iter().flat_map(|name| ENDINGS.iter().map(move |ending| format!("{name}.{ending}")));
    let mut there = files.map(|file| folder.join(file)).filter(|path| path.is_file());
    match (there.next(), there.next()) {
        (Some(first), Some(second)) => Err(Error::Ambiguous { first, second }),
        (first, _) => Ok(first),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_found_by_name_and_two_for_one_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let write = |name: &str| std::fs::write(path(name), "{}").unwrap();
        assert_eq!(Parts::find(folder.path()).unwrap(), None);
        write("train.jsonl");
        let parts = Parts::find(folder.path()).unwrap().unwrap();
        assert_eq!(parts, Parts { train: path("train.jsonl"), validation: None, test: None });
        assert!(matches!(Parts::held_out(folder.path()), Err(Error::NothingHeldOut { .. })));
        write("validation.json");
        assert_eq!(Parts::held_out(folder.path()).unwrap(), path("validation.json"));
        write("test.jsonl");
        assert_eq!(Parts::held_out(folder.path()).unwrap(), path("test.jsonl"));
        assert_eq!(Parts::held_out(&path("train.jsonl")).unwrap(), path("train.jsonl"));
        write("valid.jsonl");
        assert!(matches!(Parts::find(folder.path()), Err(Error::Ambiguous { .. })));
    }
}
