//! What neither rustfmt nor clippy says: every source file says what it is, and nothing ties the tree to one machine.

use std::{fs, path::Path};

use anyhow::{Context, Result, bail};

use crate::shell;

/// The whole tree as it would be cloned stays below this.
const MOST_BYTES: u64 = 50_000_000;
/// Examples are read in one sitting.
const MOST_EXAMPLE_LINES: usize = 100;
/// Spelled apart, so that this file passes its own check.
const MACHINE_PATHS: [&str; 3] = [concat!("/", "work/"), concat!("/", "root/"), concat!("/", "opt/")];
const UNFINISHED: [&str; 2] = [concat!("TO", "DO"), concat!("FIX", "ME")];
/// Files that people write; data and pictures are not read.
const TEXT: [&str; 6] = ["rs", "toml", "md", "py", "cpp", "h"];

/// Fails with one line for each fault.
pub(crate) fn check() -> Result<()> {
    let root = shell::root()?;
    let listed = shell::output(shell::command("git")?.args(["ls-files", "--cached", "--others", "--exclude-standard"]))
        .context("the list of files comes from git")?;
    let (mut faults, mut bytes, mut files) = (Vec::new(), 0, 0);
    for name in listed.lines() {
        let path = root.join(name);
        let Ok(metadata) = fs::symlink_metadata(&path) else { continue }; // deleted, not yet committed
        bytes += metadata.len();
        files += 1;
        if Path::new(name).extension().is_some_and(|extension| TEXT.iter().any(|text| extension == *text)) {
            let text = fs::read_to_string(&path).with_context(|| format!("{name} is no text"))?;
            faults.extend(faults_of(name, &text));
        }
    }
    if bytes > MOST_BYTES {
        faults.push(format!("the tree has {bytes} bytes; at most {MOST_BYTES} are meant to be cloned"));
    }
    if !faults.is_empty() {
        bail!("{} faults\n   {}", faults.len(), faults.join("\n   "));
    }
    println!("   {files} files, {:.1} MB", bytes as f64 / 1e6);
    Ok(())
}

/// What is wrong with one text file.
fn faults_of(name: &str, text: &str) -> Vec<String> {
    let mut faults = Vec::new();
    if name.ends_with(".rs") && !text.starts_with("//!") {
        faults.push(format!("{name}: does not open with `//!` and what it is"));
    }
    let lines = text.lines().count();
    let is_example = name.strip_prefix("examples/").is_some_and(|file| file.ends_with(".rs") && !file.contains('/'));
    if is_example && lines > MOST_EXAMPLE_LINES {
        faults.push(format!("{name}: {lines} lines; an example has at most {MOST_EXAMPLE_LINES}"));
    }
    for (number, line) in text.lines().enumerate() {
        for word in MACHINE_PATHS
            .iter()
            .filter(|path| names_a_path(line, path))
            .chain(UNFINISHED.iter().filter(|w| line.contains(**w)))
        {
            faults.push(format!("{name}:{}: `{word}`", number + 1));
        }
    }
    faults
}

/// Whether `line` has the absolute path `path`, and not a longer one that ends like it.
fn names_a_path(line: &str, path: &str) -> bool {
    line.match_indices(path).any(|(at, _)| {
        !line[..at]
            .ends_with(|before: char| before.is_alphanumeric() || matches!(before, '.' | '_' | '-' | '/' | '}' | ']'))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_are_found_where_they_are() {
        let text = format!("use std::fs;\nlet path = \"{}x\"; // {}\n", MACHINE_PATHS[0], UNFINISHED[0]);
        let faults = faults_of("lora-core/src/x.rs", &text);
        assert_eq!(faults.len(), 3, "{faults:?}");
        assert!(faults[1].starts_with("lora-core/src/x.rs:2"));
    }

    #[test]
    fn a_tidy_file_has_no_faults() {
        assert!(faults_of("a.rs", "//! What it is.\n\nconst URL: &str = \"https://host/root/x\";\n").is_empty());
    }

    #[test]
    fn long_examples_are_faults_and_long_modules_are_not() {
        let long = "//! Long.\n".repeat(MOST_EXAMPLE_LINES + 1);
        assert_eq!(faults_of("examples/x.rs", &long).len(), 1);
        assert!(faults_of("examples/tests/x.rs", &long).is_empty());
        assert!(faults_of("lora-core/src/x.rs", &long).is_empty());
    }
}
