//! `cargo xtask parity FOLDER [CASE..]`: golden values of the peers, any folder laid out like our fixtures.
//!
//! The comparing is done by one small program per crate (`lora-diffusion/examples/parity`, `lora-llm/examples/parity`,
//! `lora-core/examples/parity_formats.rs`); this task looks at the folder and starts the right one. A line a case, with
//! the largest error beside its tolerance; ends with 1 if a case fails.

use std::{
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::{setup, shell};

/// What a folder of cases is about.
#[derive(Debug, PartialEq, Eq)]
enum Layout {
    /// Models, samplers, pictures, training: `fixtures/sd`.
    Diffusion,
    /// Adapter files: `fixtures/formats`.
    Formats,
    /// Tokenizers, chat templates, logits, training: `fixtures/llm`.
    Language,
}

/// The task.
pub(crate) fn run(arguments: &[String]) -> Result<ExitCode> {
    let Some((folder, cases)) = arguments.split_first() else { bail!("`parity` needs the folder of the cases") };
    // Cargo starts us in the root of the checkout only if the person was there.
    let folder = fs::canonicalize(folder).with_context(|| format!("cannot read {folder}"))?;
    let layout = layout(&folder)?;
    setup::run(&[])?;
    let mut program = shell::cargo()?;
    program.args(["run", "--quiet"]);
    match layout {
        Layout::Diffusion => program.args(["-p", "lora-diffusion", "--example", "parity", "--"]).arg(&folder),
        Layout::Formats => program.args(["-p", "lora-core", "--example", "parity_formats", "--"]).arg(&folder),
        Layout::Language => program.args(["-p", "lora-llm", "--example", "parity", "--"]).arg(&folder),
    };
    match layout {
        Layout::Diffusion => program.arg("--base").arg(base(&folder, "tiny-sd")?),
        Layout::Language => program.arg("--base").arg(base(&folder, "tiny-llm")?),
        Layout::Formats => &mut program,
    };
    let status = program.args(cases).status().context("cannot start cargo")?;
    Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The tiny base that some cases were made with: the one that lies with the fixtures, else ours.
fn base(folder: &Path, name: &str) -> Result<PathBuf> {
    let beside = folder.join("../../models").join(name);
    Ok(if beside.exists() { beside } else { shell::root()?.join("assets").join(name) })
}

/// Language models have one `parity.json`; the others are told apart by the first case of `index.json`: those of adapter
/// files name the base that the adapter belongs to.
fn layout(folder: &Path) -> Result<Layout> {
    if folder.join("parity.json").is_file() {
        return Ok(Layout::Language);
    }
    let index = folder.join("index.json");
    let text = fs::read_to_string(&index).with_context(|| format!("{} is no folder of cases", folder.display()))?;
    let cases: Value = serde_json::from_str(&text).with_context(|| format!("{} is not JSON", index.display()))?;
    let first = cases.get(0).with_context(|| format!("{} lists no cases", index.display()))?;
    Ok(if first.get("family").is_some() { Layout::Formats } else { Layout::Diffusion })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_known_by_its_index() {
        let here = tempfile::tempdir().unwrap();
        assert!(layout(here.path()).unwrap_err().to_string().contains("no folder of cases"));
        for (index, expected) in [
            (r#"[{"name": "vae", "what": ".."}]"#, Layout::Diffusion),
            (r#"[{"name": "lora", "family": "kohya", "base": "sd15"}]"#, Layout::Formats),
        ] {
            fs::write(here.path().join("index.json"), index).unwrap();
            assert_eq!(layout(here.path()).unwrap(), expected);
        }
        fs::write(here.path().join("index.json"), "[]").unwrap();
        assert!(layout(here.path()).is_err());
        fs::write(here.path().join("parity.json"), "{}").unwrap();
        assert_eq!(layout(here.path()).unwrap(), Layout::Language);
    }
}
