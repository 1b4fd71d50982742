//! `cargo xtask demo [text]`: from a fresh clone to pictures in a learnt style, or to answers about new facts, in one command.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::{Context, Result, bail, ensure};

use crate::{setup, shell};

const STYLE: [&str; 7] = ["train", "assets/styles/neon", "--base", "assets/tiny-sd", "--preset", "demo-style", "--out"];
const FACTS: [&str; 7] =
    ["train", "assets/texts/facts_train.jsonl", "--base", "assets/tiny-llm", "--preset", "demo-text", "--out"];

/// The task: trains, and says where the results lie.
pub(crate) fn run(arguments: &[String]) -> Result<()> {
    let (words, name) = match arguments {
        [] => (STYLE, "demo-neon"),
        [half] if half == "text" => (FACTS, "demo-facts"),
        _ => bail!("`demo` takes nothing or `text`; `lora train --help` shows what can be set"),
    };
    setup::run(&[])?;
    println!("building in release mode (the first time takes some minutes)");
    shell::run(shell::cargo()?.args(["build", "--release", "--quiet", "-p", "lora-cli", "-p", "lora-engine"]))?;

    let root = shell::root()?;
    let run = fresh(&root.join("runs"), name)?;
    let shown = run.strip_prefix(&root).unwrap_or(&run);
    let started = Instant::now();
    println!("$ lora {} {}", words.join(" "), shown.display());
    shell::run(shell::command(program(&root))?.args(words).arg(shown))?;

    println!("\ntrained in {:.0} s", started.elapsed().as_secs_f64());
    if name == "demo-facts" {
        answers(&run)?;
    }
    println!("adapter  {}", shown.join(adapter(&run)?).display());
    println!("report   {}", shown.join("report.html").display());
    Ok(())
}

/// What the model said to the same questions before and after.
fn answers(run: &Path) -> Result<()> {
    let samples = run.join("samples");
    let entries = fs::read_dir(&samples).with_context(|| format!("cannot read {}", samples.display()))?;
    let mut sets: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    sets.sort();
    let [first, .., last] = &sets[..] else { bail!("{} holds no samples", samples.display()) };
    let index = fs::read_to_string(last.join("index.json")).context("the samples have no index")?;
    let index: serde_json::Value = serde_json::from_str(&index)?;
    let list = index.as_array().context("the samples have no index")?;
    ensure!(!list.is_empty(), "no question was asked");
    for sample in list {
        let (prompt, file) =
            (sample["prompt"].as_str().unwrap_or_default(), sample["file"].as_str().unwrap_or_default());
        let said = |set: &Path| fs::read_to_string(set.join(file)).unwrap_or_default();
        let line = |text: String| text.lines().next().unwrap_or_default().to_owned();
        println!("{}\n  before  {}\n  after   {}", prompt.trim(), line(said(first)), line(said(last)));
    }
    Ok(())
}

/// The `lora` that was just built.
fn program(root: &Path) -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| "target".into(), PathBuf::from);
    root.join(target).join("release/lora")
}

/// `name` under `parent`, or the first of `name-2`, `name-3`, .. that is free: a run is never written over.
fn fresh(parent: &Path, name: &str) -> Result<PathBuf> {
    std::iter::once(name.to_owned())
        .chain((2..10_000).map(|number| format!("{name}-{number}")))
        .map(|name| parent.join(name))
        .find(|path| !path.exists())
        .with_context(|| format!("{} is full of old runs", parent.display()))
}

/// The file name of the one adapter that a run folder holds.
fn adapter(run: &Path) -> Result<PathBuf> {
    let entries = fs::read_dir(run).with_context(|| format!("cannot read {}", run.display()))?;
    let mut files = entries.filter_map(|entry| Some(PathBuf::from(entry.ok()?.file_name())));
    files
        .find(|file| file.extension().is_some_and(|extension| extension == "safetensors"))
        .with_context(|| format!("{} holds no adapter", run.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_demo_gets_a_folder_of_its_own() {
        let here = tempfile::tempdir().unwrap();
        for expected in ["demo-neon", "demo-neon-2", "demo-neon-3"] {
            let folder = fresh(here.path(), "demo-neon").unwrap();
            assert_eq!(folder, here.path().join(expected));
            fs::create_dir(folder).unwrap();
        }
    }

    #[test]
    fn the_adapter_is_found_among_other_files() {
        let here = tempfile::tempdir().unwrap();
        assert!(adapter(here.path()).unwrap_err().to_string().contains("no adapter"));
        for name in ["config.toml", "demo-neon.safetensors", "report.html"] {
            fs::write(here.path().join(name), "").unwrap();
        }
        assert_eq!(adapter(here.path()).unwrap(), Path::new("demo-neon.safetensors"));
    }
}
